"""Fashion-MNIST: the small cut in this repository, and the full data set.

Images are uint8 `[N, 28, 28]`, labels uint8 `[N]` with values 0 to 9. NOTICE holds the data's licence,
make_cut.py made the cut.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:  # most is measured without images
    import numpy as np

CUT = Path(__file__).with_name("fashion_mnist_train_2000.npz")
CUT_PER_CLASS = 200
CLASSES = 10
SIDE = 28
MEAN, STD = 0.2860, 0.3530  # of the training images, as fractions of 255

_COUNTS = {"train": 60_000, "test": 10_000}


def load_cut() -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of the 2,000 training examples kept here, 200 of each class, mixed."""
    import numpy as np

    with np.load(CUT) as cut:
        return cut["images"], cut["labels"]


def load_fashion_mnist(
    split: str, data_root: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels of `split` ("train": 60,000 or "test": 10,000).

    The folder with the four gz files is `data_root`, else `$EFFDENSE_DATA`, else where the Debian package
    dataset-fashion-mnist puts them. Raises FileNotFoundError for a file that is missing, ValueError for one
    that is damaged or something else; the message names the file, what was expected and what was found.
    """
    if split not in _COUNTS:
        raise ValueError(f'load_fashion_mnist: split must be "train" or "test", got {split!r}')
    from effdense.train import idx  # here: peers are measured beside an effdense that does not load

    images, labels = idx.read_split(idx.find(data_root), split, _COUNTS[split])
    return images.numpy(), labels.numpy()


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
