"""`effdense train`: the files of a run, and that an interrupted run resumes to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.train import checkpoint, loop
from effdense.train.settings import RECIPES
from tests._training import (
    BATCH,
    STEPS,
    TEST,
    TRAIN,
    Terminal,
    arguments,
    assert_same_end,
    load,
    rows,
    train,
)

CUT_OFF = STEPS + 3  # a step in the middle of the second epoch


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Any) -> None:
    """Calls `what` behind the forward of a step."""
    original = loop.Training._loss

    def loss(self: Any, model: Any, x: Any, labels: Any) -> Any:
        result = original(self, model, x, labels)
        return what(result) if self.step + 1 == step and self.model.training else result

    monkeypatch.setattr(loop.Training, "_loss", loss)


def test_metrics(whole: Path) -> None:
    text = (whole / "metrics.csv").read_text()
    assert text.startswith("epoch,step,split,loss,accuracy,lr,images_per_second,peak_bytes,seconds\n")
    found = rows(whole)
    epoch = ["step"] * STEPS + ["train", "test"]
    assert [row["split"] for row in found] == 2 * epoch
    assert [row["lr"] for row in found] == [0.1] * len(epoch) + [pytest.approx(0.01)] * len(epoch)
    for number in (1, 2):
        own = [row for row in found if row["epoch"] == str(number)]
        steps = [row for row in own if row["split"] == "step"]
        mean = next(row for row in own if row["split"] == "train")
        for name in ("loss", "accuracy"):
            assert mean[name] == pytest.approx(sum(row[name] for row in steps) / STEPS, rel=1e-12)


def test_results_say_what_was_run(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["settings"]["model"] == "densenet_bc_10_4" and results["settings"]["recipe"]["lr"] == 0.1
    assert (results["training images"], results["test images"], results["processes"]) == (TRAIN, TEST, 1)
    assert results["parameters"] == sum(
        p.numel() for p in effdense.models.build("densenet_bc_10_4", in_channels=1).parameters()
    )
    assert results["machine"]["torch"] == torch.__version__
    found = rows(whole)
    for epoch in results["epochs"]:
        for split in ("train", "test"):
            row = next(r for r in found if (r["epoch"], r["split"]) == (str(epoch["epoch"]), split))
            assert epoch[split] == {name: row[name] for name in ("loss", "accuracy")}
            assert (epoch["step"], epoch["lr"]) == (int(row["step"]), row["lr"])
        assert epoch["peak_bytes"] > 2**26 and epoch["seconds"] > 0
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2]
    assert results["best test accuracy"] == max(epoch["test"]["accuracy"] for epoch in results["epochs"])


@pytest.mark.core
def test_the_checkpoint_holds_the_model(whole: Path, root: Path) -> None:
    saved = load(whole)
    assert (saved["model"], saved["in_channels"]) == ("densenet_bc_10_4", 1) and len(
        saved["class_names"]
    ) == 10
    assert saved["epoch"] == 2 and saved["recipe"]["name"] == "cifar" and saved["recipe"]["momentum"] == 0.9
    model = effdense.models.build(saved["model"], **saved["options"])
    effdense.models.load_weights(model, whole / "last.pt")
    from effdense.train import idx

    images, labels = idx.read_split(root, "test")
    x = (images.unsqueeze(1) / 255 - 0.2860) / 0.3530
    with torch.no_grad():
        hits = (model.eval()(x).argmax(1) == labels).sum().item()
    assert hits / TEST == rows(whole)[-1]["accuracy"]


def test_best_is_the_epoch_with_the_best_test(whole: Path) -> None:
    tests = [row for row in rows(whole) if row["split"] == "test"]
    best = max(tests, key=lambda row: row["accuracy"])  # the first of them
    assert str(load(whole, "best.pt")["epoch"]) == best["epoch"]


def assert_tensorboard_has_the_rows(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for split in ("step", "train", "test"):
        own = {int(row["step"]): row["loss"] for row in rows(out) if row["split"] == split}
        assert {e.step: e.value for e in events.Scalars(f"loss/{split}")} == pytest.approx(own, rel=1e-6)
        assert len(events.Scalars(f"loss/{split}")) == len(own)


def test_tensorboard_has_the_same(whole: Path) -> None:
    assert_tensorboard_has_the_rows(whole)


KILLED = """
import os, signal, sys
from effdense import cli
from effdense.train import loop
original = loop.Training._loss
def loss(self, *arguments):
    if self.step + 1 == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
loop.Training._loss = loss
cli.main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_an_epoch(whole: Path, root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        KILLED.format(step=CUT_OFF),
        *arguments(root, tmp_path, "--save-steps", "3"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (
        load(tmp_path)["step"] == 6 < len([r for r in rows(tmp_path) if r["split"] == "step"]) == CUT_OFF - 1
    )
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1.earlier"))  # ordered by the second in their names
    assert train(root, tmp_path, "--save-steps", "3", "--resume") == 0
    assert_same_end(tmp_path, whole)
    assert_tensorboard_has_the_rows(tmp_path)


@pytest.mark.core
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_and_resumed(
    number: int, whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, CUT_OFF, lambda result: os.kill(os.getpid(), number) or result)
        assert train(root, tmp_path) == 130
    assert f"stopped after step {CUT_OFF}, in epoch 2" in capsys.readouterr().err
    assert load(tmp_path)["step"] == CUT_OFF
    assert signal.getsignal(number) is not None and train(root, tmp_path, "--resume") == 0
    assert_same_end(tmp_path, whole)


def test_ended_between_two_checkpoints(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second epoch's best.pt is written, and its last.pt cannot be: its end comes again."""
    original = checkpoint.save

    def full(state: dict[str, Any], path: Path) -> None:
        if state["epoch"] == 2 and path.name == "last.pt":
            raise OSError(f"{path} cannot be written")
        original(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert train(root, tmp_path) == 2
    assert "last.pt cannot be written" in capsys.readouterr().err and load(tmp_path)["epoch"] == 1
    assert train(root, tmp_path, "--resume") == 0
    assert_same_end(tmp_path, whole)
    assert load(tmp_path, "best.pt")["epoch"] == load(whole, "best.pt")["epoch"]


def test_a_failed_save_leaves_the_one_before(root: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(root, tmp_path, "--epochs", "1") == 0
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt cannot be written: .*; the one before it is as it was"):
            checkpoint.save(load(tmp_path), tmp_path / "last.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} <= {
        ".lock",
        "best.pt",
        "last.pt",
        "metrics.csv",
        "results.json",
        "settings.toml",
        "tensorboard",
    }


def test_a_loss_that_is_nan(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    at_step(monkeypatch, CUT_OFF, lambda result: (result[0] * float("nan"), result[1]))
    assert train(root, tmp_path) == 1
    error = capsys.readouterr().err
    good = f"the last good checkpoint is {tmp_path}/last.pt (step {STEPS})"
    assert f"effdense train: the loss is nan at step {CUT_OFF}; {good}" in error
    assert load(tmp_path)["step"] == STEPS


def test_a_run_that_diverges(root: Path, tmp_path: Path, capsys: Any) -> None:
    """A net whose statistics have overflowed is not kept, and no test's result is the best."""
    assert train(root, tmp_path, "--lr", "1e3") == 1
    assert re.search(r"not finite after step|the (test )?loss is (nan|inf)", error := capsys.readouterr().err)
    assert "no checkpoint has been written yet" in error and not list(tmp_path.glob("*.pt"))


def test_an_end_that_is_there(whole: Path, root: Path, capsys: Any) -> None:
    best = max(row["accuracy"] for row in rows(whole) if row["split"] == "test")
    assert train(root, whole, "--resume") == 0
    assert capsys.readouterr().out == f"epoch 2 was the last: nothing to do; best test accuracy {best:.4f}\n"


def test_one_process_of_its_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some launchers set a rank for jobs of one process."""
    monkeypatch.setenv("RANK", "1")
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", str(BATCH)) == 0
    assert (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("impl", ["naive", "checkpoint"])
def test_implementations_train_the_same(impl: str, root: Path, tmp_path: Path) -> None:
    short = ("--epochs", "1", "--dtype", "float64", "--drop-rate", "0")
    assert train(root, tmp_path / "fused", *short, "--memory", "minimal") == 0
    assert train(root, tmp_path / impl, *short, "--impl", impl) == 0
    for fused, theirs in zip(rows(tmp_path / "fused"), rows(tmp_path / impl), strict=True):
        if impl == "checkpoint" and fused["split"] == "test":
            continue  # its running statistics move twice a step, as torchvision's do
        assert fused["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


def test_parts_of_a_batch_add_up(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation, where statistics are not those of a part, the gradients of parts are the batch's."""
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: _all_eval(self))
    short = ("--epochs", "1", "--dtype", "float64", "--drop-rate", "0", "--limit-train", str(2 * BATCH))
    for parts in ("1", "3"):
        assert train(root, tmp_path / parts, *short, "--accumulate", parts) == 0
    for one, three in zip(rows(tmp_path / "1"), rows(tmp_path / "3"), strict=True):
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-9)


def _all_eval(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        module.training = False
    return model


@pytest.mark.parametrize(
    "options",
    [
        ("--amp", "bf16"),
        ("--amp", "fp16", "--impl", "naive", "--batch-size", "4", "--limit-train", "8"),
        ("--channels-last",),
        ("--optimizer", "adam", "--lr", "0.001", "--augment", "resized-crop"),
        ("--recipe", "d2l", "--resize", "16", "--dtype", "float64"),
        ("--recipe", "imagenet", "--resize", "16", "--pad", "32", "--impl", "naive"),
    ],
    ids=" ".join,
)
def test_options(
    options: tuple[str, ...], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run, and go on to the bit from the middle of the second epoch."""
    short = ("--limit-train", str(2 * BATCH), *options)
    assert train(root, tmp_path / "whole", *short) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda result: os.kill(os.getpid(), signal.SIGINT) or result)
        assert train(root, tmp_path / "parts", *short) == 130
    assert train(root, tmp_path / "parts", *short, "--resume") == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_recipes_fall_where_they_say() -> None:
    cifar, imagenet, d2l, tutorial = (RECIPES[name] for name in ("cifar", "imagenet", "d2l", "tutorial"))
    changes = {
        "cifar": [(0, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (299, 0.001)],
        "imagenet": [(29, 0.1), (30, 0.01), (59, 0.01), (60, 0.001)],
        "d2l": [(0, 0.1), (9, 0.1)],
        "tutorial": [(0, 0.001), (39, 0.001)],
    }
    for name, points in changes.items():
        assert [RECIPES[name].lr_in(epoch) for epoch, _ in points] == pytest.approx([lr for _, lr in points])
    for epochs, lrs in ((1, [0.1]), (2, [0.1, 0.01]), (3, [0.1, 0.1, 0.01])):  # trials
        short = dataclasses.replace(cifar, epochs=epochs)
        assert [short.lr_in(epoch) for epoch in range(epochs)] == pytest.approx(lrs)
    sgd = dataclasses.replace(tutorial, optimizer="sgd", drops=(0.5, 0.75))
    assert [sgd.lr_in(e) / sgd.lr for e in (19, 20, 29, 30)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert (cifar.epochs, cifar.batch_size, cifar.momentum, cifar.nesterov, cifar.weight_decay) == (
        *(300, 64, 0.9, True, 1e-4),
    )
    assert (imagenet.epochs, imagenet.batch_size, imagenet.augment) == (90, 256, "resized-crop")
    assert (d2l.epochs, d2l.batch_size, d2l.resize, d2l.momentum) == (10, 256, 96, 0)
    assert (tutorial.optimizer, tutorial.lr, tutorial.batch_size) == ("adam", 0.001, 16)


def test_dropout_where_there_is_no_augmentation(root: Path, tmp_path: Path) -> None:
    command = arguments(root, tmp_path, "--augment", "none", "--epochs", "1", "--limit-train", str(BATCH))
    command = [a for i, a in enumerate(command) if "--drop-rate" not in (a, command[i - 1])]
    assert effdense.cli.main(command) == 0
    assert load(tmp_path)["recipe"]["drop_rate"] == load(tmp_path)["options"]["drop_rate"] == 0.2


@pytest.mark.core
def test_compile_takes_what_trains(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile then makes of it is test_compile's matter."""
    given: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: given.append(model) or model)
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", str(BATCH), "--compile") == 0
    assert [type(model).__name__ for model in given] == ["DenseNet"]


@pytest.mark.parametrize("kept", [None, 90], ids=["deleted", "half a line"])
def test_metrics_that_were_changed(
    kept: int | None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole stays, and the rest of the run is written."""
    short = ("--limit-train", str(BATCH))
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda result: os.kill(os.getpid(), signal.SIGINT) or result)
        assert train(root, tmp_path, *short) == 130
    file = tmp_path / "metrics.csv"
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    assert train(root, tmp_path, *short, "--resume") == 0
    assert [(row["epoch"], row["split"]) for row in rows(tmp_path)] == [
        *(("1", "train"), ("1", "test"), ("2", "step"), ("2", "train"), ("2", "test"))
    ]


def test_a_new_head_on_frozen_features(whole: Path, root: Path, tmp_path: Path) -> None:
    short = ("--epochs", "1", "--weights", str(whole / "best.pt"), "--freeze-features")
    assert train(root, tmp_path, *short) == 0
    before, after = load(whole, "best.pt")["state_dict"], load(tmp_path)["state_dict"]
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_bar_on_a_terminal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    assert train(root, tmp_path, "--epochs", "1") == 0
    shown = terminal.getvalue()
    for part in (f"/{STEPS}", "epoch 1/1", "loss 2.", "accuracy 0.", "images/s", "peak ", " MiB"):
        assert part in shown
    assert capsys.readouterr().out.splitlines()[-1].startswith("epoch 1/1: loss ")
