"""The calls that run every kernel in small ragged shapes, for the interpreter of PTX: operators and what they are compared with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests._cases import CONVOLUTIONS, assert_as_exact, channels_last, permit_tf32
from tests.harness.test_simt_bottleneck import ARITHMETICS, check_backward, check_forward
from tests.harness.test_simt_operators import DTYPES, OF_MAPS
from tests.ops import test_batch_norm, test_features, test_pool
from tests.ops.test_batch_norm import run_accumulate_correction, run_fold
from tests.ops.test_pool import (
    run_average,
    run_average_backward,
    run_maximum,
    run_maximum_backward,
)


class Call(NamedTuple):
    name: str  # operator, type, shape
    run: Callable[[Any], None]  # raises if an operator of this namespace is wrong


# images, spatial sizes, channels of each feature
MAPS = [
    (2, (5, 7), (3, 5, 2)),
    (1, (1, 1), (1,)),
    (3, (9, 8), (24, 12, 12)),
    (2, (33,), (13,)),
    (2, (4, 3, 5), (2, 6)),
    (1, (20, 15), (20,)),
    (1, (4, 4), (150, 150)),
]
# Of so many pixels, dense, that the sums of the blocks are added by a kernel of its own (rows.cuh, sums.cuh).
LONG = [(torch.half, (1, (8200,), (136,))), (torch.float64, (1, (32900,), (52,)))]
WITH_SUMS = ("channel_statistics", "bn_relu_backward_accumulate", "bn_relu_backward")
# images, spatial sizes, channels, kernel size
AVERAGES = [
    (2, (5, 7), 10, (2, 2)),
    (3, (7, 7), 17, (7, 7)),
    (2, (4, 3, 5), 12, (3, 1, 4)),
    (2, (33,), 48, (2,)),
    (5, (8, 8), 8, (2, 2)),
]
# images, spatial sizes, channels, kernel size, stride, padding
MAXIMA = [
    (2, (9, 8), 5, (3, 3), (2, 2), (1, 1)),
    (2, (7, 6), 16, (3, 3), (2, 2), (1, 1)),
    (2, (5, 7), 6, (2, 2), (2, 2), (0, 0)),
    (2, (4, 3, 5), 20, (2, 1, 4), (1, 2, 3), (1, 0, 2)),
]
# pixels, channels, out channels, where in wider buffers the maps lie: elements before, after
PRODUCTS = [
    (1, 1, 1, 0, 0),
    (7, 3, 5, 1, 2),
    (130, 12, 48, 4, 4),
    (147, 83, 19, 0, 5),  # pieces of 16 bytes, the last of a row in part
    (65, 24, 96, 8, 8),
    (129, 40, 160, 2, 2),
    (50, 36, 200, 0, 0),
    (1100, 8, 12, 0, 4),
]
# Cards of so few multiprocessors that larger tiles than the smallest fill them, and products: all tiles with these.
CARDS = [(1, 2), (1, 3), (1, 4), (1, 5), (3, 2), (5, 2)]
# The same of a product's statistics.
LONG_PRODUCTS = {"half": (2100, 8, 12, 0, 4), "double": (33000, 2, 3, 0, 0)}
# What may be wanted or not, of the forward: bias, norm, statistics; and of the backward.
EPILOGUES = [(False, False, True), (True, True, False), (True, True, True)]
WANTED: list[dict[str, Any]] = [
    {},
    {"correction": 4},
    {"correction": 6},
    {"correction": 6, "accumulate": False},
    {"need_grad_x": False},
    {"need_weight": False},
    {"need_features": False, "accumulate": False},
]


def every_call() -> Iterator[Call]:
    """All operators, in all types, in small shapes."""
    yield from maps()
    yield from pools()
    yield from products()


def maps() -> Iterator[Call]:
    """What goes over a map once, and vectors."""
    for dtype in DTYPES:
        for shape in MAPS:
            for op, make in OF_MAPS.items():
                if op == "bn_relu_backward" and shape is MAPS[1]:
                    continue  # nothing but rounding is left of the gradient of a batch of one value
                yield from _as_exact(
                    f"{op} {dtype} {shape}", functools.partial(make, (*shape, 1), dtype), dtype
                )
        yield Call(f"rounding {dtype}", functools.partial(check_rounding, dtype=dtype))
    for dtype, shape in LONG:
        for op in WITH_SUMS:
            *_, dense = _as_exact(
                f"{op} {dtype} {shape}", functools.partial(OF_MAPS[op], (*shape, 1), dtype), dtype
            )
            yield dense
    for dtype in (torch.float64, torch.float32):
        for given in (None, dtype):
            yield from _as_exact(f"fold {dtype} {given}", functools.partial(run_fold, given, given), dtype)
        yield from _as_exact(
            f"accumulate_correction {dtype}", functools.partial(run_accumulate_correction, 7), dtype
        )


def pools() -> Iterator[Call]:
    """The pools and their backward."""
    for dtype in DTYPES:
        for makes, every in (
            ((run_average, run_average_backward), AVERAGES),
            ((run_maximum, run_maximum_backward), MAXIMA),
        ):
            for pool in every:
                for make in makes:
                    of_pool = functools.partial(make, pool, dtype)
                    yield from _as_exact(f"{make.__name__} {dtype} {pool}", of_pool, dtype)


def products() -> Iterator[Call]:
    """The bottleneck and its backward, in every arithmetic."""
    for name, arithmetic in ARITHMETICS.items():
        for i, shape in enumerate(PRODUCTS):
            for bias, norm, statistics in EPILOGUES if i in (2, 5) else EPILOGUES[:1]:
                forward = functools.partial(
                    check_forward,
                    shape=shape,
                    arithmetic=arithmetic,
                    bias=bias,
                    norm=norm,
                    statistics=statistics,
                )
                yield _product(f"bottleneck {name} {shape} {bias, norm, statistics}", forward, name)
            for wanted in WANTED if i in (2, 6) else WANTED[:3]:
                backward = functools.partial(check_backward, shape=shape, arithmetic=arithmetic, **wanted)
                yield _product(f"bottleneck_backward {name} {shape} {wanted}", backward, name)
        if (long := LONG_PRODUCTS.get(name)) is not None:
            form: dict[str, Any] = {"shape": long, "arithmetic": arithmetic}
            forward = functools.partial(check_forward, **form, bias=False, norm=False, statistics=True)
            yield _product(f"long bottleneck {name}", forward, name)
        for card, i in CARDS:
            form = {"shape": PRODUCTS[i], "arithmetic": arithmetic}
            forward = functools.partial(check_forward, **form, bias=False, norm=False, statistics=True)
            on_card = f"{name} {PRODUCTS[i]} on {card} multiprocessors"
            yield _product(f"bottleneck {on_card}", forward, name, card)
            backward = functools.partial(check_backward, **form, **WANTED[2])
            yield _product(f"bottleneck_backward {on_card}", backward, name, card)


def check_rounding(ops: Any, dtype: torch.dtype) -> None:
    """What is stored is the nearest number of the type, ties to even."""
    x = channels_last(torch.randn(2, 16, 5, 7, dtype=torch.float64).to(dtype))
    scale = torch.rand(16, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    out = torch.full_like(x, float("nan"))
    ops.bn_relu(x, scale, torch.zeros_like(scale), out)
    exact = (x.double() * scale.double()[:, None, None]).clamp(min=0)
    assert torch.equal(out, exact.to(scale.dtype).to(dtype))


@contextlib.contextmanager
def _dense() -> Iterator[None]:
    """What operators write lies densely, and so aligned; else it is a slice, and kernels move single elements."""
    with contextlib.ExitStack() as stack:
        for module in (test_batch_norm, test_features, test_pool):
            stack.enter_context(mock.patch.object(module, "in_buffer", channels_last))
            stack.enter_context(mock.patch.object(module, "rest_is_untouched", lambda out: True))
        yield


def _as_exact(name: str, make: Callable[[], Any], dtype: torch.dtype) -> Iterator[Call]:
    def run(ops: Any, placed: Callable[[], Any]) -> None:
        torch.manual_seed(0)
        with placed():
            assert_as_exact(make(), ops, dtype)

    yield Call(name, functools.partial(run, placed=contextlib.nullcontext))
    yield Call(f"{name} dense", functools.partial(run, placed=_dense))


def _product(name: str, check: Callable[..., None], arithmetic: str, card: int = 0) -> Call:
    def run(ops: Any) -> None:
        set_back = permit_tf32(CONVOLUTIONS, arithmetic == "tf32")
        ops.override_multiprocessors(card)
        try:
            check(ops)
        finally:
            ops.override_multiprocessors(0)
            set_back()

    return Call(name, run)
