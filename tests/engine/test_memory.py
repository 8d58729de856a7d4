"""Feature memory in counted bytes: linear in depth, and under a bound that is worked out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import models
from benchmarks.measure import peak_bytes
from tests import _stages as stages

GROWTH, BATCH, SIZE = 12, 8, 32
FLOAT = 4


def measure(depth: int, impl: str) -> int:
    """Peak of one training step above the built model and its gradients."""
    torch.manual_seed(0)
    model = models.build(f"densenet_bc_{depth}_{GROWTH}", impl).model
    x, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 10
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = lambda: F.cross_entropy(model(x), target).backward()  # noqa: E731
    step()  # whatever is allocated once
    effdense.empty_cache()  # the workspace counts
    return peak_bytes(step)


def features_of(depth: int) -> list[tuple[int, int, int]]:
    """Per block: pixels, input channels, output channels."""
    layers, channels, size, blocks = (depth - 4) // 6, 2 * GROWTH, SIZE, []
    for _ in range(3):
        blocks.append((BATCH * size * size, channels, channels + layers * GROWTH))
        channels, size = blocks[-1][2] // 2, size // 2
    return blocks


def bound(depth: int, memory: str) -> int:
    """What a step may hold at most, in bytes.

    Every block: its feature buffer, and with "balanced" the bottleneck outputs of 4 k channels. On top, in the backward of
    the first block: the buffer's gradient; of one layer the gradient of its k features, z, a y that was not kept, and
    twice z's gradient; the gradient that comes in, of half of the channels on a quarter of the pixels; and 2 MiB of
    tiles, parameter gradients and vectors.
    """
    blocks = features_of(depth)
    layers = (depth - 4) // 6
    kept = sum(pixels * out for pixels, _, out in blocks)
    if memory == "balanced":
        kept += sum(pixels * layers * 4 * GROWTH for pixels, _, _ in blocks)
    pixels, _, out = blocks[0]
    maps = 3 if memory == "balanced" else 4
    return FLOAT * (kept + pixels * out * 9 // 8 + pixels * (maps * 4 + 1) * GROWTH) + 2 * 2**20


DEPTHS = [40, 64, 100]


@pytest.mark.core
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_memory_stays_under_a_bound_that_is_linear_in_depth(memory: str) -> None:
    peaks = [measure(depth, f"effdense-{memory}") for depth in DEPTHS]
    bounds = [bound(depth, memory) for depth in DEPTHS]
    assert (bounds[2] - bounds[1]) * (64 - 40) == (bounds[1] - bounds[0]) * (100 - 64)
    for i, depth in enumerate(DEPTHS):
        assert peaks[i] <= bounds[i], f"depth {depth}: {peaks[i] / 2**20:.1f} MiB"
    for i in range(2):  # nor does a constant hide that the slope grows
        assert peaks[i + 1] - peaks[i] <= bounds[i + 1] - bounds[i]


def test_the_naive_model_does_not() -> None:
    peaks = [measure(depth, "naive") for depth in DEPTHS]
    assert peaks[2] > bound(100, "balanced")
    assert (peaks[2] - peaks[1]) / (100 - 64) > 1.3 * (peaks[1] - peaks[0]) / (64 - 40)


def kept_bytes(fused: nn.Module, x: Tensor, need: Callable[[str], bool], grad: bool = True) -> int:
    for name, p in fused.named_parameters():
        p.requires_grad_(need(name))

    def forward() -> None:
        with torch.set_grad_enabled(grad):
            fused(x)

    forward()  # the workspace
    return peak_bytes(forward)


def test_no_bottleneck_is_kept_below_what_is_trained() -> None:
    fused, x = (
        stages.converted(stages.make_naive(), "balanced").float(),
        stages.make_input((32, 32), 32).float(),
    )
    pixel = 32 * 32 * 32 * 4  # bytes of a channel
    # The buffer, and what an operator takes in passing: per thread a band of z and of nine products for each new channel.
    features = pixel * (-(-stages.ALL // 4) * 4) + torch.get_num_threads() * 1_100_000
    per_layer = stages.WIDTH * pixel
    everything = kept_bytes(fused, x, lambda _: True)
    assert features < stages.LAYERS * per_layer < everything <= features + stages.LAYERS * per_layer
    assert kept_bytes(fused, x, lambda name: "layer3" in name) <= features + per_layer
    assert kept_bytes(fused, x, lambda _: False) <= features
    assert kept_bytes(fused, x, lambda _: True, grad=False) <= features
    effdense.convert(fused, memory="minimal")
    assert kept_bytes(fused, x, lambda _: True) <= features
