"""Runs blocks and transitions of other libraries, and users' own, fused; otherwise they stay what they are.

They are read anew before every forward; where something stands in the way, it is their own forward that runs (conversion/class_swap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.engine.inputs import accepts
from effdense.engine.pool import plain_avg_pool
from effdense.nn.blocks import fits, run_transition, run_unpooled
from effdense.nn.chain import Chain
from effdense.nn.code import code_of_classes, is_function
from effdense.nn.code_reader import Reads, counts
from effdense.nn.kinds import DROPOUTS
from effdense.nn.looks import look
from effdense.nn.modules import original, walk
from effdense.nn.obstacles import global_obstacle
from effdense.nn.outside import frozen, same
from effdense.nn.stage_run import Chains, dimensions_of, run_stage
from effdense.nn.structure import (
    MODULE_STATE,
    Obstacle,
    Snapshot,
    TransitionParts,
    lead_of,
    read_block,
    read_transition,
)


class Head(NamedTuple):
    """What a net's forward calls behind its `features`."""

    names: tuple[str, ...] = ("classifier",)  # of the submodules
    relus: int | None = (
        None  # how many ReLUs come before the pool among these; None: its forward pools by a function
    )
    relu_before: bool = False  # whether the features end with a ReLU themselves: the head may have none


class Form(NamedTuple):
    """What a probe finds out, and no structure shows."""

    after_each: bool = False  # whether a layer's rate of dropout is for all its convolutions
    newest_first: bool = False  # whether a block puts new features in front of what they are made of
    new_only: bool = False  # whether a block gives back what its layers add, without its input
    pool: tuple[int, ...] = ()  # a transition's, if its forward calls a function
    head: Head = Head()  # a net's
    reads: Reads = Reads()  # the attributes that count


NO_FORM = Form()


class Outside:
    """What the code of modules of some classes, and functions in their attributes, reach; a copy or pickle has it anew."""

    def __init__(self, classes: tuple[type, ...], functions: tuple[Any, ...]) -> None:
        self.made_of = classes, functions
        self.reached = code_of_classes(classes, functions).reached

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def __reduce__(self) -> Any:
        return Outside, self.made_of


class Container(NamedTuple):
    """A list, dict or set in an attribute, and what was in it."""

    name: str
    now: Any
    then: Any


def outside_of(module: nn.Module, form: Form) -> tuple[Outside, tuple[Container, ...]]:
    """What convert notes of a module that is not in its modules' attributes, or can change in these unseen."""
    modules = list(walk(module))
    classes = tuple(dict.fromkeys(original(type(m)) for m in modules))
    values = {
        (id(v), k): (f"{original(type(m)).__name__}.{k}", v)
        for m in modules
        for k, v in vars(m).items()
        if k not in MODULE_STATE and counts(k, form.reads)
    }
    functions = tuple({id(v): v for _, v in values.values() if is_function(v)}.values())
    found = ((name, v, frozen(v)) for name, v in values.values())
    return Outside(classes, functions), tuple(Container(*c) for c in found if c[1] is not c[2])


def changed_outside(noted: Noted) -> str | None:
    """What has changed since convert that no module's attributes show: functions, globals, classes' and containers' contents.

    PyTorch's own code is asked for by global_obstacle. Not to be called where torch.compile traces.
    """
    for name, now, then in noted.containers:
        if not same(now, then):
            return name
    return None if noted.outside is None else noted.outside.reached.changed()


class Noted(NamedTuple):
    """What convert keeps of a module: `_effdense` in its attributes."""

    memory: str
    form: Form
    snapshots: tuple[Snapshot, ...]  # of its modules when it was compared
    outside: Outside | None = None  # what their code reaches
    containers: tuple[Container, ...] = ()  # in their attributes

    def check(self, snapshots: Sequence[Snapshot]) -> None:
        """What was changed since may do something else, though the structure is the same."""
        if len(snapshots) != len(self.snapshots):
            raise Obstacle(
                "it has not the modules that effdense.convert has compared (revert, then convert again)"
            )
        for now, then in zip(snapshots, self.snapshots, strict=True):
            if (change := now.differs(then)) is not None:
                raise Obstacle(f"effdense.convert has not compared {change} (revert, then convert again)")


def noted_of(module: nn.Module) -> Noted:
    """What convert has noted; an Obstacle where the module, or its class's forward, is another one since."""
    noted: Noted | None = module.__dict__.get("_effdense")
    if noted is None:
        raise Obstacle("it was made from a converted module and has not been compared (revert, then convert)")
    cls: Any = type(module)
    if torch.compiler.is_compiling():
        return noted
    if cls._effdense_original.forward is not cls._effdense_forward:
        raise Obstacle("its class has another forward since effdense.convert (revert, then convert again)")
    if (change := changed_outside(noted)) is not None:
        raise Obstacle(
            f"effdense.convert has not compared {change}, which was changed (revert, then convert again)"
        )
    return noted


def _has_changed_outside(module: nn.Module) -> bool:
    noted: Noted | None = module.__dict__.get("_effdense")
    return noted is not None and changed_outside(noted) is not None


class Foreign(nn.Module):
    """What both kinds have."""

    kind: ClassVar[str]  # what a report calls it

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

    def fused(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Its fused forward of x, or None where something stands in the way."""
        raise NotImplementedError


class ForeignBlock(Foreign):
    """A dense block whose layers are recognised by structure.read_block."""

    kind = "DenseBlock"

    def read(self) -> tuple[list[Chain], str]:
        """What run_stage takes of it."""
        noted = noted_of(self)
        chains, snapshots = read_block(self, noted.form.after_each, reads=noted.form.reads)
        noted.check(snapshots)
        first, only = noted.form.newest_first, noted.form.new_only
        if first or only:
            chains = [chain._replace(newest_first=first, new_only=only) for chain in chains]
        return chains, noted.memory

    def chains(self) -> tuple[list[Chain], str] | None:
        """See DenseBlock."""
        if global_obstacle() is not None or (
            not torch.compiler.is_compiling() and _has_changed_outside(self)
        ):
            return None
        return look(self, self._chains)

    def _chains(self) -> tuple[list[Chain], str] | None:
        try:
            chains, memory = self.read()
        except Obstacle:
            return None
        return Chains(chains), memory

    def fused(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """[N, C, *spatial] -> [N, C + what the layers add, *spatial], or what they add alone."""
        stage = self.chains()
        if stage is None or not accepts(x, dimensions_of(stage[0])):
            return None
        return lambda x: run_stage(*stage, self.enter(x))

    def enter(self, x: Tensor) -> Tensor:
        """What the first layer reads: a transition may stand at the head of the block's sequence."""
        lead = lead_of(self)
        return x if lead is None else lead(x)


class ForeignTransition(Foreign):
    """A norm, ReLU, 1x1 convolution and a pool, recognised by structure.read_transition."""

    kind = "Transition"

    def read(self) -> TransitionParts:
        """Its parts."""
        noted = noted_of(self)
        parts, snapshots = read_transition(self, reads=noted.form.reads)
        noted.check(snapshots)
        return parts._replace(pool=noted.form.pool)

    def pool_first(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
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
        return (lambda x: self._run(x, parts)) if accepts(x, parts.conv.weight.dim()) else None

    def _run(self, x: Tensor, parts: TransitionParts) -> Tensor:
        kernel = parts.kernel()
        if kernel is not None and fits(x, kernel):
            return run_transition(x, parts.norm, kernel, parts.conv)
        y = run_unpooled(x, parts.norm, parts.conv)
        # Contiguous, so that on the CPU dropout draws what it would have drawn.
        if parts.rate > 0:
            y = F.dropout(y.contiguous(), parts.rate)
        for module in parts.behind:
            y = module(y.contiguous() if type(module) in DROPOUTS else y)
        return plain_avg_pool(y, parts.pool) if parts.pool else y
