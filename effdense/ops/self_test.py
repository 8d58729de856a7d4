"""`effdense check`: runs every operator that a device has and compares it with the float64 reference.

The shapes are small and odd; the whole takes seconds. It is what to run, and to paste into an issue, on a machine that
nobody has tried yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.ops import reference
from effdense.ops.dispatch import has_kernel
from effdense.ops.reference import channels_last


class Number(NamedTuple):
    """A dtype, and how operands of products are rounded."""

    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


_ON_EVERY_DEVICE = [Number(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
NUMBERS = {
    "cpu": _ON_EVERY_DEVICE,
    "cuda": [*_ON_EVERY_DEVICE, Number(torch.float32, tf32=True), Number(torch.float16)],
}
TF32_ROUNDING = 2.0**-10
# What the products' launches are cut for, in multiprocessors, besides the card itself (0): the last of SHAPES then has each of
# the tiles that maps of many pixels have.
CARDS = (1, 22, 60, 0)

Shape = tuple[int, tuple[int, ...], tuple[int, ...], int]
# images, spatial sizes, channels of each feature, output channels
SHAPES: list[Shape] = [
    (2, (5, 7), (3, 5, 2), 6),
    (3, (1, 1), (4, 3), 5),
    (2, (33,), (13,), 3),
    (8, (16, 17), (24, 12, 12), 48),
]


class Result(NamedTuple):
    """One operator in one kind of numbers."""

    operator: str
    number: Number
    error: float  # the largest, relative to the result's root mean square, over all shapes
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within what the numbers allow; NaN is not."""
        return self.error <= self.allowed


class _Case:
    """Random arguments of one shape, the same numbers in every dtype: multiples of 1/16, in vectors of 1/1024."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: Any):
        images, spatial, channels, out = shape
        generator = torch.Generator("cpu").manual_seed(0)
        wide = reference.accumulate_dtype(dtype)

        def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            steps = 1024 if len(size) == 1 else 16
            numbers = torch.randn(size, generator=generator, device="cpu") * steps
            return numbers.round().div(steps).to(device, dtype)

        maps = [random(images, c, *spatial) for c in channels]
        self.features = [channels_last(x) if i % 2 else x for i, x in enumerate(maps)]
        self._grads = [channels_last(random(images, c, *spatial)) for c in channels]
        self.y, self.weight = channels_last(random(images, out, *spatial)), random(out, sum(channels))
        self.vectors = [random(sum(channels), dtype=wide) for _ in range(4)]
        self.of_out = [random(out, dtype=wide) for _ in range(3)]
        self.average = [min(2, n) for n in spatial]
        self.maximum = [[k] * len(spatial) for k in (3, 2, 1)]  # kernel size, stride, padding
        # the first feature alone, its gradient, and what pools make of it
        self.x = self.features[0]
        averages = [n // k for n, k in zip(spatial, self.average, strict=True)]
        self.averages = random(images, channels[0], *averages)
        self.conv = random(out, channels[0], *[3] * len(spatial))
        self.maxima = random(images, channels[0], *((n + 1) // 2 for n in spatial))

    def renewed(self) -> _Case:
        """Itself, with what operators write as it was in the beginning."""
        self.grads = [grad.clone() for grad in self._grads]
        self.grad = self.grads[0]
        return self

    def first(self, count: int) -> list[Tensor]:
        """Vectors for the first feature alone."""
        return [v[: self.x.shape[1]] for v in self.vectors[:count]]


def _fold(ops: Any, c: _Case) -> list[Tensor]:
    mean, var, weight, bias = c.vectors
    return [*ops.fold(mean, var.abs(), weight, bias, 1e-5), *ops.fold(mean, var.abs(), None, None, 1e-5)]


def _accumulate_correction(ops: Any, c: _Case) -> list[Tensor]:
    a, b = (torch.cat([v, v]) for v in c.vectors[:2])
    ops.accumulate_correction(*c.vectors, 7, a, b)
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
    y, norm = torch.ones_like(c.y), [c.of_out[1], c.of_out[2]]
    for accumulate, correction in ((False, []), (True, [y, *c.of_out]), (True, [y, *c.of_out, *norm])):
        arguments = c.features, c.y, *c.vectors[:3], c.weight, c.grads
        results += ops.bottleneck_backward(*arguments, accumulate, True, True, correction)
    return [*results, *c.grads]


def _bn_relu_conv3x3(ops: Any, c: _Case) -> list[Tensor]:
    out = torch.empty_like(c.y)
    return [*ops.bn_relu_conv3x3(c.x, *c.first(2), c.conv, c.of_out[0], out), out]


def _bn_relu_conv3x3_backward(ops: Any, c: _Case) -> list[Tensor]:
    results = []
    for accumulate in (False, True):
        arguments = c.y, c.x, *c.first(3), c.conv, c.grad
        results += ops.bn_relu_conv3x3_backward(*arguments, accumulate, True, True)
    return [*results, c.grad]


def _apply_correction(ops: Any, c: _Case) -> list[Tensor]:
    ops.apply_correction(c.x, *c.first(3), c.grad, c.grad)
    return [c.grad]


def _bn_relu(ops: Any, c: _Case) -> list[Tensor]:
    ops.bn_relu(c.x, *c.first(2), c.grad)
    return [c.grad]


def _bn_relu_backward_sums(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_backward_sums(c.grad.neg(), c.x, *c.first(3), c.grad), c.grad]


def _bn_relu_backward(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_backward(c.grad, c.x, *c.first(4), True), c.grad]


def _bn_relu_backward_accumulate(ops: Any, c: _Case) -> list[Tensor]:
    return [*ops.bn_relu_backward_accumulate(c.grad.neg(), c.x, *c.first(3), c.grad), c.grad]


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


def _update_running_statistics(ops: Any, c: _Case) -> list[Tensor]:
    running = [v.clone() for v in c.vectors[:2]]
    ops.update_running_statistics(running, c.vectors[2:], [0.875, 0.5], [0.125, 0.5])
    return running


OPERATORS: dict[str, Callable[[Any, _Case], list[Tensor]]] = {
    "fold": _fold,
    "accumulate_correction": _accumulate_correction,
    "channel_statistics": _channel_statistics,
    "append_features": _append_features,
    "bottleneck": _bottleneck,
    "bottleneck_backward": _bottleneck_backward,
    "bn_relu_conv3x3": _bn_relu_conv3x3,
    "bn_relu_conv3x3_backward": _bn_relu_conv3x3_backward,
    "apply_correction": _apply_correction,
    "bn_relu": _bn_relu,
    "bn_relu_backward_sums": _bn_relu_backward_sums,
    "bn_relu_backward": _bn_relu_backward,
    "bn_relu_backward_accumulate": _bn_relu_backward_accumulate,
    "bn_relu_avg_pool": _bn_relu_avg_pool,
    "bn_relu_avg_pool_backward": _bn_relu_avg_pool_backward,
    "bn_relu_max_pool": _bn_relu_max_pool,
    "max_pool_backward": _max_pool_backward,
    "update_running_statistics": _update_running_statistics,
}


@contextlib.contextmanager
def _multiprocessors(ops: Any, count: int) -> Iterator[None]:
    """For how many multiprocessors this thread's launches are cut; 0: for the card's."""
    ops.override_multiprocessors(count)
    try:
        yield
    finally:
        ops.override_multiprocessors(0)


@contextlib.contextmanager
def _tf32(ops: Any, permitted: bool) -> Iterator[None]:
    """Whether the products of this thread may round to TF32, where there is such a thing. PyTorch's setting stays as it is."""
    override = getattr(ops, "override_tf32", lambda permitted: None)
    override(permitted)
    try:
        yield
    finally:
        override(None)


def check(
    device: str,
    ops: Any,
    numbers: Sequence[Number] | None = None,
    shapes: Sequence[Shape] = SHAPES,
) -> list[Result]:
    """Runs every operator that `ops` has on `device` in every kind of numbers and compares it with the float64 twin on the CPU.

    A result may differ by 16 roundings of its own numbers and 1000 of the dtype that sums are kept in, relative to its root
    mean square: far more than correct code needs and far less than a wrong index gives.
    """
    kind = torch.device(device).type
    names = [name for name in OPERATORS if has_kernel(ops, name, kind)]
    numbers = NUMBERS.get(kind, _ON_EVERY_DEVICE) if numbers is None else numbers
    # a product is what TF32 changes
    worst = {
        (name, number): 0.0
        for name in names
        for number in numbers
        if not number.tf32 or name.startswith("bottleneck")
    }
    for shape in shapes:
        exact_case = _Case(shape, torch.float64, "cpu")
        exact = {name: OPERATORS[name](reference, exact_case.renewed()) for name in names}
        cases = {number: _Case(shape, number.dtype, device) for number in numbers}
        for name, number in worst:
            for got in _runs(name, ops, cases[number], number):
                for a, b in zip(got, exact[name], strict=True):
                    error = (a.double().cpu() - b).abs().max() / b.double().square().mean().sqrt()
                    found = error.item() if error == error else float("nan")
                    worst[name, number] = max(worst[name, number], found) if found == found else found
    return [Result(name, number, error, _allowed(number)) for (name, number), error in worst.items()]


def _runs(name: str, ops: Any, case: _Case, number: Number) -> Iterator[list[Tensor]]:
    """The operator's results; of a product on a card once in every tile."""
    with _tf32(ops, number.tf32):
        if not (name.startswith("bottleneck") and hasattr(ops, "override_multiprocessors")):
            yield OPERATORS[name](ops, case.renewed())
            return
        for count in CARDS:
            with _multiprocessors(ops, count):
                yield OPERATORS[name](ops, case.renewed())


def _allowed(number: Number) -> float:
    rounding = TF32_ROUNDING if number.tf32 else torch.finfo(number.dtype).eps
    return 16 * rounding + 1e3 * torch.finfo(reference.accumulate_dtype(number.dtype)).eps
