"""Recognises dense blocks and transitions by structure, whatever their class or submodule names.

A layer's submodules, nested ones included, are its chain: norms, ReLUs, convolutions and dropouts in the order of
registration. What the forward around them does is not looked at here: convert compares it on a probe. A block is read
before every forward, so a reader looks at every module once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense.nn.chain import NO_DROP, Chain, Drop
from effdense.nn.code import code_of_tree, constants_of
from effdense.nn.code_reader import Reads, counts
from effdense.nn.kinds import ACTIVATIONS, AVG_POOLS, CONVS, DROPOUTS, MAX_POOLS, NORMS
from effdense.nn.looks import KEPT
from effdense.nn.modules import original, walk
from effdense.nn.obstacles import (
    PROCESSES,
    changed,
    conv_obstacle,
    dimensions,
    global_obstacle,
    is_norm,
    plain_avg_pool,
    same_processes,
)
from effdense.nn.outside import frozen, same

_SILENT = (*ACTIVATIONS, nn.Identity)  # the forward may as well have functions in their place
_WEIGHTED = (*NORMS, *CONVS)
_LEAVES = (*_WEIGHTED, *ACTIVATIONS, *DROPOUTS)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class TransitionParts(NamedTuple):
    """A transition's norm and 1x1 convolution, and what it calls after them."""

    norm: Any
    conv: Any
    behind: list[Any]
    pool: tuple[int, ...] = ()  # windows side by side over which its forward averages last, by a function
    rate: float = 0.0  # at which its forward drops the convolution's output at the moment, by a function

    def kernel(self) -> tuple[int, ...] | None:
        """The windows of an average pool that could come before the convolution as well, if that is all there is behind it now."""
        active = [m for m in self.behind if not _is_idle(m)]
        if self.rate > 0:
            return None
        if self.pool:
            return None if active else self.pool
        return plain_avg_pool(active[0], self.norm) if len(active) == 1 else None

    def has_pool(self) -> bool:
        """Whether it makes the image smaller by a pool of PyTorch's."""
        return bool(self.pool) or any(
            type(m) in (*AVG_POOLS, *MAX_POOLS) for part in self.behind for m in walk(part)
        )


class Obstacle(Exception):
    """Why a module has not the structure, or cannot run fused at the moment."""


def own_tensors(module: nn.Module, reads: Reads) -> list[str]:
    """Names of a container's parameters, and of those buffers that its forward may read: tools leave others."""
    return [*module._parameters, *(name for name in module._buffers if counts(name, reads))]


def _check(name: str, module: nn.Module, hooks: bool, reads: Reads) -> None:
    weighted = isinstance(module, _WEIGHTED)
    if (reason := changed(name, module, weighted, not hooks)) is not None:
        raise Obstacle(reason)
    if module._modules and not weighted and (own := own_tensors(module, reads)):
        raise Obstacle(
            f"{name}, {type(module).__name__}, has parameters or buffers of its own: {', '.join(own)}"
        )


def _walk(name: str, module: nn.Module, hooks: bool, reads: Reads, found: list[tuple[str, Any]]) -> None:
    """Collects a module and all inside of it in their order; an Obstacle where one was changed."""
    _check(name, module, hooks, reads)
    found.append((name, module))
    for child_name, child in module._modules.items():
        if child is not None:
            _walk(f"{name}.{child_name}", child, hooks, reads, found)


def _is_idle(module: Any) -> bool:
    """Whether it gives its input back at the moment."""
    kind = type(module)
    idle = kind is nn.Identity or (kind in DROPOUTS and not (module.training and module.p > 0))
    return idle and changed("", module, False) is None


def drop_attributes(module: nn.Module) -> list[str]:
    """The names under which a module keeps rates of dropouts that its forward makes itself; the first is taken for a layer's."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and "drop" in name.lower() and not isinstance(value, bool)
    ]


# Ours, and what PyTorch puts there: nn.DataParallel, Module.compile; the last a probe.
_OURS = KEPT, "_effdense", "_memory"
_OTHERS = *_OURS, "_former_parameters", "_is_replica", "_compiled_call_impl", "_call_impl"
MODULE_STATE = frozenset((*vars(nn.Module()), *_OTHERS))
_OF_NORMS = frozenset(("eps", "momentum", "track_running_stats"))  # read at every forward
_NORM_STATE = MODULE_STATE | _OF_NORMS


class Snapshot(NamedTuple):
    """What a module's forward may depend on beside its submodules and tensors; containers as outside.frozen copies them."""

    kind: type
    attributes: dict[str, Any]

    def frozen(self) -> Snapshot:
        """To be compared later."""
        attributes = {name: frozen(value) for name, value in self.attributes.items()}
        return self if attributes == {} else self._replace(attributes=attributes)

    def differs(self, other: Snapshot) -> str | None:
        """What is not as it was in `other`, which is frozen: names must have the same objects, or equal numbers and strings."""
        if self is other:
            return None
        if self.kind is not other.kind:
            return f"{self.kind.__name__} where there was {other.kind.__name__}"
        for name in self.attributes.keys() | other.attributes.keys():
            a, b = (s.attributes.get(name, s) for s in (self, other))
            if a is not b and not same(a, b):
                return f"{self.kind.__name__}.{name}, which was changed"
        return None


# What has no attributes that count. One kind for PyTorch's batch norms: they compute the same.
_WITHOUT_ATTRIBUTES: dict[type, Snapshot] = {
    kind: Snapshot(kind, {}) for kind in (*CONVS, *_SILENT, *DROPOUTS, *_CONTAINERS)
}
_NORM = Snapshot(nn.BatchNorm2d, {})
_WITHOUT_ATTRIBUTES |= dict.fromkeys(NORMS, _NORM)


def snapshot(module: nn.Module, reads: Reads, rate: str | None = None) -> Snapshot:
    """What a forward that `reads` attributes may depend on. `rate`: an attribute that is read at every forward."""
    if (known := _WITHOUT_ATTRIBUTES.get(type(module))) is not None:
        if known is not _NORM or reads.own.isdisjoint(_OF_NORMS):
            return known
        # The same kind for all PyTorch's norms, here too.
        return Snapshot(known.kind, {k: module.__dict__.get(k) for k in sorted(_OF_NORMS & reads.own)})
    kind = original(type(module))
    state, ignored = module.__dict__, _NORM_STATE if isinstance(module, NORMS) else MODULE_STATE
    attributes = {k: None if k == rate else state[k] for k in state.keys() - ignored if counts(k, reads)}
    if not torch.compiler.is_compiling():
        for name in constants_of(kind, reads):
            attributes.setdefault(name, getattr(kind, name))
    return Snapshot(kind, attributes)


def _read_layer(found: list[tuple[str, Any]], rate: str | None, after_each: bool) -> Chain:
    """The chain of a layer, which is the first of the modules `found`, or an Obstacle. `rate`: its attribute."""
    name, layer = found[0]
    norms: list[Any] = []
    convs: list[Any] = []
    paths: list[str] = []
    drops: list[Drop] = []
    spatial: set[int | None] = set()
    dropouts = False
    for path, module in found:
        kind = type(module)
        if kind in CONVS:
            convs.append(module)
            paths.append(path)
            drops.append(NO_DROP)
            spatial.add(CONVS.index(kind) + 1)
            if len(convs) > len(norms):
                raise Obstacle(f"{path} has no norm before it")
        elif is_norm(module):
            norms.append(module)
            spatial.add(dimensions(module))
        elif kind in DROPOUTS and convs:
            if drops[-1] != NO_DROP or len(norms) > len(convs):
                raise Obstacle(f"{path} is a dropout that is not behind a convolution alone")
            drops[-1] = Drop(module.p if module.training else 0.0, kind is not nn.Dropout)
            dropouts = True
        elif kind not in _SILENT and (not module._modules or isinstance(module, _LEAVES)):
            raise Obstacle(
                f"{path} is {kind.__name__}, not one of a dense layer's norms, ReLUs, convolutions or dropouts"
            )
    if not 1 <= len(convs) <= 2 or len(norms) != len(convs):
        raise Obstacle(f"{name} has {len(norms)} norms and {len(convs)} convolutions, not one or two of both")
    if len(spatial - {None}) > 1:
        raise Obstacle(f"{name}'s submodules have different numbers of spatial dimensions")
    for path, conv, kernel in zip(paths, convs, (1, None)[-len(convs) :], strict=True):
        if (reason := conv_obstacle(path, conv, kernel)) is not None:
            raise Obstacle(reason)
    if layer.training and not dropouts and rate is not None:
        drop = Drop(float(getattr(layer, rate)))
        drops = [drop if after_each or i == len(convs) - 1 else NO_DROP for i in range(len(convs))]
    return Chain(name, norms, convs, drops)


def layer_obstacle(name: str, layer: nn.Module, reads: Reads) -> str | None:
    """Why a module is not one of a dense block's layers, or None."""
    found: list[tuple[str, Any]] = []
    try:
        _walk(name, layer, False, reads, found)
        _read_layer(found, None, False)
    except Obstacle as obstacle:
        return str(obstacle)
    return None


class StandIn(nn.Module):
    """On a probe, in the place of what is called in the same way with effdense and without: that is not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Something else than x."""
        return x * 1.5


def lead_of(block: nn.Module) -> nn.Module | None:
    """The transition at the head of the sequence that is the next block, if there is one; the layers come after it."""
    cls: Any = original(type(block))
    children = [m for m in block._modules.values() if m is not None]
    if cls.forward is not nn.Sequential.forward or len(children) < 2:
        return None
    if isinstance(children[0], StandIn):
        return children[0]
    first, second = (convs_of(m) for m in children[:2])
    if (
        not looks_like_transition(children[0])
        or not 1 <= len(second) <= 2
        or set(second[-1].kernel_size) == {1}
    ):
        return None
    return children[0] if second[0].in_channels == first[0].out_channels else None


def convs_of(module: nn.Module) -> list[Any]:
    """All its convolutions, itself too, in the order of registration."""
    return [m for m in walk(module) if isinstance(m, CONVS)]


def layers_of(block: nn.Module) -> dict[str, nn.Module]:
    """The block's layers by name: its children, or those of the one container it has. Without its lead."""
    children: Mapping[str, nn.Module | None] = block._modules
    prefix = ""
    if len(children) == 1:
        ((name, only),) = children.items()
        if isinstance(only, _CONTAINERS) and not any(isinstance(m, CONVS) for m in only._modules.values()):
            children, prefix = only._modules, f"{name}."
    lead = lead_of(block)
    return {
        prefix + name: layer for name, layer in children.items() if layer is not None and layer is not lead
    }


def read_block(
    block: nn.Module, after_each: bool = False, hooks: bool = True, reads: Reads | None = None
) -> tuple[list[Chain], list[Snapshot]]:
    """The chains of a dense block, or an Obstacle: layers of which each reads what the one before it reads and adds.

    And what was seen of all modules. `after_each`: a rate of dropout that a layer keeps is for all its convolutions, not
    only the last. `reads`: the attributes that count; found out unless given.
    """
    reads = code_of_tree(block).reads if reads is None else reads
    if hooks and (reason := global_obstacle()) is not None:
        raise Obstacle(reason)
    snapshots = [snapshot(block, reads)]
    if len(block._modules) == 1:
        ((name, only),) = block._modules.items()
        if only is not None:
            _check(name, only, hooks, reads)
            snapshots.append(snapshot(only, reads))
    chains: list[Chain] = []
    for name, layer in layers_of(block).items():
        found: list[tuple[str, Any]] = []
        _walk(name, layer, hooks, reads, found)
        rate = next(iter(drop_attributes(layer)), None)
        snapshots += [snapshot(layer, reads, rate), *(snapshot(module, reads) for _, module in found[1:])]
        chains.append(_read_layer(found, rate, after_each))
    if not chains:
        raise Obstacle("it has no layers")
    for before, after in itertools.pairwise(chains):
        if after.channels != before.channels + before.growth:
            raise Obstacle(
                f"{after.name} reads {after.channels} channels, not the {before.channels} + {before.growth} "
                f"that {before.name} reads and adds"
            )
        if len(after.convs) != len(before.convs):
            raise Obstacle(f"{after.name} and {before.name} have different numbers of convolutions")
    if not same_processes(norm for chain in chains for norm in chain.norms):
        raise Obstacle(PROCESSES)
    return chains, snapshots


def looks_like_block(module: nn.Module) -> bool:
    """Whether the widths of its layers are those of a dense block, whatever may stand in the way of running it fused."""
    widths: list[tuple[int, int]] = []
    layers = layers_of(module).values()
    if len(layers) == 2 and len({original(type(layer)) for layer in layers}) > 1:
        return False  # two convolutions of a net's may have such widths by chance
    for layer in layers:
        convs = convs_of(layer)
        if not convs or len(convs) > 2 or not layer._modules:
            return False
        widths.append((convs[0].in_channels, convs[-1].out_channels))
    steps = itertools.pairwise(widths)
    return len(widths) > 1 and all(b[0] == a[0] + a[1] for a, b in steps)


def looks_like_transition(module: nn.Module) -> bool:
    """Whether what comes behind a block is made of several modules with one convolution, of one pixel."""
    convs = convs_of(module)
    return len(convs) == 1 and module is not convs[0] and set(convs[0].kernel_size) == {1}


def _flatten(name: str, module: nn.Module, hooks: bool, reads: Reads, found: list[tuple[str, Any]]) -> bool:
    """Collects what a transition calls: up to its convolution one by one, whole after it; returns whether there was one."""
    passed = False
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if child is None:
            continue
        if not passed:
            _check(path, child, hooks, reads)
        whole = passed or not child._modules or isinstance(child, _WEIGHTED)
        if whole:
            found.append((path, child))
        passed = passed or (_flatten(path, child, hooks, reads, found) if not whole else type(child) in CONVS)
    return passed


def read_transition(
    module: nn.Module, hooks: bool = True, reads: Reads | None = None
) -> tuple[TransitionParts, list[Snapshot]]:
    """A norm, ReLUs, a 1x1 convolution and whatever comes behind them; or an Obstacle. And what was seen of all its modules."""
    reads = code_of_tree(module).reads if reads is None else reads
    if hooks and (reason := global_obstacle()) is not None:
        raise Obstacle(reason)
    found: list[tuple[str, Any]] = []
    _flatten("", module, hooks, reads, found)
    norm: Any = None
    for i, (path, part) in enumerate(found):
        if type(part) in CONVS and norm is not None:
            if (reason := conv_obstacle(path, part, 1)) is not None:
                raise Obstacle(reason)
            if dimensions(norm) not in (None, CONVS.index(type(part)) + 1):
                raise Obstacle("its submodules have different numbers of spatial dimensions")
            rate = next((name for name in drop_attributes(module) if counts(name, reads)), None)
            snapshots = [snapshot(m, reads, rate if m is module else None) for m in walk(module)]
            dropped = vars(module)[rate] if rate is not None and module.training else 0.0
            return TransitionParts(norm, part, [m for _, m in found[i + 1 :]], rate=dropped), snapshots
        if is_norm(part) and norm is None:
            norm = part
            inside: list[tuple[str, Any]] = []
            for child_name, child in part._modules.items():
                _walk(f"{path}.{child_name}", child, hooks, reads, inside)
            others = [(p, m) for p, m in inside if type(m) not in _SILENT]
        else:
            others = [(path, part)] if type(part) not in _SILENT else []
        for other, m in others:
            raise Obstacle(
                f"{other} is {type(m).__name__}, not one of a norm, ReLU and convolution in this order"
            )
    raise Obstacle("it has no norm with a convolution behind it")
