"""bottleneck and bottleneck_backward against the float64 reference and torch's convolution; wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import reference
from tests._cases import (
    DTYPES,
    EPS,
    IN_EVERY_LAYOUT,
    LAYOUTS,
    OPCHECKS,
    SHAPES,
    Mistake,
    Run,
    assert_as_exact,
    assert_refused,
    assert_repeatable,
    away_from_the_kink,
    channels_last,
    column,
    in_buffer,
    lay_out,
    make_features,
    mistakes,
    over_channels,
    random_scale,
    rest_is_untouched,
    rms,
    to_dtype,
)

Case = dict[str, Any]
VECTORS = ("scale", "shift", "mean")
# of what grad_y misses: the first four, or with relu's backward all six
CORRECTION = ("y", "y_mean", "a", "b", "out_scale", "out_shift")


def make_case(shape: tuple, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Case:
    """Arguments in float64, rounded to what `dtype` has: every run gets the same numbers, in its own types."""
    images, spatial, channels, out = shape
    features = [x + offset for x in make_features(images, spatial, channels)]
    mean, var = reference.channel_statistics(features)
    total, scale = sum(channels), random_scale((var + EPS).rsqrt())
    case = {
        "scale": scale,
        "shift": torch.randn(total, dtype=torch.float64) - mean * scale,
        "mean": mean,
        "weight": torch.randn(out, total, dtype=torch.float64) / total**0.5,
        "bias": torch.randn(out, dtype=torch.float64),
        "out_scale": random_scale(torch.ones(out, dtype=torch.float64)),
        "out_shift": torch.randn(out, dtype=torch.float64),
        "grad_y": torch.randn(images, out, *spatial, dtype=torch.float64),
        "grad_features": [torch.randn_like(x) for x in features],
        "y": torch.randn(images, out, *spatial, dtype=torch.float64),
        "y_mean": torch.randn(out, dtype=torch.float64),
        "a": torch.randn(out, dtype=torch.float64),
        "b": torch.randn(out, dtype=torch.float64),
    }
    case = to_dtype(to_dtype(case, dtype), torch.float64)
    vectors = zip(case["scale"].split(channels), case["shift"].split(channels), strict=True)
    case["y"] = away_from_the_kink(case["y"], case["out_scale"], case["out_shift"], dtype)
    case["features"] = [away_from_the_kink(x, *v, dtype) for x, v in zip(features, vectors, strict=True)]
    return case


def run_forward(
    case: Case, bias: bool = False, epilogue: bool = False, statistics: bool = True, first: int = 0
) -> Run:
    """`first`: the layout of the first feature, see `lay_out`."""

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        y = in_buffer(torch.full_like(c["grad_y"], float("nan")))
        of_out = [c[name] if epilogue else None for name in ("out_scale", "out_shift")]
        result = ops.bottleneck(
            lay_out(c["features"], first),
            *(c[name] for name in ("scale", "shift", "weight")),
            c["bias"] if bias else None,
            *of_out,
            statistics,
            y,
        )
        assert rest_is_untouched(y)
        return [y, *result]

    return run


def run_backward(
    case: Case,
    accumulate: bool = False,
    need_features: bool = True,
    need_weight: bool = True,
    first: int = 0,
    correction: int = 0,
) -> Run:
    """`first`: the layout of the first feature, see `lay_out`; those of grad_y and y are others. `correction`: how many of CORRECTION."""

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        start = [x if accumulate else torch.full_like(x, float("nan")) for x in c["grad_features"]]
        grads = [in_buffer(x) for x in start]
        grad_y, c["y"] = lay_out([c["grad_y"], c["y"]], first + 2)
        sums = ops.bottleneck_backward(
            lay_out(c["features"], first),
            grad_y,
            *(c[name] for name in (*VECTORS, "weight")),
            grads,
            accumulate,
            need_features,
            need_weight,
            [c[name] for name in CORRECTION[:correction]],
        )
        assert all(map(rest_is_untouched, grads))
        if need_features:
            return [*sums, *grads]
        for a, b in zip(grads, start, strict=True):
            assert torch.equal(a.nan_to_num(99), b.nan_to_num(99))
        return list(sums)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "bias, epilogue, statistics, first",
    [(False, False, True, 0), (True, False, False, 2), (False, True, True, 4), (True, True, False, 3)],
)
def test_forward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, bias: bool, epilogue: bool, statistics: bool, first: int
) -> None:
    run = run_forward(make_case(shape, dtype), bias, epilogue, statistics, first)
    assert_as_exact(lambda *which: run(*which)[:1], ops, dtype)
    y, *result = run(ops, dtype)
    if not statistics:
        assert [x.numel() for x in result] == [0, 0]
        return
    # Of y as it was stored: what the rounding of y does to them is no error of theirs.
    for got, exact in zip(result, reference.channel_statistics([y.double()]), strict=True):
        roundings = 100 if dtype == torch.float64 else 3
        assert rms(got.double() - exact) <= roundings * torch.finfo(got.dtype).eps * rms(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "accumulate, need_features, need_weight, first, correction",
    [
        (False, True, True, 0, 0),
        (True, True, False, 2, 4),
        (False, False, True, 4, 4),
        (True, True, True, 3, 6),
    ],
)
def test_backward_matches_the_float64_twin(
    ops: Any,
    shape: tuple,
    dtype: torch.dtype,
    accumulate: bool,
    need_features: bool,
    need_weight: bool,
    first: int,
    correction: int,
) -> None:
    run = run_backward(make_case(shape, dtype), accumulate, need_features, need_weight, first, correction)
    assert_as_exact(run, ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images, channels, spatial", IN_EVERY_LAYOUT)
def test_features_in_every_layout(
    ops: Any, images: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = make_case((images, spatial, (channels,) * len(LAYOUTS), 9), dtype)
    assert_as_exact(run_forward(case), ops, dtype)
    for correction in (0, 4, 6):
        assert_as_exact(run_backward(case, accumulate=True, correction=correction), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_one_feature_in_every_layout(ops: Any, first: int, dtype: torch.dtype) -> None:
    case = make_case((2, (5, 7), (9,), 4), dtype)
    assert_as_exact(run_forward(case, first=first), ops, dtype)
    for correction in (0, 4, 6):
        assert_as_exact(run_backward(case, first=first, correction=correction), ops, dtype)


def test_a_mean_far_larger_than_the_deviation(ops: Any) -> None:
    case = make_case(SHAPES[6], torch.float32, offset=2e4)
    assert_as_exact(run_forward(case), ops, torch.float32)
    assert_as_exact(run_backward(case), ops, torch.float32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
@pytest.mark.parametrize("epilogue, accumulate", [(False, False), (True, True)])
def test_together_they_are_torchs_convolution(
    any_ops: Any, shape: tuple, epilogue: bool, accumulate: bool
) -> None:
    c = make_case(shape)
    features, vectors = c["features"], [c[name] for name in VECTORS]
    x = torch.cat(features, 1).requires_grad_()
    before_relu = x * column(c["scale"], x) + column(c["shift"], x)
    weight = c["weight"].clone().requires_grad_()
    y = torch.einsum("oc,nc...->no...", weight, before_relu.relu()) + column(c["bias"], x)
    d, grad_weight, grad_x = torch.autograd.grad(y, (before_relu, weight, x), c["grad_y"])
    expected = (y * column(c["out_scale"], x) + column(c["out_shift"], x)).relu() if epilogue else y
    of_out = (c["out_scale"], c["out_shift"]) if epilogue else (None, None)

    got = in_buffer(torch.empty_like(y))
    arguments = features, *vectors[:2], c["weight"], c["bias"], *of_out, True, got
    mean, var = any_ops.bottleneck(*arguments)
    torch.testing.assert_close(got, expected.detach())
    if y.numel():
        torch.testing.assert_close(mean, expected.mean(over_channels(x)))
        torch.testing.assert_close(var, expected.var(over_channels(x), correction=0))
    grads = [in_buffer(start) for start in c["grad_features"]]
    got_weight, sum_d, sum_dx = any_ops.bottleneck_backward(
        features, c["grad_y"], *vectors, c["weight"], grads, accumulate, True, True, []
    )
    start = torch.cat(c["grad_features"], 1) if accumulate else 0
    torch.testing.assert_close(torch.cat(grads, 1), grad_x + start)
    torch.testing.assert_close(got_weight, grad_weight)
    torch.testing.assert_close(sum_d, d.sum(over_channels(x)))
    torch.testing.assert_close(sum_dx, (d * (x - column(c["mean"], x))).sum(over_channels(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spatial", [(4, 3), (9,), (1, 1), (2, 3, 2)])
def test_a_prefix_of_a_feature_buffer(any_ops: Any, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """As a dense block calls them: a prefix in one buffer, its gradient in another, new features behind it."""
    c = to_dtype(make_case((2, spatial, (5,), 3), dtype), dtype)
    buffer, grads = (torch.randn(2, *spatial, 9).movedim(-1, 1).to(dtype) for _ in range(2))
    buffer[:, :5] = c["features"][0]
    before, y = (buffer.clone(), grads.clone()), buffer[:, 5:8]
    vectors = [c[name] for name in VECTORS]
    any_ops.bottleneck([buffer[:, :5]], *vectors[:2], c["weight"], None, None, None, False, y)
    dense = in_buffer(torch.empty_like(y))
    any_ops.bottleneck(c["features"], *vectors[:2], c["weight"], None, None, None, False, dense)
    torch.testing.assert_close(y, dense)
    assert torch.equal(buffer[:, 8:], before[0][:, 8:]) and torch.equal(buffer[:, :5], before[0][:, :5])

    alone = in_buffer(grads[:, :5])
    every = [
        any_ops.bottleneck_backward(x, grads[:, 5:8], *vectors, c["weight"], [grad], True, True, True, [])
        for x, grad in ((c["features"], alone), ([buffer[:, :5]], grads[:, :5]))
    ]
    torch.testing.assert_close(*every)
    torch.testing.assert_close(grads[:, :5], alone)
    assert torch.equal(grads[:, 5:], before[1][:, 5:])


@pytest.mark.parametrize("accumulate", [False, True])
def test_unwanted_gradients_are_not_written(any_ops: Any, accumulate: bool) -> None:
    c = make_case(SHAPES[0])
    every, some = ([channels_last(x.clone()) for x in c["grad_features"]] for _ in range(2))
    some[1] = some[1].new_empty(0)
    arguments = c["features"], c["grad_y"], *(c[name] for name in VECTORS), c["weight"]
    all_sums = any_ops.bottleneck_backward(*arguments, every, accumulate, True, True, [])
    some_sums = any_ops.bottleneck_backward(*arguments, some, accumulate, True, True, [])
    for a, b in zip(some_sums, all_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert some[1].numel() == 0
    for i in (0, 2):
        torch.testing.assert_close(some[i], every[i], rtol=0, atol=0)


def test_expanded_features_and_gradients_are_read_right(any_ops: Any) -> None:
    c = make_case((2, (4, 3), (3, 4), 5))
    expanded = [
        c["features"][0][:, :, :1, :1].expand(-1, -1, 4, 3),
        c["features"][1][:1].expand(2, -1, -1, -1),
    ]
    grad_y = torch.tensor(0.5).double().expand_as(c["grad_y"])
    vectors, results = [c[name] for name in VECTORS], []
    for features, dy in ((expanded, grad_y), ([x.contiguous() for x in expanded], grad_y.contiguous())):
        y, grads = in_buffer(torch.empty_like(c["grad_y"])), [in_buffer(x) for x in c["grad_features"]]
        any_ops.bottleneck(features, *vectors[:2], c["weight"], None, None, None, False, y)
        sums = any_ops.bottleneck_backward(features, dy, *vectors, c["weight"], grads, False, True, True, [])
        results.append([y, *sums, *grads])
    torch.testing.assert_close(*results)


def test_nan_stays_nan_and_passes_gradients_as_in_torch(any_ops: Any) -> None:
    c = make_case(SHAPES[0])
    c["features"][0][0, 0, 0, 0] = float("nan")
    vectors, y = [c[name] for name in VECTORS], in_buffer(torch.empty_like(c["grad_y"]))
    for of_out in ((None, None), (c["out_scale"], c["out_shift"])):
        any_ops.bottleneck(c["features"], *vectors[:2], c["weight"], None, *of_out, False, y)
        assert y[0, :, 0, 0].isnan().all() and y.isnan().sum() == y.shape[1]
    grads = [in_buffer(x) for x in c["grad_features"]]
    any_ops.bottleneck_backward(
        c["features"], c["grad_y"], *vectors, c["weight"], grads, False, True, False, []
    )
    d = c["weight"][:, 0] @ c["grad_y"][0, :, 0, 0]
    torch.testing.assert_close(grads[0][0, 0, 0, 0], c["scale"][0] * d)


# ---- what grad_y still misses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", [4, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_correction_comes_first(any_ops: Any, shape: tuple, correction: int, dtype: torch.dtype) -> None:
    """By hand in float64; what is written in `dtype` may be off by a rounding of it, sums of n terms by sqrt(n) of theirs.

    The CUDA kernels write the finished grad_y in `dtype` for the tensor cores: all that follows is off by that rounding.
    """
    case = make_case(shape, dtype)
    like, got = case["y"], run_backward(case, correction=correction)(any_ops, dtype)
    subtracted = column(case["a"], like) + column(case["b"], like) * (like - column(case["y_mean"], like))
    grad = case["grad_y"]
    if correction == 6:
        scale, shift = column(case["out_scale"], like), column(case["out_shift"], like)
        grad = scale * grad * (scale * like + shift > 0)
    finished = {**case, "grad_y": grad - subtracted}
    terms = max(like.numel() // like.shape[1], like.shape[1])
    wide = torch.finfo(reference.accumulate_dtype(dtype)).eps
    on_cuda = any_ops is torch.ops.effdense_simt
    for a, b in zip(got, run_backward(finished)(reference, torch.float64), strict=True):
        if b.numel():
            eps = torch.finfo(dtype if on_cuda else a.dtype).eps
            assert rms(a.double() - b) <= (eps + terms**0.5 * wide) * rms(b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_correction_leaves_its_arguments_alone(any_ops: Any, dtype: torch.dtype) -> None:
    _, backward = arguments(make_case(SHAPES[0], dtype), dtype)
    read = [backward["grad_y"], *backward["correction"], *backward["features"]]
    before = [x.clone() for x in read]
    any_ops.bottleneck_backward(**backward)
    assert all(map(torch.equal, read, before))


def test_where_nothing_is_to_be_corrected_y_is_not_looked_at(any_ops: Any) -> None:
    """As in apply_correction: b = 0 of a norm with running statistics, and a y that overflowed."""
    results = []
    for value in (float("nan"), float("inf"), 0.0):
        torch.manual_seed(1)
        case = make_case(SHAPES[0])
        case["y"][:, 2], case["b"][2] = value, 0.0
        results.append(run_backward(case, correction=4)(any_ops, torch.float64))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_repeatable(ops: Any, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[5], dtype)
    assert_repeatable(run_forward(case, True, True), ops, dtype)
    assert_repeatable(run_backward(case, True), ops, dtype)
    assert_repeatable(run_backward(case, True, correction=6), ops, dtype)


def arguments(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of bottleneck and of bottleneck_backward, by name."""
    c = to_dtype(case, dtype)
    shared = {"features": lay_out(c["features"], 2), **{k: c[k] for k in ("scale", "shift", "weight")}}
    rest = {k: c[k] for k in ("bias", "out_scale", "out_shift")}
    grads = [channels_last(x) for x in c["grad_features"]]
    backward = {**shared, "grad_y": c["grad_y"], "mean": c["mean"], "grad_features": grads}
    return {**shared, **rest, "statistics": True, "y": channels_last(torch.zeros_like(c["grad_y"]))}, {
        **backward,
        **dict.fromkeys(("accumulate", "need_features", "need_weight"), True),
        "correction": [c[name] for name in CORRECTION],
    }


@pytest.mark.core
@pytest.mark.parametrize("shape, dtype", OPCHECKS)
def test_opcheck(shape: tuple, dtype: torch.dtype) -> None:
    forward, backward = arguments(make_case(shape), dtype)
    torch.library.opcheck(torch.ops.effdense.bottleneck.default, (), forward)
    torch.library.opcheck(torch.ops.effdense.bottleneck_backward.default, (), backward)


@pytest.mark.core
@pytest.mark.parametrize("shape, dtype", OPCHECKS[:1])
def test_opcheck_of_what_may_be_left_out(shape: tuple, dtype: torch.dtype) -> None:
    forward, backward = arguments(make_case(shape), dtype)
    forward |= {"bias": None, "out_scale": None, "out_shift": None, "statistics": False}
    torch.library.opcheck(torch.ops.effdense.bottleneck.default, (), forward)
    backward |= {"accumulate": False, "need_weight": False, "correction": []}
    backward["grad_features"][1] = torch.empty(0, dtype=dtype)
    torch.library.opcheck(torch.ops.effdense.bottleneck_backward.default, (), backward)


FEATURES: list[Mistake] = [
    ("features", lambda f: [], ValueError, r"must hold at least one tensor, got an empty list"),
    (
        "features",
        lambda f: [f[0], f[1][:, :, :2], f[2]],
        ValueError,
        r"\[1\] must have the batch and spatial sizes of \[2, 3, 5, 7\], got \[2, 5, 2, 7\]",
    ),
    ("features", lambda f: [*f[:2], f[2].float()], TypeError, r"\[2\] must be Double .*, got Float"),
    (
        "features",
        lambda f: [f[0][0, 0, 0]],
        ValueError,
        r"\[0\] must be \[N, C, \*spatial\].*got shape \[7\]",
    ),
    (
        "features",
        lambda f: [f[0][:, :0]],
        ValueError,
        r"\[0\] must have at least one channel, got shape \[2, 0",
    ),
    (
        "weight",
        lambda w: w[:, 1:].contiguous(),
        ValueError,
        r"must be a matrix \[out_channels, 10\] .*, got shape \[6, 9\]",
    ),
    (
        "weight",
        lambda w: w[..., None],
        ValueError,
        r"must be a matrix \[out_channels, 10\] .*, got shape \[6, 10, 1\]",
    ),
    ("weight", lambda w: w[:0], ValueError, r"must be a matrix .*, got shape \[0, 10\]"),
    ("weight", lambda w: w.t().contiguous().t(), ValueError, r"must be contiguous, got strides \[1, 6\]"),
    ("weight", Tensor.float, TypeError, r"must be Double .*, got Float"),
]


@pytest.mark.parametrize(
    "mistake",
    [*FEATURES, *mistakes(["scale", "shift", "bias", "out_scale", "out_shift"], [], ["y"])],
)
def test_wrong_arguments_of_bottleneck(mistake: Mistake) -> None:
    assert_refused("bottleneck", arguments(make_case(SHAPES[0]), torch.float64)[0], mistake)


@pytest.mark.parametrize("missing", ["out_scale", "out_shift"])
def test_half_an_epilogue(missing: str) -> None:
    wrong = arguments(make_case(SHAPES[0]), torch.float64)[0] | {missing: None}
    with pytest.raises(
        ValueError, match=r"^bottleneck: out_scale and out_shift must be given together, got one"
    ):
        torch.ops.effdense.bottleneck(**wrong)


GRADIENTS: list[Mistake] = [
    ("grad_features", lambda g: g[:1], ValueError, r"must hold 3 tensors \(one per feature\), got 1"),
    (
        "grad_features",
        lambda g: [g[0], g[1][:, 1:], g[2]],
        ValueError,
        r"\[1\] must have 5 channels, got shape",
    ),
    ("grad_features", lambda g: [*g[:2], g[2][1:]], ValueError, r"\[2\] must have the batch .*, got \[1, 2"),
    ("grad_features", lambda g: [g[0].float(), *g[1:]], TypeError, r"\[0\] must be Double .*, got Float"),
    (
        "grad_features",
        lambda g: [g[0], g[1].contiguous(), g[2]],
        ValueError,
        r"(\[1\] )?must be channels-last \(written in place\), got shape \[2, 5, 5, 7\] with strides \[175, 35, 7, 1\]",
    ),
]


def in_correction(mistake: Mistake, position: int) -> Mistake:
    _, change, error, message = mistake
    return (
        "correction",
        lambda d: [change(x) if i == position else x for i, x in enumerate(d)],
        error,
        rf"\[{position}\] {message}",
    )


NOT_FOUR = r"must hold y, mean, a, b, perhaps scale, shift, or nothing, got {} tensors"
WRONG_CORRECTIONS: list[Mistake] = [
    ("correction", lambda d: d[:3], ValueError, NOT_FOUR.format(3)),
    ("correction", lambda d: d[:5], ValueError, NOT_FOUR.format(5)),
    *(in_correction(mistake, 0) for mistake in mistakes([], ["y"])),
    *(in_correction(mistake, i) for i in range(1, 6) for mistake in mistakes(["vector"])),
]


@pytest.mark.parametrize(
    "mistake", [*FEATURES, *GRADIENTS, *WRONG_CORRECTIONS, *mistakes(VECTORS, ["grad_y"])]
)
def test_wrong_arguments_of_bottleneck_backward(mistake: Mistake) -> None:
    right = arguments(make_case(SHAPES[0]), torch.float64)[1]
    before = [x.clone() for x in right["grad_features"]]
    assert_refused("bottleneck_backward", right, mistake)
    assert all(map(torch.equal, right["grad_features"], before))
