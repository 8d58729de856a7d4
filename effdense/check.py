"""Runs every operator that is present for a device against the float64 twin: `python -m effdense check`.

The shapes are small and odd; the whole takes seconds. It is what to run, and to paste into an issue, on a machine that
nobody has tried yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense import reference
from effdense.operators import operators

# images, spatial sizes, channels of each feature, output channels
SHAPES = [
    (2, (5, 7), (3, 5, 2), 6),
    (3, (1, 1), (4, 3), 5),
    (2, (33,), (13,), 3),
    (8, (16, 17), (24, 12, 12), 48),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Result(NamedTuple):
    """One operator in one dtype."""

    operator: str
    dtype: torch.dtype
    error: float  # the largest, relative to the result's root mean square, over all shapes
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within what the dtype allows; NaN is not."""
        return self.error <= self.allowed


class _Case:
    """Random arguments of one shape, the same numbers in every dtype (multiples of 1/16)."""

    def __init__(
        self, shape: tuple[int, tuple[int, ...], tuple[int, ...], int], dtype: torch.dtype, device: Any
    ):
        images, spatial, channels, out = shape
        generator = torch.Generator().manual_seed(0)
        wide = reference.accumulate_dtype(dtype)

        def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator) * 16).round().div(16).to(device, dtype)

        self.features = [random(images, c, *spatial) for c in channels]
        self.grads = [random(images, c, *spatial) for c in channels]
        self.grad_y, self.weight = random(images, out, *spatial), random(out, sum(channels))
        self.vectors = [random(sum(channels), dtype=wide) for _ in range(4)]
        self.bias = random(out, dtype=wide)

    def first(self, count: int) -> list[Tensor]:
        """Vectors for the first feature alone."""
        return [v[: self.features[0].shape[1]] for v in self.vectors[:count]]


def _channel_statistics(ops: Any, c: _Case) -> list[Tensor]:
    return list(ops.channel_statistics(c.features))


def _bottleneck(ops: Any, c: _Case) -> list[Tensor]:
    return list(ops.bottleneck(c.features, *c.vectors[:2], c.weight, c.bias, True))


def _bottleneck_backward(ops: Any, c: _Case) -> list[Tensor]:
    sums = ops.bottleneck_backward(c.features, c.grad_y, *c.vectors[:3], c.weight, c.grads, True, True)
    return [*sums, *c.grads]


def _take_gradient(ops: Any, c: _Case) -> list[Tensor]:
    ops.take_gradient(c.features, *c.vectors[:3], c.grads)
    return c.grads


def _bn_relu(ops: Any, c: _Case) -> list[Tensor]:
    ops.bn_relu(c.features[0], *c.first(2), c.grads[0])
    return c.grads[:1]


def _bn_relu_backward(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_backward(c.grads[0], c.features[0], *c.first(4), True), c.grads[0]]


OPERATORS: dict[str, Callable[[Any, _Case], list[Tensor]]] = {
    "channel_statistics": _channel_statistics,
    "bottleneck": _bottleneck,
    "bottleneck_backward": _bottleneck_backward,
    "take_gradient": _take_gradient,
    "bn_relu": _bn_relu,
    "bn_relu_backward": _bn_relu_backward,
}


def check(device: str = "cpu") -> list[Result]:
    """Runs every operator on `device` in every dtype and compares it with the float64 twin on the CPU.

    A result may differ by 16 roundings of its own dtype and 1000 of the dtype that sums are kept in, relative to its root
    mean square: far more than correct code needs and far less than a wrong index gives.
    """
    results = []
    for name, call in OPERATORS.items():
        for dtype in DTYPES:
            worst = 0.0
            wide = torch.finfo(reference.accumulate_dtype(dtype)).eps
            for shape in SHAPES:
                case = _Case(shape, dtype, device)
                got = call(operators(case.features[0]), case)
                exact = call(reference, _Case(shape, torch.float64, "cpu"))
                for a, b in zip(got, exact, strict=True):
                    error = (a.double().cpu() - b).abs().max() / b.square().mean().sqrt()
                    worst = max(worst, error.item()) if error == error else float("nan")
            results.append(Result(name, dtype, worst, 16 * torch.finfo(dtype).eps + 1e3 * wide))
    return results
