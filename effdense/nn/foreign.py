"""Blocks and transitions of other libraries, and users' own: they run fused and stay what they are otherwise.

A converted one's class is a subclass of its own class, with a fused forward in front. So its methods stay, and where
something stands in the way, it is its own forward that runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from effdense.inputs import takes
from effdense.nn.layers import dimensions_of, fits, run_stage, run_transition, run_unpooled
from effdense.nn.obstacles import refuse_scripting
from effdense.nn.structure import DROPOUTS, Chain, Obstacle, Passage, Seen, read_block, read_transition


class Foreign(nn.Module):
    """What both kinds have."""

    original: ClassVar[type]
    kind: ClassVar[str]  # what a report calls it
    # The memory mode; whether a layer's rate of dropout is for all its convolutions; what was seen of its modules when it
    # was compared. Of an object that its own methods have made since (a slice of a Sequential): None.
    _effdense: tuple[str, bool, tuple[Seen, ...]] | None = None
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

    def adopted(self) -> tuple[str, bool, tuple[Seen, ...]]:
        """What convert has noted."""
        if self._effdense is None:
            raise Obstacle(
                "it was made from a converted module and has not been compared (revert, then convert)"
            )
        return self._effdense

    def check(self, seen: Sequence[Seen]) -> None:
        """What was changed since may do something else, though the structure is the same."""
        compared = self.adopted()[2]
        if len(seen) != len(compared):
            raise Obstacle(
                "it has not the modules that effdense.convert has compared (revert, then convert again)"
            )
        for now, then in zip(seen, compared, strict=True):
            if (change := now.differs(then)) is not None:
                raise Obstacle(f"effdense.convert has not compared {change} (revert, then convert again)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Fused where it is called with one tensor and nothing stands in the way, else as its own class does."""
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        fused = self.fused(args[0]) if one else None
        return super().forward(*args, **kwargs) if fused is None else fused(args[0])

    def fused(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Its fused forward of x, or None where something stands in the way."""
        raise NotImplementedError


class ForeignBlock(Foreign):
    """A dense block whose layers are recognised by structure.read_block."""

    kind = "DenseBlock"

    def read(self) -> tuple[list[Chain], str]:
        """What run_stage takes of it."""
        memory, everywhere, _ = self.adopted()
        chains, seen = read_block(self, everywhere)
        self.check(seen)
        return chains, memory

    def chains(self) -> tuple[list[Chain], str] | None:
        """See DenseBlock."""
        try:
            return self.read()
        except Obstacle:
            return None

    def fused(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """[N, C, *spatial] -> [N, C + what the layers add, *spatial]."""
        stage = self.chains()
        if stage is None or not takes(x, dimensions_of(stage[0])):
            return None
        return lambda x: run_stage(*stage, x)


class ForeignTransition(Foreign):
    """A norm, ReLU, 1x1 convolution and a pool, recognised by structure.read_transition."""

    kind = "Transition"

    def read(self) -> Passage:
        """Its parts."""
        passage, seen = read_transition(self)
        self.check(seen)
        return passage

    def passage(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """See Transition."""
        try:
            parts = self.read()
        except Obstacle:
            return None
        kernel = parts.kernel()
        return None if kernel is None or not fits(x, kernel) else (parts.norm, kernel, parts.conv)

    def fused(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """[N, C, *spatial] -> [N, C', what its pool makes of *spatial]."""
        try:
            parts = self.read()
        except Obstacle:
            return None
        return (lambda x: self._run(x, parts)) if takes(x, parts.conv.weight.dim()) else None

    def _run(self, x: Tensor, parts: Passage) -> Tensor:
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
