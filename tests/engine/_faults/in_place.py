"""Public functions that change a module in place, interrupted: the module is then as before, or as after."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import effdense
from benchmarks import densenet
from effdense.conversion.class_swap import Converted
from tests._stages import assert_close
from tests.engine._faults.lines import PACKAGE
from tests.engine._faults.out_of_memory import same
from tests.engine._faults.steps import step, whole_net

TORCH_MODULE = torch.nn.modules.module.__file__


def _naive() -> nn.Module:
    """A block of two layers and a transition, in float64."""
    torch.manual_seed(0)
    block: Any = densenet._DenseBlock(2, 5, 2, 4, 0.0)
    return nn.Sequential(block, densenet._Transition(13, 6, False)).double()


def _classes(model: nn.Module) -> list[tuple[type, list[str]]]:
    """Every module's class, and the names of what it holds, but for what is kept of a look at it."""
    return [(type(m), sorted(k for k in vars(m) if k != "_effdense_kept")) for m in model.modules()]


class Change:
    """A model that is changed. Classes and attributes are those before or after, parameters and buffers too."""

    files: Sequence[str] = (PACKAGE,)
    forks = False

    def __init__(self) -> None:
        self._original = self.make()
        self.changed = copy.deepcopy(self._original)
        self.apply(self.changed)

    def make(self) -> Any:
        """What is changed."""
        return whole_net()

    def apply(self, model: Any) -> None:
        """Changes it."""
        raise NotImplementedError

    def prepare(self) -> None:
        self.model = copy.deepcopy(self._original)
        self._chance = torch.get_rng_state()

    def act(self) -> None:
        self.apply(self.model)

    def check(self, thoroughly: bool = True) -> None:
        assert any(self.is_like(m) for m in (self._original, self.changed)), "the model is changed in part"
        self.apply(self.model)
        assert self.is_like(self.changed), "it cannot be changed afterwards"

    def is_like(self, other: Any) -> bool:
        """Whether the model is like this one."""
        return _classes(self.model) == _classes(other) and same(
            list(self.model.state_dict().values()), list(other.state_dict().values())
        )


class Convert(Change):
    """`convert`, whose model then also computes what it did, on PyTorch's operators or fused."""

    forks = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self._x = torch.randn(2, 5, 4, 4, dtype=torch.float64, generator=generator)
        self._expected = step(copy.deepcopy(self._original), self._x)

    def make(self) -> Any:
        return _naive()

    def apply(self, model: Any) -> None:
        effdense.convert(model)

    def check(self, thoroughly: bool = True) -> None:
        assert any(self.is_like(m) for m in (self._original, self.changed)), "the model is changed in part"
        assert [m.training for m in self.model.modules()] == [m.training for m in self._original.modules()]
        assert all(p.grad is None for p in self.model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch._C._len_torch_function_stack(), "a mode is left on"
        assert torch.equal(torch.get_rng_state(), self._chance), "the random state has moved"
        again = copy.deepcopy(self.model)
        assert_close(step(self.model, self._x), self._expected)
        if thoroughly:
            effdense.convert(again)
            assert _classes(again) == _classes(self.changed), "it cannot be converted afterwards"


class Memory(Change):
    """`convert` of a converted model, which changes its memory mode."""

    def make(self) -> Any:
        return effdense.convert(_naive())

    def apply(self, model: Any) -> None:
        effdense.convert(model, memory="minimal")

    def is_like(self, other: Any) -> bool:
        return super().is_like(other) and _modes(self.model) == _modes(other)


def _modes(model: nn.Module) -> list[Any]:
    noted = [vars(m).get("_effdense") for m in model.modules()]
    return [n and n.memory for n in noted] + [vars(m).get("_memory") for m in model.modules()]


class Revert(Change):
    """`revert`."""

    def make(self) -> Any:
        model = effdense.convert(_naive())
        assert any(isinstance(m, Converted) for m in model.modules())
        return model

    def apply(self, model: Any) -> None:
        effdense.revert(model)


class LoadWeights(Change):
    """`load_weights`, also at the lines of PyTorch's load_state_dict."""

    files = (PACKAGE, TORCH_MODULE)

    def apply(self, model: Any) -> None:
        torch.manual_seed(7)
        effdense.models.load_weights(model, whole_net().state_dict())

    def prepare(self) -> None:
        super().prepare()
        torch.manual_seed(7)
        self._weights = whole_net().state_dict()

    def act(self) -> None:
        effdense.models.load_weights(self.model, self._weights)


class ResetClassifier(Change):
    """A net's `reset_classifier`, also at the lines of nn.Module."""

    files = (PACKAGE, TORCH_MODULE)

    def apply(self, model: Any) -> None:
        torch.manual_seed(7)
        model.reset_classifier(7)

    def is_like(self, other: Any) -> bool:
        return super().is_like(other) and self.model.num_classes == other.num_classes


CHANGES: dict[str, type[Change]] = {
    "convert": Convert,
    "convert, another memory": Memory,
    "revert": Revert,
    "load_weights": LoadWeights,
    "reset_classifier": ResetClassifier,
}
