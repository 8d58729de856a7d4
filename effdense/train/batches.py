"""Batches: which images they hold, how these are augmented, and how they become the model's input.

Order and augmentation of an epoch come from (seed, epoch) alone, drawn for all images at once. So a run that goes on in
the middle of an epoch sees what it would have seen, and so do several processes together.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effdense.models.preparation import Preparation, padded
from effdense.train.images import Images, InMemory, pixels

BORDER = 4  # pixels, for crop-flip
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # for resized-crop: Szegedy et al., arXiv 1409.4842, section 6


class Draws(NamedTuple):
    """One epoch's chance: the order, and per image how it is augmented (None: not)."""

    order: Tensor  # [N]
    offsets: Tensor | None  # [N, 2], rows and columns in the image with its border
    boxes: Tensor | None  # [N, 4], see images.pixels
    flips: Tensor | None  # [N]


def draw(count: int, augment: str, seed: int, epoch: int) -> Draws:
    """Order and augmentation of `count` images in an epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(count, generator=generator)
    if augment == "none":
        return Draws(order, None, None, None)
    flips = torch.rand(count, generator=generator) < 0.5
    if augment == "crop-flip":
        offsets = torch.randint(2 * BORDER + 1, (count, 2), generator=generator)
        return Draws(order, offsets, None, flips)
    area, ratio, x, y = torch.rand(4, count, generator=generator, dtype=torch.float64)
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
    return Draws(order, None, torch.stack([area, ratio, x, y], 1), flips)


class Batches:
    """The model's inputs and labels, for given images.

    Args:
        prepare: what is done to images, beside the augmentation.
        like: a tensor with the model's device and dtype.
        channels_last: whether the batches have that layout.
    """

    def __init__(self, prepare: Preparation, like: Tensor, channels_last: bool) -> None:
        self._prepare, self._like = prepare, like
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._ahead = ThreadPoolExecutor(1)

    def each(
        self, images: Images, chosen: list[Tensor], draws: Draws | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch for each tensor of image numbers; files are read one batch ahead. Without `draws` nothing is augmented."""

        def read(numbers: Tensor) -> Tensor:
            return images.read(
                numbers, None if draws is None or draws.boxes is None else draws.boxes[numbers]
            )

        if isinstance(images, InMemory):
            for numbers in chosen:
                yield self._assemble(images, read(numbers), numbers, draws)
            return
        futures = [self._ahead.submit(read, numbers) for numbers in chosen[:1]]
        for i, numbers in enumerate(chosen):
            futures += [self._ahead.submit(read, later) for later in chosen[i + 1 : i + 2]]
            yield self._assemble(images, futures.pop(0).result(), numbers, draws)

    def _assemble(
        self, images: Images, x: Tensor, numbers: Tensor, draws: Draws | None
    ) -> tuple[Tensor, Tensor]:
        prepare = self._prepare
        x = x if prepare.pad is None else padded(x, prepare.pad)
        if draws is not None and draws.flips is not None:
            offsets = None if draws.offsets is None else draws.offsets[numbers]
            x = crop_and_flip(x, offsets, draws.flips[numbers])
        x = prepare.normalised(x.to(self._like.device, non_blocking=True), self._like.dtype)
        if draws is not None and draws.boxes is not None and isinstance(images, InMemory):
            x = cut(x, draws.boxes[numbers], prepare.resize or x.shape[-1])
        else:
            x = prepare.fitted(x)
        x = prepare.repeated(x)
        return x.contiguous(memory_format=self._layout), images.labels[numbers].to(x.device)


def crop_and_flip(x: Tensor, offsets: Tensor | None, flips: Tensor) -> Tensor:
    """Of every image [C, H, W] with a border of zeros the part [C, H, W] at its offset, mirrored where flips says so."""
    n, _, height, width = x.shape
    rows = torch.arange(height).expand(n, -1)
    columns = torch.where(flips[:, None], torch.arange(width).flip(0), torch.arange(width))
    if offsets is not None:
        x = F.pad(x, (BORDER,) * 4)
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    picked = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C]
    return picked.permute(0, 3, 1, 2)


def cut(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Of every image the part in its box (images.pixels), brought to [C, size, size]."""
    height, width = x.shape[-2:]
    parts = torch.tensor([pixels(box, width, height) for box in boxes.tolist()], dtype=torch.float64)
    left, top, w, h = parts.T
    theta = torch.zeros(len(x), 2, 3, dtype=torch.float64)
    theta[:, 0, 0], theta[:, 0, 2] = w / width, (2 * left + w) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
    grid = F.affine_grid(theta.to(x), [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")
