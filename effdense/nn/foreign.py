"""Blocks and transitions of other libraries, and users' own: they run fused and stay what they are otherwise.

A converted one's class is a subclass of its own class, with a fused forward in front. So its methods stay, and where
something stands in the way, it is its own forward that runs.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from effdense.nn.layers import fits, run_stage, run_transition
from effdense.nn.structure import Chain, Obstacle, read_block, read_transition


class Foreign(nn.Module):
    """What both kinds have. `memory`, `everywhere`: see convert.ForeignBlock and structure.read_layer."""

    original: ClassVar[type]
    kind: ClassVar[str]  # what a report calls it
    _effdense: tuple[str, bool]  # memory, and whether a layer's rate of dropout is for all its convolutions

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By its own class: the subclass has no name that pickle could find."""
        _, _, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        base = ForeignBlock if isinstance(self, ForeignBlock) else ForeignTransition
        return _new, (base, self.original), *rest

    def obstacle(self) -> str | None:
        """Why its own forward runs at the moment, or None where it runs fused."""
        raise NotImplementedError


class ForeignBlock(Foreign):
    """A dense block whose layers are recognised by structure.read_block."""

    kind = "DenseBlock"

    def obstacle(self) -> str | None:
        """See Foreign."""
        try:
            read_block(self, self._effdense[1])
        except Obstacle as reason:
            return str(reason)
        return None

    def chains(self) -> tuple[list[Chain], str]:
        """What run_stage takes of it, where there is no obstacle."""
        return read_block(self, self._effdense[1]), self._effdense[0]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C + what the layers add, *spatial]."""
        if isinstance(x, Tensor) and not args and not kwargs:
            try:
                chains, memory = self.chains()
            except Obstacle:
                pass
            else:
                return run_stage(chains, memory, x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class ForeignTransition(Foreign):
    """A norm, ReLU, 1x1 convolution and average pool, recognised by structure.read_transition."""

    kind = "Transition"

    def obstacle(self) -> str | None:
        """See Foreign."""
        try:
            read_transition(self)
        except Obstacle as reason:
            return str(reason)
        return None

    def passage(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """The norm, the pool's kernel size and the convolution, where the pool can be taken first."""
        try:
            passage = read_transition(self)
        except Obstacle:
            return None
        return passage if fits(x, passage[1]) else None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C', *spatial / the pool's kernel]."""
        if isinstance(x, Tensor) and not args and not kwargs and (passage := self.passage(x)) is not None:
            return run_transition(x, *passage)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def foreign_class(base: type, original: type) -> type:
    """`original` with the forward of ForeignBlock or ForeignTransition in front."""
    return type(f"Fused{original.__name__}", (base, original), {"original": original, "__doc__": original.__doc__})


def _new(base: type, original: type) -> Any:
    cls = foreign_class(base, original)
    return cls.__new__(cls)
