"""convert on users' own classes: whatever they override, take as arguments, or change later, stays."""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import COPIES, assert_same, assert_same_classes, copied, kinds, randomised
from tests._stages import assert_close

SWITCH = False


def make(cls: Any = densenet.DenseNet) -> Any:
    torch.manual_seed(1)
    return cls(4, (2, 3), 6, num_classes=5).double()


def images(*shape: int) -> Tensor:
    return torch.randn(
        *(shape or (3, 3, 32, 32)), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def pair(cls: Any) -> tuple[Any, Any]:
    naive = make(cls)
    return naive, effdense.convert(copy.deepcopy(naive))


# ---- what a class overrides


class FrozenNorms(densenet.DenseNet):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class OldKeys(densenet.DenseNet):
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(
            {k.replace("old.", ""): v for k, v in state_dict.items()}, *args, **kwargs
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"old.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}


class FewParameters(densenet.DenseNet):
    def parameters(self, recurse: bool = True) -> Any:
        return self.classifier.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.classifier.named_parameters(*args, **kwargs)


class Delegating(densenet.DenseNet):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("features"), name)


class Described(densenet.DenseNet):
    size = "small"

    def extra_repr(self) -> str:
        return f"size={self.size}"

    @property
    def width(self) -> int:
        return self.classifier.in_features

    def _helper(self) -> str:
        return "helped"

    def __len__(self) -> int:
        return 7


class Registered(densenet.DenseNet):
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls.__name__)


OVERRIDDEN: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "train": (
        FrozenNorms,
        lambda m: [b.training for b in m.train().modules() if isinstance(b, nn.BatchNorm2d)],
    ),
    "load_state_dict": (OldKeys, lambda m: str(m.load_state_dict(m.state_dict()))),
    "parameters": (FewParameters, lambda m: [p.shape for p in m.parameters()]),
    "named_parameters": (FewParameters, lambda m: [n for n, _ in m.named_parameters()]),
    "__getattr__": (Delegating, lambda m: type(m.denseblock1).__name__),
    "extra_repr": (Described, repr),
    "a property": (Described, lambda m: m.width),
    "a private method": (Described, lambda m: m._helper()),
    "a class attribute": (Described, lambda m: (m.size, type(m).size)),
    "__len__": (Described, len),
    "__init_subclass__": (Registered, lambda _: Registered.known),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_a_class_overrides_stays(name: str) -> None:
    cls, use = OVERRIDDEN[name]
    naive, fused = pair(cls)
    assert use(fused) == use(naive)
    assert kinds(fused)["DenseBlock"] == 2 and kinds(fused)["DenseFeatures"] == 1
    assert (
        isinstance(fused, cls)
        and type(fused).__name__ == cls.__name__
        and type(fused).__module__ == cls.__module__
    )
    assert_close([fused.eval()(images())], [naive.eval()(images())])
    assert_same_classes(effdense.revert(fused), naive)


def test_classes_and_names_stay() -> None:
    naive, fused = pair(densenet.DenseNet)
    assert repr(fused) == repr(naive)
    for a, b in zip(fused.modules(), naive.modules(), strict=True):
        assert isinstance(a, type(b)) and a._get_name() == b._get_name()
    names = collections.Counter(type(m).__name__ for m in fused.modules())
    assert names["_DenseLayer"] == 5 and names["_DenseBlock"] == 2 and names["_Transition"] == 1
    assert isinstance(fused, effdense.nn.DenseNet) and isinstance(fused.features, effdense.nn.DenseFeatures)
    assert sum(isinstance(m, effdense.nn.DenseLayer) for m in fused.modules()) == 5


def test_the_arguments_names_stay() -> None:
    _, fused = pair(WithFeature)
    assert list(inspect.signature(fused.forward).parameters) == ["images", "with_feature"]
    traced = torch.fx.symbolic_trace(effdense.convert(make()).eval())
    assert [n.name for n in traced.graph.nodes if n.op == "placeholder"] == ["x"]


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_users_class(how: str) -> None:
    fused = effdense.convert(make(FrozenNorms))
    other = copied(fused, how)
    assert type(other) is type(fused) and str(effdense.report(other)) == str(effdense.report(fused))
    assert_close([other.train()(images())], [fused.train()(images())])


# ---- arguments, branches, side effects, attributes that change later


class WithFeature(densenet.DenseNet):
    def forward(self, images: Tensor, with_feature: bool = False) -> Any:
        features = self.features(images)
        out = self.classifier(F.adaptive_avg_pool2d(F.relu(features), 1).flatten(1))
        return (features, out) if with_feature else out


class WithTargets(densenet.DenseNet):
    def forward(self, x: Tensor, targets: Any = None) -> Any:
        y = super().forward(x)
        return y if targets is None else F.cross_entropy(y, targets)


class AnyImage(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.double() / 255
        x = x[None] if x.dim() == 3 else x
        x = x.flatten(0, 1) if x.dim() == 5 else x
        return super().forward(x.expand(-1, 3, -1, -1))


class Squeezing(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).squeeze())


class Clamping(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x)).clamp(max=50.0)
        return self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))


class Remembering(densenet.DenseNet):
    return_features = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        features = F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1)
        return features if self.return_features else self.classifier(features)


class Switched(densenet.DenseNet):
    return_features = False

    def forward(self, x: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1)
        return features if self.return_features else self.classifier(features)


class GlobalSwitch(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1)
        return features if SWITCH else self.classifier(features)


def switch_class(model: Any) -> Any:
    Switched.return_features = True
    try:
        return model(images())
    finally:
        Switched.return_features = False


def switch_global(model: Any) -> Any:
    global SWITCH
    SWITCH = True
    try:
        return model(images())
    finally:
        SWITCH = False


def switch(model: Any) -> Any:
    before = model(images())
    model.return_features = True
    return before, model(images())


CALLED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "an argument": (WithFeature, lambda m: m(images(), with_feature=True)),
    "a second argument": (WithFeature, lambda m: m(images(), True)),
    "by keyword": (WithFeature, lambda m: m(images=images())),
    "targets": (WithTargets, lambda m: (m(images()), m(images(), torch.tensor([0, 1, 2])))),
    "targets by keyword": (WithTargets, lambda m: m(x=images(), targets=torch.tensor([0, 1, 2]))),
    "grey": (AnyImage, lambda m: m(images(2, 1, 32, 32))),
    "unbatched": (AnyImage, lambda m: m(images(3, 32, 32))),
    "5D": (AnyImage, lambda m: m(images(2, 2, 3, 32, 32))),
    "uint8": (AnyImage, lambda m: m((images().abs() * 50).to(torch.uint8))),
    "squeezed": (Squeezing, lambda m: m(images(1, 3, 32, 32))),
    "clamped": (Clamping, lambda m: m(images() * 1e3)),
    "an attribute that it sets": (Remembering, lambda m: (m(images()), m.seen)),
    "an attribute that changes": (Switched, switch),
    "an attribute of the class": (Switched, switch_class),
    "a global": (GlobalSwitch, switch_global),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_model_is_called_as_before(name: str) -> None:
    cls, use = CALLED[name]
    naive, fused = pair(cls)
    got, expected = use(fused.eval()), use(naive.eval())
    flat = lambda y: list(y) if isinstance(y, tuple) and not isinstance(y, torch.Size) else [y]  # noqa: E731
    for a, b in zip(flat(got), flat(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        else:
            assert a == b
    assert kinds(fused)["DenseBlock"] == 2
    assert_same(naive, fused, images() if name != "squeezed" else images(2, 3, 32, 32), 1)


def test_a_class_that_gets_another_forward_later() -> None:
    class Patched(structures.NetBlock):
        pass

    naive = randomised(Patched(3, 6, 4))
    fused: Any = effdense.convert(copy.deepcopy(naive))
    assert fused.obstacle() is None
    Patched.forward = lambda self, x: structures.NetBlock.forward(self, x) * 2  # type: ignore[method-assign]
    assert "another forward" in fused.obstacle()
    assert_same(naive, fused, images(2, 6, 5, 5), 1)


def test_a_librarys_function_in_another_name_is_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from effdense.nn.code_reader import is_librarys

    assert is_librarys(nn.Sequential.forward) and is_librarys(F.relu) and not is_librarys(WithFeature.forward)

    def forward(self: Any, input: Tensor) -> Tensor:
        return input

    forward.__module__, forward.__qualname__ = nn.Sequential.forward.__module__, "Sequential.forward"
    assert not is_librarys(forward)
