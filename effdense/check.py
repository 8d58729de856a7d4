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


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


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

        maps = [random(images, c, *spatial) for c in channels]
        self.features = [_channels_last(x) if i % 2 else x for i, x in enumerate(maps)]
        self.grads = [_channels_last(random(images, c, *spatial)) for c in channels]
        self.y, self.weight = _channels_last(random(images, out, *spatial)), random(out, sum(channels))
        self.vectors = [random(sum(channels), dtype=wide) for _ in range(4)]
        self.of_out = [random(out, dtype=wide) for _ in range(3)]
        self.average = [min(2, n) for n in spatial]
        self.maximum = [[k] * len(spatial) for k in (3, 2, 1)]  # kernel size, stride, padding
        # the first feature alone, its gradient, and what pools make of it
        self.x, self.grad = self.features[0], self.grads[0]
        averages = [n // k for n, k in zip(spatial, self.average, strict=True)]
        self.averages = random(images, channels[0], *averages)
        self.maxima = random(images, channels[0], *((n + 1) // 2 for n in spatial))

    def first(self, count: int) -> list[Tensor]:
        """Vectors for the first feature alone."""
        return [v[: self.x.shape[1]] for v in self.vectors[:count]]


def _fold(ops: Any, c: _Case) -> list[Tensor]:
    mean, var, weight, bias = c.vectors
    return [*ops.fold(mean, var.abs(), weight, bias, 1e-5), *ops.fold(mean, var.abs(), None, None, 1e-5)]


def _defer(ops: Any, c: _Case) -> list[Tensor]:
    a, b = (torch.cat([v, v]) for v in c.vectors[:2])
    ops.defer(*c.vectors, 7, a, b)
    return [a, b]


def _channel_statistics(ops: Any, c: _Case) -> list[Tensor]:
    return list(ops.channel_statistics(c.features))


def _append_features(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.append_features(c.x, c.grad), c.grad]


def _bottleneck(ops: Any, c: _Case) -> list[Tensor]:
    results = []
    for of_out in (None, None, None), c.of_out:
        y = torch.empty_like(c.y)
        results += [*ops.bottleneck(c.features, *c.vectors[:2], c.weight, *of_out, True, y), y]
    return results


def _bottleneck_backward(ops: Any, c: _Case) -> list[Tensor]:
    results = []
    for accumulate in (False, True):
        arguments = c.features, c.y, *c.vectors[:3], c.weight, c.grads
        results += ops.bottleneck_backward(*arguments, accumulate, True, True, [])
    return [*results, *c.grads]


def _take_gradient(ops: Any, c: _Case) -> list[Tensor]:
    ops.take_gradient(c.x, *c.first(3), c.grad, c.grad)
    return [c.grad]


def _bn_relu(ops: Any, c: _Case) -> list[Tensor]:
    ops.bn_relu(c.x, *c.first(2), c.grad)
    return [c.grad]


def _bn_relu_backward(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_backward(c.grad, c.x, *c.first(4), True), c.grad]


def _bn_relu_accumulate(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_accumulate(c.grad.neg(), c.x, *c.first(3), c.grad), c.grad]


def _bn_relu_avg_pool(ops: Any, c: _Case) -> list[Tensor]:
    return [ops.bn_relu_avg_pool(c.x, *c.first(2), c.average)]


def _bn_relu_avg_pool_backward(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_avg_pool_backward(c.averages, c.x, *c.first(3), c.average, c.grad), c.grad]


def _bn_relu_max_pool(ops: Any, c: _Case) -> list[Tensor]:
    scale, shift = c.first(2)
    return list(ops.bn_relu_max_pool(c.x, scale, shift, *c.maximum))


def _max_pool_backward(ops: Any, c: _Case) -> list[Tensor]:
    scale, shift = c.first(2)
    where = reference.bn_relu_max_pool(c.x, scale, shift, *c.maximum)[1]
    ops.max_pool_backward(c.maxima, where, *c.maximum, c.grad)
    return [c.grad]


OPERATORS: dict[str, Callable[[Any, _Case], list[Tensor]]] = {
    "fold": _fold,
    "defer": _defer,
    "channel_statistics": _channel_statistics,
    "append_features": _append_features,
    "bottleneck": _bottleneck,
    "bottleneck_backward": _bottleneck_backward,
    "take_gradient": _take_gradient,
    "bn_relu": _bn_relu,
    "bn_relu_backward": _bn_relu_backward,
    "bn_relu_accumulate": _bn_relu_accumulate,
    "bn_relu_avg_pool": _bn_relu_avg_pool,
    "bn_relu_avg_pool_backward": _bn_relu_avg_pool_backward,
    "bn_relu_max_pool": _bn_relu_max_pool,
    "max_pool_backward": _max_pool_backward,
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
                    error = (a.double().cpu() - b).abs().max() / b.double().square().mean().sqrt()
                    worst = max(worst, error.item()) if error == error else float("nan")
            results.append(Result(name, dtype, worst, 16 * torch.finfo(dtype).eps + 1e3 * wide))
    return results
