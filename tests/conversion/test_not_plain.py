"""Modules that look like a dense block's part on a probe and are not: other norms, wrappers, random skipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import assert_same, kinds, randomised

NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5),
    "d2l": structures.d2l_net,
    "one rate for all": lambda: structures.rate_net(0.0),
}


class GhostNorm(nn.BatchNorm2d):
    """In training, statistics of every two images."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(GhostNorm, self).forward(part) for part in input.split(2)])


class GhostNorm1d(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(GhostNorm1d, self).forward(part) for part in input.split(2)])


class NamedNorm(nn.BatchNorm2d):
    """Only another name: known code, but a class that is not listed."""


class Wrapper(nn.Module):
    """All attributes of the norm inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).clamp(-3.0, 3.0) if x.shape[-1] > 8 else self.norm(x)


class NormWithChild(nn.BatchNorm2d):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.act = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Leaky(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.clamp(min=0.0, max=6.0)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


class Blocks(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input


def swap(old: type, cls: type) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in list(model.modules()):
            if type(module) is old:
                module.__class__ = cls
                if cls is NormWithChild:
                    module.act = nn.Identity()

    return change


def wrap(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                module._modules[name] = Wrapper(child)


KINDS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "ghost norm": (swap(nn.BatchNorm2d, GhostNorm), "GhostNorm"),
    "a norm by another name": (swap(nn.BatchNorm2d, NamedNorm), "NamedNorm"),
    "a norm with a child": (swap(nn.BatchNorm2d, NormWithChild), "NormWithChild"),
    "a wrapper": (wrap, "Wrapper"),
    "activation": (swap(nn.ReLU, Leaky), "Leaky"),
    "convolution": (swap(nn.Conv2d, Standardised), "Standardised"),
}


@pytest.mark.parametrize("net", ["torchvision's structure", "d2l"])
@pytest.mark.parametrize("name", KINDS)
def test_only_the_very_classes_are_taken(name: str, net: str) -> None:
    change, cls = KINDS[name]
    naive = randomised(NETS[net]())
    change(naive)
    fused = effdense.convert(copy.deepcopy(naive))
    assert "DenseBlock" not in kinds(fused)
    reasons = [e.reason for e in effdense.report(fused) if not e.converted]
    assert reasons and any(
        cls in str(reason) or "clamp" in str(reason) or "shape" in str(reason) for reason in reasons
    )
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64) * 5
    assert_same(naive, fused, x, 1)


def test_a_ghost_norm_in_one_dimension() -> None:
    naive = randomised(NETS["one rate for all"]())
    swap(nn.BatchNorm1d, GhostNorm1d)(naive)
    fused = effdense.convert(copy.deepcopy(naive))
    assert "GhostNorm1d" in str(effdense.report(fused))
    assert_same(naive, fused, torch.randn(6, 3, 20, dtype=torch.float64), 1)


def test_a_norm_that_is_replaced_later() -> None:
    naive = randomised(NETS["torchvision's structure"]())
    fused = effdense.convert(copy.deepcopy(naive))
    for model in (naive, fused):
        swap(nn.BatchNorm2d, GhostNorm)(model)
    assert "DenseBlock" not in kinds(fused) and "GhostNorm" in str(effdense.report(fused))
    assert_same(naive, fused, torch.randn(6, 3, 32, 32, dtype=torch.float64), 1)


class SkippingByTorch(structures.RateLayer):
    """Stochastic depth, whose rate has no telling name."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.survival = 0.999

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training and torch.rand(()) > self.survival:
            y = torch.cat([x, torch.zeros_like(y[:, x.shape[1] :])], 1)
        return y


class SkippingByBernoulli(structures.RateLayer):
    def forward(self, x: Tensor) -> Tensor:
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.999)
        return super().forward(x) * (keep * 0 + 1)


class SkippingFunction(structures.RateLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.0 * torch.randn_like(x))


class EveryThird(structures.RateLayer):
    """The result changes from call to call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        y = super().forward(x)
        return y if self.calls % 3 else y * 2


CHANCE = [SkippingByTorch, SkippingByBernoulli, SkippingFunction, EveryThird]


@pytest.mark.parametrize("layer", CHANCE)
def test_a_forward_that_draws_or_changes_is_refused(layer: Any) -> None:
    block = nn.Sequential(*(layer(6 + 4 * i, 4, 0.0) for i in range(3))).double()
    rng = torch.get_rng_state()
    effdense.convert(block)
    assert torch.equal(rng, torch.get_rng_state())
    (entry,) = [e for e in effdense.report(block) if e.kind == "DenseBlock"]
    assert not entry.converted and entry.reason is not None


class LargeOnly(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y / 2 if x.shape[-1] > 100 else y


class ByValue(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if bool(x.detach().abs().max() < 1e6) else y * 0


class ByType(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.dtype != torch.float32 else y * 2


class Bounded(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e5, 1e5)


class Halves(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:64])


class ByLength(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) < 5 else super().forward(x) * 3


class UnderAutocast(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if torch.is_autocast_enabled("cpu") else y


class ByAttribute(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        scale = getattr(x, "scale", None)
        return super().forward(x) if scale is None else super().forward(x) * scale


class ByMask(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x.mask if hasattr(x, "mask") else 1)


class ByKind(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if isinstance(x, nn.Parameter) else 1)


NOT_SHOWN = [
    *(LargeOnly, ByValue, ByType, Bounded, Halves, ByLength, UnderAutocast),
    *(ByAttribute, ByMask, ByKind),
]


@pytest.mark.parametrize("cls", NOT_SHOWN)
def test_what_a_probes_input_does_not_show_is_refused(cls: Any) -> None:
    naive = cls(2, 6, 4)
    fused = effdense.convert(copy.deepcopy(naive))
    (entry,) = [e for e in effdense.report(fused) if e.kind == "DenseBlock"]
    assert not entry.converted and "its forward" in str(entry.reason)
    x = torch.randn(70, 6, 2, 101) * 1e6
    assert torch.equal(fused(x), naive(x))


class Functional(structures.NetBlock):
    """Asks only what cannot matter."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and self.training:
            pass
        for layer in self.net:
            x = torch.cat((x, layer[2](F.relu(layer[0](x)))), 1)
        return x


def test_what_cannot_matter_is_allowed() -> None:
    naive = randomised(Functional(3, 6, 4))
    fused = effdense.convert(copy.deepcopy(naive))
    assert kinds(fused) == {"DenseBlock": 1}
    assert_same(naive, fused, torch.randn(2, 6, 5, 5, dtype=torch.float64))


# ---- what is switched on around a call, modes, and tensors that are no parameters or buffers


def asking(ask: Callable[[Any, Tensor], Any]) -> Any:
    """A layer that halves what it adds where `ask` says so."""

    class Asking(structures.RateLayer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.gate, self.number = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
            self.tensors = {"shift": torch.zeros(1, dtype=torch.float64)}

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
            y = F.dropout(y, self.droprate, self.training)
            return torch.cat([x, y * 0.5 if ask(self, x) else y], 1)

    return nn.Sequential(*(Asking(6 + 4 * i, 4, 0.0) for i in range(3))).double()


def refused(block: nn.Module) -> str:
    (entry,) = [e for e in effdense.report(effdense.convert(block)) if e.kind == "DenseBlock"]
    assert not entry.converted
    return str(entry.reason)


SWITCHES: dict[str, Callable[[], Any]] = {
    "is_grad_enabled": lambda: torch.is_grad_enabled(),
    "is_inference_mode_enabled": lambda: torch.is_inference_mode_enabled(),
    "are_deterministic_algorithms_enabled": lambda: torch.are_deterministic_algorithms_enabled(),
    "initial_seed": lambda: torch.initial_seed() == 77,
    "get_rng_state": lambda: torch.get_rng_state().sum() == 3,
    "get_num_threads": lambda: torch.get_num_threads() == 77,
    "is_initialized": lambda: torch.distributed.is_initialized(),
    "is_anomaly_enabled": lambda: torch.is_anomaly_enabled(),
    "is_available": lambda: torch.cuda.is_available(),
    "enable_grad": lambda: torch.enable_grad().__enter__(),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_switched_on_around_a_call_must_not_be_asked_for(name: str) -> None:
    switch = SWITCHES[name]
    assert name in refused(asking(lambda *_: switch()))


MODES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a norm's mode": lambda layer, _: layer.training and not layer.bn1.training,
    "a convolution's mode": lambda layer, _: layer.conv2.training is not layer.training,
    "the mode by name": lambda layer, _: getattr(layer.bn2, "training") is not layer.training,  # noqa: B009
    "the input's gradient": lambda _, x: not x.requires_grad,
    "a weight's gradient": lambda layer, _: not layer.conv1.weight.requires_grad,
    "neither gradient": lambda layer, x: not (x.requires_grad or layer.conv1.weight.requires_grad),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_that_differ_are_tried(name: str) -> None:
    reason = refused(asking(MODES[name]))
    tried = ("gradient", "frozen") if "gradient" in name else ("in the other mode",)
    assert "computes something else" in reason and any(words in reason for words in tried)


class RateByChild(structures.RateLayer):
    """Drops in its convolution's mode, at the rate that it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, F.dropout(y, self.droprate, self.conv2.training)], 1)


def test_dropout_by_a_childs_mode() -> None:
    block = nn.Sequential(*(RateByChild(6 + 4 * i, 4, 0.3) for i in range(3)))
    assert "some modules in the other mode" in refused(block)


class Plus(structures.RateLayer):
    """Computes with a tensor of its own that is neither a parameter nor a buffer."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__(channels, 4, 0.0)
        self.how, one = how, torch.ones(1, dtype=torch.float64)
        self.own, self.inside, self.number = one * 0, [{"one": one}], torch.zeros(1, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        if self.how == "added":
            y = y + self.own
        if self.how == "a factor in containers":
            y = y * self.inside[0]["one"]
        if self.how == "a number":
            y = y - y * self.number
        if self.how == "changed":
            self.own.add_(1)
        if self.how == "changed in containers":
            self.inside[0]["one"].mul_(2)
        return torch.cat([x, F.dropout(y, self.droprate, self.training)], 1)


@pytest.mark.parametrize(
    "how", ["added", "a factor in containers", "a number", "changed", "changed in containers"]
)
def test_a_tensor_that_is_neither_a_parameter_nor_a_buffer(how: str) -> None:
    block = nn.Sequential(*(Plus(6 + 4 * i, how) for i in range(3))).double()
    before = [copy.deepcopy((layer.own, layer.inside)) for layer in block]
    assert ("changes its attribute" if how.startswith("changed") else "something else") in refused(block)
    assert before == [(layer.own, layer.inside) for layer in block]


def test_such_a_tensor_that_nothing_computes_with() -> None:
    naive = randomised(nn.Sequential(*(Plus(6 + 4 * i, "not at all") for i in range(3))))
    fused = effdense.convert(copy.deepcopy(naive))
    assert kinds(fused) == {"DenseBlock": 1}
    assert_same(naive, fused, torch.randn(2, 6, 5, dtype=torch.float64))


class Called(structures.RateLayer):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 1.0


class CalledNorm(nn.BatchNorm1d):
    __call__ = Called.__call__


@pytest.mark.parametrize("inner", [False, True])
def test_a_call_of_a_layers_own_is_refused(inner: bool) -> None:
    block = nn.Sequential(*((structures.RateLayer if inner else Called)(6 + 4 * i, 4, 0.0) for i in range(3)))
    if inner:
        block[1].bn1.__class__ = CalledNorm
    assert ("CalledNorm" if inner else "__call__") in refused(block)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_global_hook_neither_sees_nor_spoils_the_comparison(wrong: bool) -> None:
    calls: list[Any] = []
    block = asking((lambda *_: True) if wrong else (lambda *_: False))
    handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(a[0]))
    try:
        effdense.convert(block)
        assert calls == []
    finally:
        handle.remove()
    (entry,) = [e for e in effdense.report(block) if e.kind == "DenseBlock"]
    assert entry.converted is not wrong
