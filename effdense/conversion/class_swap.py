"""Changes a module's class to one that runs fused, and gives the class back.

The new class is a subclass of the module's own, of its name, with a fused forward in front: all that the own class defines or
overrides stays, `isinstance` too. Where something stands in the way, or the call is another one, the own forward runs.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
from abc import ABCMeta
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdense.nn.blocks import DenseBlock, Transition
from effdense.nn.code_reader import Reads
from effdense.nn.foreign import (
    NO_FORM,
    Foreign,
    ForeignBlock,
    ForeignTransition,
    Form,
    Noted,
    noted_of,
    outside_of,
)
from effdense.nn.layers import DenseLayer, PlainDenseLayer
from effdense.nn.looks import KEPT
from effdense.nn.modules import kind_of, original
from effdense.nn.network import DenseFeatures, DenseNet
from effdense.nn.obstacles import global_obstacle, refuse_scripting, shadowed
from effdense.nn.structure import MODULE_STATE, Obstacle, Snapshot, read_block, read_transition, snapshot

LAYERS = (DenseLayer, PlainDenseLayer)
OURS = (*LAYERS, DenseBlock, Transition, DenseFeatures, DenseNet)
# Of which class a module must be for one of effdense's to add no methods that it would not have.
_BASES: dict[type, type] = {
    DenseBlock: nn.ModuleDict,
    Transition: nn.Sequential,
    DenseFeatures: nn.Sequential,
}


# Attributes of effdense's classes that a fused forward does not use, so that a module may have its own.
_UNUSED = {"forward", "drop_rate", "_bottleneck", "_one_by_one"}


class Converted:
    """In front of every converted module's class."""

    __prepare_scriptable__ = refuse_scripting

    def __init_subclass__(cls, **_: Any) -> None:
        """Does not tell the own class, which may keep a list of its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By its own class: pickle would find that one under this name."""
        usual: Any = super().__reduce_ex__(protocol)
        if usual[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return usual
        return _new, (kind_of(self), original(type(self))), *usual[2:]  # type: ignore[arg-type]


def has_base(cls: type, kind: type) -> bool:
    """Whether a subclass of a class can run as a `kind` without methods that it would not have."""
    return issubclass(cls, _BASES.get(kind, nn.Module))


@functools.cache
def _names_of(kind: type) -> frozenset[str]:
    """What a fused forward looks up in a module that runs as a `kind`."""
    own = (c for c in kind.__mro__ if c.__module__.startswith("effdense."))
    return frozenset(n for c in own for n in vars(c) if not n.startswith("__")) - _UNUSED


class _NotThere:
    """An attribute of a class that its subclass does not have: a module may have one of its own under this name."""

    def __get__(self, module: Any, cls: Any = None) -> Any:
        raise AttributeError


def class_obstacle(module: nn.Module, kind: type) -> str | None:
    """Why there can be no subclass of a module's class that runs fused as a `kind`, or None."""
    cls = type(module)
    if type(cls) not in (type, ABCMeta):
        return f"its class is made by {type(cls).__name__}, not by type"
    theirs = {n for c in cls.__mro__ if not c.__module__.startswith(("torch.", "effdense.")) for n in vars(c)}
    theirs |= {*vars(module).keys() - MODULE_STATE, *module._modules}
    if taken := _names_of(kind) & theirs:
        return f"its class has attributes that would be hidden: {', '.join(sorted(taken))}"
    return None


def _attempt(kind: Any, module: Any, x: Any) -> Tensor | None:
    """What a converted module gives where it can run fused, else None."""
    if shadowed(module):
        return None
    if torch.compiler.is_compiling() and global_obstacle() is not None:
        return None  # before anything that an older compiler cannot trace
    if issubclass(kind, LAYERS):
        if not all(isinstance(t, Tensor) for t in (x if isinstance(x, (list, tuple)) else [x])):
            return None
    elif not isinstance(x, Tensor):
        return None
    if issubclass(kind, Foreign):
        fused = module.fused(x)
        return None if fused is None else fused(x)
    if changed_since(module) is not None:
        return None
    if kind is DenseNet:
        return kind.fused(module, x)
    y: Tensor | None = kind.forward(module, x) if module.obstacle() is None else None
    return y


def changed_since(module: Any) -> str | None:
    """What of a module that runs as one of effdense's is not what convert has compared, or None."""
    if original(type(module)).__module__.startswith("torch."):
        return None  # nn.Sequential: there was nothing to compare
    try:
        noted = noted_of(module)
        noted.check(_snapshots_of(module, type(module), noted.form.reads))
    except Obstacle as reason:
        return str(reason)
    return None


def _snapshots_of(module: nn.Module, kind: type, reads: Reads) -> list[Snapshot]:
    return [snapshot(module, reads, "drop_rate" if issubclass(kind, LAYERS) else None)]


@functools.cache
def fused_class(kind: Any, own: Any) -> type:
    """A subclass of a module's own class that runs fused as a `kind`, one of OURS or Foreign's."""

    @functools.wraps(own.forward)  # torch.fx, torch.export and trainers ask for its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Fused where it is called with one argument and nothing stands in the way, else as its own class does."""
        y = _attempt(kind, self, args[0]) if len(args) == 1 and not kwargs else None
        return own.forward(self, *args, **kwargs) if y is None else y

    def obstacle(self: Any) -> str | None:
        """Why its own forward runs at the moment, or None where it runs fused."""
        if hidden := shadowed(self):
            return f"it has attributes that hide effdense's: {', '.join(hidden)}"
        reason = None if issubclass(kind, Foreign) else changed_since(self)
        return kind.obstacle(self) if reason is None else reason

    names = {n: getattr(own, n) for n in ("__module__", "__qualname__", "__doc__")}
    noted = {"_effdense_kind": kind, "_effdense_original": own, "_effdense_forward": own.forward}
    noted["_effdense_names"] = _names_of(kind)
    if issubclass(kind, LAYERS) and not issubclass(kind, own):
        noted["memory"] = _NotThere()  # that a set one counts is effdense's
        if not hasattr(own, "drop_rate"):
            noted["drop_rate"] = 0.0  # of a class without dropout
    # What inspect.getfullargspec, unlike inspect.signature, does not take from the wrapped function.
    forward.__signature__ = inspect.signature(own.forward)  # type: ignore[attr-defined]
    bases = (Converted, kind) if issubclass(kind, own) else (Converted, own, kind)
    return type(own)(own.__name__, bases, {**names, **noted, "forward": forward, "obstacle": obstacle})


def _new(kind: type, own: type) -> Any:
    cls: Any = fused_class(kind, own)
    return cls.__new__(cls)


def is_fused_kind(module: nn.Module) -> bool:
    """Whether a module is one of effdense's: built as that, or converted."""
    return isinstance(module, (*OURS, Converted))


def adopt(module: Any, kind: type, memory: str, form: Form = NO_FORM) -> None:
    """Makes a module one of effdense's, or changes the memory mode of one that is."""
    state = module.__dict__
    if isinstance(module, Converted):
        if (noted := state.get("_effdense")) is not None:
            state["_effdense"] = noted._replace(memory=memory)
    elif not isinstance(module, OURS):
        snapshots: Sequence[Snapshot]
        if issubclass(kind, Foreign):
            read: Any = read_block if kind is ForeignBlock else read_transition
            snapshots = read(module, hooks=False, reads=form.reads)[1]
        else:
            snapshots = _snapshots_of(module, kind, form.reads)
        own: Any = type(module)
        object.__setattr__(module, "__class__", fused_class(kind, own))
        outside: Any = (None, ()) if kind is DenseFeatures else outside_of(module, form)
        state["_effdense"] = Noted(memory, form, tuple(s.frozen() for s in snapshots), *outside)
    if isinstance(module, LAYERS):
        state["_memory"] = memory


@contextlib.contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules back the class and the attributes that they had, where something ends what is done to them: Ctrl-C, too."""
    before = [(m, type(m), dict(vars(m))) for m in modules]
    try:
        yield
    except BaseException:
        for module, own, state in before:
            object.__setattr__(module, "__class__", own)
            module.__dict__.clear()
            module.__dict__.update(state)
        raise


def give_back(module: nn.Module) -> None:
    """Undoes what adopt has done, if it has."""
    if isinstance(module, Converted):
        object.__setattr__(module, "__class__", original(type(module)))
        for name in ("_effdense", "_memory", KEPT):
            module.__dict__.pop(name, None)


__all__ = [
    "LAYERS",
    "OURS",
    "Converted",
    "Foreign",
    "ForeignBlock",
    "ForeignTransition",
    "Form",
    "adopt",
    "all_or_nothing",
    "class_obstacle",
    "fused_class",
    "give_back",
    "has_base",
    "is_fused_kind",
]
