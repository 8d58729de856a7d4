"""The compiled operators on shapes, layouts, dtypes and options at random, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from effdense.ops import reference
from tests._cases import DTYPES, LAYOUTS
from tests.fuzz._fuzz import fuzz
from tests.ops import test_batch_norm, test_conv3x3, test_features, test_pool
from tests.ops import test_bottleneck as of_bottleneck

pytestmark = pytest.mark.compiled
OPS = torch.ops.effdense
LARGEST = 6000  # values in a map


class Map(NamedTuple):
    """Images, their sizes, the channels of each feature, output channels; the numbers in it."""

    images: int
    spatial: tuple[int, ...]
    channels: tuple[int, ...]
    out: int
    dtype: torch.dtype
    threads: int
    seed: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """As the operators' tests take it."""
        return self[:4]


@st.composite
def maps(draw: Any, features: int = 5) -> Map:
    """Sizes of 0 and 1 are likely, and those about the widths of registers and tiles."""
    sizes = st.one_of(st.integers(0, 2), st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33]))
    widths = st.one_of(st.integers(1, 5), st.integers(1, 40), st.sampled_from([8, 16, 32, 64]))
    spatial = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    channels = tuple(draw(st.lists(widths, min_size=1, max_size=features)))
    images = draw(st.one_of(st.integers(0, 3), st.integers(0, 40)))
    while images * math.prod(spatial) * sum(channels) > LARGEST and max((images, *spatial)) > 3:
        images = (images + 1) // 2
        spatial = tuple(min(n, max(3, n - 5)) for n in spatial)
    return Map(
        images,
        spatial,
        channels,
        draw(widths),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


layouts = st.sampled_from(list(LAYOUTS))
flags = st.booleans()


def assert_near(run: Callable[[Any, torch.dtype], Any], case: Map) -> None:
    """Within 16 roundings of the results' own kind and 1000 of the kind that sums are kept in, or what plain PyTorch is off by.

    Far more than correct code needs, far less than a wrong index gives: nobody looks at all of these cases.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        got = run(OPS, case.dtype)
    finally:
        torch.set_num_threads(before)
    wide = torch.finfo(reference.accumulate_dtype(case.dtype)).eps
    roundings = 16 * torch.finfo(case.dtype).eps + 1000 * wide
    for a, plain, exact in zip(got, run(reference, case.dtype), run(reference, torch.float64), strict=True):
        assert a.dtype == plain.dtype and a.shape == plain.shape == exact.shape
        if not exact.is_floating_point():
            assert torch.equal(a, plain)
        elif exact.numel():
            allowed = 4 * (plain.double() - exact).abs().max() + roundings * exact.abs().max().clamp(min=1)
            error = (a.double() - exact).abs().max()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


class Bottleneck(NamedTuple):
    map: Map
    bias: bool
    epilogue: bool
    statistics: bool
    layout: int


@fuzz(st.builds(Bottleneck, maps(), flags, flags, flags, st.integers(0, 7)), 60)
def test_bottleneck(case: Bottleneck) -> None:
    torch.manual_seed(case.map.seed)
    arguments = of_bottleneck.make_case(case.map.shape, case.map.dtype)
    assert_near(of_bottleneck.run_forward(arguments, *case[1:]), case.map)


class BottleneckBackward(NamedTuple):
    map: Map
    accumulate: bool
    need_features: bool
    need_weight: bool
    layout: int
    deferred: int


@fuzz(
    st.builds(BottleneckBackward, maps(), flags, flags, flags, st.integers(0, 7), st.sampled_from([0, 4, 6])),
    60,
)
def test_bottleneck_backward(case: BottleneckBackward) -> None:
    torch.manual_seed(case.map.seed)
    arguments = of_bottleneck.make_case(case.map.shape, case.map.dtype)
    assert_near(of_bottleneck.run_backward(arguments, *case[1:]), case.map)


class Convolution(NamedTuple):
    map: Map
    backward: bool
    bias: bool
    accumulate: bool
    need_x: bool
    need_weight: bool
    layouts: tuple[str, str]
    weight: str


@fuzz(
    st.builds(
        Convolution,
        maps(1),
        *[flags] * 5,
        st.tuples(layouts, layouts),
        st.sampled_from(list(test_conv3x3.WEIGHTS)),
    ),
    80,
)
def test_convolution(case: Convolution) -> None:
    torch.manual_seed(case.map.seed)
    images, spatial, channels, out = case.map.shape
    spatial = tuple(max(1, n) for n in spatial)  # PyTorch refuses empty images
    arguments = test_conv3x3.make_case((images, spatial, channels[0], out), case.map.dtype)
    if case.backward:
        rest = case.accumulate, case.need_x, case.need_weight, case.layouts, case.weight
        assert_near(test_conv3x3.run_backward(arguments, *rest), case.map)
    else:
        assert_near(test_conv3x3.run_forward(arguments, case.bias, case.layouts[0], case.weight), case.map)


class OneMap(NamedTuple):
    map: Map
    layout: str
    option: bool


def bound(run: Callable[..., Any]) -> Callable[[OneMap], Any]:
    return lambda c: run(c.map.shape, c.map.dtype, c.layout)


OF_ONE_MAP: dict[str, Callable[[OneMap], Any]] = {
    "bn_relu": bound(test_batch_norm.run_forward),
    "bn_relu_backward": lambda c: test_batch_norm.run_backward(c.map.shape, c.map.dtype, *c[1:]),
    "bn_relu_accumulate": bound(test_batch_norm.run_accumulate),
    "bn_relu_with_sums": bound(test_batch_norm.run_with_sums),
    "append_features": bound(test_features.run_append),
    "take_gradient": lambda c: test_features.run_take(c.map.shape, c.map.dtype, *c[1:]),
    "channel_statistics": lambda c: test_features.run_statistics(
        c.map.shape, c.map.dtype, list(LAYOUTS).index(c.layout), 100.0 * c.option
    ),
}


@fuzz(st.tuples(st.sampled_from(list(OF_ONE_MAP)), st.builds(OneMap, maps(3), layouts, flags)), 120)
def test_one_map(case: tuple[str, OneMap]) -> None:
    name, arguments = case
    torch.manual_seed(arguments.map.seed)
    assert_near(OF_ONE_MAP[name](arguments), arguments.map)


class Pool(NamedTuple):
    map: Map
    kind: str
    layout: str
    windows: tuple[tuple[int, int, int], ...]  # kernel size, stride and padding in every dimension


windows = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
POOLS = {
    "average": test_pool.run_average,
    "average_backward": test_pool.run_average_backward,
    "maximum": test_pool.run_maximum,
    "maximum_backward": test_pool.run_maximum_backward,
}


@fuzz(
    st.builds(Pool, maps(1), st.sampled_from(list(POOLS)), layouts, st.tuples(windows, windows, windows)), 120
)
def test_pools(case: Pool) -> None:
    """Of windows that fit, as everyone sees to that calls the operators."""
    images, spatial, channels, _ = case.map.shape
    spatial = tuple(max(1, n) for n in spatial)
    kernel, stride, padding = [], [], []
    for size, (k, s, p) in zip(spatial, case.windows, strict=False):
        p = min(p, k // 2) if case.kind.startswith("maximum") else 0
        kernel.append(min(k, size + 2 * p))
        stride.append(s)
        padding.append(min(p, kernel[-1] // 2))
    pool: tuple[Any, ...] = (images, spatial, channels[0], tuple(kernel))
    if case.kind.startswith("maximum"):
        pool = (*pool, tuple(stride), tuple(padding))
    torch.manual_seed(case.map.seed)
    assert_near(POOLS[case.kind](pool, case.map.dtype, case.layout), case.map)
