"""Finds modules that have a dense block's widths and cannot run fused, so that a report names them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from effdense.nn.modules import original
from effdense.nn.structure import convs_of, layers_of


class _Unit(NamedTuple):
    """What may be a layer."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    reads: int
    adds: int
    convs: int

    def follows(self, other: _Unit, last: int | None) -> bool:
        """Whether it reads what another one reads and adds. `last`: how much the unit before that one adds.

        What is made of more convolutions, such as a net's stages, may do so by chance: there all must add the same.
        """
        same = original(type(self.modules[0])) is original(type(other.modules[0]))
        steady = max(self.convs, other.convs) <= 2 or last in (None, other.adds)
        return same and steady and self.reads == other.reads + other.adds


def _unit(parts: list[tuple[str, nn.Module]]) -> _Unit:
    """Its first convolution says what it reads; every convolution whose output the next one does not read, what it adds."""
    convs = [conv for _, module in parts for conv in convs_of(module)]
    behind: list[Any] = [*convs[1:], None]
    ends = [a for a, b in zip(convs, behind, strict=True) if b is None or b.in_channels != a.out_channels]
    names, modules = zip(*parts, strict=True)
    return _Unit(names, modules, convs[0].in_channels, sum(conv.out_channels for conv in ends), len(convs))


def _longest(units: list[_Unit]) -> list[_Unit]:
    """The longest run of units of which each reads what the one before it reads and adds."""
    best: list[_Unit] = []
    run: list[_Unit] = []
    for unit in units:
        last = run[-2].adds if len(run) > 1 else None
        run = [*run, unit] if run and unit.follows(run[-1], last) else [unit]
        best = max(best, run, key=len)
    return best


def growing(module: nn.Module) -> dict[str, nn.Module]:
    """Three or more of a module's children, or of the one container's that it has, that read widths as a dense block's layers do.

    A layer may be one child, or two convolutions beside each other. Empty where there are none, and where the container has a
    forward: then it is looked at by itself.
    """
    only = next(iter(module._modules.values())) if len(module._modules) == 1 else None
    if only is not None and type(only).forward is not nn.Module.forward:
        return {}
    children = [(name, m) for name, m in layers_of(module).items() if convs_of(m)]
    bare = [pair for pair in children if not pair[1]._modules]
    runs = [_longest([_unit([pair]) for pair in children])]
    for first in (0, 1):
        pairs = zip(bare[first::2], bare[first + 1 :: 2], strict=False)
        runs.append(_longest([_unit([*pair]) for pair in pairs]))
    run = max(runs, key=len)
    if len(run) < 3:
        return {}
    return {name: m for unit in run for name, m in zip(unit.names, unit.modules, strict=True)}
