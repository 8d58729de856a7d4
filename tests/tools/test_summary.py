"""effdense summary: the paper's table 1, published multiply-adds, and saved bytes counted in another way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from benchmarks import densenet, structures
from effdense import cli, models
from effdense.tools.summary import SAVED
from tests._stages import kept_tensors

GMACS = {
    "densenet121": 2.834,
    "densenet161": 7.728,
    "densenet169": 3.360,
    "densenet201": 4.291,
    "densenet264": 5.75,
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.build(name)


@pytest.mark.parametrize("name", GMACS)
def test_published_multiply_adds(name: str) -> None:
    model = on_meta(name)
    total = effdense.summary(model, (2, 3, 224, 224)).total
    digits = 2 if name == "densenet264" else 3
    assert round(total.multiply_adds / 1e9, digits) == GMACS[name]
    assert total.parameters == sum(p.numel() for p in model.parameters())


def test_table_1() -> None:
    rows = effdense.summary(on_meta("densenet121"), (1, 3, 224, 224)).rows
    assert [(row.layer, row.output) for row in rows] == [
        ("Convolution", (64, 112, 112)),
        ("Pooling", (64, 56, 56)),
        ("Dense block 1", (256, 56, 56)),
        ("Transition 1", (128, 28, 28)),
        ("Dense block 2", (512, 28, 28)),
        ("Transition 2", (256, 14, 14)),
        ("Dense block 3", (1024, 14, 14)),
        ("Transition 3", (512, 7, 7)),
        ("Dense block 4", (1024, 7, 7)),
        ("Classification", (1000,)),
    ]
    assert rows[0].multiply_adds == 112 * 112 * 64 * 3 * 49 and rows[0].parameters == 64 * (3 * 49 + 2)
    assert rows[3].multiply_adds == 56 * 56 * 256 * 128 and rows[3].parameters == 256 * (128 + 2)
    assert rows[-1].parameters == 2 * 1024 + 1025 * 1000
    for row in rows:
        fused = 0 if row.layer.startswith(("Pooling", "Transition", "Class")) else 1
        assert row.saved["balanced"] >= row.saved["minimal"] >= fused
        assert row.saved["naive"] >= row.saved["balanced"] + 1


FORMS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "plain": {"bn_size": None},
    "small": {"small_inputs": True, "drop_rate": 0.2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", SAVED)
def test_saved_bytes_are_those_of_a_real_forward(memory: str, form: str) -> None:
    shape = (3, 3, 40, 32)
    options = {"bn_size": 2, "num_classes": 5, **FORMS[form]}
    fused = models.DenseNet(4, (2, 3), 6, **options)
    got = effdense.summary(fused, shape).total.saved[memory]
    runs = densenet.DenseNet(4, (2, 3), 6, **options) if memory == "naive" else fused
    if memory != "naive":
        effdense.convert(fused, memory=memory)
    x = torch.randn(shape)
    own = {t.untyped_storage()._cdata for t in (x, *runs.parameters(), *runs.buffers())}
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in kept_tensors(runs, x)[0])}
    expected = sum(size for key, size in storages.items() if key not in own)
    if memory == "naive":  # its head flattens in another way
        assert abs(got - expected) <= 0.02 * expected
    else:
        assert got == expected


def test_bytes_grow_with_the_batch_and_work_does_not() -> None:
    model = on_meta("densenet_bc_22_12")
    one, four = (effdense.summary(model, (n, 3, 32, 32)).total for n in (1, 4))
    assert one.multiply_adds == four.multiply_adds
    assert all(3.9 * one.saved[memory] < four.saved[memory] <= 4 * one.saved[memory] for memory in SAVED)


def test_the_model_is_not_touched() -> None:
    model = models.DenseNet(4, (2, 1), 6, num_classes=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    effdense.summary(model.eval(), (2, 3, 32, 32))
    assert not model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "_step" not in vars(model.features)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["densenet_40_12", "densenet_d2l", "densenet169_tutorial", "torchvision:densenet121"]
)
def test_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("torchvision") and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    file = tmp_path / "summary.json"
    assert cli.main(["summary", name, "--image-size", "64", "--batch", "2", "--json", str(file)]) == 0
    out, content = capsys.readouterr().out, json.loads(file.read_text())
    count = sum(p.numel() for p in on_meta(name).parameters())
    assert content["model"] == name and content["total"]["parameters"] == count
    assert content["input_shape"] == [2, 1 if "d2l" in name else 3, 64, 64]
    assert out.startswith(f"{name}, input 2x") and f"{count:,}" in out
    assert [row["layer"] for row in content["rows"]][:2] == [
        "Convolution",
        "Dense block 1" if "40" in name else "Pooling",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("densenet212", "--image-size", "64"), "unknown model 'densenet212', did you mean"),
        (("densenet121", "--image-size", "28"), "at least 29 pixels each way"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("effdense summary: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("where", ["missing/summary.json", "folder"])
def test_a_file_that_cannot_be_written(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / where
    arguments = ["densenet_bc_10_4", "--image-size", "8", "--json", str(file)]
    assert cli.main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"effdense summary: {file} cannot be written: ") and error.count("\n") == 1
    assert [f.name for f in tmp_path.rglob("*")] == ["folder"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    file.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["summary", "densenet_bc_10_4", "--image-size", "8", "--json", str(file)])
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    assert cli.main(["summary", "densenet_bc_10_4", "--image-size", "8", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["model"] == "densenet_bc_10_4" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("efficient", [False, True])
def test_other_libraries_blocks(efficient: bool) -> None:
    fused = models.densenet_cifar(22, 12)
    summary = effdense.summary(structures.StarNet(0.0, efficient, 12, (3, 3, 3), 24, 4, 10), (2, 3, 32, 32))
    expected = effdense.summary(fused, (2, 3, 32, 32))
    for row, other in zip(summary.rows, expected.rows, strict=True):
        assert row[:-1] == other[:-1]
        assert {k: row.saved[k] for k in ("balanced", "minimal")} == {
            k: other.saved[k] for k in ("balanced", "minimal")
        }


def test_a_model_of_another_kind() -> None:
    with pytest.raises(ValueError, match="Sequential is not a DenseNet with features and classifier"):
        effdense.summary(nn.Sequential(nn.Conv2d(3, 4, 1)), (1, 3, 8, 8))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        effdense.summary("densenet121", (1, 3, 8, 8))


def test_another_classifier() -> None:
    model = models.densenet_cifar(10, 4)
    expected = effdense.summary(model, (1, 3, 8, 8)).total
    model.classifier = torch.nn.Sequential(torch.nn.Dropout(), model.classifier)
    assert effdense.summary(model, (1, 3, 8, 8)).total[:4] == expected[:4]
