"""`effdense export`: ONNX against onnxruntime, .pt2 and safetensors read back, their metadata, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import models as naive
from effdense import cli, tensor_files
from effdense.models import DenseNet, Preparation, densenet, load_checkpoint
from effdense.tools import export

PREPARATION = Preparation((0.4, 0.5, 0.6), (0.2, 0.3, 0.2), 3, pad=16)
CLASSES = ["Rose", "tulip", "Ähre"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of `effdense train`, as far as its checkpoint is read."""
    torch.manual_seed(0)
    options = {"num_classes": len(CLASSES), "in_channels": 3}
    model = effdense.models.build("densenet_bc_10_4", **options)
    model(torch.randn(8, 3, 16, 16))  # running statistics
    content = {
        **{"model": "densenet_bc_10_4", "options": options, "class_names": CLASSES, "in_channels": 3},
        **{"preparation": dataclasses.asdict(PREPARATION), "state_dict": model.state_dict()},
        "settings": {"data": "cifar10"},
    }
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "best.pt")
    return tmp_path / "run"


def of_onnx(path: Path) -> Any:
    """onnxruntime's session of a file whose operators are all ONNX's own."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    content = onnx.load(path)
    assert not content.functions and {node.domain for node in content.graph.node} <= {"", "ai.onnx"}
    return runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def check_metadata(found: dict[str, str]) -> None:
    assert (found["model"], json.loads(found["class_names"])) == ("densenet_bc_10_4", CLASSES)
    prepared = json.loads(found["preparation"])
    assert (
        Preparation(**{**prepared, "mean": tuple(prepared["mean"]), "std": tuple(prepared["std"])})
        == PREPARATION
    )


def test_onnx_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_onnx()
    assert cli.main(["export", str(run), "-o", str(tmp_path / "m.onnx")]) == 0
    printed = capsys.readouterr()
    assert "for images batchx3x16x16" in printed.out and "by onnxruntime: they differ by" in printed.out
    assert not printed.err
    session, model = of_onnx(tmp_path / "m.onnx"), load_checkpoint(run / "best.pt").eval()
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, made.name) == ("images", ["batch", 3, 16, 16], "scores")
    check_metadata(session.get_modelmeta().custom_metadata_map)
    for images in (1, 5):
        x = torch.randn(images, 3, 16, 16)
        (scores,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), model(x), rtol=1e-5, atol=1e-5)


def test_pt2_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run / "best.pt"), "-o", str(tmp_path / "m.pt2")]) == 0
    assert "by torch.export: they differ by" in capsys.readouterr().out
    extra = {export.PT2_METADATA: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    check_metadata(json.loads(extra[export.PT2_METADATA]))
    assert not [n for n in program.graph.nodes if str(n.target).startswith("effdense")]
    model = load_checkpoint(run / "best.pt").eval()
    for images in (1, 5):
        x = torch.randn(images, 3, 16, 16)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_safetensors_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    assert cli.main(["export", str(run), "-o", str(path)]) == 0
    assert "the same weights when read back" in capsys.readouterr().out
    expected, loaded = load_checkpoint(run / "best.pt").state_dict(), tensor_files.load_tensors(path)
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    check_metadata(header["__metadata__"])
    effdense.models.load_weights(load_checkpoint(run / "best.pt"), path)


def volumes() -> nn.Module:
    return DenseNet(4, (1, 1), 6, num_classes=2, spatial_dims=3, in_channels=1)


def test_a_state_dict_of_a_net_for_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --model and --image-size; its dimensions are read off the weights."""
    monkeypatch.setitem(densenet.IMAGENET, "densenet121", (4, (1, 1), 6))
    torch.manual_seed(0)
    effdense.models.save_weights(volumes(), tmp_path / "weights.pt")
    command = [
        "export",
        str(tmp_path / "weights.pt"),
        "--model",
        "densenet121",
        "-o",
        str(tmp_path / "m.pt2"),
    ]
    assert cli.main(command) == 2  # the size is not known
    assert cli.main([*command, "--image-size", "12"]) == 0
    model: Any = volumes().eval()
    effdense.models.load_weights(model, tmp_path / "weights.pt")
    x = torch.randn(2, 1, 12, 12, 12)
    torch.testing.assert_close(
        torch.export.load(tmp_path / "m.pt2").module()(x), model(x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_converted_model_stays_as_it_is(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        needs_onnx()
    model = effdense.convert(naive.DenseNet(4, (1, 1), 6, num_classes=3).double())
    before, state = str(effdense.report(model)), copy.deepcopy(model.state_dict())
    done = export.export_model(model, tmp_path / f"m{suffix}", (4, 3, 32, 32))
    assert done.dtype == (torch.float32 if suffix == ".onnx" else torch.float64)
    assert done.difference <= 1000 * torch.finfo(done.dtype).eps * done.largest and done.largest > 0
    assert str(effdense.report(model)) == before and model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", ["timm:densenet121", "torchvision:densenet121"])
def test_other_libraries_models(name: str, tmp_path: Path) -> None:
    needs_onnx()
    try:
        model = effdense.models.build(name, num_classes=3)
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(str(error))
    export.export_model(effdense.convert(model), tmp_path / "m.onnx", (1, 3, 32, 32), name=name)
    assert of_onnx(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map["model"] == name


def test_what_differs_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(content: bytes) -> Any:
        by, right = export._run_pt2(content)
        return by, lambda x: right(x) * 1.001

    way = export._WAYS[".pt2"]._replace(run=wrong)
    monkeypatch.setitem(export._WAYS, ".pt2", way)
    path = tmp_path / "m.pt2"
    path.write_text("old")
    assert cli.main(["export", str(run), "-o", str(path)]) == 1
    assert "torch.export gives something else than the model" in capsys.readouterr().err
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_without_onnxruntime_it_says_that_nothing_was_compared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(export._WAYS, ".pt2", export._WAYS[".pt2"]._replace(run=lambda content: None))
    assert cli.main(["export", str(run), "-o", str(tmp_path / "m.pt2")]) == 0
    assert "not compared with the model: that needs onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    "output, message",
    [
        ("m.pth", "must end in .onnx, .pt2 or .safetensors, got "),
        ("missing/m.pt2", "there is no folder "),
        ("run", "it is a folder"),
        ("folder.pt2", "it is a folder"),
        ("protected.pt2", "it is write-protected"),
    ],
)
def test_refused_before_anything_is_read(
    output: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    protected = tmp_path / "protected.pt2"
    protected.touch()
    protected.chmod(0o400)
    if output == "protected.pt2" and protected.stat().st_uid == 0:
        pytest.skip("root writes everywhere")
    (run / "best.pt").write_bytes(b"not read")
    assert cli.main(["export", str(run), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("effdense export: ") and error.count("\n") == 1


def test_a_model_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))

    with pytest.raises(ValueError, match=r"^export: Branches with images 1x3x8x8 cannot be traced: \S"):
        export.export_model(Branches(), tmp_path / "m.pt2", (1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^export: \.pt2 needs input_shape"):
        export.export_model(Branches(), tmp_path / "m.pt2")
    with pytest.raises(TypeError, match=r"^export: model must be a torch.nn.Module, got str$"):
        export.export_model("model", tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
