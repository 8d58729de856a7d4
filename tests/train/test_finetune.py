"""`effdense train --recipe finetune`: schedule, average, validation, early end, weighted classes, published weights."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import effdense
from effdense import models
from effdense.train import loop, split
from effdense.train.learner import Learner, class_weights
from effdense.train.settings import RECIPES, Recipe
from tests._training import assert_same_end, load, rows, train, write_flowers

FINETUNE = ("--recipe", "finetune", "--class-weights", "balanced")
STEPS = 4  # in an epoch: of 60 images 48 are left for training


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(root, out, *FINETUNE) == 0
    return out


def stop_at(patch: pytest.MonkeyPatch, count: int, training: bool = True) -> None:
    """Ctrl-C in a step, or in a test's batch, counted from 1."""
    original, seen = loop.Training._loss, list[int]()

    def loss(self: Any, model: Any, x: Any, labels: Any) -> Any:
        seen.extend([1] * (model.training == training))
        if len(seen) == count and model.training == training:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, x, labels)

    patch.setattr(loop.Training, "_loss", loss)


def assert_same(out: Path, other: Path) -> None:
    assert_same_end(out, other)
    for part in ("ema", "stale", "tested", "scaler"):
        torch.testing.assert_close(load(out)[part], load(other)[part], rtol=0, atol=0)
    torch.testing.assert_close(
        load(out, "best.pt")["state_dict"], load(other, "best.pt")["state_dict"], rtol=0, atol=0
    )


# --- the learning rate


@pytest.mark.parametrize("warmup", [0.5, 1, 3])
def test_cosine_is_pytorchs(warmup: float) -> None:
    recipe, steps = Recipe(epochs=7, batch_size=1, lr=0.3, schedule="cosine", warmup_epochs=warmup), 10
    optimizer = torch.optim.SGD([torch.zeros(1)], recipe.lr)
    rising = round(warmup * steps)
    parts = [
        LinearLR(optimizer, 1 / (rising + 1), total_iters=rising),
        CosineAnnealingLR(optimizer, 7 * steps - rising),
    ]
    schedule, wanted = SequentialLR(optimizer, parts, [rising]), []
    for _ in range(7 * steps):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [recipe.lr_at(i, steps) for i in range(7 * steps)] == pytest.approx(wanted, rel=1e-9)


def test_drops_fall_between_epochs() -> None:
    recipe = RECIPES["cifar"]
    assert [recipe.lr_at(s, 10) for s in (0, 1499, 1500, 2249, 2250)] == [
        recipe.lr_in(e) for e in (0, 149, 150, 224, 225)
    ]
    late = Recipe(epochs=4, batch_size=1, drops=(0.5,), warmup_epochs=1)
    assert [late.lr_at(s, 4) for s in (0, 1, 3, 4, 8)] == pytest.approx([0.02, 0.04, 0.08, 0.1, 0.01])


def test_the_run_has_it(whole: Path) -> None:
    recipe = RECIPES["finetune"]
    assert (recipe.optimizer, recipe.schedule, recipe.val_split) == ("adamw", "cosine", 0.2)
    lrs = [row["lr"] for row in rows(whole) if row["split"] == "step"]
    assert lrs[:STEPS] == pytest.approx([0.0002, 0.0004, 0.0006, 0.0008])  # the first epoch of two
    assert lrs[STEPS:] == pytest.approx([0.001, 0.00085355, 0.0005, 0.00014645], rel=1e-4)


# --- validation, the end, and the test


def test_the_split_is_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    numbers = split.stratified(labels, 0.2, 7)
    assert labels[numbers].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(numbers, split.stratified(labels, 0.2, 7))
    assert not torch.equal(numbers, split.stratified(labels, 0.2, 8))


def test_the_test_comes_once(whole: Path, root: Path) -> None:
    found = rows(whole)
    assert [row["split"] for row in found] == [*2 * (["step"] * STEPS + ["train", "val"]), "test"]
    best = load(whole, "best.pt")
    assert found[-1]["epoch"] == str(best["epoch"]) and found[-1]["step"] == str(best["step"])
    results = json.loads((whole / "results.json").read_text())
    assert results["training images"] + results["validation images"] == 60
    assert results["best val accuracy"] == max(epoch["val"]["accuracy"] for epoch in results["epochs"])
    assert (
        results["test of the best epoch"]["accuracy"]
        == found[-1]["accuracy"]
        == load(whole)["tested"]["accuracy"]
    )
    model = models.load_checkpoint(whole / "best.pt").eval()
    from effdense.train import idx

    images, labels = idx.read_split(root, "test")
    with torch.no_grad():
        hits = (model(model.prepare(images.unsqueeze(1))).argmax(1) == labels).double().mean().item()
    assert hits == found[-1]["accuracy"]


def test_training_sees_no_image_of_the_validation(
    whole: Path, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    original = loop.Training._loss

    def loss(self: Any, model: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        if model.training or self.epoch < 2:  # behind the last epoch comes the test
            seen[model.training] |= {image.numpy().tobytes() for image in x}
        return original(self, model, x, labels)

    monkeypatch.setattr(loop.Training, "_loss", loss)
    assert train(root, tmp_path, *FINETUNE, "--augment", "none", "--epochs", "2") == 0
    assert len(seen[False]) == 12 and len(seen[True]) == 48 and not seen[True] & seen[False]


def test_an_early_end(root: Path, tmp_path: Path, capsys: Any) -> None:
    """With a learning rate of nothing, only the first epoch is the best."""
    run: tuple[str, ...] = (
        "--recipe",
        "finetune",
        "--epochs",
        "20",
        "--lr",
        "0",
        "--early-stop",
        "2",
        "--ema-decay",
        "0",
    )
    run = (*run, "--freeze-features")
    assert train(root, tmp_path, *run) == 0
    assert load(tmp_path)["epoch"] == 3 and load(tmp_path)["stale"] == 2
    assert [row["split"] for row in rows(tmp_path)].count("test") == 1
    capsys.readouterr()
    assert train(root, tmp_path, *run, "--resume") == 0
    assert "epoch 3 was the last: nothing to do; best val accuracy" in capsys.readouterr().out


# --- going on


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--accumulate", "2", "--amp", "bf16"),
        ("--ema-decay", "0", "--clip-norm", "none", "--val-split", "0"),
    ],
    ids=lambda options: " ".join(options),
)
def test_stopped_and_resumed(
    options: tuple[str, ...], whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options:
        whole = tmp_path / "whole"
        assert train(root, whole, *FINETUNE, *options) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, (STEPS + 2) * (2 if "--accumulate" in options else 1))
        assert train(root, tmp_path / "parts", *FINETUNE, *options) == 130
    assert load(tmp_path / "parts")["step"] == STEPS + 2
    assert train(root, tmp_path / "parts", *FINETUNE, *options, "--resume") == 0
    assert_same(tmp_path / "parts", whole)


def test_stopped_in_the_test_at_the_end(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2 + 1, training=False)  # one batch of validation behind each epoch
        assert train(root, tmp_path, *FINETUNE) == 130
    assert "in the test at the end; --resume goes on with that test" in capsys.readouterr().err
    assert train(root, tmp_path, *FINETUNE, "--resume") == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("name", ["val-split", "ema-decay", "label-smoothing", "clip-norm", "warmup-epochs"])
def test_other_values_are_another_run(name: str, whole: Path, root: Path, capsys: Any) -> None:
    assert train(root, whole, *FINETUNE, "--resume", f"--{name}", "0.3") == 2
    assert f"{name.replace('-', '_')} was " in capsys.readouterr().err


# --- the learner


def test_the_average_is_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages: list[dict[str, torch.Tensor]] = []
    original = Learner.step

    def step(self: Learner) -> None:
        original(self)
        now = {k: v.clone() for k, v in self.model.state_dict().items() if v.is_floating_point()}
        before = averages[-1] if averages else now
        averages.append({k: 0.9 * before[k] + 0.1 * now[k] for k in now})

    monkeypatch.setattr(Learner, "step", step)
    run = ("--ema-decay", "0.9", "--dtype", "float64", "--epochs", "1")
    assert train(root, tmp_path, *run) == 0
    saved = load(tmp_path)
    assert saved["ema"]["steps"] == len(averages) == 5
    for key, value in averages[-1].items():
        torch.testing.assert_close(saved["state_dict"][key], value)
    key = "features.conv0.weight"
    assert not torch.equal(saved["state_dict"][key], saved["ema"]["trained"][key])


def learner(recipe: Recipe, labels: torch.Tensor) -> Learner:
    settings: Any = type("Settings", (), {"recipe": recipe, "amp": "off"})()
    torch.manual_seed(0)
    return Learner(settings, torch.nn.Linear(5, 3).double(), labels, 3)


def test_gradients_are_clipped() -> None:
    ours = learner(Recipe(epochs=1, batch_size=1, clip_norm=0.25), torch.tensor([0, 1, 2]))
    (100 * ours.model(torch.ones(1, 5, dtype=torch.float64)).sum()).backward()
    ours.step()
    norm = torch.stack([p.grad.norm() for p in ours.model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.25)


def test_classes_are_weighted() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    balanced = class_weights(Recipe(1, 1, class_weights="balanced"), labels, 3)
    assert balanced is not None and balanced.tolist() == pytest.approx([0.75, 1.5, 0])
    numbers = class_weights(Recipe(1, 1, class_weights=(2.0, 2.0, 9.0)), labels, 3)
    assert numbers is not None and numbers.tolist() == pytest.approx([1, 1, 4.5])
    with pytest.raises(ValueError, match="one for each of the 3 classes was expected, got 2"):
        class_weights(Recipe(1, 1, class_weights=(1.0, 2.0)), labels, 3)
    with pytest.raises(ValueError, match="one above 0 was expected"):
        class_weights(Recipe(1, 1, class_weights=(0.0, 0.0, 1.0)), labels, 3)


def test_a_weighted_batch_is_the_mean_of_its_parts() -> None:
    recipe = Recipe(1, 1, class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1)
    labels = torch.tensor([0, 0, 1, 2])
    ours, x = learner(recipe, labels), torch.randn(4, 5, dtype=torch.float64)
    whole = ours.loss(ours.model, x, labels)[0]
    parts = [ours.loss(ours.model, a, b)[0] for a, b in zip(x.split(2), labels.split(2), strict=True)]
    assert whole.item() == pytest.approx((sum(parts) / 2).item())
    weights = torch.tensor([1.0, 2, 3], dtype=torch.float64) * 4 / 7
    single = [
        F.cross_entropy(ours.model(a[None]), b[None], weights, reduction="sum", label_smoothing=0.1)
        for a, b in zip(x, labels, strict=True)
    ]
    assert whole.item() == pytest.approx((sum(single) / 4).item())
    plain = ours.loss(ours.model.eval(), x, labels)[0]  # a test's
    assert plain.item() == pytest.approx(F.cross_entropy(ours.model(x), labels).item())


def test_mixup_is_torchvisions(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    recipe, labels = Recipe(1, 1, mixup=0.4), torch.tensor([0, 1, 2, 2])
    ours, x = learner(recipe, labels), torch.randn(4, 5, 1, 1, dtype=torch.float64)
    ours.model = torch.nn.Sequential(torch.nn.Flatten(), ours.model)
    torch.manual_seed(5)
    loss, _ = ours.loss(ours.model, x, labels)
    torch.manual_seed(5)
    mixed, targets = v2.MixUp(alpha=0.4, num_classes=3)(x, labels)
    assert loss.item() == pytest.approx(F.cross_entropy(ours.model(mixed), targets.double()).item())
    run = (*FINETUNE, "--mixup", "0.4")
    assert train(root, tmp_path / "whole", *run) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        assert train(root, tmp_path / "parts", *run) == 130
    assert train(root, tmp_path / "parts", *run, "--resume") == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")


# --- published weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_flowers(tmp_path, images=2, size=32)


PRETRAINED = (
    "--model",
    "densenet121",
    "--pretrained",
    "--recipe",
    "finetune",
    "--val-split",
    "0",
    "--lr",
    "0",
)


def test_published_weights_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.hub has left them there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = effdense.models.densenet121().state_dict()
    torch.save(published, cache / "densenet121-a639ec97.pth")
    run = (*PRETRAINED, "--data", "folder", "--resize", "32", "--batch-size", "4", "--epochs", "1")
    assert (
        train(folder, tmp_path / "run", *run, "--freeze-features", "--weight-decay", "0", "--drop-rate", "0")
        == 0
    )
    saved = load(tmp_path / "run")["state_dict"]
    assert torch.equal(saved["features.conv0.weight"], published["features.conv0.weight"])
    assert saved["classifier.weight"].shape == (2, 1024)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            (),
            "--pretrained: the published weights of 'densenet121' cannot be had: <urlopen error no network>. Without a",
        ),
        (("--model", "densenet_bc_10_4"), "nothing has been published for model 'densenet_bc_10_4'"),
        (("--weights", "x.pt"), "--pretrained and --weights exclude each other"),
    ],
)
def test_published_weights_that_are_not_there(
    options: tuple[str, ...],
    message: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    assert train(root, tmp_path, *PRETRAINED, *options) == 2
    assert message in capsys.readouterr().err
