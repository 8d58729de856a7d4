"""Fashion-MNIST's four gz files, read strictly. MNIST's, KMNIST's and others of their form can be read too."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
CLASSES, SIDE = 10, 28
_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049  # unsigned bytes, three dimensions and one


def find(data_root: str | os.PathLike[str] | None) -> Path:
    """The folder with the files: `data_root`, else `$EFFDENSE_DATA`, else where Debian's dataset-fashion-mnist puts them.

    It may also be the root of a download by torchvision, which has them two folders further down.

    Raises:
        FileNotFoundError: there is not one of the four files.
    """
    if data_root is not None:
        root, source = Path(data_root), "--data-root"
    elif os.environ.get("EFFDENSE_DATA"):
        root, source = Path(os.environ["EFFDENSE_DATA"]), "$EFFDENSE_DATA"
    else:
        root, source = DEBIAN_ROOT, "the Debian package dataset-fashion-mnist's folder"
    for folder in (root, root / "FashionMNIST" / "raw"):
        if any(path.is_file() for split in _PREFIXES for path in _paths(folder, split)):
            return folder
    raise FileNotFoundError(
        f"no Fashion-MNIST in {root} ({source}): name the folder with its four gz files in --data-root or "
        "$EFFDENSE_DATA, or install the Debian package dataset-fashion-mnist"
    )


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    images, labels = (
        folder / f"{_PREFIXES[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")
    )
    return images, labels


def read_split(root: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of "train" or "test"; `count`: the N that there must be.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged or something else, the message says what was expected and what found; images and labels
            do not belong together.
    """
    images_path, labels_path = _paths(root, split)
    images = _read(images_path, _IMAGES_MAGIC, (count, SIDE, SIDE))
    labels = _read(labels_path, _LABELS_MAGIC, (count,))
    if len(images) != len(labels):
        raise ValueError(f"{images_path} has {len(images)} images, {labels_path.name} {len(labels)} labels")
    if len(labels) and int(labels.max()) >= CLASSES:
        raise ValueError(f"{labels_path}: labels must be 0 to {CLASSES - 1}, found {labels.max()}")
    return images, labels


def _unpack(path: Path, magic: int, wanted: tuple[int | None, ...]) -> bytes:
    """What a gz file holds; of one that is cut off, what is left, and of one with more than its header says a part of that.

    A file of few bytes may unpack to gigabytes.
    """
    unpacked = bytearray()
    try:
        with gzip.open(path) as file:
            while len(unpacked) <= _size(unpacked, magic, wanted) and (part := file.read1()):
                unpacked += part
    except EOFError:
        pass  # too few bytes, which the caller sees
    except (zlib.error, gzip.BadGzipFile) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is damaged or not gzip ({size} bytes on disk: {error})") from error
    return bytes(unpacked)


def _size(content: bytes | bytearray, magic: int, wanted: tuple[int | None, ...]) -> int:
    """How many bytes there must be, as far as the header says; of another kind of file, those of a header."""
    header = 4 * (1 + len(wanted))
    if len(content) < header:
        return header
    found_magic, *shape = struct.unpack(f">{1 + len(wanted)}I", content[:header])
    is_ours = found_magic == magic and all(want in (None, n) for n, want in zip(shape, wanted, strict=True))
    return header + math.prod(shape) if is_ours else header


def _read(path: Path, magic: int, wanted: tuple[int | None, ...]) -> Tensor:
    """One gzipped IDX file: a big-endian magic number, the dimensions (None: any), then the bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (of Fashion-MNIST's files {path.parent} must hold all four)"
        )
    content = _unpack(path, magic, wanted)
    header = 4 * (1 + len(wanted))
    if len(content) < header:
        raise ValueError(f"{path} must hold {header} bytes or more when unpacked, found {len(content)}")
    found_magic, *found = struct.unpack(f">{1 + len(wanted)}I", content[:header])
    if found_magic != magic:
        raise ValueError(f"{path} must begin with the magic number {magic}, found {found_magic}")
    shape = tuple(n if want is None else want for n, want in zip(found, wanted, strict=True))
    if tuple(found) != shape:
        raise ValueError(f"{path} must hold an array of shape {shape}, its header says {tuple(found)}")
    if len(content) != header + math.prod(shape):
        more = " or more" if len(content) > header + math.prod(shape) else ""
        raise ValueError(
            f"{path} must hold {header + math.prod(shape)} bytes when unpacked, found {len(content)}{more}"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header) if shape[0] else None
    return torch.empty(shape, dtype=torch.uint8) if values is None else values.view(shape)
