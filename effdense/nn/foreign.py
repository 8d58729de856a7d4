"""Blocks and transitions of other libraries, and users' own: they run fused and stay what they are otherwise.

A converted one's class is a subclass of its own class, with a fused forward in front. So its methods stay, and where
something stands in the way, it is its own forward that runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from effdense.nn.layers import fits, run_stage, run_transition, run_unpooled
from effdense.nn.obstacles import refuse_scripting
from effdense.nn.structure import DROPOUTS, Chain, Obstacle, Passage, read_block, read_transition


class Foreign(nn.Module):
    """What both kinds have."""

    original: ClassVar[type]
    kind: ClassVar[str]  # what a report calls it
    # The memory mode; whether a layer's rate of dropout is for all its convolutions; the classes of its submodules when it
    # was compared.
    _effdense: tuple[str, bool, tuple[type, ...]]
    __prepare_scriptable__ = refuse_scripting

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By its own class: the subclass has no name that pickle could find."""
        usual: Any = super().__reduce_ex__(protocol)
        base = ForeignBlock if isinstance(self, ForeignBlock) else ForeignTransition
        return _new, (base, self.original), *usual[2:]

    def read(self) -> Any:
        """What a fused forward takes of it; an Obstacle where it cannot run fused."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why its own forward runs at the moment, or None where it runs fused."""
        try:
            self.read()
        except Obstacle as reason:
            return str(reason)
        return None

    def check_kinds(self, kinds: Sequence[type]) -> None:
        """What was put in another's place may do something else, though the structure is the same."""
        if tuple(kinds) != self._effdense[2]:
            raise Obstacle(
                "its submodules' classes are not those that effdense.convert has compared (revert and convert do again)"
            )


class ForeignBlock(Foreign):
    """A dense block whose layers are recognised by structure.read_block."""

    kind = "DenseBlock"

    def read(self) -> tuple[list[Chain], str]:
        """What run_stage takes of it."""
        chains, kinds = read_block(self, self._effdense[1])
        self.check_kinds(kinds)
        return chains, self._effdense[0]

    def chains(self) -> tuple[list[Chain], str] | None:
        """See DenseBlock."""
        try:
            return self.read()
        except Obstacle:
            return None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C + what the layers add, *spatial]."""
        if isinstance(x, Tensor) and not args and not kwargs and (stage := self.chains()) is not None:
            return run_stage(*stage, x)
        return super().forward(x, *args, **kwargs)


class ForeignTransition(Foreign):
    """A norm, ReLU, 1x1 convolution and a pool, recognised by structure.read_transition."""

    kind = "Transition"

    def read(self) -> Passage:
        """Its parts."""
        passage, kinds = read_transition(self)
        self.check_kinds(kinds)
        return passage

    def passage(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """See Transition."""
        try:
            parts = self.read()
        except Obstacle:
            return None
        kernel = parts.kernel()
        return None if kernel is None or not fits(x, kernel) else (parts.norm, kernel, parts.conv)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, C, *spatial] -> [N, C', what its pool makes of *spatial]."""
        if not isinstance(x, Tensor) or args or kwargs:
            return super().forward(x, *args, **kwargs)
        try:
            parts = self.read()
        except Obstacle:
            return super().forward(x)
        kernel = parts.kernel()
        if kernel is not None and fits(x, kernel):
            return run_transition(x, parts.norm, kernel, parts.conv)
        y = run_unpooled(x, parts.norm, parts.conv)
        for module in parts.behind:
            # Contiguous, so that on the CPU dropout draws what it would have drawn.
            y = module(y.contiguous() if type(module) in DROPOUTS else y)
        return y


@functools.cache
def foreign_class(base: type, original: type) -> type:
    """`original` with the forward of ForeignBlock or ForeignTransition in front."""
    return type(
        f"Fused{original.__name__}", (base, original), {"original": original, "__doc__": original.__doc__}
    )


def _new(base: type, original: type) -> Any:
    cls: Any = foreign_class(base, original)
    return cls.__new__(cls)
