"""Keeps what a look at a module has found, until the module or one inside of it changes.

Whether a block runs fused is asked before every forward: a hook, another class, a replaced submodule change the answer.
In a deep net that takes longer than small layers' computation. Whether anything has changed is asked in C++
(csrc/module_state.h).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from effdense.nn.modules import walk
from effdense.ops.extension import extension

KEPT = "_effdense_kept"  # the attribute; a module's own, so that it goes with the module
Found = TypeVar("Found")


class _Kept:
    """What was found in one module. A copy of the module has found nothing yet."""

    def __init__(self) -> None:
        # Whose it is, what its modules were like, what was found: together, since Ctrl-C may come at any line, and other
        # threads.
        self.entry: tuple[weakref.ref[nn.Module], State, Any] | None = None

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> Any:
        return _Kept, ()


class State:
    """What modules are like at the moment."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._records = None if extension is None else extension.module_state(list(modules))

    def is_same(self) -> bool:
        """Whether they still are; always False without the compiled module."""
        return self._records is not None and bool(extension.module_state_is(self._records))  # type: ignore[union-attr]


def can_keep() -> bool:
    """Whether what is found now may be used again."""
    return extension is not None and not torch.compiler.is_compiling()


def look(module: nn.Module, find: Callable[[], Found]) -> Found:
    """find(), or what it gave at the last look: it depends on nothing but the module and those inside of it."""
    if not can_keep():
        return find()
    kept: _Kept | None = module.__dict__.get(KEPT)
    if kept is None:
        # Not setattr, which a user's class may have of its own.
        kept = module.__dict__.setdefault(KEPT, _Kept())
    elif (entry := kept.entry) is not None:
        owner, state, before = entry
        if owner() is module and state.is_same():
            found: Found = before
            return found
    found = find()
    # Of the modules as they are after the look, which changes nothing.
    kept.entry = weakref.ref(module), State(list(walk(module))), found
    return found
