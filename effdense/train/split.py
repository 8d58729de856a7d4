"""Which images a run is trained on, which ones pick its best epoch, and which are only tested."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effdense.train.images import DataSet, Images
from effdense.train.settings import RunConfig


class Parts(NamedTuple):
    """The images of a run.

    `watched` are tested after every epoch and pick the best: those of the validation, which is set aside from the training
    images, or without one those of the test. `watched_name` is its name in metrics.csv.
    """

    train: Images
    watched: Images
    watched_name: str  # val or test


def split(settings: RunConfig, data: DataSet) -> Parts:
    """The parts of a data set, of which `limit_train` leaves the first training images.

    Raises:
        ValueError: none would be left in one of the parts.
    """
    there = len(data.train.labels)
    count = min(settings.limit_train or there, there)
    part = settings.recipe.val_split
    if not part:
        train = data.train if count == there else data.train.subset(torch.arange(count))
        return Parts(train, data.test, "test")
    numbers = stratified(data.train.labels[:count], part, settings.seed)
    if not len(numbers):
        raise ValueError(
            f"--val-split {part:g}: no class of the {count} training images has enough for one of them"
        )
    kept = torch.ones(count, dtype=torch.bool)
    kept[numbers] = False
    return Parts(data.train.subset(kept.nonzero()[:, 0]), data.train.subset(numbers), "val")


def stratified(labels: Tensor, part: float, seed: int) -> Tensor:
    """The numbers, in order, of a random part of every class's images, of each at least one if it leaves another."""
    generator = torch.Generator().manual_seed((seed << 20) + 2**19)  # no epoch's: draw has 2^20 of them
    chosen = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        wanted = min(max(1, round(part * len(own))), len(own) - 1)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values
