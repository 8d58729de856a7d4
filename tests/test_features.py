"""channel_statistics and take_gradient against the float64 twin, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effdense import reference
from tests.cases import DTYPES, SHAPES, assert_as_exact, make_features, to_dtype


def rounded_features(shape: tuple, dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    features = make_features(*shape[:3])
    return to_dtype(to_dtype([x + offset for x in features], dtype), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_statistics_match_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    features = rounded_features(shape, dtype)

    def run(ops: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return ops.channel_statistics(to_dtype(features, dtype))

    assert_as_exact(run, ops, dtype)


def test_the_variance_survives_a_large_mean(any_ops: Any) -> None:
    features = rounded_features(SHAPES[6], torch.float32, offset=2e4)  # 1e4 deviations
    mean, var = any_ops.channel_statistics(to_dtype(features, torch.float32))
    exact_mean, exact_var = reference.channel_statistics(features)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2.4e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_take_gradient_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    features = rounded_features(shape, dtype)
    start = [torch.randn_like(x).to(dtype).double() for x in features]
    a, b, mean = torch.randn(3, sum(shape[2])).double()

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        grads = [x.to(dtype).clone() for x in start]
        vectors = (v.to(reference.accumulate_dtype(dtype)) for v in (mean, a, b))
        ops.take_gradient(to_dtype(features, dtype), *vectors, grads)
        return grads

    assert_as_exact(run, ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    features = to_dtype(make_features(*SHAPES[0][:3]), dtype)
    torch.library.opcheck(torch.ops.effdense.channel_statistics.default, (features,))
    vectors = list(torch.randn(3, 10).to(reference.accumulate_dtype(dtype)))
    grads = [torch.randn_like(x) for x in features]
    torch.library.opcheck(torch.ops.effdense.take_gradient.default, (features, *vectors, grads))


def test_take_gradient_refuses_what_it_cannot_write() -> None:
    features = make_features(*SHAPES[0][:3])
    vectors = list(torch.randn(3, 10).double())
    grads = [torch.zeros_like(x).contiguous(memory_format=torch.channels_last) for x in features]
    with pytest.raises(
        ValueError, match=r"take_gradient: grad_features must be dense in every image .* strides"
    ):
        torch.ops.effdense.take_gradient(features, *vectors, grads)
    with pytest.raises(
        ValueError, match=r"take_gradient: b must be a contiguous vector of 10 .* got shape \[3\]"
    ):
        torch.ops.effdense.take_gradient(features, *vectors[:2], vectors[2][:3], features)


def test_take_gradient_is_affine_in_the_features(any_ops: Any) -> None:
    features = make_features(*SHAPES[0][:3])
    mean, a, b = torch.randn(3, 10).double()
    grads = [torch.randn_like(x).contiguous() for x in features]
    x, g = torch.cat(features, 1), torch.cat(grads, 1)
    column = (slice(None), None, None)
    any_ops.take_gradient(features, mean, a, b, grads)
    torch.testing.assert_close(torch.cat(grads, 1), g - a[column] - b[column] * (x - mean[column]))


def test_channel_statistics_are_torchs(any_ops: Any) -> None:
    x = torch.cat(make_features(*SHAPES[6][:3]), 1)
    mean, var = any_ops.channel_statistics([x])
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
