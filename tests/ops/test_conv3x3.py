"""bn_relu_conv3x3 and its backward against the float64 reference and torch's convolution; wrong arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._cases import (
    DTYPES,
    IN_EVERY_LAYOUT,
    LAYOUTS,
    Mistake,
    Run,
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
    rms,
    to_dtype,
)

BACKENDS = {"cpu": torch.ops.effdense}  # elsewhere convolutions are PyTorch's
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Case = dict[str, Tensor]
VECTORS = ("scale", "shift", "mean")

# images, spatial sizes, channels, output channels: images in several bands. A thread's scratch is a band of lines of
# 1 MiB, here (float64, forward; a backward's are no higher): 3 lines of 30, 1 of 5, 11 of the 99 of three images. Two
# threads share the first two images, and the second of three. Volumes: bands of 4 lines, in planes of 6, and of several
# small planes. 1D: 264 pixels.
CUT = [
    (1, (30, 64), 40, 40),
    (1, (5, 700), 24, 16),
    (3, (33, 63), 48, 12),
    (1, (4, 6, 20), 32, 40),
    (2, (7, 3, 3), 64, 33),
    (2, (700,), 128, 32),
]
SHAPES = [
    (1, (1, 1), 1, 1),
    (3, (1, 1), 40, 3),
    (2, (1, 9), 3, 16),
    (2, (9, 1), 12, 1),
    (2, (5, 7), 12, 17),
    (5, (7, 7), 48, 12),
    (2, (32, 32), 48, 12),
    (2, (3, 2), 4, 40),
    (2, (2, 3), 32, 12),
    (5, (1, 2), 48, 17),
    (1, (1, 1, 1), 3, 2),
    (2, (3, 5, 4), 12, 17),
    (3, (2, 2, 2), 40, 32),
    (2, (1, 3, 5), 5, 16),
    (2, (5, 1, 1), 16, 3),
    (1, (4, 3, 1), 16, 33),
    (1, (1,), 2, 3),
    (3, (2,), 16, 12),
    (2, (11,), 13, 17),
    *CUT,
]
EMPTY = [(0, (4, 4), 3, 2), (0, (4,), 3, 2), (0, (2, 4, 4), 3, 2)]
OPCHECKS = [
    *zip([(2, (5, 7), 12, 17), (1, (1, 3), 3, 1), EMPTY[0]], DTYPES, strict=True),
    ((1, (2, 3, 4), 3, 2), torch.float32),
    ((1, (4,), 3, 2), torch.float64),
]


def slice_of_larger(w: Tensor) -> Tensor:
    larger = F.pad(w, (*[1, 1] * (w.dim() - 2), 2, 0), value=float("nan"))
    return larger[(slice(None), slice(2, None), *[slice(1, -1)] * (w.dim() - 2))]


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels-last": channels_last,
    "slice": slice_of_larger,
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
}


def make_case(shape: tuple, dtype: torch.dtype = torch.float64) -> Case:
    """Arguments in float64, rounded to what `dtype` has: every run gets the same numbers, in its own types."""
    images, spatial, channels, k = shape
    case = make_norm_case((images, spatial, (channels,)), dtype)
    rest = {
        "weight": torch.randn(k, channels, *[3] * len(spatial), dtype=torch.float64)
        / (3 ** len(spatial) * channels) ** 0.5,
        "bias": torch.randn(k, dtype=torch.float64),
        "grad": torch.randn(images, k, *spatial, dtype=torch.float64),
        "grad_x": torch.randn_like(case["x"]),
    }
    return {**case, **to_dtype(to_dtype(rest, dtype), torch.float64)}


def run_forward(
    case: Case, bias: bool = True, layout: str = "channels-last", weight: str = "contiguous"
) -> Run:
    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        out = in_buffer(torch.full_like(c["grad"], float("nan")))
        x, w = LAYOUTS[layout](c["x"]), WEIGHTS[weight](c["weight"])
        result = ops.bn_relu_conv3x3(x, c["scale"], c["shift"], w, c["bias"] if bias else None, out)
        assert rest_is_untouched(out)
        return [out, *result]

    return run


def run_backward(
    case: Case,
    accumulate: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
    layouts: tuple[str, str] = ("channels-last", "channels-last"),
    weight: str = "contiguous",
) -> Run:
    """`layouts`: of grad and of x."""

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        start = c["grad_x"] if accumulate else torch.full_like(c["grad_x"], float("nan"))
        grad_x = in_buffer(start)
        maps = (LAYOUTS[layout](c[name]) for layout, name in zip(layouts, ("grad", "x"), strict=True))
        vectors, w = [c[name] for name in VECTORS], WEIGHTS[weight](c["weight"])
        sums = ops.bn_relu_conv3x3_backward(*maps, *vectors, w, grad_x, accumulate, need_x, need_weight)
        assert rest_is_untouched(grad_x)
        if need_x:
            return [*sums, grad_x]
        assert torch.equal(grad_x.nan_to_num(99), start.nan_to_num(99))
        return list(sums)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("bias, layout", [(False, "channels-last prefix"), (True, "contiguous")])
def test_forward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, bias: bool, layout: str
) -> None:
    assert_as_exact(run_forward(make_case(shape, dtype), bias, layout), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize(
    "accumulate, need_x, need_weight, layouts",
    [
        (False, True, True, ("channels-last", "channels-last prefix")),
        (True, True, False, ("channels-last slice", "contiguous")),
        (False, False, True, ("contiguous", "channels-last")),
    ],
)
def test_backward_matches_the_float64_twin(
    ops: Any,
    shape: tuple,
    dtype: torch.dtype,
    accumulate: bool,
    need_x: bool,
    need_weight: bool,
    layouts: tuple[str, str],
) -> None:
    run = run_backward(make_case(shape, dtype), accumulate, need_x, need_weight, layouts)
    assert_as_exact(run, ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images, channels, spatial", [(2, 12, (33, 63)), *IN_EVERY_LAYOUT])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_in_every_layout(
    ops: Any, layout: str, images: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The same bits as from channels-last maps, which the other tests compare with the twin."""
    other = list(LAYOUTS)[-1 - list(LAYOUTS).index(layout)]
    torch.manual_seed(1)  # with seed 0 relu stops all of a single channel, and nothing is to be seen
    case = make_case((images, spatial, channels, channels), dtype)
    assert (case["x"] * column(case["scale"], case["x"]) + column(case["shift"], case["x"]) > 0).any()
    got = run_forward(case, layout=layout)(ops, dtype) + run_backward(case, layouts=(layout, other))(
        ops, dtype
    )
    expected = run_forward(case)(ops, dtype) + run_backward(case)(ops, dtype)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("spatial", [(11,), (5, 7), (2, 3, 4)])
def test_weights_in_every_layout(ops: Any, spatial: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    case = make_case((2, spatial, 12, 17), dtype)
    assert_as_exact(run_forward(case, weight=layout), ops, dtype)
    assert_as_exact(run_backward(case, weight=layout), ops, dtype)


def by_autograd(c: Case, bias: bool, accumulate: bool) -> list[Tensor]:
    """What both operators give, from torch's convolution and autograd."""
    x = c["x"].clone().requires_grad_()
    before_relu = x * column(c["scale"], x) + column(c["shift"], x)
    weight = c["weight"].clone().requires_grad_()
    out = CONVOLVE[x.dim() - 2](before_relu.relu(), weight, c["bias"] if bias else None, padding=1)
    d, grad_weight, grad_x = torch.autograd.grad(out, (before_relu, weight, x), c["grad"])
    dims, out = over_channels(x), out.detach()
    deviation = (x - column(c["mean"], x)).detach()
    statistics = out.mean(dims), out.var(dims, correction=0)
    grad_x = grad_x + c["grad_x"] if accumulate else grad_x
    return [out, *statistics, grad_weight, d.sum(dims), (d * deviation).sum(dims), grad_x]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias, accumulate", [(False, False), (True, True)])
def test_together_they_are_torchs_convolution(
    any_ops: Any, shape: tuple, dtype: torch.dtype, bias: bool, accumulate: bool
) -> None:
    """Root mean squares of errors: one rounding of the dtype for what is stored, and sqrt(n) of the sums' of n terms."""
    case = make_case(shape, dtype)
    got = run_forward(case, bias)(any_ops, dtype) + run_backward(case, accumulate)(any_ops, dtype)
    images, spatial, channels, k = shape
    taps = 3 ** len(spatial)
    terms = max(taps * channels, taps * k, images * math.prod(spatial))
    wide = torch.finfo(to_dtype(case["mean"], dtype).dtype).eps
    for a, b in zip(got, by_autograd(case, bias, accumulate), strict=True):
        allowed = (torch.finfo(dtype).eps + terms**0.5 * wide) * rms(b)
        assert rms(a.double() - b) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*CUT, (1, (1, 1), 3, 2), (2, (3, 2), 5, 3)])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(ops: Any, threads: int, shape: tuple, dtype: torch.dtype) -> None:
    """More than images and more than lines as well; every one is as exact as the two of the other tests."""
    case = make_case(shape, dtype)
    torch.set_num_threads(threads)
    assert_as_exact(run_forward(case), ops, dtype)
    assert_as_exact(run_backward(case), ops, dtype)


@pytest.mark.parametrize("height", range(1, 13))
@pytest.mark.parametrize("volumes", [False, True])
def test_every_height(any_ops: Any, height: int, volumes: bool) -> None:
    """Bands of up to 3 lines, all numbers of them and all heights of the last one, on one thread and on two.

    Volumes: bands of up to 6, a different one of which begins each plane.
    """
    case = make_case((2, (3, height, 12), 32, 40) if volumes else (1, (height, 64), 40, 40))
    expected = by_autograd(case, True, False)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = run_forward(case)(any_ops, torch.float64) + run_backward(case)(any_ops, torch.float64)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CUT)
def test_runs_are_bitwise_repeatable(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    case = make_case(shape, dtype)
    assert_repeatable(run_forward(case), ops, dtype)
    assert_repeatable(run_backward(case), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spatial", [(70,), (9, 8), (3, 4, 6)])
def test_a_prefix_of_a_feature_buffer(any_ops: Any, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """As a plain layer calls them: a prefix in one buffer, its gradient in another, new features behind it."""
    c = to_dtype(make_case((2, spatial, 5, 3), dtype), dtype)
    buffer, grads = (torch.randn(2, *spatial, 9).movedim(-1, 1).to(dtype) for _ in range(2))
    buffer[:, :5] = c["x"]
    before, dense = (buffer.clone(), grads.clone()), in_buffer(torch.empty_like(c["grad"]))
    vectors = [c[name] for name in VECTORS]
    in_place = any_ops.bn_relu_conv3x3(buffer[:, :5], *vectors[:2], c["weight"], c["bias"], buffer[:, 5:8])
    alone = any_ops.bn_relu_conv3x3(c["x"], *vectors[:2], c["weight"], c["bias"], dense)
    torch.testing.assert_close([*in_place, buffer[:, 5:8]], [*alone, dense])
    assert torch.equal(buffer[:, 8:], before[0][:, 8:]) and torch.equal(buffer[:, :5], before[0][:, :5])

    dense, every = in_buffer(grads[:, :5]), []
    for x, grad_x in ((c["x"], dense), (buffer[:, :5], grads[:, :5])):
        arguments = grads[:, 5:8], x, *vectors, c["weight"], grad_x
        every.append(any_ops.bn_relu_conv3x3_backward(*arguments, True, True, True))
    torch.testing.assert_close([*every[0], dense], [*every[1], grads[:, :5]])
    assert torch.equal(grads[:, 5:], before[1][:, 5:])


def test_an_expanded_gradient_is_read_right(any_ops: Any) -> None:
    c = make_case((2, (5, 7), 12, 17))
    results = []
    for of in (lambda g: g, Tensor.contiguous):
        grad, grad_x = of(torch.tensor(0.5).double().expand_as(c["grad"])), in_buffer(c["grad_x"])
        arguments = grad, c["x"], *(c[name] for name in VECTORS), c["weight"], grad_x
        results.append([*any_ops.bn_relu_conv3x3_backward(*arguments, False, True, True), grad_x])
    torch.testing.assert_close(*results)


def test_an_unwanted_gradient_may_be_nothing(any_ops: Any) -> None:
    c = make_case((2, (5, 7), 12, 17))
    arguments = c["grad"], c["x"], *(c[name] for name in VECTORS), c["weight"]
    every = any_ops.bn_relu_conv3x3_backward(*arguments, channels_last(c["grad_x"]), False, True, True)
    for accumulate in (False, True):
        nothing = c["x"].new_empty(0)
        some = any_ops.bn_relu_conv3x3_backward(*arguments, nothing, accumulate, False, True)
        assert nothing.numel() == 0 and torch.equal(some[0], every[0])
        assert [s.shape for s in some[1:]] == [s.shape for s in every[1:]]


def test_nan_spreads_as_in_torch(any_ops: Any) -> None:
    """To the neighbours of its pixel and no further, in an image's corner, and past what relu would stop."""
    c = make_case((2, (5, 7), 12, 17))
    c["x"][1, 3, 0, 6] = c["grad"][0, 2, 4, 0] = float("nan")
    out, mean, _ = run_forward(c)(any_ops, torch.float64)
    where = torch.zeros_like(out, dtype=torch.bool)
    where[1, :, :2, 5:] = True
    assert torch.equal(out.isnan(), where) and mean.isnan().all()
    grad_weight, _, sum_dx, grad_x = run_backward(c)(any_ops, torch.float64)
    where = torch.zeros_like(grad_x, dtype=torch.bool)
    where[0, :, 3:, :2] = (c["scale"] * c["x"].movedim(1, -1) + c["shift"] > 0).movedim(-1, 1)[0, :, 3:, :2]
    assert torch.equal(grad_x.isnan(), where) and grad_x[1, 3, 0, 6] != 0
    assert sum_dx[3].isnan() and grad_weight[2].isnan().any() and not grad_weight[3, :3].isnan().any()


def test_nan_spreads_in_volumes_as_in_torch(any_ops: Any) -> None:
    """To the neighbours of its pixel and no further, from the last plane of an image and the first of the next."""
    c = make_case((2, (3, 4, 5), 12, 17))
    c["x"][0, 3, 2, 3, 4] = c["x"][1, 3, 1, 1, 2] = float("nan")
    out, _, _ = run_forward(c)(any_ops, torch.float64)
    where = torch.zeros_like(out, dtype=torch.bool)
    where[0, :, 1:, 2:, 3:] = where[1, :, :, :3, 1:4] = True
    assert torch.equal(out.isnan(), where)
    c = make_case((2, (3, 4, 5), 12, 17))
    c["grad"][1, 2, 0, 0, 0] = float("nan")
    grad_x = run_backward(c)(any_ops, torch.float64)[-1]
    where = torch.zeros_like(grad_x, dtype=torch.bool)
    passed = (c["scale"] * c["x"].movedim(1, -1) + c["shift"] > 0).movedim(-1, 1)
    where[1, :, :2, :2, :2] = passed[1, :, :2, :2, :2]
    assert torch.equal(grad_x.isnan(), where)


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of bn_relu_conv3x3 and of its backward, by name."""
    c = to_dtype(case, dtype)
    shared = {name: c[name] for name in ("x", "scale", "shift", "weight")}
    forward = {**shared, "bias": c["bias"], "out": channels_last(torch.zeros_like(c["grad"]))}
    backward = {**shared, "grad": c["grad"], "mean": c["mean"], "grad_x": channels_last(c["grad_x"])}
    return forward, {**backward, **dict.fromkeys(("accumulate", "need_x", "need_weight"), True)}


@pytest.mark.core
@pytest.mark.parametrize("shape, dtype", OPCHECKS)
def test_opcheck(shape: tuple, dtype: torch.dtype) -> None:
    forward, backward = arguments(make_case(shape), dtype)
    left_out: dict[str, Any]
    for left_out in ({}, {"bias": None}):
        torch.library.opcheck(torch.ops.effdense.bn_relu_conv3x3.default, (), {**forward, **left_out})
    for left_out in ({}, {"need_weight": False}, {"need_x": False, "grad_x": torch.empty(0, dtype=dtype)}):
        torch.library.opcheck(
            torch.ops.effdense.bn_relu_conv3x3_backward.default, (), {**backward, **left_out}
        )


OF_BOTH: list[Mistake] = [
    ("x", lambda x: x[0, 0], ValueError, r"must be \[N, C, \*spatial\].*, got shape \[5, 7\]"),
    ("x", lambda x: x[:, :0], ValueError, r"must have at least one channel, got shape \[2, 0, 5, 7\]"),
    ("x", lambda x: x[..., None, None], ValueError, r"must be \[N, C, \*spatial\] with 1 to 3 spatial dimensions, got shape \[2, 12, 5, 7, 1, 1\]"),
    ("weight", lambda w: w[..., None], ValueError, r"must be \[out_channels, 12, 3, 3\] .*, got shape \[17, 12, 3, 3, 1\]"),
    *(
        ("weight", change, ValueError, rf"must be \[out_channels, 12, 3, 3\] \(x's channels and dimensions\), got shape {got}")
        for change, got in [
            (lambda w: w[:, 1:], r"\[17, 11, 3, 3\]"),
            (lambda w: w[:0], r"\[0, 12, 3, 3\]"),
            (lambda w: w[..., 1:], r"\[17, 12, 3, 2\]"),
            (lambda w: w[:, :, 1:2, 1:2], r"\[17, 12, 1, 1\]"),
            (lambda w: w[0], r"\[12, 3, 3\]"),
        ]
    ),
    ("weight", Tensor.float, TypeError, r"must be Double \(the features' type\), got Float"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", [*OF_BOTH, *mistakes(["scale", "shift", "bias"], [], ["out"])])
def test_wrong_arguments_of_bn_relu_conv3x3(mistake: Mistake) -> None:
    right = arguments(make_case((2, (5, 7), 12, 17)))[0]
    assert_refused("bn_relu_conv3x3", right, mistake)
    assert not right["out"].any()


@pytest.mark.parametrize("mistake", [*OF_BOTH, *mistakes(VECTORS, ["grad"], ["grad_x"])])
def test_wrong_arguments_of_bn_relu_conv3x3_backward(mistake: Mistake) -> None:
    right = arguments(make_case((2, (5, 7), 12, 17)))[1]
    before = right["grad_x"].clone()
    assert_refused("bn_relu_conv3x3_backward", right, mistake)
    assert torch.equal(right["grad_x"], before)
