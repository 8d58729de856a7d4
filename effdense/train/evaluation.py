"""Tests a model on images that the processes share."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effdense.train.batches import Batches
from effdense.train.images import Images
from effdense.train.metrics import Sums
from effdense.train.processes import Processes

Loss = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Loss,
    images: Images,
    batches: Batches,
    size: int,
    processes: Processes,
    look: Callable[[int, int], bool],
) -> Sums | None:
    """Loss and hits of all images; None: `look` has asked for an end. The model is left as it was, training or not.

    Args:
        model: all processes get the first one's running statistics.
        loss: of a model, its input and the labels: their mean, and how many are right.
        images: all of them.
        batches: makes the input.
        size: of a process's batch.
        processes: they share the images.
        look: is called with the number of each batch and how many there are, in all processes at once.
    """
    start, count, training = time.monotonic(), len(images.labels), model.training
    processes.same_buffers(model)
    numbers = processes.share(torch.arange(count))
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=processes.device)
    own = [part for part in numbers.split(size) if len(part)]
    inputs = batches.each(images, own, None)
    rounds = math.ceil(math.ceil(count / processes.count) / size)  # of the process with most
    model.eval()
    try:
        for i in range(rounds):
            if look(i, rounds):
                return None
            for x, labels in itertools.islice(inputs, 1):
                mean, hits = loss(model, x, labels)
                loss_sum += mean * len(labels)
                correct += hits
    finally:
        model.train(training)
    total, hit = processes.sum([loss_sum, correct])
    return Sums(total, hit, count, time.monotonic() - start)
