"""Files of tensors: safetensors' form both ways, against its own library where that is there, and what is something else."""

from __future__ import annotations

import gzip
import io
import json
import pickle
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


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    save_tensors(some(), tmp_path / name)
    loaded = load_tensors(tmp_path / name)
    assert list(loaded) == list(some())
    for key, tensor in some().items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key], tensor)


def test_the_librarys_own_files(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    contiguous = {name: tensor.contiguous() for name, tensor in some().items()}
    library.save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"epoch": "3"})
    save_tensors(some(), tmp_path / "ours.safetensors")
    theirs, own = (
        load_tensors(tmp_path / "theirs.safetensors"),
        library.load_file(tmp_path / "ours.safetensors"),
    )
    assert set(theirs) == set(own) == set(contiguous)
    for name, tensor in contiguous.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(own[name], tensor)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safetensors has no torch.complex64, which x is of"):
        save_tensors({"x": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model._orig_mod."])
def test_weights_of_a_model(name: str, prefix: str, tmp_path: Path) -> None:
    """Lightning's modules have the model as an attribute."""
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


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"weights\n" * 99, "it is text"),
        (b'{"epoch": 3}', "it is text"),
        (b"\n<!DOCTYPE html><title>404</title>", "it is a web page or XML, as a failed download leaves"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "it is an HDF5 file, as Keras writes"),
        (b"\x93NUMPY\x01\x00" + bytes(600), "it is an array of NumPy's"),
        (gzip.compress(b"weights", mtime=0), "it is compressed by gzip"),
        (pickle.dumps({"weight": [1.0, 2.0]}), "it was pickled without torch.save"),
        (archive("x.npy"), "it is an archive of NumPy's arrays"),
        (archive("model.weights.h5"), "it is a model of Keras'"),
        (whole()[:40], "it is cut off"),
        (whole()[:-1], r"x of shape \[2\] does not fit bytes 0 to 8 of 7"),
        (whole(shape=[3]), r"x of shape \[3\] does not fit bytes 0 to 8 of 8"),
        (whole(data_offsets=[-8, 0]), r"x of shape \[2\] does not fit bytes -8 to 0"),
        (whole(dtype="F4"), "x is of dtype F4, which is not known here"),
        (whole(offset=3), "Extra data|Expecting|Invalid|decode"),
    ],
)
def test_what_is_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} \({len(content)} bytes\) is damaged or .*: .*({message})"):
        load_tensors(file)


def test_the_length_of_a_header_is_no_name(tmp_path: Path) -> None:
    """A file of safetensors begins with any byte, such as a web page's."""
    for length in range(64):
        content = whole(note="x" * length)
        (tmp_path / "x").write_bytes(content)
        assert load_tensors(tmp_path / "x")["x"].tolist() == [0, 0]
        (tmp_path / "x").write_bytes(content[:-1])
        with pytest.raises(ValueError, match=r"x of shape .* does not fit bytes 0 to 8 of 7"):
            load_tensors(tmp_path / "x")


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
    with pytest.raises(ValueError, match="is damaged") as error:
        load_tensors(tmp_path / "y.pt")
    assert "pickled without" not in str(error.value)
