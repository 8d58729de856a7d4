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


FLAGS = {"bias": KINDS, "memory_efficient": KINDS[::2][:2], "dropout_after_bottleneck": KINDS[::2][:2]}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["no", None, 2, torch.tensor([1, 2]), []])
def test_a_flag_is_true_or_false(name: str, value: Any) -> None:
    """A text would count as true."""
    for kind, given in [*FLAGS[name], (effdense.models.DenseNet, {"growth_rate": 4, "block_config": (1,)})]:
        with pytest.raises(TypeError) as raised:
            kind(**given, **{name: value})
        assert (
            str(raised.value)
            == f"{getattr(kind, '__name__', '')}: {name} must be True or False, got {value!r}"
        )


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    made = DenseBlock(
        numpy.int64(2), numpy.int64(4), 2, numpy.int64(3), numpy.float32(0.5), numpy.bool_(False)
    )
    assert made(torch.rand(2, 4, 5, 5)).shape == (2, 10, 5, 5)
    net = effdense.models.densenet_cifar(numpy.int64(10), 4)
    assert effdense.plan(net, (numpy.int64(1), 3, 32, 32)).total == effdense.plan(net, (1, 3, 32, 32)).total


@pytest.mark.parametrize("memory", [None, ["balanced"], torch.tensor([1, 2])])
def test_memory_is_a_text(memory: Any) -> None:
    net = effdense.models.densenet_cifar(10, 4)
    for call in (
        lambda: effdense.convert(net, memory=memory),
        lambda: effdense.plan(net, (1, 3, 32, 32), memory=memory),
        lambda: effdense.models.densenet_cifar(10, 4, memory=memory),
    ):
        with pytest.raises(ValueError, match="memory must be "):
            call()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_are_dense_floating_tensors() -> None:
    net = effdense.models.densenet_cifar(10, 4)
    for images, message in (
        (None, "a tensor, got NoneType"),
        ([[1.0]], "a tensor, got list"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"a floating dtype, .*, got torch\.uint8"),
    ):
        with pytest.raises(TypeError, match=f"^DenseNet: images must (be|have) {message}$"):
            net(images)
    block, x = DenseBlock(**BLOCK), torch.rand(2, 8, 4, 4)
    with pytest.raises(
        TypeError,
        match=r"^DenseBlock: features\[0\] must be a dense tensor \(to_dense\), got layout torch.sparse_coo$",
    ):
        block(x.to_sparse())
    with pytest.raises(TypeError, match=r"^cat_bn_relu_conv1x1: norm_bias must be a dense tensor"):
        effdense.functional.cat_bn_relu_conv1x1(
            [x], None, torch.ones(8).to_sparse(), None, None, torch.rand(3, 8, 1, 1)
        )


def test_a_transition_that_raises_has_changed_nothing() -> None:
    transition = Transition(**TRANSITION)
    with pytest.raises(RuntimeError):
        transition(torch.rand(2, 8, 4, 4, dtype=torch.float64))
    assert transition.norm.num_batches_tracked == 0 and not transition.norm.running_mean.any()


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
