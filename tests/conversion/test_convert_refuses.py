"""convert refuses, says why, and leaves the model as it was."""

from __future__ import annotations

import copy
import importlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import effdense
from benchmarks import structures
from tests._conversions import ALLOWED, assert_same, assert_same_classes, randomised, unchanged


class PostActivationBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([structures.conv_block(6 + 4 * i, 4) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.net
        for norm, relu, conv in layers:
            x = torch.cat((x, conv(norm(relu(x)))), dim=1)
        return x


class Cropping(nn.Conv2d):
    """A convolution of a user's own."""


def with_layer(change: Callable[[nn.Sequential], Any]) -> nn.Module:
    block = structures.NetBlock(3, 6, 4)
    change(block.net[1])
    return block


def replace(index: int, module: nn.Module) -> Callable[[nn.Sequential], Any]:
    return lambda layer: layer.__setitem__(index, module)


def gate(layer: nn.Sequential) -> None:
    layer.gate = nn.Parameter(torch.ones(1))


def hook(conv: nn.Module) -> None:
    conv.register_forward_hook(lambda *_: None)


def weight_norm_hook(conv: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(conv)


def prune_hook(conv: nn.Module) -> None:
    prune.random_unstructured(conv, "weight", 0.5)


DIFFERS = "its forward computes something else (training, on a probe)"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other order": (PostActivationBlock, DIFFERS),
    "norm": (lambda: with_layer(replace(0, nn.GroupNorm(2, 10))), f"net.1.0 is GroupNorm, {ALLOWED}"),
    "instance norm": (
        lambda: with_layer(replace(0, nn.InstanceNorm2d(10))),
        f"net.1.0 is InstanceNorm2d, {ALLOWED}",
    ),
    "activation": (lambda: with_layer(replace(1, nn.SiLU())), f"net.1.1 is SiLU, {ALLOWED}"),
    "padding": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 3, padding=1, padding_mode="reflect"))),
        "net.1.2.padding_mode is reflect, not zeros",
    ),
    "own convolution": (
        lambda: with_layer(replace(2, Cropping(10, 4, 3, padding=1, stride=1))),
        f"net.1.2 is Cropping, {ALLOWED}",
    ),
    "unequal dilation": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 3, padding=(2, 1), dilation=(2, 1)))),
        "net.1.2.padding is (2, 1), not (2, 2)",
    ),
    "even kernel": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 4, padding="same"))),
        "net.1.2.kernel_size is (4, 4), not odd",
    ),
    "weight norm": (
        lambda: with_layer(lambda layer: weight_norm_hook(layer[2])),
        "net.1.2.weight is not a plain parameter",
    ),
    "pruned": (
        lambda: with_layer(lambda layer: prune_hook(layer[2])),
        "net.1.2.weight is not a plain parameter",
    ),
    "groups": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 3, padding=1, groups=2))),
        "net.1.2.groups is 2, not 1",
    ),
    "parametrized": (
        lambda: with_layer(lambda layer: nn.utils.parametrizations.weight_norm(layer[2])),
        "net.1.2.weight is not a plain parameter",
    ),
    "own parameter": (
        lambda: with_layer(gate),
        "net.1, Sequential, has parameters or buffers of its own: gate",
    ),
}


def _twice(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Not by a copy, of which a pruned module is not capable."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make())
    return models


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_refused_and_left_alone(name: str) -> None:
    make, reason = REFUSED[name]
    naive, fused = _twice(make)
    fused.eval().requires_grad_(False)
    classes = [type(m) for m in fused.modules()]
    with unchanged(fused):
        effdense.convert(fused)
    assert [type(m) for m in fused.modules()] == classes
    (entry,) = [e for e in effdense.report(fused) if e.kind == "DenseBlock"]
    assert (entry.converted, entry.reason) == (False, reason)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(fused(x), naive.eval()(x))


def transition(*replaced: tuple[int, nn.Module]) -> nn.Module:
    parts = [nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1), nn.AvgPool2d(2)]
    for index, module in replaced:
        parts[index] = module
    return nn.Sequential(*parts)


ORDER = "not one of a norm, ReLU and convolution in this order"
TRANSITIONS: dict[str, tuple[nn.Module, str]] = {
    "norm": (transition((0, nn.GroupNorm(2, 18))), f"0 is GroupNorm, {ORDER}"),
    "activation": (transition((1, nn.SiLU())), f"1 is SiLU, {ORDER}"),
    "stride": (transition((2, nn.Conv2d(18, 9, 1, stride=2))), "2.stride is (2, 2), not (1, 1)"),
    "groups": (transition((2, nn.Conv2d(18, 9, 1, groups=9))), "2.groups is 9, not 1"),
    "order": (transition((0, nn.ReLU()), (1, nn.BatchNorm2d(18))), DIFFERS),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_that_differs_is_refused(name: str) -> None:
    module, reason = TRANSITIONS[name]
    naive = nn.Sequential(structures.NetBlock(3, 6, 4), module)
    fused = effdense.convert(copy.deepcopy(naive))
    (entry,) = [e for e in effdense.report(fused) if e.kind == "Transition"]
    assert (entry.name, entry.converted, entry.reason) == ("1", False, reason)
    assert_same_classes(fused[1], naive[1])


def test_a_block_of_one_layer_is_told_by_its_class() -> None:
    blocks = structures.NetBlock(2, 6, 4), structures.NetBlock(1, 14, 4)
    blocks[1].net[0][0] = nn.GroupNorm(2, 14)
    model = effdense.convert(nn.Sequential(*blocks))
    entry = next(e for e in effdense.report(model) if e.name == "1")
    assert (entry.kind, entry.converted, entry.reason) == (
        "DenseBlock",
        False,
        f"net.0.0 is GroupNorm, {ALLOWED}",
    )


@pytest.mark.parametrize("change", [hook, weight_norm_hook, prune_hook])
def test_what_stands_in_the_way_later_makes_its_own_forward_run(change: Callable[[nn.Module], Any]) -> None:
    naive = randomised(structures.NetBlock(3, 6, 4))
    fused = effdense.convert(copy.deepcopy(naive))
    for block in (naive, fused):
        torch.manual_seed(1)
        change(block.net[1][2])
    assert fused.obstacle() in ("net.1.2 has hooks", "net.1.2.weight is not a plain parameter")
    assert_same(naive, fused, torch.randn(2, 6, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("attribute, value", [("padding", (0, 0)), ("stride", (2, 2)), ("groups", 2)])
def test_a_convolution_that_changes_later_makes_its_own_forward_run(attribute: str, value: Any) -> None:
    block = effdense.convert(structures.NetBlock(3, 6, 4))
    setattr(block.net[1][2], attribute, value)
    assert block.obstacle().startswith(f"net.1.2.{attribute} is {value}, not ")


@pytest.mark.parametrize("failing", [0, 3])
def test_a_convert_that_fails_halfway_leaves_the_model_as_it_was(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = importlib.import_module("effdense.conversion"), itertools.count()
    adopt = module.adopt

    def fail(*arguments: Any) -> None:
        adopt(*arguments)
        if next(calls) == failing:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "adopt", fail)
    model = nn.Sequential(structures.StarNet(), structures.d2l_net())
    naive = copy.deepcopy(model)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        effdense.convert(model)
    assert_same_classes(model, naive)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_on_the_probe(error: type[BaseException]) -> None:
    class Failing(structures.NetBlock):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            raise error("no")

    model = nn.Sequential(structures.NetBlock(2, 6, 4), Failing(2, 14, 4))
    naive = copy.deepcopy(model)
    with unchanged(model):
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                effdense.convert(model)
        else:
            effdense.convert(model)
    assert_same_classes(model[1], naive[1])
    if error is KeyboardInterrupt:
        assert_same_classes(model, naive)
    else:
        entry = effdense.report(model)[-1]
        assert entry.reason == "its forward failed on a probe (RuntimeError: no)"


def test_other_networks_are_left_alone() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = structures.conv_block(6, 6), structures.conv_block(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Residual(), nn.Sequential(Residual(), Residual()))
    classes = [type(m) for m in model.modules()]
    effdense.convert(model)
    assert [type(m) for m in model.modules()] == classes
    assert effdense.report(model) == []
