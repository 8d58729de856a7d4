"""Which parts of a model are dense layers, blocks, transitions …, and why one cannot become ours.

By structure first, then by a comparison on a copy (probe.py). Nothing here changes the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, DenseNet, PlainDenseLayer, Transition
from effdense.nn.classes import LAYERS, OURS
from effdense.nn.foreign import Foreign, ForeignBlock, ForeignTransition
from effdense.nn.obstacles import chain_obstacle, transition_obstacle
from effdense.nn.structure import (
    MODULE_STATE,
    Obstacle,
    layers_of,
    looks_like_block,
    looks_like_transition,
    read_block,
    read_transition,
)
from effdense.probe import difference


def _looks_like(module: nn.Module) -> type | None:
    """Which of our classes a module might be, by the names of its submodules alone."""
    names = set(module._modules)
    if type(module).forward is nn.Module.forward:
        return None  # a container that nobody calls
    if type(module) is nn.Sequential and _holds_blocks(module):
        return DenseFeatures
    if {"norm1", "conv1", "norm2", "conv2"} <= names:
        return DenseLayer
    if {"norm1", "conv1"} <= names and "conv2" not in names:
        return PlainDenseLayer
    if {"norm", "conv", "pool"} <= names:
        return Transition
    if {"features", "classifier"} == names and _holds_blocks(module._modules["features"]):
        return DenseNet
    layers = list(module._modules.values())
    if layers and all(m is not None and _looks_like(m) in LAYERS for m in layers):
        return DenseBlock
    return None


def _holds_blocks(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and any(
        isinstance(m, ForeignBlock) or _looks_like(m) is DenseBlock or looks_like_block(m) for m in module
    )


def _successors(model: nn.Module) -> dict[nn.Module, set[nn.Module]]:
    """What comes behind a module in a sequence."""
    behind: dict[nn.Module, set[nn.Module]] = {}
    for m in model.modules():
        if isinstance(m, nn.Sequential):
            for before, after in itertools.pairwise(m):
                behind.setdefault(before, set()).add(after)
    return behind


# Parts of torchvision's own layer that are of no use outside of its forward.
_INTERNAL = {"any_requires_grad", "bn_function", "call_checkpoint_bottleneck"}


def _structure_obstacle(module: nn.Module, ours: type) -> str | None:
    """Why a module is not made like ours, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    own = [*module._parameters, *module._buffers]
    if own:
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if issubclass(ours, Foreign):
        taken = {n for n in (*vars(ours), *vars(Foreign)) if not n.startswith("__")} & set(dir(module)) - {
            "forward"
        }
        if taken:
            return f"its class has attributes that would be hidden: {', '.join(sorted(taken))}"
        try:
            read_block(module, hooks=False) if ours is ForeignBlock else read_transition(module, hooks=False)
        except Obstacle as reason:
            return str(reason)
        return None
    lost = {name for name in set(dir(type(module))) - set(dir(ours)) - _INTERNAL if not name.startswith("_")}
    if lost:
        more = ", …" if len(lost) > 5 else ""
        return f"its class has more than a DenseNet's: {', '.join(sorted(lost)[:5])}{more}"
    if ours is Transition:
        return transition_obstacle(module._modules, ignore_hooks=True)
    if not issubclass(ours, LAYERS):
        return None
    extra = set(module._modules) - set(ours.parts)
    if extra:
        return f"it has further submodules: {', '.join(sorted(extra))}"
    return chain_obstacle(module._modules, ours.parts, ignore_hooks=True)


class Examiner:
    """Says why a module cannot become one of ours, or None.

    Every module's structure is looked at. The comparison on a copy is made once for all modules that run the same code:
    the same class with the same attributes, on submodules of the same names and classes.
    """

    def __init__(self) -> None:
        self.known: dict[Any, str | None] = {}
        self.blocks: set[type] = set()  # the classes of what looks like a block
        self.everywhere: dict[nn.Module, bool] = {}  # blocks that drop behind every convolution

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, type, str | None]]:
        """Every part that is converted or might be: its name, itself, its class in effdense.nn, why it is not that.

        What is inside a foreign block or transition is left out.
        """
        successors, behind = _successors(model), set[nn.Module]()
        inside: set[nn.Module] = set()
        blocks = (m for m in model.modules() if looks_like_block(m))
        self.blocks = {m.original if isinstance(m, Foreign) else type(m) for m in blocks} - {nn.Sequential}
        for name, module in model.named_modules():
            if module in inside:
                continue
            ours: type | None = type(module)
            reason = None
            if not isinstance(module, (*OURS, Foreign)):
                ours, reason = self._kind(module, module in behind)
            if ours is None:
                continue
            yield name, module, ours, reason
            if issubclass(ours, (DenseBlock, ForeignBlock)):
                behind |= successors.get(module, set())
            if issubclass(ours, Foreign):
                inside.update(module.modules())

    def _kind(self, module: nn.Module, behind: bool) -> tuple[type | None, str | None]:
        """What a module might become, and why not."""
        ours = _looks_like(module)
        if ours in (None, DenseBlock) and not any(self._is_layer(m) for m in module._modules.values()):
            reason = self._no_foreign_block(module, ours is DenseBlock or type(module) in self.blocks)
            if reason != "":
                return ForeignBlock, reason
            ours = None
        if ours not in (None, Transition):
            return ours, self(module, ours)
        if behind and looks_like_transition(module):
            # With torchvision's names and all that it has, it can become our own.
            if ours is Transition and self(module, Transition) is None:
                return Transition, None
            return ForeignTransition, self(module, ForeignTransition)
        return ours, None if ours is None else self(module, ours)

    def _no_foreign_block(self, module: nn.Module, expected: bool) -> str | None:
        """Why it is no foreign block, or None; "" where nothing but the reason speaks for one.

        A single layer has no widths to compare: its names or other blocks of the same class must let one expect a block, or
        the probe must prove it.
        """
        if looks_like_block(module):
            return self(module, ForeignBlock)
        if len(layers_of(module)) != 1:
            return ""
        reason = self(module, ForeignBlock)
        return reason if reason is None or expected else ""

    def _is_layer(self, module: Any) -> bool:
        """Whether it is one of our layers, or can be."""
        ours = type(module) if isinstance(module, LAYERS) else _looks_like(module)
        return isinstance(module, LAYERS) or (ours in LAYERS and self(module, ours) is None)

    def __call__(self, module: nn.Module, ours: type) -> str | None:
        structure = _structure_obstacle(module, ours)
        if (
            structure is not None or ours is DenseFeatures
        ):  # nn.Sequential itself: there is nothing to compare
            return structure
        key = _code_of(module, ours)
        if key not in self.known:
            self.known[key] = self._compare(module, ours)
        return self.known[key]

    def _compare(self, module: nn.Module, ours: type) -> str | None:
        # Whatever is switched on around the call must not reach the probe, nor the probe the random numbers.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            reason = difference(module, ours)
            if reason is not None and ours is ForeignBlock and difference(module, ours, True) is None:
                self.everywhere[module] = True
                return None
        return reason


def _code_of(module: nn.Module, ours: type) -> Any:
    """What modules that run the same code have in common; of a foreign one, nothing is known before its probe."""
    if issubclass(ours, Foreign):
        return ours, module
    attributes = {k: repr(v) for k, v in vars(module).items() if k not in MODULE_STATE}
    whole = ours not in (DenseBlock, DenseNet)
    children = tuple((n, type(m)) for n, m in module.named_modules()) if whole else ()
    return ours, type(module), *sorted(attributes.items()), *children
