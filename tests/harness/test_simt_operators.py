"""The CUDA kernels on the CPU: half precision, any order of threads, the memory that they move, long offsets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import reference
from harness.simt.compiler import compile_launchers
from tests._cases import SHAPES, Run, assert_as_exact, channels_last, make_norm_case, to_dtype
from tests.harness.test_simt_harness import ORDERS, SANITIZER_OPTIONS
from tests.ops.test_batch_norm import (
    run_accumulate_correction,
    run_backward,
    run_backward_accumulate,
    run_backward_sums,
    run_fold,
    run_forward,
)
from tests.ops.test_features import run_append, run_apply_correction, run_statistics
from tests.ops.test_pool import (
    AVERAGES,
    MAXIMA,
    run_average,
    run_average_backward,
    run_maximum,
    run_maximum_backward,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.half]


def without_statistics(shape: tuple, dtype: torch.dtype) -> Run:
    return run_backward(shape, dtype, batch_statistics=False)


OF_MAPS: dict[str, Callable[..., Any]] = {
    "channel_statistics": run_statistics,
    "append_features": run_append,
    "apply_correction": run_apply_correction,
    "bn_relu": run_forward,
    "bn_relu_backward_sums": run_backward_sums,
    "bn_relu_backward": run_backward,
    "bn_relu_backward without statistics": without_statistics,
    "bn_relu_backward_accumulate": run_backward_accumulate,
}
OF_POOLS: dict[str, tuple[Callable[..., Any], Any]] = {
    "bn_relu_avg_pool": (run_average, AVERAGES),
    "bn_relu_avg_pool_backward": (run_average_backward, AVERAGES),
    "bn_relu_max_pool": (run_maximum, MAXIMA),
    "max_pool_backward": (run_maximum_backward, MAXIMA),
}


# ---- Half precision


@pytest.mark.parametrize(
    "op, shape",  # nothing but rounding is left of the gradient of a batch of one value
    [(op, s) for op in OF_MAPS for s in SHAPES if not (op == "bn_relu_backward" and s is SHAPES[1])],
)
def test_half_precision_of_maps(simt: Any, op: str, shape: tuple) -> None:
    assert_as_exact(OF_MAPS[op](shape, torch.half), simt, torch.half)


@pytest.mark.parametrize("op, pool", [(op, pool) for op in OF_POOLS for pool in OF_POOLS[op][1]])
def test_half_precision_of_pools(simt: Any, op: str, pool: tuple) -> None:
    assert_as_exact(OF_POOLS[op][0](pool, torch.half), simt, torch.half)


# ---- Threads in any order: the same bits


def assert_the_same_in_every_order(
    simt: Any, monkeypatch: pytest.MonkeyPatch, run: Run, dtype: torch.dtype
) -> None:
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", order)
        results.append(run(simt, dtype))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("op", OF_MAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_in_maps(
    simt: Any, monkeypatch: pytest.MonkeyPatch, op: str, dtype: torch.dtype
) -> None:
    for shape in (SHAPES[0], SHAPES[5]):
        assert_the_same_in_every_order(simt, monkeypatch, OF_MAPS[op](shape, dtype), dtype)


@pytest.mark.parametrize("op", OF_POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_in_pools(
    simt: Any, monkeypatch: pytest.MonkeyPatch, op: str, dtype: torch.dtype
) -> None:
    make_run, pools = OF_POOLS[op]
    for pool in (pools[0], pools[4], pools[11]):
        assert_the_same_in_every_order(simt, monkeypatch, make_run(pool, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_order_of_threads_in_vectors(
    simt: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    for run in (run_fold(dtype, dtype, 700), run_accumulate_correction(12, 700)):
        assert_the_same_in_every_order(simt, monkeypatch, run, dtype)


# ---- Traffic: each element read once and written once, by accesses of 16 bytes


class Traffic:
    """Watches maps that are the first channels of wider buffers, while an operator runs."""

    def __init__(self, simt: Any, dtype: torch.dtype, images: int = 8, channels: int = 48) -> None:
        self.simt, self.dtype, self.ideal = simt, dtype, 0
        self.images, self.channels = images, channels
        self.names: dict[str, tuple[int, int, int]] = {}
        simt.forget()

    def map(self, name: str, read: int, written: int, size: int = 16) -> Tensor:
        """A map that is to be read and written so many times."""
        wide = 64 if self.channels <= 64 else self.channels + 4
        x = torch.randn(self.images, size, size, wide).to(self.dtype).movedim(-1, 1)[:, : self.channels]
        self.simt.watch(name, x)
        moved = x.numel() * x.element_size()
        self.names[name] = (moved, read, written)
        self.ideal += moved * (read + written)
        return x

    def vectors(self, count: int) -> list[Tensor]:
        return list(torch.rand(count, self.channels).to(reference.accumulate_dtype(self.dtype)))

    def check(self, wide: bool = True) -> None:
        for name, (moved, read, written) in self.names.items():
            loads, load_bytes, stores, store_bytes = self.simt.watched(name)
            assert (load_bytes, store_bytes) == (read * moved, written * moved), name
            if wide:
                assert (16 * loads, 16 * stores) == (load_bytes, store_bytes), name
        _, load_bytes, _, store_bytes = self.simt.traffic()
        self.simt.forget()
        assert self.ideal <= load_bytes + store_bytes <= 1.1 * self.ideal


@pytest.fixture(params=DTYPES)
def traffic(simt: Any, request: pytest.FixtureRequest) -> Traffic:
    return Traffic(simt, request.param)


def test_traffic_of_features(traffic: Traffic) -> None:
    simt = traffic.simt
    simt.channel_statistics([traffic.map("x", 1, 0)])
    traffic.check()
    traffic = Traffic(simt, traffic.dtype)
    simt.append_features(traffic.map("x", 1, 0), traffic.map("out", 0, 1))
    traffic.check()
    traffic = Traffic(simt, traffic.dtype)
    x, grad, out = traffic.map("x", 1, 0), traffic.map("grad", 1, 0), traffic.map("out", 0, 1)
    simt.apply_correction(x, *traffic.vectors(3), grad, out)
    traffic.check()


def test_traffic_of_batch_norm(traffic: Traffic) -> None:
    simt = traffic.simt
    simt.bn_relu(traffic.map("x", 1, 0), *traffic.vectors(2), traffic.map("out", 0, 1))
    traffic.check()
    for statistics in (False, True):  # which take a pass of their own
        traffic = Traffic(simt, traffic.dtype)
        x, grad = traffic.map("x", 1 + statistics, 0), traffic.map("grad", 1 + statistics, 1)
        simt.bn_relu_backward(grad, x, *traffic.vectors(4), statistics)
        traffic.check()
    traffic = Traffic(simt, traffic.dtype)
    x, grad, grad_x = traffic.map("x", 1, 0), traffic.map("grad", 1, 0), traffic.map("grad_x", 1, 1)
    simt.bn_relu_backward_accumulate(grad, x, *traffic.vectors(3), grad_x)
    traffic.check()
    traffic = Traffic(simt, traffic.dtype)
    x, grad, out = traffic.map("x", 1, 0), traffic.map("grad", 1, 0), traffic.map("out", 0, 1)
    simt.bn_relu_backward_sums(grad, x, *traffic.vectors(3), out)
    traffic.check()


def test_traffic_of_average_pools(traffic: Traffic) -> None:
    simt = traffic.simt
    x, vectors = traffic.map("x", 1, 0), traffic.vectors(3)
    out = simt.bn_relu_avg_pool(x, *vectors[:2], [2, 2])
    traffic.ideal += out.numel() * out.element_size()
    traffic.check()
    traffic = Traffic(simt, traffic.dtype)
    grad, x = traffic.map("grad", 1, 0, size=8), traffic.map("x", 1, 0)
    simt.bn_relu_avg_pool_backward(grad, x, *vectors, [2, 2], traffic.map("grad_x", 0, 1))
    traffic.check()


def test_a_prefix_of_300_half_precision_channels_is_moved_in_pieces_of_16_bytes(simt: Any) -> None:
    traffic = Traffic(simt, torch.half, images=2, channels=300)
    simt.bn_relu(traffic.map("x", 1, 0), *traffic.vectors(2), traffic.map("out", 0, 1))
    loads, load_bytes, stores, _ = simt.watched("x")
    assert loads == load_bytes // 600 * 38 and stores == 0  # 37 whole pieces a row and a half
    traffic.check(wide=False)


@pytest.mark.parametrize("first, bytes_", [(0, 16), (4, 8), (12, 8), (16, 16), (3, 2)])
def test_the_width_of_accesses_is_what_a_slices_alignment_permits(simt: Any, first: int, bytes_: int) -> None:
    simt.forget()
    buffer = torch.randn(3, 5, 7, 64).half().movedim(-1, 1)
    simt.watch("buffer", buffer)
    simt.channel_statistics([buffer[:, first : first + 24]])
    loads, load_bytes, *_ = simt.watched("buffer")
    simt.forget()
    assert load_bytes == 3 * 5 * 7 * 24 * 2 and loads * bytes_ == load_bytes


def test_overlapping_windows_read_a_pixel_as_often_as_they_cover_it(simt: Any) -> None:
    """3x3 windows two pixels apart: 2.25 times, of which the caches see to all but one."""
    simt.forget()
    x, vectors = torch.randn(2, 16, 16, 48).half().movedim(-1, 1), torch.rand(2, 48)
    windows: Sequence[list[int]] = [3, 3], [2, 2], [1, 1]
    simt.watch("x", x)
    _, where = simt.bn_relu_max_pool(x, *vectors, *windows)
    taps = 2 * (8 * 3 - 1) ** 2  # but for the padding's
    assert simt.watched("x")[:2] == [taps * 6, taps * 96]
    grad, grad_z = torch.randn(2, 8, 8, 48).half().movedim(-1, 1), torch.empty_like(x)
    for name, tensor in (("grad", grad), ("where", where), ("grad_z", grad_z)):
        simt.watch(name, tensor)
    simt.max_pool_backward(grad, where, *windows, grad_z)
    assert simt.watched("grad")[:2] == [taps * 6, taps * 96]
    assert simt.watched("where")[:2] == [taps * 6, taps * 48]
    assert simt.watched("grad_z") == [0, 0, 2 * 256 * 6, 2 * 256 * 96]
    simt.forget()


def test_nothing_is_launched_for_nothing(simt: Any) -> None:
    simt.forget()
    for make_run in OF_MAPS.values():
        make_run(SHAPES[7], torch.half)(simt, torch.half)
    for make_run, pools in OF_POOLS.values():
        make_run(pools[-1], torch.half)(simt, torch.half)
    assert simt.traffic() == [0, 0, 0, 0]


# ---- Offsets


def test_offsets_beyond_two_to_the_31(simt: Any) -> None:
    """Three pixels in a buffer of 4 GiB, of which nobody touches more than a few pages."""
    step = 2**30 + 8
    buffer = torch.empty(2 * step + 8, dtype=torch.half)
    x = torch.randn(3, 8, 1).half()
    far = buffer.as_strided((3, 8, 1), (step, 1, 1))
    near = channels_last(torch.empty_like(x))
    mean, var = simt.append_features(x, far)
    expected = simt.append_features(x, near)
    assert torch.equal(far, x) and torch.equal(mean, expected[0]) and torch.equal(var, expected[1])
    case = to_dtype(make_norm_case((3, (1,), (8,)), torch.half), torch.half)
    simt.bn_relu(far, case["scale"], case["shift"], far)
    simt.bn_relu(near, case["scale"], case["shift"], near)
    assert torch.equal(far, near)
    pooled = [simt.bn_relu_avg_pool(z, case["scale"], case["shift"], [1]) for z in (far, near)]
    assert torch.equal(*pooled)


def test_offsets_beyond_two_to_the_31_in_products(simt: Any) -> None:
    step = 2**30 + 8
    far = torch.empty(2 * step + 8, dtype=torch.half).as_strided((3, 8, 1), (step, 1, 1))
    near = channels_last(torch.randn(3, 8, 1).half())
    far.copy_(near)
    scale, shift, mean = torch.rand(3, 8)
    weight = torch.randn(8, 8).half()
    results = []
    for x in (near, far):
        y = torch.empty_like(near)
        statistics = simt.bottleneck([x], scale, shift, weight, None, None, None, True, y)
        gradients = simt.bottleneck_backward([x], y, scale, shift, mean, weight, [x], True, True, True, [])
        results.append([y, *statistics, *gradients, x])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 12, 13, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nobody_touches_the_neighbours(simt: Any, channels: int, dtype: torch.dtype) -> None:
    """Slices at every offset of a buffer: the harness raises where one block stores what another one touches."""
    for first in range(9):
        buffer = torch.full((2, 3, 3, channels + 17), 77.0).to(dtype)
        simt.forget()
        simt.watch("buffer", buffer)
        out = buffer.movedim(-1, 1)[:, first : first + channels]
        x = torch.randn(2, channels, 3, 3).to(dtype)
        simt.append_features(x, out)
        assert torch.equal(out, x)
        assert (buffer[..., :first] == 77).all() and (buffer[..., first + channels :] == 77).all()
    simt.forget()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(simt: Any, sanitizer: str) -> None:
    """Every launcher, on memory that ends where its matrices end. To races, the order of threads is no matter."""
    program = compile_launchers(sanitizer)
    for order in ORDERS if sanitizer == "address" else ORDERS[2:]:
        environment = {**os.environ, **SANITIZER_OPTIONS, "SIMT_ORDER": order}
        done = subprocess.run([program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
