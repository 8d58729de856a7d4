"""Runs a model over images: in batches that fit a budget, the next one read meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from effdense.inference.sources import Source
from effdense.inference.trained import Trained
from effdense.tools.planner import largest_batch

MOST = 256  # images in a batch; more save no time
UNPLANNED = 16  # of a model that the planner does not know


class Scored(NamedTuple):
    """A batch: the numbers of the images, what the model says of them [n, classes], and which could not be read, and why."""

    numbers: list[int]
    scores: Tensor
    unread: list[str]


def batch_size(trained: Trained, source: Source, budget: int) -> int:
    """The largest batch, up to MOST, with which the model and the images stay within `budget` bytes, as planned for the CPU.

    Raises:
        ValueError: one image is too much.
    """
    prepare, like = trained.prepare, trained.like
    most = min(MOST, max(1, len(source)))
    side = prepare.resize or prepare.pad
    height, width = (side, side) if side else source.largest()
    read, channels = len(prepare.mean), prepare.channels
    # Pixels of this batch and the next, and as a tensor; then in the model's dtype, on the way to mean 0 and deviation 1.
    extra = height * width * (3 * read + 3 * like.element_size() * max(read, channels))
    memory = "balanced" if trained.fused else "naive"
    budget -= 0 if trained.fused else budget // 4  # what oneDNN takes for itself is not in the plan
    shape = (most, channels, height, width)
    try:
        found = largest_batch(
            trained.model, shape, budget, memory=memory, training=False, most=most, extra=extra
        )
    except ValueError as error:
        print(f"no plan of this model's memory, batches of {UNPLANNED}: {error}", file=sys.stderr)
        return min(UNPLANNED, most)
    if not found:
        raise ValueError(
            f"--budget: the model and one image of {height}x{width} take more than {budget / 2**20:.0f} MiB; --batch 1 tries it"
        )
    return found


def scored(trained: Trained, source: Source, batch: int) -> Iterator[Scored]:
    """What the model says of all images, in order.

    Raises:
        ValueError: the model does not run on images of their size.
    """
    parts = [range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(source.read, part) for part in parts[:1]]
        for i, part in enumerate(parts):
            coming += [ahead.submit(source.read, later) for later in parts[i + 1 : i + 2]]
            read = coming.pop(0).result()
            by_size: dict[tuple[int, ...], dict[int, Tensor]] = {}
            for number, pixels in zip(part, read, strict=True):
                if isinstance(pixels, Tensor):
                    by_size.setdefault(tuple(pixels.shape), {})[number] = pixels
            found: dict[int, Tensor] = {}
            for some in by_size.values():
                found.update(zip(some, trained.scores(list(some.values())), strict=True))
            numbers = sorted(found)
            rows = [found[number] for number in numbers]
            scores = torch.stack(rows) if rows else torch.empty(0, len(trained.class_names))
            yield Scored(numbers, scores, [x for x in read if isinstance(x, str)])
