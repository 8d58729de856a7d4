"""What the modules' constructors refuse, as DenseNet does: one message each, with class, argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from effdense.nn import DenseBlock, DenseLayer, DenseNet, PlainDenseLayer, Transition

LAYER = {"num_input_features": 8, "growth_rate": 4, "bn_size": 2, "drop_rate": 0.0}
PLAIN = {"num_input_features": 8, "growth_rate": 4}
BLOCK = {"num_layers": 2, **LAYER}
TRANSITION = {"num_input_features": 8, "num_output_features": 4}
KINDS: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (DenseLayer, LAYER),
    (PlainDenseLayer, PLAIN),
    (DenseBlock, BLOCK),
    (Transition, TRANSITION),
]
COUNT, RATE = "must be a positive whole number", "must be between 0 and 1"
COUNTS = ("num_layers", "num_input_features", "num_output_features", "growth_rate", "bn_size")
WRONG: list[tuple[str, Any, str]] = [
    *((name, value, COUNT) for name in COUNTS for value in (0, -1, 2.0, "4", True)),
    *(("drop_rate", value, RATE) for value in (1.5, -0.1, float("nan"))),
    *(("memory", value, 'must be "balanced" or "minimal"') for value in ("tiny", None)),
    *(("spatial_dims", value, "must be 1, 2 or 3") for value in (0, 4, 2.0, True)),
]
CASES = [
    (kind, given, *wrong)
    for kind, given in KINDS
    for wrong in WRONG
    if wrong[0] in given
    or (wrong[0] in ("memory", "drop_rate") and kind is not Transition)
    or wrong[0] == "spatial_dims"
]


@pytest.mark.parametrize("kind, given, name, value, expected", CASES)
def test_a_wrong_value_is_named(
    kind: Callable[..., nn.Module], given: dict[str, Any], name: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError) as raised:
        kind(**{**given, name: value})
    assert str(raised.value) == f"{getattr(kind, '__name__', '')}: {name} {expected}, got {value!r}"


@pytest.mark.parametrize("kind, given", KINDS[:3])
def test_a_rate_is_a_number(kind: Callable[..., nn.Module], given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="drop_rate must be a number, got str"):
        kind(**{**given, "drop_rate": "0.1"})


def test_dropout_after_a_bottleneck_needs_one() -> None:
    with pytest.raises(
        ValueError, match="DenseBlock: dropout_after_bottleneck needs bottlenecks, but bn_size is None"
    ):
        DenseBlock(**{**BLOCK, "bn_size": None}, dropout_after_bottleneck=True)


def test_the_memory_of_a_layer_is_checked_when_it_is_set() -> None:
    layer = DenseLayer(**LAYER)
    with pytest.raises(ValueError, match='DenseLayer: memory must be "balanced" or "minimal", got \'tiny\''):
        layer.memory = "tiny"  # type: ignore[assignment]
    assert layer.memory == "balanced"


@pytest.mark.parametrize("parts", [(3, nn.Linear(4, 2)), (nn.Identity(), None)])
def test_a_net_is_made_of_modules(parts: tuple[Any, Any]) -> None:
    with pytest.raises(
        TypeError, match=r"DenseNet: (features|classifier) must be a torch.nn.Module, got (int|NoneType)"
    ):
        DenseNet(*parts)


def test_arguments_that_do_not_exist_are_refused() -> None:
    for kind, given in KINDS:
        with pytest.raises(TypeError, match="grow"):
            kind(**given, grow=1)
    with pytest.raises(TypeError, match="num_clases"):
        effdense.models.densenet121(num_clases=10)


def set_eps(module: nn.Module, eps: float) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = eps


# As PyTorch's own batch norm: a batch's variance may be zero.
@pytest.mark.parametrize("kind, given", KINDS)
def test_eps_is_above_zero_in_training(kind: Callable[..., nn.Module], given: dict[str, Any]) -> None:
    module, x = kind(**given).eval(), torch.randn(2, 8, 4, 4)
    set_eps(module, 0.0)
    expected = module(x)
    assert expected.isfinite().all()
    for eps, training in ((0.0, True), (-1e-3, True), (-1e-3, False)):
        set_eps(module.train(training), eps)
        with pytest.raises(
            (ValueError, RuntimeError), match=r"eps must be (above 0|positive|non-negative).*, (but )?got"
        ):
            module(x)
    set_eps(module.eval(), 0.0)
    assert torch.equal(module(x), expected)


def test_the_operators_eps() -> None:
    features, weight = [torch.randn(2, 8, 4, 4)], torch.randn(3, 8, 1, 1)
    run = effdense.functional.cat_bn_relu_conv1x1
    with pytest.raises(ValueError, match=r"^cat_bn_relu_conv1x1: norm: eps must be above 0 .*, got 0\.0$"):
        run(features, None, None, None, None, weight, eps=0.0)
    statistics = torch.zeros(8), torch.ones(8)
    assert run(features, None, None, *statistics, weight, training=False, eps=0.0).isfinite().all()
