"""BN-ReLU-pool, average and maximum, and its backward, against the float64 reference and torch's pools; wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effdense.ops import reference
from tests._cases import (
    DTYPES,
    LAYOUTS,
    Mistake,
    assert_as_exact,
    assert_refused,
    assert_repeatable,
    channels_last,
    column,
    in_buffer,
    make_norm_case,
    mistakes,
    over_channels,
    rest_is_untouched,
    to_dtype,
)

Run = Callable[[Any, torch.dtype], list[Tensor]]
Sizes = tuple[int, ...]
VECTORS = ("scale", "shift", "mean")
AVG_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

# images, spatial sizes, channels, kernel size
AVERAGES = [
    (2, (6, 4), 5, (2, 2)),
    (2, (5, 7), 10, (2, 2)),  # the last row and column are left out
    (2, (5, 7), 3, (3, 2)),
    (3, (7, 7), 17, (7, 7)),  # the whole image
    (2, (40, 41), 29, (40, 41)),  # a large one
    (2, (5, 7), 3, (1, 1)),
    (1, (1, 1), 1, (1, 1)),
    (2, (33,), 13, (2,)),  # 1D
    (2, (1001,), 24, (1000,)),  # long lines
    (2, (3001,), 3, (2,)),
    (2, (4, 3, 5), 9, (2, 2, 2)),  # 3D
    (2, (4, 3, 5), 4, (3, 1, 4)),
    (7, (28, 28), 48, (2, 2)),
    (0, (4, 4), 3, (2, 2)),  # empty batch
]
# images, spatial sizes, channels, kernel size, stride, padding
MAXIMA = [
    (2, (9, 8), 5, (3, 3), (2, 2), (1, 1)),  # a stem's
    (7, (28, 28), 48, (3, 3), (2, 2), (1, 1)),
    (2, (1, 1), 3, (3, 3), (2, 2), (1, 1)),  # one pixel an image
    (2, (5, 7), 10, (2, 2), (2, 2), (0, 0)),  # the last row and column are left out
    (2, (5, 7), 3, (3, 3), (1, 1), (1, 1)),
    (2, (5, 7), 3, (3, 2), (1, 2), (0, 1)),
    (2, (9, 9), 3, (2, 2), (3, 4), (0, 0)),  # pixels in no window
    (2, (5, 7), 3, (5, 7), (1, 1), (0, 0)),  # the whole image
    (1, (1, 1), 1, (1, 1), (1, 1), (0, 0)),
    (2, (17, 18), 3, (16, 16), (1, 1), (8, 8)),  # 256 taps
    (2, (33,), 13, (3,), (2,), (1,)),  # 1D
    (2, (4, 3, 5), 9, (3, 3, 3), (2, 2, 2), (1, 1, 1)),  # 3D
    (2, (4, 3, 5), 4, (2, 1, 4), (1, 2, 3), (1, 0, 2)),
    (0, (4, 4), 3, (3, 3), (2, 2), (1, 1)),  # empty batch
]


def make_case(pool: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """A map, the vectors of a batch norm over it and a pooled gradient; as `dtype` has them, in float64."""
    images, spatial, channels, kernel_size, stride, padding = (*pool, pool[3], (0,) * len(pool[1]))[:6]
    windows = zip(spatial, kernel_size, stride, padding, strict=True)
    pooled = [(n + 2 * p - k) // s + 1 for n, k, s, p in windows]
    grad = torch.randn(images, channels, *pooled, dtype=torch.float64).to(dtype).double()
    return {**make_norm_case((images, spatial, (channels,)), dtype), "grad": grad}


def run_average(pool: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case, kernel_size = make_case(pool, dtype), pool[3]

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        return [ops.bn_relu_avg_pool(LAYOUTS[layout](c["x"]), c["scale"], c["shift"], kernel_size)]

    return run


def run_average_backward(pool: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case, kernel_size = make_case(pool, dtype), pool[3]

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        x, grad = LAYOUTS[layout](c["x"]), LAYOUTS[layout](c["grad"])
        grad_x = in_buffer(torch.full_like(c["x"], float("nan")))
        vectors = (c[name] for name in VECTORS)
        sums = ops.bn_relu_avg_pool_backward(grad, x, *vectors, kernel_size, grad_x)
        assert rest_is_untouched(grad_x)
        return [*sums, grad_x]

    return run


def run_maximum(pool: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case, windows = make_case(pool, dtype), pool[3:]

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        return list(ops.bn_relu_max_pool(LAYOUTS[layout](c["x"]), c["scale"], c["shift"], *windows))

    return run


def run_maximum_backward(pool: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case, windows = make_case(pool, dtype), pool[3:]
    where = reference.bn_relu_max_pool(case["x"], case["scale"], case["shift"], *windows)[1]

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        grad_z = in_buffer(torch.full_like(c["x"], float("nan")))
        ops.max_pool_backward(LAYOUTS[layout](c["grad"]), LAYOUTS[layout](where), *windows, grad_z)
        assert rest_is_untouched(grad_z)
        return [grad_z]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", AVERAGES)
def test_averages_match_the_float64_twin(ops: Any, pool: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_average(pool, dtype), ops, dtype)
    assert_as_exact(run_average_backward(pool, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", MAXIMA)
def test_maxima_match_the_float64_twin(ops: Any, pool: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_maximum(pool, dtype), ops, dtype)
    assert_as_exact(run_maximum_backward(pool, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maps_in_every_layout(ops: Any, dims: int, layout: str, dtype: torch.dtype) -> None:
    average = next(pool for pool in AVERAGES[1:] if len(pool[1]) == dims)
    maximum = next(pool for pool in MAXIMA if len(pool[1]) == dims)
    for make_run in (run_average, run_average_backward):
        assert_as_exact(make_run(average, dtype, layout), ops, dtype)
    for make_run in (run_maximum, run_maximum_backward):
        assert_as_exact(make_run(maximum, dtype, layout), ops, dtype)


def relu_of_bn(c: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The map behind batch norm, and behind relu, for autograd to begin with."""
    before_relu = (c["x"] * column(c["scale"], c["x"]) + column(c["shift"], c["x"])).requires_grad_()
    return before_relu, before_relu.relu()


@pytest.mark.parametrize("pool", [pool for pool in AVERAGES if pool[0]])
def test_averages_are_torchs(any_ops: Any, pool: tuple) -> None:
    c, kernel_size = make_case(pool, torch.float64), pool[3]
    before_relu, z = relu_of_bn(c)
    pooled = AVG_POOLS[len(kernel_size)](z, kernel_size)
    (d,) = torch.autograd.grad(pooled, before_relu, c["grad"])
    vectors = [c[name] for name in VECTORS]
    torch.testing.assert_close(any_ops.bn_relu_avg_pool(c["x"], *vectors[:2], kernel_size), pooled.detach())
    grad_x = in_buffer(torch.full_like(c["x"], float("nan")))
    sums = any_ops.bn_relu_avg_pool_backward(c["grad"], c["x"], *vectors, kernel_size, grad_x)
    torch.testing.assert_close(grad_x, d * column(c["scale"], d))
    dims = over_channels(d)
    torch.testing.assert_close(sums, (d.sum(dims), (d * (c["x"] - column(c["mean"], d))).sum(dims)))


def assert_max_is_torchs(ops: Any, c: dict[str, Tensor], windows: tuple[Sizes, Sizes, Sizes]) -> Tensor:
    """Compares maxima and, where they are equal, whose gradient it is. Returns which tap it was."""
    _, z = relu_of_bn(c)
    pooled = MAX_POOLS[len(windows[0])](z, *windows)
    out, where = ops.bn_relu_max_pool(c["x"], c["scale"], c["shift"], *windows)
    torch.testing.assert_close(out, pooled.detach(), equal_nan=True)
    (expected,) = torch.autograd.grad(pooled, z, c["grad"])
    grad_z = in_buffer(torch.full_like(c["x"], float("nan")))
    ops.max_pool_backward(c["grad"], where, *windows, grad_z)
    torch.testing.assert_close(grad_z, expected)
    return where


@pytest.mark.parametrize("pool", [pool for pool in MAXIMA if pool[0]])
@pytest.mark.parametrize("ties", [False, True])
def test_maxima_are_torchs(any_ops: Any, pool: tuple, ties: bool) -> None:
    c = make_case(pool, torch.float64)
    if ties:  # few values, exact in every step
        c |= {"x": c["x"].round(), "scale": c["scale"].sign(), "shift": torch.zeros_like(c["shift"])}
    where = assert_max_is_torchs(any_ops, c, pool[3:])
    assert where.dtype == torch.uint8 and where.shape == c["grad"].shape


@pytest.mark.parametrize("pool", [MAXIMA[0], MAXIMA[5], *(p for p in MAXIMA if len(p[1]) != 2)])
def test_maxima_of_nothing_but_zeros(any_ops: Any, pool: tuple) -> None:
    c = make_case(pool, torch.float64)
    c["x"], c["scale"] = -c["x"].abs() - 1, c["scale"].abs() + 1
    c["shift"] = torch.zeros_like(c["shift"])
    assert_max_is_torchs(any_ops, c, pool[3:])
    assert not any_ops.bn_relu_max_pool(c["x"], c["scale"], c["shift"], *pool[3:])[0].any()


@pytest.mark.parametrize("pool", [MAXIMA[0], MAXIMA[4], *(p for p in MAXIMA if len(p[1]) != 2)])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_nan_is_the_maximum(any_ops: Any, pool: tuple, share: float) -> None:
    c = make_case(pool, torch.float64)
    c["x"][torch.rand_like(c["x"]) < share] = float("nan")
    assert_max_is_torchs(any_ops, c, pool[3:])


def test_nan_in_averages(any_ops: Any) -> None:
    x, one, zero = torch.ones(1, 2, 4, 5), torch.ones(2), torch.zeros(2)
    x[0, 1, 0, 2] = float("nan")
    out, grad_x = any_ops.bn_relu_avg_pool(x, one, zero, [2, 2]), channels_last(torch.empty_like(x))
    assert out.isnan().nonzero().tolist() == [[0, 1, 0, 1]]
    any_ops.bn_relu_avg_pool_backward(torch.ones_like(out), x, one, zero, zero, [2, 2], grad_x)
    assert torch.equal(grad_x, F.pad(torch.full((1, 2, 4, 4), 0.25), (0, 1)))


def test_an_expanded_gradient(any_ops: Any) -> None:
    average, maximum = make_case(AVERAGES[1], torch.float64), make_case(MAXIMA[0], torch.float64)
    where = any_ops.bn_relu_max_pool(maximum["x"], maximum["scale"], maximum["shift"], *MAXIMA[0][3:])[1]
    results = []
    for dense in (False, True):
        grads = [torch.tensor(0.5).double().expand_as(c["grad"]) for c in (average, maximum)]
        grads = [g.contiguous() for g in grads] if dense else grads
        grad_x, grad_z = (channels_last(torch.empty_like(c["x"])) for c in (average, maximum))
        vectors = (average[name] for name in VECTORS)
        sums = any_ops.bn_relu_avg_pool_backward(grads[0], average["x"], *vectors, AVERAGES[1][3], grad_x)
        any_ops.max_pool_backward(grads[1], where, *MAXIMA[0][3:], grad_z)
        results.append([*sums, grad_x, grad_z])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pools_of_a_feature_buffer(any_ops: Any, dtype: torch.dtype) -> None:
    """What they return is channels-last; a prefix of a buffer is read, and its gradient written, in place."""
    c = to_dtype(make_case(AVERAGES[1], dtype), dtype)
    buffer, grads = in_buffer(c["x"]), torch.full_like(in_buffer(c["x"])._base, 5).movedim(-1, 1)
    vectors = [c[name] for name in VECTORS]
    for x in (buffer, c["x"].contiguous()):
        out = any_ops.bn_relu_avg_pool(x, *vectors[:2], [2, 2])
        maxima = any_ops.bn_relu_max_pool(x, *vectors[:2], *MAXIMA[0][3:])
        assert all(map(is_channels_last, (out, *maxima)))
    any_ops.bn_relu_avg_pool_backward(c["grad"], buffer, *vectors, [2, 2], grads[:, :-3])
    assert (grads[:, -3:] == 5).all() and not grads[:, :-3, -1].any() and not grads[..., :-3, :, -1].any()


def is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("kernel_size", [(5, 1), (1, 6), (5, 6)])
def test_a_window_larger_than_the_image(ops: Any, kernel_size: Sizes) -> None:
    x, vector = torch.randn(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match=r"^bn_relu_avg_pool: kernel_size must .*, got \[\d, \d\]"):
        ops.bn_relu_avg_pool(x, vector, vector, kernel_size)
    with pytest.raises(ValueError, match=r"^bn_relu_max_pool: kernel_size must .*, got \[\d, \d\]"):
        ops.bn_relu_max_pool(x, vector, vector, kernel_size, [1, 1], [0, 0])


def test_an_image_without_pixels(ops: Any) -> None:
    """Refused, as in torch: it has no window."""
    x, vector = torch.randn(2, 3, 0, 5), torch.ones(3)
    for kernel_size, padding in product(([1, 1], [2, 2]), ([0, 0], [1, 1])):
        with pytest.raises(ValueError, match=r"^bn_relu_max_pool: kernel_size must"):
            ops.bn_relu_max_pool(x, vector, vector, kernel_size, [1, 1], padding)
    with pytest.raises(ValueError, match=r"^bn_relu_avg_pool: kernel_size must"):
        ops.bn_relu_avg_pool(x, vector, vector, [1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_repeatable(ops: Any, dtype: torch.dtype) -> None:
    for make_run, pool in (
        (run_average, AVERAGES[12]),
        (run_average_backward, AVERAGES[12]),
        (run_maximum, MAXIMA[1]),
        (run_maximum_backward, MAXIMA[1]),
    ):
        assert_repeatable(make_run(pool, dtype), ops, dtype)


def arguments(
    average: tuple = AVERAGES[1], maximum: tuple = MAXIMA[0], dtype: torch.dtype = DTYPES[0]
) -> dict:
    """The arguments of every operator, by name."""
    a, m = (to_dtype(make_case(pool, dtype), dtype) for pool in (average, maximum))
    windows = dict(zip(("kernel_size", "stride", "padding"), maximum[3:], strict=True))
    where = reference.bn_relu_max_pool(m["x"], m["scale"], m["shift"], *maximum[3:])[1]
    pool = {**{k: a[k] for k in ("x", "scale", "shift")}, "kernel_size": average[3]}
    return {
        "bn_relu_avg_pool": pool,
        "bn_relu_avg_pool_backward": {
            **{"grad": a["grad"], **pool, "mean": a["mean"]},
            "grad_x": channels_last(torch.zeros_like(a["x"])),
        },
        "bn_relu_max_pool": {**{k: m[k] for k in ("x", "scale", "shift")}, **windows},
        "max_pool_backward": {
            **{"grad": m["grad"], "where": where, **windows},
            "grad_z": channels_last(torch.zeros_like(m["x"])),
        },
    }


@pytest.mark.core
@pytest.mark.parametrize("op", arguments())
@pytest.mark.parametrize("dims, dtype", [(2, torch.float64), (1, torch.float32), (3, torch.bfloat16)])
def test_opcheck(op: str, dims: int, dtype: torch.dtype) -> None:
    pools = [next(pool for pool in pools[1:] if len(pool[1]) == dims) for pools in (AVERAGES, MAXIMA[1:])]
    every = arguments(*pools, dtype)
    torch.library.opcheck(getattr(torch.ops.effdense, op).default, (), every[op])


def sizes(name: str, smallest: int) -> list[Mistake]:
    message = rf"must have 2 numbers \(one per spatial dimension\) of at least {smallest}, got \["
    return [
        (name, lambda k: k[:1], ValueError, message),
        (name, lambda k: (*k, 1), ValueError, message),
        (name, lambda k: (k[0], smallest - 1), ValueError, message),
    ]


NOT_A_MAP = ValueError, r"must be \[N, C, \*spatial\].*got shape \[3\]"
MISTAKES: dict[str, list[Mistake]] = {
    "bn_relu_avg_pool": [
        *mistakes(["scale", "shift"]),
        *sizes("kernel_size", 1),
        ("x", lambda x: torch.ones(3), *NOT_A_MAP),
    ],
    "bn_relu_avg_pool_backward": [
        *mistakes(VECTORS, ["grad"], ["grad_x"]),
        *sizes("kernel_size", 1),
        ("x", lambda x: torch.ones(3), *NOT_A_MAP),
    ],
    "bn_relu_max_pool": [
        *mistakes(["scale", "shift"]),
        *sizes("kernel_size", 1),
        *sizes("stride", 1),
        *sizes("padding", 0),
        (
            "kernel_size",
            lambda k: (17, 16),
            ValueError,
            r"must .*fit into the padded image.*, got \[17, 16\]",
        ),
        ("x", lambda x: torch.ones(3), *NOT_A_MAP),
    ],
    "max_pool_backward": [
        *mistakes([], ["grad"]),
        *sizes("kernel_size", 1),
        *sizes("stride", 1),
        *sizes("padding", 0),
        ("where", lambda w: w[..., 1:], ValueError, r"must have grad's shape \[2, .*\], got \[2, "),
        ("where", lambda w: w.long(), TypeError, r"must be Byte \(taps\), got Long"),
        (
            "grad_z",
            lambda x: x.contiguous(),
            ValueError,
            r"must be channels-last \(written in place\), got shape",
        ),
        ("grad_z", lambda x: torch.ones(3), *NOT_A_MAP),
    ],
}


@pytest.mark.parametrize("op, mistake", [(op, mistake) for op in MISTAKES for mistake in MISTAKES[op]])
def test_wrong_arguments(ops: Any, op: str, mistake: Mistake) -> None:
    assert_refused(op, arguments()[op], mistake, ops)


def test_windows_that_cannot_be(ops: Any) -> None:
    x, vector = torch.randn(1, 3, 20, 20), torch.ones(3)
    max_pool = ops.bn_relu_max_pool
    with pytest.raises(
        ValueError, match=r"kernel_size must be at least twice the padding .* \[3, 3\] with padding \[1, 2\]"
    ):
        max_pool(x, vector, vector, [3, 3], [1, 1], [1, 2])
    with pytest.raises(
        ValueError, match=r"^bn_relu_max_pool: kernel_size must have at most 256 taps .*, got \[17, 16\]"
    ):
        max_pool(x, vector, vector, [17, 16], [1, 1], [0, 0])


@pytest.mark.parametrize("op", ["bn_relu_avg_pool", "bn_relu_max_pool"])
def test_more_than_three_spatial_dimensions(ops: Any, op: str) -> None:
    x, vector = torch.ones(1, 3, 2, 2, 2, 2), torch.ones(3)
    rest = [[1] * 4, [0] * 4] if op == "bn_relu_max_pool" else []
    with pytest.raises(ValueError, match=rf"^{op}: x must .*, got shape \[1, 3, 2, 2, 2, 2\]"):
        getattr(ops, op)(x, vector, vector, [2] * 4, *rest)
