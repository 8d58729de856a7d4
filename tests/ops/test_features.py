"""channel_statistics, append_features and apply_correction against the float64 reference and plain torch; wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import reference
from tests._cases import (
    DTYPES,
    IN_EVERY_LAYOUT,
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
    lay_out,
    make_features,
    make_map,
    mistakes,
    over_channels,
    rest_is_untouched,
    to_dtype,
)


def run_statistics(shape: tuple, dtype: torch.dtype, first: int = 0, offset: float = 0.0) -> Run:
    features = [(x + offset).to(dtype) for x in make_features(*shape[:3])]

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        return list(ops.channel_statistics(lay_out(to_dtype(features, dtype), first)))

    return run


def run_append(shape: tuple, dtype: torch.dtype, layout: str = "channels-last") -> Run:
    x = make_map(shape).to(dtype)

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        new, out = LAYOUTS[layout](x.to(dtype)), in_buffer(torch.full_like(x, float("nan"), dtype=dtype))
        statistics = ops.append_features(new, out)
        assert torch.equal(out, new) and rest_is_untouched(out)
        return [out, *statistics]

    return run


def run_apply_correction(
    shape: tuple, dtype: torch.dtype, layout: str = "channels-last", in_place: bool = True
) -> Run:
    x, grad = make_map(shape).to(dtype), torch.randn_like(make_map(shape)).to(dtype)
    vectors = list(torch.randn(3, x.shape[1]).double())

    def run(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        x_ = LAYOUTS[layout](x.to(dtype))
        grad_ = in_buffer(grad.to(dtype)) if in_place else LAYOUTS[layout](grad.to(dtype))
        out = grad_ if in_place else in_buffer(torch.full_like(grad_, float("nan")))
        ops.apply_correction(x_, *to_dtype(vectors, dtype), grad_, out)
        assert rest_is_untouched(out)
        assert in_place or torch.equal(grad_, grad.to(dtype))
        return [out]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [0, 4])
def test_channel_statistics_match_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, first: int
) -> None:
    assert_as_exact(run_statistics(shape, dtype, first), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_append_features_matches_the_float64_twin(ops: Any, shape: tuple, dtype: torch.dtype) -> None:
    assert_as_exact(run_append(shape, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [True, False])
def test_apply_correction_matches_the_float64_twin(
    ops: Any, shape: tuple, dtype: torch.dtype, in_place: bool
) -> None:
    assert_as_exact(run_apply_correction(shape, dtype, in_place=in_place), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images, channels, spatial", IN_EVERY_LAYOUT)
def test_statistics_of_features_in_every_layout(
    ops: Any, images: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = (images, spatial, (channels,) * len(LAYOUTS))
    assert_as_exact(run_statistics(shape, dtype), ops, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]])
def test_maps_in_every_layout(ops: Any, shape: tuple, layout: str, dtype: torch.dtype) -> None:
    assert_as_exact(run_append(shape, dtype, layout), ops, dtype)
    assert_as_exact(run_apply_correction(shape, dtype, layout, in_place=False), ops, dtype)


@pytest.mark.parametrize("images, spatial", [(4, (3, 5)), (1, (3, 5)), (4, (1, 1)), (4, (6,))])
def test_expanded_features_are_read_right(any_ops: Any, images: int, spatial: tuple[int, ...]) -> None:
    pixel = torch.randn(images, 3, *[1] * len(spatial)).double().expand(-1, -1, *spatial)
    image = torch.randn(1, 3, *spatial).double().expand(images, -1, *[-1] * len(spatial))
    mean, var = any_ops.channel_statistics([pixel, image])
    x = torch.cat([pixel, image], 1)
    torch.testing.assert_close(mean, x.mean(over_channels(x)))
    torch.testing.assert_close(var, x.var(over_channels(x), correction=0))
    out = channels_last(torch.empty_like(x[:, :3]).contiguous())
    any_ops.append_features(pixel, out)
    assert torch.equal(out, pixel)


def test_the_variance_survives_a_large_mean(any_ops: Any) -> None:
    run = run_statistics(SHAPES[6], torch.float32, offset=2e4)  # 1e4 deviations
    (mean, var), (exact_mean, exact_var) = run(any_ops, torch.float32), run(reference, torch.float64)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2.4e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[6]])
def test_channel_statistics_are_torchs(any_ops: Any, shape: tuple) -> None:
    x = make_map(shape)
    out = channels_last(torch.empty_like(x))
    for mean, var in (any_ops.channel_statistics([x]), any_ops.append_features(x, out)):
        torch.testing.assert_close(mean, x.mean(over_channels(x)))
        torch.testing.assert_close(var, x.var(over_channels(x), correction=0))


def test_a_channel_without_values_has_mean_0_and_variance_1(any_ops: Any) -> None:
    for empty in (torch.empty(0, 3, 4, 4), torch.empty(2, 3, 0, 4)):
        mean, var = any_ops.channel_statistics([empty, empty])
        assert mean.tolist() == [0] * 6 and var.tolist() == [1] * 6


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]])
def test_apply_correction_is_affine_in_the_features(any_ops: Any, shape: tuple) -> None:
    x, (mean, a, b) = make_map(shape), torch.randn(3, sum(shape[2])).double()
    grad, out = torch.randn_like(x), channels_last(torch.empty_like(x))
    any_ops.apply_correction(x, mean, a, b, grad, out)
    expected = grad - column(a, x) - column(b, x) * (x - column(mean, x))
    torch.testing.assert_close(out, expected)


def test_apply_correction_moves_a_slice_of_one_buffer_into_another(any_ops: Any) -> None:
    buffer, grads = (channels_last(torch.randn(2, 9, 3, 4)) for _ in range(2))
    out, (mean, a, b) = in_buffer(torch.zeros(2, 4, 3, 4)), torch.randn(3, 4)
    before = grads.clone()
    any_ops.apply_correction(buffer[:, 3:7], mean, a, b, grads[:, 3:7], out)
    dense = channels_last(torch.zeros(2, 4, 3, 4))
    any_ops.apply_correction(buffer[:, 3:7].contiguous(), mean, a, b, grads[:, 3:7].contiguous(), dense)
    torch.testing.assert_close(out, dense)
    assert rest_is_untouched(out) and torch.equal(grads, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_repeatable(ops: Any, dtype: torch.dtype) -> None:
    for make_run in (run_statistics, run_append, run_apply_correction):
        assert_repeatable(make_run(SHAPES[5], dtype), ops, dtype)


@pytest.mark.core
@pytest.mark.parametrize("shape, dtype", OPCHECKS)
def test_opcheck(shape: tuple, dtype: torch.dtype) -> None:
    features = lay_out(to_dtype(make_features(*shape[:3]), dtype), 2)
    x = torch.cat(features, 1)
    vectors = list(torch.randn(3, x.shape[1]).to(reference.accumulate_dtype(dtype)))
    torch.library.opcheck(torch.ops.effdense.channel_statistics.default, (features,))
    torch.library.opcheck(torch.ops.effdense.append_features.default, (x, channels_last(x)))
    arguments = x, *vectors, x, channels_last(torch.zeros_like(x))
    torch.library.opcheck(torch.ops.effdense.apply_correction.default, arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda f: [*f[:2], f[2][..., 1:]],
            ValueError,
            r"features\[2\] must have the batch and spatial sizes of \[2, 3, 5, 7\], got \[2, 2, 5, 6\]",
        ),
        (
            lambda f: [f[0], f[1][1:]],
            ValueError,
            r"features\[1\] must have the batch and spatial sizes of \[2, 3, 5, 7\], got \[1, 5, 5, 7\]",
        ),
        (
            lambda f: [f[0], f[1][0]],
            ValueError,
            r"features\[1\] must have the batch and spatial sizes of \[2, 3, 5, 7\], got \[5, 5, 7\]",
        ),
        (lambda f: [f[0], f[1].float()], TypeError, r"features\[1\] must be Double .* got Float"),
        (
            lambda f: [f[0], f[1][:, :0]],
            ValueError,
            r"features\[1\] must have at least one channel, got shape",
        ),
        (
            lambda f: [f[0][0, 0, 0]],
            ValueError,
            r"features\[0\] must be \[N, C, \*spatial\].*got shape \[7\]",
        ),
    ],
)
def test_wrong_features(ops: Any, change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^channel_statistics: {message}"):
        ops.channel_statistics(change(make_features(*SHAPES[0][:3])))


NOT_A_MAP = ValueError, r"must be \[N, C, \*spatial\].*got shape \[3\]"


@pytest.mark.parametrize(
    "mistake", [*mistakes(written=["out"]), ("new_features", lambda x: torch.ones(3), *NOT_A_MAP)]
)
def test_wrong_arguments_of_append_features(ops: Any, mistake: Mistake) -> None:
    x = make_map(SHAPES[0])
    assert_refused("append_features", {"new_features": x, "out": channels_last(x)}, mistake, ops)


@pytest.mark.parametrize(
    "mistake",
    [
        *mistakes(vectors=["mean", "a", "b"], maps=["grad"], written=["out"]),
        ("x", lambda x: torch.ones(3), *NOT_A_MAP),
    ],
)
def test_wrong_arguments_of_apply_correction(ops: Any, mistake: Mistake) -> None:
    x = make_map(SHAPES[0])
    vectors = dict(zip(("mean", "a", "b"), torch.randn(3, x.shape[1]).double(), strict=True))
    assert_refused("apply_correction", {"x": x, **vectors, "grad": x, "out": channels_last(x)}, mistake, ops)


def test_a_dtype_without_a_kernel() -> None:
    x = torch.ones(2, 3, 4, 4, dtype=torch.half)
    with pytest.raises(NotImplementedError, match=r"\"channel_statistics\" not implemented for 'Half'"):
        torch.ops.effdense.channel_statistics([x])
