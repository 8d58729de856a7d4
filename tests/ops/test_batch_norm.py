"""fold, accumulate_correction, bn_relu and its backward in three forms, against the float64 reference and torch's batch norm; wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effdense.ops import reference
from tests._cases import (
    DTYPES,
    LAYOUTS,
    OPCHECKS,
    SHAPES,
    Mistake,
    Run,
    assert_as_exact,
    assert_refused,
    assert_repeatable,
    channels_last,
    column,
    in_buffer,
    make_features,
    make_norm_case,
    mistakes,
    over_channels,
    rest_is_untouched,
    to_dtype,
)

VECTORS = ("scale", "shift", "mean", "rstd")


def run_forward(shape: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case = make_norm_case(shape, dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c = to_dtype(case, dtype)
        out = in_buffer(torch.full_like(c["x"], float("nan")))
        ops.bn_relu(LAYOUTS[layout](c["x"]), c["scale"], c["shift"], out)
        assert rest_is_untouched(out)
        return [out]

    return run


def run_backward(
    shape: tuple, dtype: torch.dtype, layout: str = "channels-last", batch_statistics: bool = True
) -> Run:
    case = make_norm_case(shape, dtype)
    dz = torch.randn_like(case["x"]).to(dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c, grad = to_dtype(case, dtype), in_buffer(dz.to(dtype))
        vectors = (c[name] for name in VECTORS)
        sums = ops.bn_relu_backward(grad, LAYOUTS[layout](c["x"]), *vectors, batch_statistics)
        assert rest_is_untouched(grad)
        return [*sums, grad]

    return run


def run_backward_accumulate(shape: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case = make_norm_case(shape, dtype)
    dz, start = torch.randn(2, *case["x"].shape, dtype=torch.float64).to(dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c, grad_x = to_dtype(case, dtype), in_buffer(start.to(dtype))
        x, grad = LAYOUTS[layout](c["x"]), LAYOUTS[layout](dz.to(dtype))
        sums = ops.bn_relu_backward_accumulate(grad, x, c["scale"], c["shift"], c["mean"], grad_x)
        assert rest_is_untouched(grad_x) and torch.equal(grad, dz.to(dtype))
        return [*sums, grad_x]

    return run


def run_backward_sums(shape: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    case = make_norm_case(shape, dtype)
    dz = torch.randn_like(case["x"]).to(dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        c, out = to_dtype(case, dtype), in_buffer(torch.zeros_like(dz).to(dtype))
        x, grad = LAYOUTS[layout](c["x"]), LAYOUTS[layout](dz.to(dtype))
        sums = ops.bn_relu_backward_sums(grad, x, c["scale"], c["shift"], c["mean"], out)
        assert rest_is_untouched(out) and torch.equal(grad, dz.to(dtype))
        return [*sums, out]

    return run


def run_fold(weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None, channels: int = 37) -> Run:
    mean, bias, var, weight = torch.randn(4, channels, dtype=torch.float64).float().double()
    weight, bias = (v if d is None else v.to(d) for v, d in ((weight, weight_dtype), (bias, bias_dtype)))

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        affine = (None if d is None else v for v, d in ((weight, weight_dtype), (bias, bias_dtype)))
        return list(ops.fold(mean.to(dtype), var.abs().to(dtype), *affine, 1e-5))

    return run


def run_accumulate_correction(count: int, channels: int = 37, more: int = 3) -> Run:
    case = list(torch.randn(4, channels).double())
    a, b = torch.randn(2, channels + more).double()

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        to_a, to_b = a.to(dtype, copy=True), b.to(dtype, copy=True)
        ops.accumulate_correction(*to_dtype(case, dtype), count, to_a, to_b)
        assert torch.equal(to_a[channels:], a[channels:].to(dtype))
        assert torch.equal(to_b[channels:], b[channels:].to(dtype))
        return [to_a, to_b]

    return run


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "weight, bias",
    [
        (torch.float32, torch.float32),
        (None, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, None),
        (None, torch.half),
    ],
)
def test_fold_matches_the_float64_twin(ops: Any, weight: Any, bias: Any, dtype: torch.dtype) -> None:
    assert_as_exact(run_fold(weight, bias), ops, dtype)


def test_fold_is_batch_norm(any_ops: Any) -> None:
    x, (mean, weight, bias) = torch.randn(3, 6, 5, 4).double(), torch.randn(3, 6).double()
    var = torch.rand(6).double()
    for affine in ((weight, bias), (None, None), (weight, None), (None, bias)):
        rstd, scale, shift = any_ops.fold(mean, var, *affine, 1e-3)
        expected = F.batch_norm(x, mean, var, affine[0], affine[1], training=False, eps=1e-3)
        torch.testing.assert_close(x * column(scale, x) + column(shift, x), expected)
        torch.testing.assert_close(rstd, 1 / (var + 1e-3).sqrt())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("count, more", [(12, 3), (1, 0), (0, 1), (2**40, 0)])
def test_accumulate_correction_matches_the_float64_twin(
    ops: Any, count: int, more: int, dtype: torch.dtype
) -> None:
    assert_as_exact(run_accumulate_correction(count, more=more), ops, dtype)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]])
def test_corrections_added_up_finish_batch_norms_backward(any_ops: Any, shape: tuple) -> None:
    c = make_norm_case(shape, torch.float64)
    dz, grad_x = torch.randn_like(c["x"]), channels_last(torch.zeros_like(c["x"]))
    scale, shift, mean, rstd = (c[name] for name in VECTORS)
    sums = any_ops.bn_relu_backward_accumulate(dz, c["x"], scale, shift, mean, grad_x)
    a, b, whole = torch.zeros_like(mean), torch.zeros_like(mean), channels_last(dz)
    any_ops.accumulate_correction(*sums, rstd, scale, c["x"].numel() // c["x"].shape[1], a, b)
    any_ops.apply_correction(c["x"], mean, a, b, grad_x, grad_x)
    any_ops.bn_relu_backward(whole, c["x"], scale, shift, mean, rstd, True)
    torch.testing.assert_close(grad_x, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bn_relu_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_forward(shape, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, batch_statistics", [(s, b) for s in SHAPES for b in (True, False) if not (b and s is SHAPES[1])]
)
def test_backward_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, batch_statistics: bool
) -> None:
    assert_as_exact(run_backward(shape, dtype, batch_statistics=batch_statistics), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_one_value_has_no_gradient(any_ops: Any, dtype: torch.dtype) -> None:
    (*sums, grad), c = run_backward(SHAPES[1], dtype)(any_ops, dtype), make_norm_case(SHAPES[1], dtype)
    terms = (sums[0].double() * c["scale"]).abs().item()
    assert grad.abs().item() <= 4 * torch.finfo(sums[0].dtype).eps * terms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accumulate_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_backward_accumulate(shape, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_sums_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_backward_sums(shape, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]])
def test_maps_in_every_layout(ops: Any, shape: tuple, layout: str, dtype: torch.dtype) -> None:
    for make_run in (run_forward, run_backward_sums, run_backward, run_backward_accumulate):
        # nothing but rounding is left of the gradient of a batch of one value
        if not (make_run is run_backward and shape is SHAPES[1]):
            assert_as_exact(make_run(shape, dtype, layout), ops, dtype)


@pytest.mark.parametrize("spatial", [(5, 4), (9,), (2, 3, 2)])
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_together_they_are_torchs_batch_norm_and_relu(
    any_ops: Any, spatial: tuple[int, ...], batch_statistics: bool
) -> None:
    x = make_features(3, spatial, (6,))[0].contiguous().requires_grad_()
    weight, bias = (torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2))
    running = torch.randn(6).double(), torch.rand(6).double() + 0.5
    dz = torch.randn_like(x)
    z = F.relu(F.batch_norm(x, *running, weight, bias, training=batch_statistics, momentum=0.0))
    expected = torch.autograd.grad(z, (x, weight, bias), dz)
    with torch.no_grad():
        mean, var = any_ops.channel_statistics([x]) if batch_statistics else running
        rstd = (var + 1e-5).rsqrt()
        scale = weight * rstd
        shift = bias - mean * scale
        out, grad = channels_last(torch.empty_like(x)), channels_last(dz)
        any_ops.bn_relu(x, scale, shift, out)
        sum_d, sum_dx = any_ops.bn_relu_backward(grad, x, scale, shift, mean, rstd, batch_statistics)
        again = channels_last(torch.empty_like(x))
        sums = any_ops.bn_relu_backward_sums(dz, x, scale, shift, mean, again)
    torch.testing.assert_close(out, z)
    torch.testing.assert_close((grad, sum_dx * rstd, sum_d), expected)
    assert torch.equal(again, out)
    torch.testing.assert_close(sums, (sum_d, sum_dx))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]])
def test_accumulate_adds_what_needs_no_sums_of_the_batch(any_ops: Any, shape: tuple) -> None:
    c = make_norm_case(shape, torch.float64)
    x = c["x"].requires_grad_()
    before_relu = x * column(c["scale"], x) + column(c["shift"], x)
    dz, start = torch.randn(2, *x.shape, dtype=torch.float64)
    grad_x, d = torch.autograd.grad(before_relu.relu(), (x, before_relu), dz)
    out, x = channels_last(start), x.detach()
    sums = any_ops.bn_relu_backward_accumulate(dz, x, c["scale"], c["shift"], c["mean"], out)
    torch.testing.assert_close(out, start + grad_x)
    dims = over_channels(x)
    torch.testing.assert_close(sums, (d.sum(dims), (d * (x - column(c["mean"], x))).sum(dims)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_of_a_feature_buffer(any_ops: Any, dtype: torch.dtype) -> None:
    buffer, grads = (channels_last(torch.randn(2, 9, 4, 3)).to(dtype) for _ in range(2))
    c = to_dtype(make_norm_case((2, (4, 3), (5,)), dtype), dtype)
    vectors = c["scale"], c["shift"]
    narrow, dense = (channels_last(torch.empty_like(buffer[:, :5])) for _ in range(2))
    any_ops.bn_relu(buffer[:, :5], *vectors, narrow)
    any_ops.bn_relu(buffer[:, :5].contiguous(), *vectors, dense)
    assert torch.equal(narrow, dense)

    before, dense = grads.clone(), channels_last(grads[:, :5].contiguous())
    sums = any_ops.bn_relu_backward_accumulate(narrow, buffer[:, :5], *vectors, c["mean"], grads[:, :5])
    same = any_ops.bn_relu_backward_accumulate(narrow, buffer[:, :5].contiguous(), *vectors, c["mean"], dense)
    assert torch.equal(grads[:, :5], dense) and torch.equal(grads[:, 5:], before[:, 5:])
    for a, b in zip(sums, same, strict=True):
        torch.testing.assert_close(a, b)


def test_an_expanded_gradient(any_ops: Any) -> None:
    c = make_norm_case(SHAPES[0], torch.float64)
    one, vectors = torch.tensor(0.5).double().expand_as(c["x"]), [c[v] for v in VECTORS[:3]]
    results = []
    for grad in (one, one.contiguous()):
        grad_x = channels_last(torch.zeros_like(c["x"]))
        results.append([*any_ops.bn_relu_backward_accumulate(grad, c["x"], *vectors, grad_x), grad_x])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_and_passes_gradients_as_in_torch(any_ops: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), -1.0, 1.0, 0.0], dtype=dtype).repeat(5).view(1, 1, 20)
    one, zero = torch.ones(1), torch.zeros(1)
    one, zero = (v.double() if dtype == torch.float64 else v for v in (one, zero))
    out, grad, grad_x = torch.empty_like(x), torch.ones_like(x), torch.zeros_like(x)
    any_ops.bn_relu(x, one, zero, out)
    assert out.isnan().flatten().tolist() == [True, False, False, False] * 5
    sums = any_ops.bn_relu_backward_accumulate(grad, x, one, zero, zero, grad_x)
    any_ops.bn_relu_backward(grad, x, one, zero, zero, one, False)
    for result in (grad, grad_x):
        assert result.flatten().tolist() == [1, 0, 1, 0] * 5
    assert sums[0].item() == 10 and sums[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_repeatable(ops: Any, dtype: torch.dtype) -> None:
    for make_run in (run_forward, run_backward_sums, run_backward, run_backward_accumulate):
        assert_repeatable(make_run(SHAPES[5], dtype), ops, dtype)
    for run in (run_fold(dtype, dtype), run_accumulate_correction(12)):
        assert_repeatable(run, ops, reference.accumulate_dtype(dtype))


@pytest.mark.core
@pytest.mark.parametrize("shape, dtype", OPCHECKS)
def test_opcheck(shape: tuple, dtype: torch.dtype) -> None:
    c = to_dtype(make_norm_case(shape, dtype), dtype)
    scale, shift, mean, rstd = (c[name] for name in VECTORS)
    out, grad = channels_last(torch.zeros_like(c["x"])), channels_last(torch.randn_like(c["x"]))
    ops = torch.ops.effdense
    torch.library.opcheck(ops.bn_relu.default, (c["x"], scale, shift, out))
    torch.library.opcheck(ops.bn_relu_backward.default, (grad, c["x"], scale, shift, mean, rstd, True))
    torch.library.opcheck(ops.bn_relu_backward_sums.default, (grad, c["x"], scale, shift, mean, out))
    torch.library.opcheck(ops.bn_relu_backward_accumulate.default, (grad, c["x"], scale, shift, mean, out))
    torch.library.opcheck(ops.fold.default, (mean, rstd, scale.to(dtype), None, 1e-5))
    torch.library.opcheck(
        ops.accumulate_correction.default,
        (mean, shift, rstd, scale, 3, mean.clone(), torch.cat([mean, mean])[: mean.numel()]),
    )


NOT_A_MAP: Mistake = (
    "x",
    lambda x: torch.ones(3),
    ValueError,
    r"must be \[N, C, \*spatial\].*got shape \[3\]",
)


def arguments() -> dict[str, Any]:
    case = make_norm_case(SHAPES[0], torch.float64)
    return case | {name: channels_last(case["x"]) for name in ("out", "grad", "grad_x")}


@pytest.mark.parametrize("mistake", [*mistakes(["scale", "shift"], [], ["out"]), NOT_A_MAP])
def test_wrong_arguments_of_bn_relu(ops: Any, mistake: Mistake) -> None:
    assert_refused("bn_relu", {k: arguments()[k] for k in ("x", "scale", "shift", "out")}, mistake, ops)


@pytest.mark.parametrize("mistake", [*mistakes(VECTORS, [], ["grad"]), NOT_A_MAP])
def test_wrong_arguments_of_bn_relu_backward(ops: Any, mistake: Mistake) -> None:
    right = {k: arguments()[k] for k in ("grad", "x", *VECTORS)} | {"batch_statistics": True}
    assert_refused("bn_relu_backward", right, mistake, ops)


@pytest.mark.parametrize("mistake", [*mistakes(VECTORS[:3], ["grad"], ["out"]), NOT_A_MAP])
def test_wrong_arguments_of_bn_relu_backward_sums(ops: Any, mistake: Mistake) -> None:
    right = {k: arguments()[k] for k in ("grad", "x", *VECTORS[:3], "out")}
    assert_refused("bn_relu_backward_sums", right, mistake, ops)


@pytest.mark.parametrize("mistake", [*mistakes(VECTORS[:3], ["grad"], ["grad_x"]), NOT_A_MAP])
def test_wrong_arguments_of_bn_relu_backward_accumulate(ops: Any, mistake: Mistake) -> None:
    right = {k: arguments()[k] for k in ("grad", "x", *VECTORS[:3], "grad_x")}
    assert_refused("bn_relu_backward_accumulate", right, mistake, ops)


SHORT = ValueError, r"must be a contiguous vector of 10 elements .*, got shape \[9\]"


@pytest.mark.parametrize(
    "mistake",
    [
        *mistakes(["var"]),
        (
            "mean",
            lambda v: v[None],
            ValueError,
            r"must be a contiguous vector of 10 elements .*, got shape \[1, 10\]",
        ),
        ("weight", lambda v: v[1:], *SHORT),
        ("bias", lambda v: v[1:], *SHORT),
    ],
)
def test_wrong_arguments_of_fold(ops: Any, mistake: Mistake) -> None:
    vectors = dict(zip(("mean", "var", "weight", "bias"), torch.rand(4, 10).double(), strict=True))
    assert_refused("fold", {**vectors, "eps": 1e-5}, mistake, ops)


@pytest.mark.parametrize(
    "mistake",
    [
        *mistakes(["sum_dx", "rstd", "scale"]),
        (
            "a",
            lambda v: v[1:],
            ValueError,
            r"and b must be .* at least 10 elements, got shapes \[9\] and \[10\]",
        ),
        (
            "a",
            lambda v: v.repeat(2),
            ValueError,
            r"and b must be .* at least 10 elements, got shapes \[20\] and",
        ),
        ("a", lambda v: v.repeat(2)[::2], ValueError, r"and b must be contiguous vectors .*, got shapes"),
        ("a", Tensor.float, TypeError, r"must be Double \(.*sums.*\), got Float"),
        ("b", Tensor.float, TypeError, r"must be Double \(.*sums.*\), got Float"),
    ],
)
def test_wrong_arguments_of_accumulate_correction(ops: Any, mistake: Mistake) -> None:
    names = "sum_d", "sum_dx", "rstd", "scale", "a", "b"
    vectors = dict(zip(names, torch.rand(6, 10).double(), strict=True))
    assert_refused("accumulate_correction", {**vectors, "count": 3}, mistake, ops)
