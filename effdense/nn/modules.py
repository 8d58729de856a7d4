"""Reads modules and their classes without calling any method that a class may override."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def original(cls: Any) -> Any:
    """A class, or the one that a converted module had."""
    return getattr(cls, "_effdense_original", cls)  # or a class that fully_shard has made of it


def kind_of(module: nn.Module) -> type:
    """The class in effdense.nn that a module was built as, or converted to; else its own class."""
    kind: type = type(module).__dict__.get("_effdense_kind", type(module))
    return kind


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside of it, once each."""
    seen: set[nn.Module] = set()
    pending = [module]
    while pending:
        now = pending.pop()
        if now not in seen:
            seen.add(now)
            yield now
            pending += [m for m in reversed(now._modules.values()) if m is not None]


def named(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module once, as named_modules() names them."""
    seen: set[nn.Module] = set()
    pending = [(name, module)]
    while pending:
        path, now = pending.pop()
        if now in seen:
            continue
        seen.add(now)
        yield path, now
        children = [(f"{path}.{n}" if path else n, m) for n, m in now._modules.items() if m is not None]
        pending += reversed(children)
