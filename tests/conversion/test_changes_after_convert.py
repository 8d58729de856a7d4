"""What a module's forward reads beside its submodules is compared by convert, and noticed where it changes later."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import assert_same, randomised

CHANGED = "which was changed"


class Unit(nn.Module):
    """A transition's first half, whose forward asks attributes."""

    def __init__(self, channels: int, width: int, gated: bool = False) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.norm(x)))
        return y.sigmoid() if self.gated else y


class ActiveLayer(structures.RateLayer):
    """With a function in an attribute, and a rate in a nested module."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4, 0.0)
        self.act = F.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, F.dropout(out, self.droprate, self.training)], 1)


class Cut(structures.NetBlock):
    """A block whose forward asks attributes."""

    def __init__(self) -> None:
        super().__init__(3, 6, 4)
        self.depth, self.scale = 3, 1.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net[: self.depth]:  # type: ignore[attr-defined]
            x = torch.cat((x, layer(x)), 1)
        return x * self.scale


class Scaled(structures.NetBlock):
    """With an attribute of its class."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__(3, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def active() -> nn.Module:
    return nn.Sequential(ActiveLayer(6), ActiveLayer(10))


def set_on(path: str, **attributes: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        vars(model.get_submodule(path)).update(attributes)

    return change


CHANGES = {
    "a function": (active, set_on("1", act=F.gelu), CHANGED),
    "a number": (Cut, set_on("", scale=0.5), CHANGED),
    "which layers run": (Cut, set_on("", depth=2), CHANGED),
    "a rate that is none of Python's numbers": (active, set_on("0", droprate=np.float32(0.5)), CHANGED),
    "an attribute that no code reads": (active, set_on("0", drop_last=1), None),
    "an attribute over the class's": (Scaled, set_on("", scale=0.5), CHANGED),
    "a layer's rate": (active, set_on("0", droprate=0.5), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_convert_is_noticed(name: str) -> None:
    make, change, reason = CHANGES[name]
    naive = randomised(make())
    fused = effdense.convert(copy.deepcopy(naive))
    assert fused.obstacle() is None
    copies = [fused, copy.deepcopy(fused)]
    for model in (naive, *copies):
        change(model)
    for model in copies:
        obstacle = model.obstacle()
        assert obstacle is None if reason is None else reason in obstacle
        effdense.convert(model)  # compares nothing again
        assert model.obstacle() == obstacle
        channels = 6
        spatial = (5,) if make is active else (5, 4)
        assert_same(copy.deepcopy(naive), model, torch.randn(2, channels, *spatial, dtype=torch.float64))


OURS = ("memory", "kind", "read", "parts", "obstacle", "chains", "fused", "enter", "pool_first", "head")


@pytest.mark.parametrize(
    ("make", "value", "channels"),
    [
        (lambda: densenet.DenseNet(4, (2, 3), 6, num_classes=5), [1], 3),
        (lambda: structures.NetBlock(3, 6, 4), [1], 6),
        (lambda: structures.NetBlock(3, 6, 4), nn.Identity(), 6),
    ],
)
def test_names_of_ours_are_free_for_a_users_attributes(
    make: Callable[[], nn.Module], value: Any, channels: int
) -> None:
    naive = randomised(make())
    fused = effdense.convert(copy.deepcopy(naive))
    changed = [m for m in fused.modules() if type(m).__dict__.get("_effdense_kind") is not None]
    paths = [name for name, m in fused.named_modules() if m in changed]
    assert not any(hasattr(m, "memory") for m in changed)
    for model in (naive, fused):
        for path in paths:
            for name in OURS:
                setattr(model.get_submodule(path), name, value)
    if not isinstance(value, nn.Module):  # else a method of ours comes first, as any attribute of a class
        assert all(m.memory is value for m in changed)
    report = effdense.report(fused)
    assert len(report) == len(paths) > 0
    assert all("attributes that hide effdense's: " in str(e.reason) for e in report)
    assert_same(naive, fused, torch.randn(2, channels, 16, 16, dtype=torch.float64))


def test_modules_of_one_class_are_compared_one_by_one() -> None:
    """They do different things, by their attributes."""

    def pooled(*arguments: Any) -> nn.Module:
        return nn.Sequential(Unit(*arguments), nn.AvgPool2d(2))

    block = structures.NetBlock
    naive = nn.Sequential(block(2, 6, 4), pooled(14, 6), block(2, 6, 4), pooled(14, 6, True))
    fused = effdense.convert(copy.deepcopy(randomised(naive)))
    converted = {e.name: e.converted for e in effdense.report(fused)}
    assert converted["1"] and not converted["3"]
    assert_same(naive, fused, torch.randn(2, 6, 8, 9, dtype=torch.float64))


class Padding(structures.StarTransition):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))


class Doubling(structures.NetBlock):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Casting(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class LayerThatDropsInside(densenet._DenseLayer):
    """torchvision's names, with its dropout in another place."""

    def forward(self, features: Any) -> Tensor:
        x = torch.cat(features, 1) if isinstance(features, list) else features
        y = F.dropout(self.conv1(self.relu1(self.norm1(x))), self.drop_rate, self.training)
        return self.conv2(self.relu2(self.norm2(y)))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Padding(14, 6), "its forward gives"),
        (lambda: Doubling(2, 6, 4), "its class has a __call__ of its own"),
        (lambda: Casting(2, 6, 4), "its forward switches autocast"),
        (lambda: LayerThatDropsInside(6, 4, 2, 0.0), "its forward computes something else"),
    ],
)
def test_what_a_probe_must_see(make: Callable[[], nn.Module], reason: str) -> None:
    (entry,) = effdense.report(effdense.convert(make()))
    assert not entry.converted and entry.reason is not None and entry.reason.startswith(reason)


def test_called_by_keyword_and_cut() -> None:
    naive = randomised(structures.rate_net(0.0))
    fused: Any = effdense.convert(copy.deepcopy(naive))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused[1](input=x), naive[1](input=x))
    part = fused[1][:2]  # an object of the fused class that convert has not seen
    assert "has not been compared" in part.obstacle()
    torch.testing.assert_close(part(x), naive[1][:2](x))
    assert type(effdense.revert(effdense.convert(part))) is nn.Sequential


def test_reentrant_checkpoints_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = structures.checkpoint
    monkeypatch.setattr(structures, "checkpoint", lambda f, *x, **_: checkpoint(f, *x, use_reentrant=True))
    (entry,) = effdense.report(effdense.convert(structures.StarBlock(2, 6, 4, 2, 0.0, True)))
    assert entry.converted


def test_an_average_over_all_batches_of_a_norm_that_layers_share() -> None:
    naive = densenet.DenseNet(4, (2,), 6, 1)
    first, second = naive.features.denseblock1.values()
    second.norm2 = first.norm2
    first.norm2.momentum = None
    naive = randomised(naive)  # type: ignore[assignment]
    fused = effdense.convert(copy.deepcopy(naive))
    assert_same(naive, fused, torch.randn(2, 3, 32, 33, dtype=torch.float64))


def test_a_users_stem() -> None:
    model = effdense.models.densenet_cifar(10, 4)
    model.features.conv0 = nn.Sequential(nn.Conv2d(1, 3, 1), model.features.conv0)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    model.features.conv0 = nn.Upsample(scale_factor=2)
    assert model(torch.randn(2, 8, 8, 8)).shape == (2, 10)


# ---- what no attribute shows


def helper(x: Tensor) -> Tensor:
    return F.relu(x)


class Far(structures.RateLayer):
    """Reads containers, a class's attribute that may be missing, a method, a global, a norm's attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4, 0.0)
        self.config: Any = {"scale": 1.0, "skip": [False]}
        self.marks = [False, {"a"}]

    def act(self, x: Tensor, power: float = 1.0) -> Tensor:
        return helper(x) * power

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))
        if self.config["skip"][0] or self.marks[0] or "b" in self.marks[1] or getattr(self, "bypass", False):
            y = y * 0
        if self.bn1.momentum != 0.1 or self.bn2.eps != 1e-5:
            y = y * 0.5
        return torch.cat([x, F.dropout(y * self.config["scale"], self.droprate, self.training)], 1)


def first(change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda block, _: change(block[0])


def patch(owner: Any, name: str, value: Any) -> Callable[[Any, Any], Any]:
    return lambda _, patcher: patcher.setattr(owner, name, value, raising=False)


def doubled(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def far_forward(self: Any, x: Tensor) -> Tensor:
    return structures.RateLayer.forward(self, x) * 0.5


FAR: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a dict": (first(lambda layer: layer.config.update(scale=2.0)), "Far.config"),
    "a list in a dict": (first(lambda layer: layer.config["skip"].append(1)), "Far.config"),
    "a list": (first(lambda layer: layer.marks.__setitem__(0, True)), "Far.marks"),
    "a set in a list": (first(lambda layer: layer.marks[1].add("b")), "Far.marks"),
    "a norm's momentum": (first(lambda layer: setattr(layer.bn1, "momentum", 0.3)), "momentum"),
    "a norm's eps": (first(lambda layer: setattr(layer.bn2, "eps", 1e-3)), "eps"),
    "a layer's forward": (patch(Far, "forward", far_forward), "Far.forward"),
    "a layer's method": (patch(Far, "act", lambda self, x: F.elu(x)), "Far.act"),
    "a method's defaults": (patch(Far.act, "__defaults__", (2.0,)), "Far.act"),
    "a class attribute added": (patch(Far, "bypass", True), "Far.bypass"),
    "a call added": (patch(Far, "__call__", doubled(nn.Module.__call__)), "__call__"),
    "a global": (patch(sys.modules[__name__], "helper", F.elu), "helper"),
    "a global of the builtins' name": (patch(sys.modules[__name__], "getattr", lambda *_: 1), "getattr"),
    "a function's code": (patch(helper, "__code__", (lambda x: F.elu(x)).__code__), "helper"),
    "torch's relu": (patch(F, "relu", F.elu), "relu"),
    "torch's convolution": (patch(F, "conv1d", doubled(F.conv1d)), "conv1d"),
    "torch's cat": (patch(torch, "cat", doubled(torch.cat)), "cat"),
    "a norm's forward": (
        patch(nn.BatchNorm1d, "forward", doubled(nn.BatchNorm1d.forward)),
        "BatchNorm1d.forward",
    ),
    "a convolution's forward": (patch(nn.Conv1d, "forward", doubled(nn.Conv1d.forward)), "Conv1d.forward"),
    "the forward behind it": (
        first(lambda layer: setattr(layer.conv1, "_conv_forward", doubled(layer.conv1._conv_forward))),
        "_conv_forward",
    ),
}


@pytest.mark.parametrize("name", FAR)
def test_what_changes_outside_of_the_attributes_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, shown = FAR[name]
    naive = randomised(nn.Sequential(Far(6), Far(10)))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    copies = [effdense.convert(copy.deepcopy(naive))]
    copies += [copy.deepcopy(copies[0]), pickle.loads(pickle.dumps(copies[0]))]
    before = naive.eval()(x)
    for model in copies:
        assert model.obstacle() is None
    with monkeypatch.context() as patcher:
        for model in (naive, *copies):
            change(model, patcher)
        for model in copies:
            assert shown in str(model.obstacle())
        expected = naive.eval()(x)
        assert name == "a list in a dict" or not torch.equal(expected, before)
        for model in copies:
            torch.testing.assert_close(model.eval()(x), expected)
    if change.__closure__ is not None and "patch" in change.__qualname__:
        for model in copies:
            assert model.obstacle() is None, "undone again"


def test_equal_values_are_no_change() -> None:
    block = effdense.convert(nn.Sequential(Far(6), Far(10)))
    block[0].config = {"scale": float("1.0"), "skip": [False]}  # type: ignore[assignment]
    block[1].marks[1] = {"a"}  # type: ignore[assignment]
    assert block.obstacle() is None


def test_convert_again_reads_a_class_again(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = randomised(nn.Sequential(Far(6), Far(10)))
    effdense.convert(copy.deepcopy(naive))
    monkeypatch.setattr(Far, "act", lambda self, x: torch.is_grad_enabled() or F.relu(x))
    (entry,) = effdense.report(effdense.convert(naive))
    assert not entry.converted and "is_grad_enabled" in str(entry.reason)
