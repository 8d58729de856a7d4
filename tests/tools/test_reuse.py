"""Feature reuse: figure 5 of the paper from weights, checkpoints read back, and what is said of those that cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import models as twins
from benchmarks import structures
from effdense import cli, convert, models
from effdense.tools import plots
from effdense.tools.reuse import feature_reuse


def tiny(bn_size: int | None, **options: Any) -> nn.Module:
    return models.DenseNet(3, (2, 3), 4, bn_size, num_classes=5, small_inputs=True, in_channels=1, **options)


def expected(weight: Tensor, first: int, last: int) -> float:
    return sum(w.abs().sum().item() for w in weight[:, first:last]) / weight[:, first:last].numel()


@pytest.mark.parametrize("bn_size", [2, None])
def test_every_weight_belongs_to_the_layer_that_made_its_channel(bn_size: int | None) -> None:
    model: Any = tiny(bn_size)
    first, second = feature_reuse(model)
    assert first.sources == ["input", "denselayer1", "denselayer2"]
    assert first.targets == ["denselayer1", "denselayer2", "features.transition1"]
    assert second.targets[-1] == "classifier" and second.weights.shape == (4, 4)
    edges = [0, 4, 7, 10]  # the input's 4 channels, then 3 of each layer
    block, transition = model.features.denseblock1, model.features.transition1
    readers = [block.denselayer1.conv1, block.denselayer2.conv1, transition.conv]
    for target, conv in enumerate(readers):
        for source in range(3):
            value = first.weights[source, target].item()
            if source > target:
                assert value != value
            else:
                assert value == pytest.approx(expected(conv.weight, edges[source], edges[source + 1]))
    assert second.weights[0, 3].item() == pytest.approx(expected(model.classifier.weight, 0, 5))


def test_a_source_that_is_not_read_is_zero() -> None:
    model: Any = tiny(2)
    with torch.no_grad():
        model.features.denseblock1.denselayer2.conv1.weight[:, :4] = 0
    weights = feature_reuse(model)[0].weights
    assert weights[0, 1] == 0 and weights[1, 1] > 0


@pytest.mark.parametrize("build", [structures.d2l_net, structures.tutorial_net, structures.StarNet])
def test_other_peoples_nets_converted_or_not(build: Any) -> None:
    model = build()
    before = feature_reuse(model)
    after = feature_reuse(convert(model))
    for a, b in zip(before, after, strict=True):
        assert (a.block, a.sources, a.targets) == (b.block, b.sources, b.targets)
        assert len(a.targets) == len(a.sources)  # what reads the block was found
        assert torch.equal(a.weights.nan_to_num(-1), b.weights.nan_to_num(-1))


def test_a_block_alone_has_no_last_target(tmp_path: Path) -> None:
    (only,) = feature_reuse(tiny(2).features.denseblock1)
    assert only.block == "" and only.targets == ["denselayer1", "denselayer2"]
    plots.reuse_picture([only], "title", tmp_path / "block.png")
    assert (tmp_path / "block.png").stat().st_size > 0


def test_twins_and_ours_agree() -> None:
    twin = twins.build("densenet_bc_16_4", "naive").model
    fused = models.load_weights(models.build("densenet_bc_16_4"), twin.state_dict())
    for a, b in zip(feature_reuse(twin), feature_reuse(fused), strict=True):
        assert torch.equal(a.weights.nan_to_num(-1), b.weights.nan_to_num(-1))


def test_what_has_no_weights_to_show() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        feature_reuse([])
    with pytest.raises(ValueError, match="Linear has no dense block that effdense knows"):
        feature_reuse(nn.Linear(2, 2))
    model: Any = tiny(2)
    nn.utils.parametrizations.weight_norm(model.features.denseblock1.denselayer1.conv1)
    with pytest.raises(ValueError, match=r"features\.denseblock1: .* is not a plain parameter"):
        feature_reuse(model)


NAME = "densenet_bc_10_4"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.pt"
    model = models.build(NAME, num_classes=7, in_channels=1)
    torch.save({"model": NAME, "options": {}, "epoch": 3, "state_dict": model.state_dict()}, path)
    return path


def test_the_command_draws_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = checkpoint.with_name("heat.png")
    assert cli.main(["reuse", str(checkpoint), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"{picture}\n"


def test_a_checkpoint_is_built_as_it_was(checkpoint: Path) -> None:
    saved = torch.load(checkpoint)["state_dict"]
    bare = checkpoint.with_name("bare.pt")
    double = checkpoint.with_name("double.pt")
    torch.save(saved, bare)
    torch.save(
        {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in saved.items()},
        double,
    )
    assert models.load_checkpoint(double, NAME).classifier.weight.dtype == torch.float64
    for model in (models.load_checkpoint(checkpoint), models.load_checkpoint(bare, NAME)):
        state = model.state_dict()
        assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)


def flipped(content: bytes) -> bytes:
    """With one bit wrong in the middle, among the weights."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_what_is_no_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, content = checkpoint.read_bytes(), torch.load(checkpoint)

    picture = Path("/nowhere/heat.png")

    def said(*arguments: str) -> str:
        assert cli.main(["reuse", str(checkpoint), "-o", str(picture), *arguments]) == 2
        return capsys.readouterr().err

    assert "/nowhere/heat.png cannot be written: there is no folder /nowhere" in said()
    picture = checkpoint.with_name("heat.png")
    assert f"last.pt holds model '{NAME}', not 'densenet121'" in said("--model", "densenet121")
    for content_now in (whole[: len(whole) // 2], flipped(whole), b""):
        checkpoint.write_bytes(content_now)
        size = len(content_now)
        assert f"last.pt ({size} bytes) cannot be read: it is " in said()
    torch.save(content["state_dict"], checkpoint)
    assert "last.pt does not say which model it holds" in said()
    message = said("--model", "densenet_bc_16_4")
    assert "does not hold the weights of 'densenet_bc_16_4': load_weights: the weights do not fit" in message
    assert "unknown model 'densnet121', did you mean 'densenet121'" in said("--model", "densnet121")
    torch.save({**content, "options": {"depht": 3}}, checkpoint)
    assert re.search(r"model 'densenet_bc_10_4' cannot be built with the entry 'options'.*'depht'", said())
    torch.save(models.build(NAME), checkpoint)
    assert "cannot be read: it holds effdense.models.densenet.DenseNet, and only tensors" in said()
    torch.save([1], checkpoint)
    assert "must hold a checkpoint or a state_dict, it holds a list" in said()
    checkpoint.unlink()
    assert "there is no " in said()
