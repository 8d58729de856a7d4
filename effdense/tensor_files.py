"""Files of tensors: torch.save's, read with their checksums, and safetensors', whose form is read and written here."""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from effdense import files

# By the names that safetensors has for them.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What a file begins with that is no file of tensors, and what to do about it.
_OTHERS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, whose file `git lfs pull` fetches"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "it is an array of NumPy's"),
    (b"\x1f\x8b", "it is compressed by gzip"),
    (b"<", "it is a web page or XML, as a failed download leaves"),
)

_TORCH_SAVE = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the number with which its earlier form begins


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file that torch.save wrote, of tensors and plain values, or one of safetensors, to the CPU.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or something else, which is named.
    """
    with Path(path).open("rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        file.seek(0)
        try:
            if _is_safetensors(head):
                return read_safetensors(file, size)
            if zipfile.is_zipfile(file):  # torch.load does not look at the checksums
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of {damaged} is wrong")
                    _refuse_others(archive.namelist())
            elif head.startswith(b"PK\3\4"):
                raise ValueError("it is cut off")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive or pickle makes of it
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, pickle.UnpicklingError):  # whose own advice is to run what is in the file
                reason = "or it holds a whole model, of which only the state_dict should be saved"
            raise ValueError(
                f"{path} ({size} bytes) is damaged or was not written by torch.save: {_named(head) or reason}"
            ) from error


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state_dict, as a whole or not at all: in safetensors' form if the name ends in it, else by torch.save.

    Raises:
        OSError: it cannot be written.
        ValueError: safetensors has no such dtype.
    """
    with files.replacing(path) as file:
        if Path(path).suffix == ".safetensors":
            write_safetensors(tensors, file, {}, str(path))
        else:
            torch.save(dict(tensors), file)


def write_safetensors(
    tensors: Mapping[str, Tensor], file: BinaryIO, metadata: Mapping[str, str], path: str
) -> None:
    """Writes a state_dict in safetensors' form, with texts by names in its header.

    Raises:
        ValueError: safetensors has no such dtype; the message names `path`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{path}: safetensors has no {tensor.dtype}, which {name} is of")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in plain.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in plain.values():
        file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27  # its header is no longer


def read_safetensors(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """The tensors of a file of `size` bytes, which is at its beginning.

    Raises:
        ValueError: it is cut off, has a dtype that is not known here or a tensor that does not fit.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("it is cut off")
    header = json.loads(file.read(length))
    start, loaded = 8 + length, dict[str, Tensor]()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}, which is not known here")
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} does not fit bytes {begin} to {end} of {size - start}")
        file.seek(start + begin)
        content = bytearray(file.read(end - begin))
        loaded[name] = (
            torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        ).view(shape)
    return loaded


def _refuse_others(names: list[str]) -> None:
    """Other programs' archives, which are zip files as torch.save's are."""
    if any(name.endswith("constants.pkl") for name in names):
        raise ValueError(
            "it is a TorchScript program: torch.jit.load(path).state_dict() is what can be saved"
        )
    if any(name.endswith(".npy") for name in names):
        raise ValueError("it is an archive of NumPy's arrays")
    if any(name.endswith(".h5") for name in names):
        raise ValueError("it is a model of Keras'")


def _named(head: bytes) -> str:
    """What a file is that is no file of tensors, if its beginning tells."""
    if not head:
        return "it is empty"
    if _is_safetensors(head):
        return ""
    for start, what in _OTHERS:
        if head.lstrip().startswith(start):
            return what
    if head.startswith(b"\x80") and _TORCH_SAVE not in head:
        return "it was pickled without torch.save"
    return "it is text" if all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head) else ""
