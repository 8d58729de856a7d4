"""Dense blocks and transitions by their structure alone: whose they are and what their submodules are called is no matter.

A layer's submodules, nested ones included, are its chain: norms, ReLUs, convolutions and dropouts in the order of
registration. What the forward around them does is not looked at here: convert compares it on a probe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from effdense.nn.obstacles import (
    ACTIVATIONS,
    AVG_POOLS,
    CONVS,
    NORMS,
    PROCESSES,
    changed,
    conv_obstacle,
    dimensions,
    global_obstacle,
    plain_avg_pool,
    same_processes,
)

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Drop(NamedTuple):
    """Dropout behind a convolution, as it would run now."""

    rate: float
    channels: bool = False  # whole channels


NO_DROP = Drop(0.0)


class Chain(NamedTuple):
    """A dense layer's modules: one norm and convolution each (plain) or two (bottleneck), and the dropouts behind these."""

    name: str
    norms: list[Any]
    convs: list[Any]
    drops: list[Drop]

    @property
    def channels(self) -> int:
        """That the layer reads."""
        return int(self.norms[0].num_features)

    @property
    def growth(self) -> int:
        """Channels that the layer adds."""
        return int(self.convs[-1].out_channels)


class Obstacle(Exception):
    """Why a module has not the structure, or cannot run fused at the moment."""


def _walk(name: str, module: nn.Module, hooks: bool) -> Iterator[tuple[str, Any]]:
    """Every module of a chain in its order, containers and what a norm has inside too; an Obstacle where one was changed."""
    for child_name, child in module._modules.items():
        if child is None:
            continue
        path = f"{name}.{child_name}" if name else child_name
        _check(path, child, hooks)
        yield path, child
        if child._modules:
            yield from _walk(path, child, hooks)


def _check(name: str, module: nn.Module, hooks: bool) -> None:
    weighted = isinstance(module, (*NORMS, *CONVS))
    if (reason := changed(name, module, weighted, not hooks)) is not None:
        raise Obstacle(reason)
    own = [*module._parameters, *module._buffers]
    if own and module._modules and not weighted:
        raise Obstacle(f"{name} has parameters or buffers of its own: {', '.join(own)}")


def _is_container(module: nn.Module) -> bool:
    return bool(module._modules) and not isinstance(module, (*NORMS, *CONVS))


def _drop_of(module: Any) -> Drop:
    rate = module.p if module.training else 0.0
    return Drop(rate, type(module) is not nn.Dropout)


def drop_attribute(layer: nn.Module) -> str | None:
    """The name under which a layer keeps the rate of a dropout that its forward makes itself."""
    for name, value in vars(layer).items():
        if "drop" in name.lower() and isinstance(value, (int, float)) and not isinstance(value, bool):
            return name
    return None


def read_layer(name: str, layer: nn.Module, everywhere: bool = False, hooks: bool = True) -> Chain:
    """The layer's chain, or an Obstacle. `everywhere`: a rate that it keeps is for all convolutions, not only the last."""
    _check(name, layer, hooks)
    norms: list[Any] = []
    convs: list[Any] = []
    paths: list[str] = []
    drops: list[Drop] = []
    dropouts = False
    for path, module in _walk(name, layer, hooks):
        kind = type(module)
        if isinstance(module, NORMS):
            norms.append(module)
        elif kind in CONVS:
            convs.append(module)
            paths.append(path)
            drops.append(NO_DROP)
            if len(convs) > len(norms):
                raise Obstacle(f"{path} has no norm before it")
        elif kind in DROPOUTS and convs:
            if drops[-1] != NO_DROP or len(norms) > len(convs):
                raise Obstacle(f"{path} is a dropout that is not behind a convolution alone")
            drops[-1], dropouts = _drop_of(module), True
        elif kind not in ACTIVATIONS and kind is not nn.Identity and not _is_container(module):
            raise Obstacle(
                f"{path} is {kind.__name__}, not one of a dense layer's norms, ReLUs, convolutions or dropouts"
            )
    if not 1 <= len(convs) <= 2 or len(norms) != len(convs):
        raise Obstacle(f"{name} has {len(norms)} norms and {len(convs)} convolutions, not one or two of both")
    spatial = {dimensions(n) for n in norms} - {None} | {CONVS.index(type(c)) + 1 for c in convs}
    if len(spatial) > 1:
        raise Obstacle(f"{name}'s submodules have different numbers of spatial dimensions")
    for path, conv, kernel in zip(paths, convs, (1, 3)[-len(convs) :], strict=True):
        if (reason := conv_obstacle(path, conv, kernel)) is not None:
            raise Obstacle(reason)
    attribute = drop_attribute(layer)
    if attribute is not None and not dropouts and layer.training:
        rate = Drop(float(getattr(layer, attribute)))
        drops = [rate if everywhere or i == len(convs) - 1 else NO_DROP for i in range(len(convs))]
    return Chain(name, norms, convs, drops)


def layers_of(block: nn.Module) -> dict[str, nn.Module]:
    """The block's layers by name: its children, or those of the one container it has."""
    children: Mapping[str, nn.Module | None] = block._modules
    prefix = ""
    if len(children) == 1:
        ((name, only),) = children.items()
        if isinstance(only, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            children, prefix = only._modules, f"{name}."
    return {prefix + name: layer for name, layer in children.items() if layer is not None}


def read_block(block: nn.Module, everywhere: bool = False, hooks: bool = True) -> list[Chain]:
    """The chains of a dense block, or an Obstacle: layers of which each reads what the one before it reads and adds."""
    if hooks and (reason := global_obstacle()) is not None:
        raise Obstacle(reason)
    layers = layers_of(block)
    if len(block._modules) == 1:
        ((name, only),) = block._modules.items()
        if only is not None:
            _check(name, only, hooks)
    chains = [read_layer(name, layer, everywhere, hooks) for name, layer in layers.items()]
    if len(chains) < 2:
        raise Obstacle("it has fewer than two layers")
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
    return chains


def looks_like_block(module: nn.Module) -> bool:
    """Whether the widths of its layers are those of a dense block, whatever may stand in the way of running it fused."""
    widths: list[tuple[int, int]] = []
    for layer in layers_of(module).values():
        convs = [m for m in layer.modules() if isinstance(m, CONVS)]
        if not convs or len(convs) > 2 or not layer._modules:
            return False
        widths.append((convs[0].in_channels, convs[-1].out_channels))
    steps = itertools.pairwise(widths)
    return len(widths) > 1 and all(b[0] == a[0] + a[1] for a, b in steps)


def kinds_of(module: nn.Module) -> tuple[type, ...]:
    """The classes of all submodules: what convert has compared, and what must not change after it."""
    kinds = (type(m) for _, m in _walk("", module, False))
    return tuple(nn.BatchNorm2d if kind in NORMS else kind for kind in kinds)  # they compute the same


def read_transition(module: nn.Module, hooks: bool = True) -> tuple[Any, tuple[int, ...], Any]:
    """Norm, the pool's kernel size and convolution of a norm, ReLUs, a 1x1 convolution and an average pool over windows side by side, in this order; else an Obstacle."""
    if hooks and (reason := global_obstacle()) is not None:
        raise Obstacle(reason)
    modules = [m for _, m in _walk("", module, hooks) if not _is_container(m)]
    leaves = [m for m in modules if type(m) not in (*ACTIVATIONS, nn.Identity)]
    kinds = [NORMS, CONVS, AVG_POOLS]
    if len(leaves) != 3 or not all(isinstance(m, kind) for m, kind in zip(leaves, kinds, strict=True)):
        raise Obstacle("it is not a norm, a ReLU, a convolution and an average pool")
    norm, conv, pool = leaves
    if (reason := conv_obstacle("its convolution", conv, 1)) is not None:
        raise Obstacle(reason)
    kernel = plain_avg_pool(pool, norm, not hooks)
    spatial = CONVS.index(type(conv)) + 1
    if kernel is None or len(kernel) != spatial or dimensions(norm) not in (None, spatial):
        raise Obstacle("its pool is not an average over windows side by side")
    return norm, kernel, conv
