"""Files of tensors: torch.save's, read with their checksums, and safetensors', by its own library."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from effdense import extras, files

# What a file begins with that is no file of tensors, and what to do about it.
_UNPACK = "which has to be unpacked first"
_OTHERS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, whose file `git lfs pull` fetches"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "it is an array of NumPy's"),
    (b"\x1f\x8b", f"it is compressed by gzip, {_UNPACK}"),
    (b"BZh", f"it is compressed by bzip2, {_UNPACK}"),
    (b"\xfd7zXZ", f"it is compressed by xz, {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"it is compressed by zstd, {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"it is an archive of 7-Zip's, {_UNPACK}"),
    (b"Rar!", f"it is an archive of RAR's, {_UNPACK}"),
    (b"\x89PNG", "it is a picture"),
    (b"\xff\xd8\xff", "it is a picture"),
    (b"<", "it is a web page or XML, as a failed download leaves"),
)
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")  # in front of text
_TORCH_SAVE = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the number with which its earlier form begins


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file that torch.save wrote, of tensors and plain values, or one of safetensors, to the CPU.

    Raises:
        ImportError: it is one of safetensors, which is not installed.
        OSError: it cannot be opened.
        ValueError: it is damaged or something else, which is named.
    """
    with open(os.fspath(path), "rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        file.seek(0)
        try:
            if _is_safetensors(head):
                return read_safetensors(file.read(), f"{path}, a file of safetensors,")
            _check_archive(file) if head.startswith(b"PK") else _check_head(head)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except ImportError:
            raise
        except Exception as error:  # whatever a damaged archive or pickle makes of it
            raise ValueError(f"{path} ({size} bytes) cannot be read: {_reason(error)}") from error


def save_tensors(tensors: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a state_dict, as a whole or not at all: in safetensors' form if the name ends in it, else by torch.save.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written.
        ValueError: safetensors has nothing for one of them.
    """
    if Path(path).suffix.lower() == ".safetensors":
        content = safetensors_of(tensors, {}, str(path))
        with files.replacing(path) as file:
            file.write(content)
        return
    with files.replacing(path) as file:
        torch.save(dict(tensors), file)


def safetensors_of(tensors: Mapping[str, Any], metadata: Mapping[str, str], path: str) -> bytes:
    """A state_dict in safetensors' form, with texts by names in its header; `path` is for messages.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: safetensors has nothing for one of them.
    """
    library = extras.load("safetensors.torch", path)
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        if why := _no_safetensor(name, tensor):
            raise ValueError(f"{path}: {name} {why}; a name that ends in .pt is written by torch.save")
        plain[name] = tensor.detach().cpu().resolve_neg().contiguous()
        if plain[name].untyped_storage().data_ptr() in places:  # tied: the library wants each apart
            plain[name] = plain[name].clone()
        places.add(plain[name].untyped_storage().data_ptr())
    try:
        content: bytes = library.save(plain, {"format": "pt", **metadata})
    except (KeyError, ValueError) as error:  # KeyError: of a dtype that it does not know
        raise ValueError(f"{path}: safetensors says: {_reason(error)}") from error
    return content


def _no_safetensor(name: str, tensor: Any) -> str | None:
    """Why there can be no such tensor in a file of safetensors, or None."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, and safetensors has tensors only"
    if name == "__metadata__":
        return "is what safetensors calls its own texts"
    if is_lazy(tensor):
        return "has no shape yet (run the model once), which safetensors wants to know"
    if tensor.is_meta:
        return "is on the meta device and has no numbers"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is {'quantised' if tensor.is_quantized else tensor.layout}, which safetensors does not have"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, and safetensors has plain tensors only"
    return None


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27  # its header is no longer


def read_safetensors(content: bytes, what: str) -> dict[str, Tensor]:
    """The tensors of a file; `what` needs the library, in messages.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: it is cut off or damaged.
    """
    library = extras.load("safetensors.torch", what)
    error: type[Exception] = extras.load("safetensors", what).SafetensorError
    try:
        loaded: dict[str, Tensor] = library.load(content)
    except (KeyError, error) as damage:  # KeyError: of a dtype that the library does not know in torch
        raise ValueError(f"safetensors says: {damage}") from damage
    return loaded


def shortly(value: Any) -> str:
    """Something that a file holds, in a line of at most 60 characters."""
    return f"{' '.join(repr(value).split()):.60}"


def _check_archive(file: BinaryIO) -> None:
    """Raises ValueError where a zip file is not one that torch.save has written, or is damaged: torch.load does not look at the checksums."""
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut off, as a download leaves that has not ended")
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"it is damaged: the checksum of {damaged} is wrong")
        names = archive.namelist()
    for ending, what in _ARCHIVES:
        if any(name.endswith(ending) for name in names):
            raise ValueError(what)
    if not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(names[:3]) or "nothing"
        raise ValueError(f"it is a zip archive of {some}, not one of torch.save's; unpack what is meant")


# By a name in them: other programs' archives, which are zip files as torch.save's are.
_ARCHIVES = (
    ("constants.pkl", "it is a TorchScript program: torch.jit.load(path).state_dict() is what can be saved"),
    (
        "archive_format",
        "it is a program of torch.export: torch.export.load(path).state_dict is what can be saved",
    ),
    (".npy", "it is an archive of NumPy's arrays"),
    (".h5", "it is a model of Keras'"),
)


def _check_head(head: bytes) -> None:
    """Raises ValueError where a file does not begin as torch.save's earlier form does."""
    text = head
    for mark in _MARKS:
        text = text.removeprefix(mark)
    for start, what in _OTHERS:
        if text.lstrip().startswith(start):
            raise ValueError(what)
    if _TORCH_SAVE in head:
        return
    if not head.strip(b"\0"):
        raise ValueError(f"it {'is empty' if not head else 'begins with zeros, as a failed download leaves'}")
    if head.startswith(b"\x80"):
        raise ValueError("it was pickled without torch.save")
    if head[257:262] == b"ustar":
        raise ValueError(f"it is a tar archive, {_UNPACK}")
    if text is not head or all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head) or _is_utf8(head):
        raise ValueError("it is text")
    raise ValueError(f"it is no file of torch.save or safetensors; it begins with {head[:12]!r}")


def _is_utf8(head: bytes) -> bool:
    try:
        return head.decode(errors="strict").isprintable() or "\n" in head.decode()
    except UnicodeDecodeError as error:
        return error.start > 500 and head[: error.start].decode().replace("\n", "").isprintable()


def _reason(error: Exception) -> str:
    """What is wrong, in one line."""
    text = str(error).strip()
    if not isinstance(error, pickle.UnpicklingError):
        return text.partition("\n")[0] or type(error).__name__
    found = re.search(r"(?:GLOBAL|class|type|instantiate) ([\w.]+\.\w+)", text)
    if found is None:
        return "it is damaged, or torch.save has not written it"
    # torch's own advice is to run what is in the file
    return (
        f"it holds {found[1]}, and only tensors and plain values are read, as other objects may run code; if you trust where it is "
        "from, save the state_dict of torch.load(path, weights_only=False) alone"
    )
