"""Fashion-MNIST: the small cut in this repository, and a strict reader for the full data set's four gz files.

Images are uint8 `[N, 28, 28]`, labels uint8 `[N]` with values 0 to 9. NOTICE holds the data's licence,
make_cut.py made the cut.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

CUT = Path(__file__).with_name("fashion_mnist_train_2000.npz")
CUT_PER_CLASS = 200
DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
SIDE = 28
MEAN, STD = 0.2860, 0.3530  # of the training images, as fractions of 255

_COUNTS = {"train": 60_000, "test": 10_000}
_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049  # IDX: unsigned bytes, three dimensions and one


def load_cut() -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of the 2,000 training examples kept here, 200 of each class, mixed."""
    with np.load(CUT) as cut:
        return cut["images"], cut["labels"]


def load_fashion_mnist(
    split: str, data_root: str | os.PathLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels of `split` ("train": 60,000 or "test": 10,000).

    The folder with the four gz files is `data_root`, else `$EFFDENSE_DATA`, else where the Debian package
    dataset-fashion-mnist puts them. Raises FileNotFoundError for a file that is missing, ValueError for one
    that is damaged or something else; the message names the file, what was expected and what was found.
    """
    if split not in _COUNTS:
        raise ValueError(f'load_fashion_mnist: split must be "train" or "test", got {split!r}')
    root = _data_root(data_root)
    count, prefix = _COUNTS[split], _PREFIXES[split]
    images = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", _IMAGES_MAGIC, (count, SIDE, SIDE))
    labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", _LABELS_MAGIC, (count,))
    if labels.max() >= CLASSES:
        raise ValueError(
            f"{prefix}-labels-idx1-ubyte.gz in {root}: labels must be 0 to 9, found {labels.max()}"
        )
    return images, labels


def to_tensors(
    images: np.ndarray, labels: np.ndarray, image_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 images `[N, 1, image_size, image_size]`, normalised, and int64 labels.

    Up to 36 pixels an image is padded with its background; beyond that it is padded to 32 and enlarged.
    """
    if image_size < SIDE:
        raise ValueError(f"image_size must be {SIDE} or more, Fashion-MNIST's own size, got {image_size}")
    pixels = torch.from_numpy(images).unsqueeze(1)
    border = (image_size if image_size <= 36 else 32) - SIDE
    before, after = border // 2, border - border // 2
    pixels = F.pad(pixels, (before, after, before, after))
    values = (pixels.to(torch.float32) / 255 - MEAN) / STD
    if image_size > 36:
        values = F.interpolate(values, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return values, torch.from_numpy(labels).to(torch.int64)


def _data_root(data_root: str | os.PathLike | None) -> Path:
    if data_root is not None:
        root, source = Path(data_root), "data_root"
    elif os.environ.get("EFFDENSE_DATA"):
        root, source = Path(os.environ["EFFDENSE_DATA"]), "$EFFDENSE_DATA"
    else:
        root, source = DEBIAN_ROOT, "the Debian package dataset-fashion-mnist's folder"
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root} ({source}): name the one with Fashion-MNIST's four gz files in --data-root or "
            "$EFFDENSE_DATA, or install the Debian package dataset-fashion-mnist"
        )
    return root


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read one gzipped IDX file: a big-endian magic number, the dimensions, then the bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (of Fashion-MNIST's files {path.parent} must hold all four)"
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is truncated or not gzip ({size} bytes on disk: {error})") from error
    header = 4 * (1 + len(shape))
    expected = header + int(np.prod(shape))
    if len(content) < header:
        raise ValueError(f"{path} must hold {expected} bytes when unpacked, found {len(content)}")
    found_magic, *found_shape = struct.unpack(f">{1 + len(shape)}I", content[:header])
    if found_magic != magic:
        raise ValueError(f"{path} must begin with the magic number {magic}, found {found_magic}")
    if tuple(found_shape) != shape:
        raise ValueError(f"{path} must hold an array of shape {shape}, its header says {tuple(found_shape)}")
    if len(content) != expected:
        raise ValueError(f"{path} must hold {expected} bytes when unpacked, found {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
