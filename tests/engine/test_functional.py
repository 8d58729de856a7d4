"""functional.cat_bn_relu_conv1x1 against the naive composition, its gradients, and every message it can give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effdense.functional import cat_bn_relu_conv1x1
from tests._cases import SHAPES, make_features, rms

pytestmark = pytest.mark.core


def naive(
    features: list[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x = torch.cat(features, 1)
    x = F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    return conv(F.relu(x), conv_weight, conv_bias)


def make_case(
    shape: tuple = SHAPES[0], dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Any]]:
    images, spatial, channels, out = shape
    total = sum(channels)
    arguments = {
        "norm_weight": torch.randn(total),
        "norm_bias": torch.randn(total),
        "running_mean": torch.randn(total),
        "running_var": torch.rand(total) + 0.5,
        "conv_weight": torch.randn(out, total, *[1] * len(spatial)) / total**0.5,
        "conv_bias": torch.randn(out),
    }
    features = [x.to(dtype).contiguous().requires_grad_() for x in make_features(images, spatial, channels)]
    return features, {
        k: v.to(dtype).requires_grad_(not k.startswith("running")) for k, v in arguments.items()
    }


def run(function: Any, features: list[Tensor], arguments: dict[str, Any], **settings: Any) -> list[Tensor]:
    """Output, running statistics and every gradient, on copies."""
    features = [x.detach().clone().requires_grad_(x.requires_grad) for x in features]
    arguments = {
        k: v if v is None else v.detach().clone().requires_grad_(v.requires_grad)
        for k, v in arguments.items()
    }
    y = function(features, **arguments, **settings)
    inputs = [x for x in (*features, *arguments.values()) if x is not None and x.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    grads = torch.autograd.grad(y, inputs, weights)
    running = [v for k, v in arguments.items() if k.startswith("running") and v is not None]
    return [y, *running, *grads]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1][0] > 1])
def test_matches_the_naive_composition_in_float64(shape: tuple, training: bool) -> None:
    case = make_case(shape)
    for a, b in zip(
        run(cat_bn_relu_conv1x1, *case, training=training), run(naive, *case, training=training), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_the_naive_composition(dtype: torch.dtype, training: bool) -> None:
    features, arguments = make_case(SHAPES[6], dtype)
    exact = run(
        naive,
        [x.detach().double().requires_grad_() for x in features],
        {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in arguments.items()},
        training=training,
    )
    fused = run(cat_bn_relu_conv1x1, features, arguments, training=training)
    theirs = run(naive, features, arguments, training=training)
    for a, b, c in zip(fused, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert rms(a.double() - c) <= 2 * rms(b.double() - c) + torch.finfo(dtype).eps * rms(c)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    integers = st.integers
    spatial = tuple(data.draw(st.lists(integers(1, 9), min_size=1, max_size=3)))
    channels = tuple(data.draw(st.lists(integers(1, 40), min_size=1, max_size=5)))
    shape = data.draw(integers(2, 5)), spatial, channels, data.draw(integers(1, 50))
    case = make_case(shape)
    for a, b in zip(run(cat_bn_relu_conv1x1, *case), run(naive, *case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("absent", [(), ("norm_weight", "norm_bias"), ("conv_bias",), ("norm_bias",)])
def test_gradcheck(training: bool, absent: tuple[str, ...]) -> None:
    features, arguments = make_case((3, (2, 2), (2, 3), 4))
    given = {k: v for k, v in arguments.items() if k not in absent and not k.startswith("running")}
    names = list(given)

    def function(*tensors: Tensor) -> Tensor:
        parameters: dict[str, Any] = dict.fromkeys(absent) | dict(zip(names, tensors[2:], strict=True))
        statistics = {k: arguments[k].clone() for k in ("running_mean", "running_var")}
        return cat_bn_relu_conv1x1(list(tensors[:2]), **statistics, **parameters, training=training)

    assert torch.autograd.gradcheck(function, (*features, *given.values()))


@pytest.mark.parametrize("wanted", ["features[1]", "norm_weight", "conv_weight", "conv_bias"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    features, arguments = make_case()
    every = run(cat_bn_relu_conv1x1, features, arguments)[3:]
    names = [
        "features[0]",
        "features[1]",
        "features[2]",
        "norm_weight",
        "norm_bias",
        "conv_weight",
        "conv_bias",
    ]
    for i, x in enumerate(features):
        x.requires_grad_(wanted == f"features[{i}]")
    for name, x in arguments.items():
        x.requires_grad_(name == wanted)
    (grad,) = run(cat_bn_relu_conv1x1, features, arguments)[3:]
    assert torch.equal(grad, every[names.index(wanted)])


def test_running_statistics_may_be_absent_in_training() -> None:
    features, arguments = make_case()
    arguments.update(running_mean=None, running_var=None)
    for a, b in zip(
        run(cat_bn_relu_conv1x1, features, arguments), run(naive, features, arguments), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_nothing_but_inputs_statistics_and_output_is_kept() -> None:
    features, arguments = make_case()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cat_bn_relu_conv1x1(features, **arguments)
    inputs = {x.data_ptr() for x in (*features, *arguments.values())}
    channels = sum(x.shape[1] for x in features)
    others = [x for x in kept if x.data_ptr() not in inputs]
    assert len(kept) > len(others)
    assert all(x.shape == (channels,) for x in others)


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("bfloat16",) * 3, ("bfloat16", "float32", "bfloat16")])
def test_autocast_is_as_exact_as_the_naive_composition(dtypes: tuple[str, ...]) -> None:
    """Float32 features with a large mean, too: they must not be rounded before they are normalised."""
    features, arguments = make_case(SHAPES[6], torch.float32)
    offset = 300.0 if "bfloat16" not in dtypes else 0.0
    features = [
        (x.detach() + offset).to(getattr(torch, dtype)).requires_grad_()
        for x, dtype in zip(features, dtypes, strict=True)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = run(cat_bn_relu_conv1x1, features, arguments)
        theirs = run(naive, features, arguments)
    exact = run(
        naive,
        [x.detach().double().requires_grad_() for x in features],
        {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in arguments.items()},
    )
    for a, b, c in zip(fused, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert rms(a.double() - c) <= 2 * rms(b.double() - c) + torch.finfo(a.dtype).eps * rms(c)
    assert fused[0].dtype == torch.bfloat16


def test_autocast_leaves_float64_alone() -> None:
    case = make_case()
    expected = run(cat_bn_relu_conv1x1, *case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(run(cat_bn_relu_conv1x1, *case), expected, strict=True):
            assert torch.equal(a, b)


def test_strided_parameters_and_inference_tensors_are_taken() -> None:
    features, arguments = make_case()
    wide = {k: torch.stack([v, v], -1)[..., 0] for k, v in arguments.items() if not k.startswith("running")}
    expected = cat_bn_relu_conv1x1(features, **arguments)
    torch.testing.assert_close(cat_bn_relu_conv1x1(features, **arguments | wide), expected)
    with torch.inference_mode():
        copies = [x.clone() for x in features]
        cat_bn_relu_conv1x1(copies, **arguments)
    cat_bn_relu_conv1x1(copies, **arguments).sum().backward()


def test_half_on_the_cpu_runs_on_the_twin() -> None:
    features, arguments = make_case(SHAPES[0], torch.float16)
    y = cat_bn_relu_conv1x1(features, **arguments)
    exact = naive([x.double() for x in features], **{k: v.double() for k, v in arguments.items()})
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


def call(**changes: Any) -> Tensor:
    features, arguments = make_case()
    return cat_bn_relu_conv1x1(**{"features": features, **arguments, **changes})


def ones(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=device)


A, B, C = (2, 3, 5, 7), (2, 5, 5, 7), (2, 2, 5, 7)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"features": ones(*A)}, TypeError, r"features must be a list or tuple of tensors, got Tensor"),
        ({"features": []}, ValueError, r"features must hold at least one tensor, got an empty list"),
        ({"features": [ones(*A), 3]}, TypeError, r"features\[1\] must be a tensor, got int"),
        (
            {"features": [ones(*A).long()]},
            TypeError,
            r"features\[0\] must have a floating dtype, got torch.int64",
        ),
        (
            {"features": [ones(2, 3)]},
            ValueError,
            r"features\[0\] must be \[N, C, \*spatial\].* got shape \(2, 3\)",
        ),
        (
            {"features": [ones(2, 0, 5, 7)]},
            ValueError,
            r"features\[0\] must have at least one channel, got shape \(2, 0, 5, 7\)",
        ),
        (
            {"features": [ones(*A), ones(*B).float(), ones(*C)]},
            TypeError,
            r"features\[1\] must be torch.float64 like features\[0\], got torch.float32",
        ),
        (
            {"features": [ones(*A), ones(*B, device="meta"), ones(*C)]},
            ValueError,
            r"features\[1\] must be on cpu like features\[0\], got meta",
        ),
        (
            {"features": [ones(*A), ones(2, 5, 5, 6), ones(*C)]},
            ValueError,
            r"features\[1\] must have the batch and spatial sizes .*\(2, 3, 5, 7\).* got shape \(2, 5, 5, 6\)",
        ),
        (
            {"features": [ones(*A), ones(3, 5, 5, 7), ones(*C)]},
            ValueError,
            r"features\[1\] must have the batch and spatial sizes .* got shape \(3, 5, 5, 7\)",
        ),
        ({"features": [ones(*A)]}, ValueError, r"norm_weight must have 3 elements .* got shape \(10,\)"),
        ({"norm_weight": ones(9)}, ValueError, r"norm_weight must have 10 elements .* got shape \(9,\)"),
        ({"norm_bias": ones(10).long()}, TypeError, r"norm_bias must have a floating dtype, got torch.int64"),
        ({"running_mean": ones(9)}, ValueError, r"running_mean must have 10 elements .* got shape \(9,\)"),
        ({"running_var": ones(10, device="meta")}, ValueError, r"running_var must be on cpu .* got meta"),
        (
            {"conv_weight": ones(6, 9, 1, 1)},
            ValueError,
            r"conv_weight must be \[out_channels, 10, 1, 1\] .* got \(6, 9, 1, 1\)",
        ),
        (
            {"conv_weight": ones(6, 10, 3, 3)},
            ValueError,
            r"conv_weight must be \[out_channels, 10, 1, 1\] .* got \(6, 10, 3, 3\)",
        ),
        (
            {"conv_weight": ones(6, 10, 1, 1).float()},
            TypeError,
            r"conv_weight must be torch.float64 like the features, got torch.float32",
        ),
        (
            {"conv_weight": ones(0, 10, 1, 1)},
            ValueError,
            r"conv_weight must have at least one output channel, got \(0, 10, 1, 1\)",
        ),
        ({"momentum": None}, TypeError, r"momentum must be a number, got NoneType"),
        ({"conv_bias": ones(5)}, ValueError, r"conv_bias must have 6 elements .* got shape \(5,\)"),
        (
            {"training": False, "running_var": None},
            ValueError,
            r"without the batch's statistics \(evaluation\) needs running_var, got None",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="cat_bn_relu_conv1x1: .*" + message):
        call(**changes)


def test_training_on_a_single_value_per_channel() -> None:
    features, arguments = make_case((1, (1, 1), (2, 3), 4))
    before = arguments["running_mean"].clone()
    with pytest.raises(ValueError, match=r"needs more than one value per channel, got .* \(1, 2, 1, 1\)"):
        cat_bn_relu_conv1x1(features, **arguments)
    assert torch.equal(arguments["running_mean"], before)
    cat_bn_relu_conv1x1(features, **arguments, training=False)


def test_an_empty_batch_changes_no_statistics() -> None:
    features, arguments = make_case((0, (4, 4), (2, 3), 4))
    y, mean, var, *grads = run(cat_bn_relu_conv1x1, features, arguments)
    assert y.shape == (0, 4, 4, 4)
    assert torch.equal(mean, arguments["running_mean"]) and torch.equal(var, arguments["running_var"])
    assert all(not g.any() for g in grads)


def test_a_feature_changed_in_place_is_refused() -> None:
    features, arguments = make_case()
    x = features[1] * 1
    y = cat_bn_relu_conv1x1([features[0], x, features[2]], **arguments)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_forward_mode_is_refused() -> None:
    features, arguments = make_case()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"forward AD|jvp"),
    ):
        dual = torch.autograd.forward_ad.make_dual(features[0].detach(), torch.ones_like(features[0]))
        cat_bn_relu_conv1x1([dual, *features[1:]], **arguments)
