"""Training steps that are interrupted: stage, layer, net, the engine in Python, the fallback; warm, and the first one of a model."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import effdense
from effdense.engine import workspace
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, Transition
from tests.engine._faults.lines import PACKAGE
from tests.engine._faults.out_of_memory import same, state_of
from tests.fuzz._nets import engine


def block_and_transition(memory: str) -> nn.Module:
    """A stage."""
    return DenseFeatures(DenseBlock(2, 5, 2, 4, 0.0, memory=memory), Transition(13, 6))


def averaging() -> nn.Module:
    """A stage one of whose norms averages over all batches, which goes another way."""
    model: Any = block_and_transition("balanced")
    model[0].denselayer2.norm1.momentum = None
    return model


def whole_net() -> nn.Module:
    """Stem, two stages and head."""
    options = {
        "growth_rate": 4,
        "block_config": (2, 1),
        "num_init_features": 5,
        "bn_size": 2,
        "num_classes": 3,
    }
    return effdense.models.DenseNet(**options, memory="minimal")


NETS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "a stage": (lambda: block_and_transition("balanced"), "compiled", (2, 5, 4, 4)),
    "a stage that keeps less": (lambda: block_and_transition("minimal"), "compiled", (2, 5, 4, 4)),
    "the engine in Python": (lambda: block_and_transition("balanced"), "python", (2, 5, 4, 4)),
    "without operators": (lambda: block_and_transition("minimal"), "reference", (2, 5, 4, 4)),
    "averaged statistics": (averaging, "compiled", (2, 5, 4, 4)),
    "a layer": (lambda: DenseLayer(5, 4, 2, 0.0), "compiled", (2, 5, 4, 4)),
    "a whole net": (whole_net, "compiled", (2, 3, 32, 32)),
}


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads: list[Any] = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *(g.clone() for g in grads), *(b.clone() for b in model.buffers())]


class Blocks:
    """Which blocks of the workspace there are."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        take = workspace._pool.take

        def noted(size: int) -> Any:
            block, emptied = take(size)
            self.made.append(weakref.ref(block))
            return block, emptied

        workspace._pool.take = noted  # type: ignore[method-assign]

    def lost(self) -> int:
        """How many are neither free nor gone."""
        free = {id(block) for block in workspace._pool._free}
        held = [ref for ref in self.made if id(ref()) not in free]
        if any(ref() is not None for ref in held):
            gc.collect()  # which takes longer than a step
        return sum(ref() is not None for ref in held)


class Step:
    """A step of a net; `cold`: the first step of a model, which looks at its modules.

    Afterwards no parameter has changed, statistics have moved by one step or by none, a norm's never by a part of one, no lock and
    no scratch memory is held, and the next step is that of an untouched copy, to the bit.
    """

    files: Sequence[str] = (PACKAGE,)
    forks = False

    def __init__(self, name: str, cold: bool) -> None:
        make, self._engine, shape = NETS[name]
        torch.manual_seed(0)
        self._original, self._x, self._cold = make(), torch.randn(shape), cold
        self._model = copy.deepcopy(self._original)
        self._start, self._within = state_of(self._original), contextlib.ExitStack()
        self._parameters = len(list(self._original.parameters()))
        with engine(self._engine):
            step(self._model, self._x)
        self._moved = state_of(self._model)

    def prepare(self) -> None:
        if self._cold:
            self._model = copy.deepcopy(self._original)
        with torch.no_grad():
            tensors = *self._model.parameters(), *self._model.buffers()
            for now, then in zip(tensors, self._start, strict=True):
                now.copy_(then)
        workspace.empty_cache()
        workspace._pool.__dict__.pop("take", None)
        self._blocks = Blocks()
        # Not in `act`: an interrupt in the lines that put another engine there would leave it there.
        self._within.enter_context(engine(self._engine))

    def act(self) -> None:
        step(self._model, self._x)

    def check(self, thoroughly: bool = True) -> None:
        self._within.close()
        workspace._pool.__dict__.pop("take", None)
        assert workspace._pool._lock.acquire(blocking=False), "the lock is held"
        workspace._pool._lock.release()
        assert not self._blocks.lost(), "scratch memory is held"
        now, parameters = state_of(self._model), self._parameters
        assert same(now[:parameters], self._start[:parameters]), "a parameter has changed"
        of_buffers = now[parameters:], self._start[parameters:], self._moved[parameters:]
        for a, before, after in zip(*of_buffers, strict=True):
            assert torch.equal(a, before) or torch.equal(a, after), (
                "statistics have moved by a part of a step"
            )
        other = copy.deepcopy(self._model)
        with engine(self._engine):
            assert same(step(self._model, self._x), step(other, self._x)), "another step after it"
