"""Files of tensors: both forms, what safetensors cannot hold, and what is something else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effdense import models
from effdense.tensor_files import load_tensors, save_tensors
from tests.models.test_weights import make

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)


def some() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 2) * 9).to(dtype) for dtype in (*DTYPES, torch.int8)}
    return {
        **tensors,
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "strided": torch.randn(4, 6)[::2, 1:3].t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a name of ö": torch.randint(0, 255, (2, 2), dtype=torch.uint8),
    }


SAFE = "weights.safetensors"


def needs_library(name: str) -> None:
    if name.lower().endswith("safetensors"):
        pytest.importorskip("safetensors")


@pytest.mark.parametrize("name", [SAFE, "WEIGHTS.SAFETENSORS", "weights.pt"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    needs_library(name)
    save_tensors(some(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(b"PK") == name.endswith(".pt")
    loaded = load_tensors(tmp_path / name)
    assert set(loaded) == set(some())
    for key, tensor in some().items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key], tensor)


def test_tied_and_negated_tensors(tmp_path: Path) -> None:
    needs_library(SAFE)
    x = torch.arange(6.0)
    tensors = {"a": x, "tied": x, "part": x[2:4], "expanded": x[:1].expand(3), "negated": torch._neg_view(x)}
    save_tensors(tensors, tmp_path / SAFE)
    assert {k: t.tolist() for k, t in load_tensors(tmp_path / SAFE).items()} == {
        k: t.tolist() for k, t in tensors.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, make, message",
    [
        ("x", lambda: {"a": 1}, "x is a dict, and safetensors has tensors only"),
        ("x", lambda: torch.zeros(2, device="meta"), "x is on the meta device and has no numbers"),
        ("x", lambda: torch.eye(2).to_sparse(), "x is torch.sparse_coo, which"),
        ("x", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "x is quantised, which"),
        ("x", lambda: nn.LazyLinear(2).weight, r"x has no shape yet \(run the model once\)"),
        ("__metadata__", lambda: torch.zeros(2), "__metadata__ is what safetensors calls its own texts"),
    ],
)
def test_what_safetensors_cannot_hold(name: str, make: Any, message: str, tmp_path: Path) -> None:
    needs_library(SAFE)
    with pytest.raises(
        ValueError, match=rf"{SAFE}: {message}.*; a name that ends in .pt is written by torch.save"
    ):
        save_tensors({"before": torch.ones(1), name: make()}, tmp_path / SAFE)
    assert not list(tmp_path.iterdir())


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    install = r"safetensors.* needs safetensors, which .*: pip install 'effdense\[safetensors\]'$"
    with pytest.raises(ImportError, match=install):
        save_tensors({"x": torch.ones(1)}, tmp_path / SAFE)
    assert not list(tmp_path.iterdir())
    (tmp_path / SAFE).write_bytes(whole())
    with pytest.raises(ImportError, match=install):
        load_tensors(tmp_path / SAFE)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model._orig_mod."])
def test_weights_of_a_model(name: str, prefix: str, tmp_path: Path) -> None:
    """Lightning's modules have the model as an attribute."""
    needs_library(name)
    model = make()
    if prefix:
        state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
        content: Any = state if name.endswith("safetensors") else {"state_dict": state, "epoch": 3}
        if name.endswith("safetensors"):
            save_tensors(content, tmp_path / name)
        else:
            torch.save(content, tmp_path / name)
    else:
        models.save_weights(model, tmp_path / name)
    other = models.load_weights(make(), tmp_path / name)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


def script() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.ReLU()), content)
    return content.getvalue()


def archive(name: str) -> bytes:
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, b"x")
    return content.getvalue()


def whole(offset: int = 0, **entry: Any) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return (len(header) + offset).to_bytes(8, "little") + header + bytes(8)


UNPACK = "which has to be unpacked first"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (bytes(900), "it begins with zeros, as a failed download leaves"),
        (b"weights\n" * 99, "it is text"),
        ("Gewichte für ein Netz\n".encode() * 40, "it is text"),
        ("weights\n".encode("utf-16"), "it is text"),
        (b'{"epoch": 3}', "it is text"),
        (b"\n<!DOCTYPE html><title>404</title>", "it is a web page or XML, as a failed download leaves"),
        (b"\xef\xbb\xbf<html>", "it is a web page or XML, as a failed download leaves"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "it is an HDF5 file, as Keras writes"),
        (b"\x93NUMPY\x01\x00" + bytes(600), "it is an array of NumPy's"),
        (b"\x89PNG\r\n\x1a\n" + bytes(600), "it is a picture"),
        (gzip.compress(b"weights", mtime=0), f"it is compressed by gzip, {UNPACK}"),
        (bz2.compress(b"weights"), f"it is compressed by bzip2, {UNPACK}"),
        (b"net.pth" + bytes(250) + b"ustar" + bytes(300), f"it is a tar archive, {UNPACK}"),
        (pickle.dumps({"weight": [1.0, 2.0]}), "it was pickled without torch.save"),
        (bytes(range(256)), r"it is no file of torch.save or safetensors; it begins with b'\\x00\\x01"),
        (archive("x.npy"), "it is an archive of NumPy's arrays"),
        (archive("model.weights.h5"), "it is a model of Keras'"),
        (archive("archive_format"), "it is a program of torch.export: torch.export.load"),
        (archive("net.pth"), "it is a zip archive of net.pth, not one of torch.save's; unpack what is meant"),
        (archive("net.pth")[:40], "it is cut off"),
    ],
)
def test_what_is_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} \({len(content)} bytes\) cannot be read: {message}"):
        load_tensors(file)


def two(begin: int, end: int = 16) -> bytes:
    entries = [{"dtype": "F32", "shape": [2], "data_offsets": [i, i + 8]} for i in (0, begin)]
    header = json.dumps(dict(zip("xy", entries, strict=True))).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


@pytest.mark.parametrize(
    "content",
    [
        whole()[:40],
        whole()[:-1],
        whole() + b"x",
        whole(shape=[3]),
        whole(data_offsets=[-8, 0]),
        whole(dtype="F4"),
        whole(dtype="nothing"),
        whole(shape=[2.0]),
        whole(shape=[0, 2**70]),
        two(4),
        two(0),
        two(12, 20),
        whole(offset=3),
    ],
)
def test_damaged_files_of_safetensors(content: bytes, tmp_path: Path) -> None:
    """Cut off, longer, tensors that do not fit, overlap or leave holes."""
    needs_library(SAFE)
    (file := tmp_path / SAFE).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{file} \({len(content)} bytes\) cannot be read: safetensors says: .+$"
    ):
        load_tensors(file)


def test_other_objects_are_not_made(tmp_path: Path) -> None:
    for name, value in (
        ("argparse.Namespace", Namespace(lr=1)),
        ("torch.nn.modules.linear.Linear", nn.Linear(1, 1)),
    ):
        for new in (True, False):
            torch.save({"state_dict": {}, "x": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
            message = f"cannot be read: it holds {name}, and only tensors and plain values are read"
            with pytest.raises(ValueError, match=message):
                load_tensors(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program(tmp_path: Path) -> None:
    (file := tmp_path / "weights.pt").write_bytes(script())
    with pytest.raises(
        ValueError, match=r"it is a TorchScript program: torch.jit.load\(path\).state_dict\(\)"
    ):
        load_tensors(file)


def test_torch_saves_earlier_form(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert load_tensors(tmp_path / "x.pt")["x"].tolist() == [1, 1]
    (tmp_path / "y.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be read: ") as error:
        load_tensors(tmp_path / "y.pt")
    assert "pickled without" not in str(error.value)
