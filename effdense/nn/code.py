"""What is known of modules' forwards: of a class's, of many classes' together, and of modules with what their attributes hold."""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from effdense.nn.code_reader import Code, Reader, Reads, counts, is_simple, owners_of, plain, with_article
from effdense.nn.modules import original, walk
from effdense.nn.outside import Reached

_KNOWN: dict[Any, Code] = {}


def _read(cls: Any, called: frozenset[str]) -> Code:
    """Read once, and again where something that it reaches was changed."""
    key = cls, cls.forward, called
    if key not in _KNOWN or _KNOWN[key].reached.changed() is not None:
        if len(_KNOWN) > 4096:
            _KNOWN.clear()
        _KNOWN[key] = Reader(cls).read(cls.forward, called)
    return _KNOWN[key]


def code_of(cls: Any, called: frozenset[str] = frozenset()) -> Code:
    """What is known of a class's forward; of a converted module's, of the class that it had.

    `called`: names of methods that other modules' code may call.
    """
    cls = original(cls)
    return _read(cls, called)


@functools.lru_cache(maxsize=4096)
def constants_of(cls: Any, reads: Reads) -> tuple[str, ...]:
    """Names of the class attributes, not methods, that the code may read."""
    found = {
        name: value
        for owner in reversed(owners_of(original(cls)))
        for name, value in vars(owner).items()
        if counts(name, reads)
    }
    return tuple(n for n, v in found.items() if is_simple(v) and not n.startswith("__"))


def code_of_tree(module: nn.Module) -> Code:
    """What is known of the forwards of a module and all inside of it; what their attributes hold counts."""
    modules = list(walk(module))
    code = code_of_classes(tuple(dict.fromkeys(original(type(m)) for m in modules)))
    if not code.own:
        return code
    readers = [reader for m in modules for reader in _read_attributes(m, code.reads)]
    for reader in readers:
        code.reached.add(reader.reached)
    obstacles = code.obstacle, *(reader.obstacle for reader in readers)
    return code._replace(obstacle=next((o for o in obstacles if o is not None), None))


def code_of_classes(classes: tuple[Any, ...], functions: tuple[Any, ...] = ()) -> Code:
    """What is known of the forwards of classes whose objects call each other, and functions in their attributes."""
    called = frozenset(name for c in classes for name in code_of(c).reads.names)
    codes = [code_of(c, called) for c in classes]
    reads = Reads(
        frozenset(name for c in codes for name in c.reads.names),
        any(c.reads.every for c in codes),
        own=frozenset(name for c in codes for name in c.reads.own),
    )
    reached = Reached()
    for c in codes:
        reached.add(c.reached)
    for function in functions:
        reader = Reader(nn.Module)
        reader.visit(function, getattr(function, "__name__", "a function"))
        reached.add(reader.reached)
    own = frozenset(f for c in codes for f in c.own)
    return Code(own, reads, next((c.obstacle for c in codes if c.obstacle is not None), None), reached)


_STATE = frozenset((*vars(nn.Module()), "_effdense", "_effdense_kept", "_call_impl", "_compiled_call_impl"))


def _read_attributes(module: nn.Module, reads: Reads) -> Iterator[Reader]:
    """What was read of the functions in a module's attributes; other objects keep its forward from being run on a probe."""
    for name, value in vars(module).items():
        if name in _STATE or not counts(name, reads) or _is_copied(value):
            continue
        reader = Reader(original(type(module)))
        if not callable(value) or isinstance(value, type):
            reader.refuse(f"its forward reads {name}, {with_article(value)}")
        else:
            reader.visit(value, name)
        yield reader


def _is_copied(value: Any) -> bool:
    """Whether the probe's copy of an attribute is a copy indeed."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_copied, value)) and all(map(_is_copied, getattr(value, "__dict__", {}).values()))
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None) if isinstance(value, defaultdict) else None
        if factory not in (None, list, int, float, dict, set, str):
            return False
        inside = *dict.items(value), *getattr(value, "__dict__", {}).items()
        return all(_is_copied(v) for pair in inside for v in pair)
    return is_simple(value) or isinstance(value, (torch.Tensor, nn.Module))


def is_function(value: Any) -> bool:
    """Whether an attribute holds a function, or a method, whose code can be read."""
    return isinstance(plain(value), types.FunctionType)


def is_known(module: nn.Module) -> bool:
    """Whether a module runs a library's code alone, whatever else its class overrides."""
    return not code_of(type(module)).own
