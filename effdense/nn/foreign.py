"""Blocks and transitions of other libraries, and users' own: they run fused and stay what they are otherwise.

A converted one's class is a subclass of its own class, with a fused forward in front. So its methods stay, and where
something stands in the way, it is its own forward that runs.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from effdense.nn.layers import fits, run_stage, run_transition
from effdense.nn.obstacles import refuse_scripting
from effdense.nn.structure import Chain, Obstacle, kinds_of, read_block, read_transition


class Foreign(nn.Module):
    """What both kinds have."""

    original: ClassVar[type]
    kind: ClassVar[str]  # what a report calls it
    # The memory mode; whether a layer's rate of dropout is for all its convolutions; what kinds_of said to convert.
    _effdense: tuple[str, bool, tuple[type, ...]]
    __prepare_scriptable__ = refuse_scripting

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By its own class: the subclass has no name that pickle could find."""
        usual: Any = super().__reduce_ex__(protocol)
        base = ForeignBlock if isinstance(self, ForeignBlock) else ForeignTransition
        return _new, (base, self.original), *usual[2:]

    def read(self) -> Any:
        """Its modules, for a stage; an Obstacle where it cannot run fused."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why its own forward runs at the moment, or None where it runs fused."""
        try:
            self.read()
        except Obstacle as reason:
            return str(reason)
        return None

    def check_kinds(self) -> None:
        """What was put in another's place may do something else, though the structure is the same."""
        if kinds_of(self) != self._effdense[2]:
            raise Obstacle("its submodules' classes are not those that effdense.convert has compared")


class ForeignBlock(Foreign):
    """A dense block whose layers are recognised by structure.read_block."""

    kind = "DenseBlock"

    def read(self) -> tuple[list[Chain], str]:
        """What run_stage takes of it."""
        chains = read_block(self, self._effdense[1])
        self.check_kinds()
        return chains, self._effdense[0]

    def chains(self) -> tuple[list[Chain], str]:
        """See DenseBlock."""
        return self.read()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C + what the layers add, *spatial]."""
        if isinstance(x, Tensor) and not args and not kwargs:
            try:
                chains, memory = self.read()
            except Obstacle:
                pass
            else:
                return run_stage(chains, memory, x)
        return super().forward(x, *args, **kwargs)


class ForeignTransition(Foreign):
    """A norm, ReLU, 1x1 convolution and average pool, recognised by structure.read_transition."""

    kind = "Transition"

    def read(self) -> tuple[Any, tuple[int, ...], Any]:
        """See passage."""
        passage = read_transition(self)
        self.check_kinds()
        return passage

    def passage(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """The norm, the pool's kernel size and the convolution, where the pool can be taken first."""
        try:
            passage = self.read()
        except Obstacle:
            return None
        return passage if fits(x, passage[1]) else None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C', *spatial / the pool's kernel]."""
        if isinstance(x, Tensor) and not args and not kwargs and (passage := self.passage(x)) is not None:
            return run_transition(x, *passage)
        return super().forward(x, *args, **kwargs)


@functools.cache
def foreign_class(base: type, original: type) -> type:
    """`original` with the forward of ForeignBlock or ForeignTransition in front."""
    return type(
        f"Fused{original.__name__}", (base, original), {"original": original, "__doc__": original.__doc__}
    )


def _new(base: type, original: type) -> Any:
    cls: Any = foreign_class(base, original)
    return cls.__new__(cls)
