"""bn_relu and bn_relu_backward against the float64 twin and torch's own batch norm, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effdense import reference
from tests.cases import (
    DTYPES,
    SHAPES,
    assert_as_exact,
    away_from_the_kink,
    make_features,
    random_scale,
)


def make_case(shape: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    x = make_features(shape[0], shape[1], shape[2][:1])[0].to(dtype).double()
    mean, var = reference.channel_statistics([x])
    rstd = (var + 1e-5).rsqrt()
    scale = random_scale(rstd)
    case = {
        "x": x,
        "mean": mean,
        "rstd": rstd,
        "scale": scale,
        "shift": torch.randn_like(mean) - mean * scale,
    }
    wide = reference.accumulate_dtype(dtype)
    case = {k: v if k == "x" else v.to(wide).double() for k, v in case.items()}
    return case | {"x": away_from_the_kink(x, case["scale"], case["shift"], dtype)}


def in_dtype(case: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype if k == "x" else reference.accumulate_dtype(dtype)) for k, v in case.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_relu_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    case = make_case(shape, dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = in_dtype(case, dtype)
        out = torch.empty_like(c["x"], memory_format=torch.contiguous_format)
        ops.bn_relu(c["x"], c["scale"], c["shift"], out)
        return [out]

    assert_as_exact(run, ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_backward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, batch_statistics: bool
) -> None:
    case = make_case(shape, dtype)
    dz = torch.randn_like(case["x"]).to(dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = in_dtype(case, dtype)
        grad = dz.to(dtype).clone(memory_format=torch.contiguous_format)
        vectors = (c[name] for name in ("scale", "shift", "mean", "rstd"))
        return [*ops.bn_relu_backward(grad, c["x"], *vectors, batch_statistics), grad]

    assert_as_exact(run, ops, dtype)


def test_together_they_are_torchs_batch_norm_and_relu(any_ops: Any) -> None:
    x = make_features(3, (5, 4), (6,))[0].contiguous().requires_grad_()
    weight, bias = (torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2))
    dz = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    z = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
    expected = torch.autograd.grad(z, (x, weight, bias), dz)
    with torch.no_grad():
        mean, var = any_ops.channel_statistics([x])
        rstd = (var + 1e-5).rsqrt()
        scale = weight * rstd
        shift = bias - mean * scale
        out, grad = torch.empty_like(x), dz.clone()
        any_ops.bn_relu(x, scale, shift, out)
        sum_d, sum_dx = any_ops.bn_relu_backward(grad, x, scale, shift, mean, rstd, True)
    torch.testing.assert_close(out, z)
    torch.testing.assert_close((grad, sum_dx * rstd, sum_d), expected)


def test_nan_stays_nan(any_ops: Any) -> None:
    x = torch.tensor([float("nan"), -1.0, 1.0]).view(1, 1, 3)
    out, one, zero = torch.empty_like(x), torch.ones(1), torch.zeros(1)
    any_ops.bn_relu(x, one, zero, out)
    assert out.isnan().tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    c = in_dtype(make_case(SHAPES[0], dtype), dtype)
    out = torch.zeros_like(c["x"], memory_format=torch.contiguous_format)
    torch.library.opcheck(torch.ops.effdense.bn_relu.default, (c["x"], c["scale"], c["shift"], out))
    vectors = [c[name] for name in ("scale", "shift", "mean", "rstd")]
    grad = torch.randn_like(out)
    torch.library.opcheck(torch.ops.effdense.bn_relu_backward.default, (grad, c["x"], *vectors, True))


def test_wrong_arguments() -> None:
    x, vector = torch.ones(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(
        ValueError, match=r"bn_relu: scale must be a contiguous vector of 3 .* got shape \[2\]"
    ):
        torch.ops.effdense.bn_relu(x, vector[:2], vector, torch.empty_like(x))
    with pytest.raises(
        ValueError, match=r"bn_relu: out must have the batch and spatial sizes .* got \[2, 3, 4, 5\]"
    ):
        torch.ops.effdense.bn_relu(x, vector, vector, torch.ones(2, 3, 4, 5))
    with pytest.raises(TypeError, match=r"bn_relu_backward: grad must be Float .* got Double"):
        torch.ops.effdense.bn_relu_backward(x.double(), x, vector, vector, vector, vector, True)
