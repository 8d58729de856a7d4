"""bottleneck and bottleneck_backward against the float64 twin, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effdense import reference
from tests.cases import (
    DTYPES,
    SHAPES,
    assert_as_exact,
    away_from_the_kink,
    make_features,
    random_scale,
    to_dtype,
)

Case = tuple[list[Tensor], dict[str, Tensor]]


def make_case(shape: tuple, offset: float = 0.0) -> Case:
    images, spatial, channels, out = shape
    features = [x + offset for x in make_features(images, spatial, channels)]
    mean, var = reference.channel_statistics(features)
    total = sum(channels)
    scale = random_scale((var + 1e-5).rsqrt())
    return features, {
        "scale": scale,
        "shift": torch.randn(total, dtype=torch.float64) - mean * scale,
        "mean": mean,
        "weight": torch.randn(out, total, dtype=torch.float64) / total**0.5,
        "bias": torch.randn(out, dtype=torch.float64),
        "grad_y": torch.randn(images, out, *spatial, dtype=torch.float64),
    }


def in_dtype(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rounded once to `dtype` for all, so that every run gets the same numbers, in its own types."""
    features, rest = case
    wide = reference.accumulate_dtype(dtype)
    return to_dtype(features, dtype), {
        k: v.to(dtype if k in ("weight", "grad_y") else wide) for k, v in rest.items()
    }


def rounded(case: Case, dtype: torch.dtype) -> Case:
    rest = {k: v.double() for k, v in in_dtype(case, dtype)[1].items()}
    channels = [x.shape[1] for x in case[0]]
    vectors = zip(rest["scale"].split(channels), rest["shift"].split(channels), strict=True)
    features = [away_from_the_kink(x, *v, dtype) for x, v in zip(case[0], vectors, strict=True)]
    return features, rest


def run_forward(case: Case, bias: bool, statistics: bool) -> Any:
    def run(ops: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        features, p = in_dtype(case, dtype)
        return ops.bottleneck(
            features, p["scale"], p["shift"], p["weight"], p["bias"] if bias else None, statistics
        )

    return run


def run_backward(case: Case, need_features: bool = True, need_weight: bool = True) -> Any:
    def run(ops: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        features, p = in_dtype(case, dtype)
        grads = [torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in features]
        sums = ops.bottleneck_backward(
            features,
            p["grad_y"],
            *(p[name] for name in ("scale", "shift", "mean", "weight")),
            grads,
            need_features,
            need_weight,
        )
        return (*sums, *grads) if need_features else tuple(sums)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias, statistics", [(False, True), (True, True), (True, False)])
def test_forward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, bias: bool, statistics: bool
) -> None:
    case = rounded(make_case(shape), dtype)
    assert_as_exact(run_forward(case, bias, statistics), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("need_features, need_weight", [(True, True), (True, False), (False, True)])
def test_backward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, need_features: bool, need_weight: bool
) -> None:
    case = rounded(make_case(shape), dtype)
    assert_as_exact(run_backward(case, need_features, need_weight), ops, dtype)


def test_a_mean_far_larger_than_the_deviation(ops: Any) -> None:
    case = rounded(make_case(SHAPES[6], offset=2e4), torch.float32)
    assert_as_exact(run_forward(case, False, True), ops, torch.float32)
    assert_as_exact(run_backward(case), ops, torch.float32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
def test_together_they_are_torchs_convolution(any_ops: Any, shape: tuple) -> None:
    features, p = make_case(shape)
    x = torch.cat(features, 1).requires_grad_()
    vectors = [p[name].view(-1, *[1] * len(shape[1])) for name in ("scale", "shift", "mean")]
    before_relu = x * vectors[0] + vectors[1]
    weight = p["weight"].requires_grad_()
    z = before_relu.relu()
    y = torch.einsum("oc,nc...->no...", weight, z) + p["bias"].view(-1, *[1] * len(shape[1]))
    d, grad_weight, grad_x = torch.autograd.grad(y, (before_relu, weight, x), p["grad_y"])
    dims = [i for i in range(x.dim()) if i != 1]
    p["weight"] = weight.detach()

    got, mean, var = any_ops.bottleneck(features, p["scale"], p["shift"], p["weight"], p["bias"], True)
    torch.testing.assert_close(got, y)
    if y.numel():
        torch.testing.assert_close(mean, y.mean(dims))
        torch.testing.assert_close(var, y.var(dims, correction=0))
    grads = [torch.empty_like(f) for f in features]
    got_weight, sum_d, sum_dx = any_ops.bottleneck_backward(
        features, p["grad_y"], p["scale"], p["shift"], p["mean"], p["weight"], grads, True, True
    )
    torch.testing.assert_close(got_weight, grad_weight)
    torch.testing.assert_close(torch.cat(grads, 1), grad_x)
    torch.testing.assert_close(sum_d, d.sum(dims))
    torch.testing.assert_close(sum_dx, (d * (x - vectors[2])).sum(dims))


def test_unwanted_gradients_are_not_written(any_ops: Any) -> None:
    features, p = make_case(SHAPES[0])
    grads = [torch.empty_like(features[0]), features[1].new_empty(0), torch.empty_like(features[2])]
    every = [torch.empty_like(x) for x in features]
    arguments = features, p["grad_y"], p["scale"], p["shift"], p["mean"], p["weight"]
    some_sums = any_ops.bottleneck_backward(*arguments, grads, True, True)
    all_sums = any_ops.bottleneck_backward(*arguments, every, True, True)
    for a, b in zip(some_sums, all_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert grads[1].numel() == 0
    torch.testing.assert_close(grads[2], every[2], rtol=0, atol=0)


def test_features_that_are_not_dense_are_read_right(any_ops: Any) -> None:
    features, p = make_case(SHAPES[0])
    strided = [x.contiguous(memory_format=torch.channels_last) for x in features]
    strided[1] = torch.stack([features[1], features[1]], -1)[..., 0]
    arguments = p["scale"], p["shift"], p["weight"], p["bias"], True
    for a, b in zip(
        any_ops.bottleneck(strided, *arguments), any_ops.bottleneck(features, *arguments), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_nan_stays_nan(any_ops: Any) -> None:
    features, p = make_case(SHAPES[0])
    features[0][0, 0, 0, 0] = float("nan")
    y = any_ops.bottleneck(features, p["scale"], p["shift"], p["weight"], None, False)[0]
    assert y[0, :, 0, 0].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_repeatable(ops: Any, dtype: torch.dtype) -> None:
    case = rounded(make_case(SHAPES[5]), dtype)
    for run in (run_forward(case, True, True), run_backward(case)):
        first, second = run(ops, dtype), run(ops, dtype)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(shape: tuple, dtype: torch.dtype) -> None:
    features, p = in_dtype(make_case(shape), dtype)
    vectors = p["scale"], p["shift"]
    torch.library.opcheck(
        torch.ops.effdense.bottleneck.default, (features, *vectors, p["weight"], p["bias"], True)
    )
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in features]
    torch.library.opcheck(
        torch.ops.effdense.bottleneck_backward.default,
        (features, p["grad_y"], *vectors, p["mean"], p["weight"], grads, True, True),
    )


def wrong(**changes: Any) -> Any:
    features, p = make_case(SHAPES[0])
    arguments = {
        "features": features,
        **{k: p[k] for k in ("scale", "shift", "weight", "bias")},
        "statistics": True,
    }
    return torch.ops.effdense.bottleneck(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"features": []},
            ValueError,
            r"bottleneck: features must hold at least one tensor, got an empty list",
        ),
        (
            {"scale": torch.ones(9).double()},
            ValueError,
            r"bottleneck: scale must .* 10 elements .* got shape \[9\]",
        ),
        ({"shift": torch.ones(10)}, TypeError, r"bottleneck: shift must be Double .* got Float"),
        (
            {"weight": torch.ones(6, 9).double()},
            ValueError,
            r"bottleneck: weight must be a matrix \[out_channels, 10\].*\[6, 9\]",
        ),
        ({"weight": torch.ones(6, 10)}, TypeError, r"bottleneck: weight must be Double .* got Float"),
        (
            {"bias": torch.ones(5).double()},
            ValueError,
            r"bottleneck: bias must .* 6 elements .* got shape \[5\]",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong(**changes)


def test_wrong_features() -> None:
    features, _ = make_case(SHAPES[0])
    with pytest.raises(ValueError, match=r"bottleneck: features\[1\] must have the batch and spatial sizes"):
        wrong(features=[features[0], features[1][:, :, :2], features[2]])
    with pytest.raises(TypeError, match=r"bottleneck: features\[2\] must be Double .* got Float"):
        wrong(features=[*features[:2], features[2].float()])


def test_wrong_gradients() -> None:
    features, p = make_case(SHAPES[0])
    vectors = p["scale"], p["shift"], p["mean"], p["weight"]
    backward = torch.ops.effdense.bottleneck_backward
    with pytest.raises(ValueError, match=r"bottleneck_backward: grad_features must hold 3 tensors .* got 1"):
        backward(features, p["grad_y"], *vectors, [torch.empty_like(features[0])], True, True)
    with pytest.raises(ValueError, match=r"bottleneck_backward: grad_y must have 6 channels .* got shape"):
        backward(features, p["grad_y"][:, :5], *vectors, features, True, True)
