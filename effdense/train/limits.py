"""Refuses, before anything is built, batches that cannot be made of the images or do not fit into the machine."""

from __future__ import annotations

import os

import torch

from effdense.train.processes import Processes
from effdense.train.settings import RunConfig


def check_sizes(settings: RunConfig, processes: Processes, images: int, channels: int) -> None:
    """Refuses batches that make no sense; `images`: of the training, `channels`: of each.

    Raises:
        ValueError: the message says which options do not go together.
    """
    if settings.sync_bn and settings.impl != "effdense" and processes.device.type == "cpu":
        raise ValueError(
            f"--sync-bn with --impl {settings.impl} needs GPUs: PyTorch's own SyncBatchNorm does not run on CPUs"
        )
    batch, count, parts = settings.recipe.batch_size, processes.count, settings.accumulate
    if count > images:
        raise ValueError(f"there are more processes ({count}) than training images ({images})")
    if batch > images:
        raise ValueError(f"--batch-size {batch} is more than there are training images, {images}")
    own, rest = divmod(batch, parts * count)
    _check_input(settings, own * channels)
    if rest or own < 1:
        raise ValueError(
            f"--batch-size {batch} must be a multiple of --accumulate {parts} times {count} processes"
        )
    if own == 1 and not (settings.sync_bn and count > 1):
        raise ValueError(
            "batch norm needs two images or more at a time for its statistics, and --batch-size "
            f"{batch} in {parts * count} parts leaves one; on several processes --sync-bn helps"
        )


def _check_input(settings: RunConfig, maps: int) -> None:
    """Refuses images that a machine does not hold even alone; `maps`: images times channels."""
    side = settings.recipe.resize or settings.recipe.pad or 0
    needed = maps * side**2 * torch.finfo(getattr(torch, settings.dtype)).bits // 8
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"a batch of images of {side}x{side} pixels alone takes {needed / 2**30:.0f} GiB, and this machine has "
            f"{there / 2**30:.0f}: a smaller --resize, --pad or --batch-size is needed"
        )
