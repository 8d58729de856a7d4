"""A run's checkpoints: read only if they are whole, and resumed only with the settings that they were begun with."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from effdense import files, tensor_files
from effdense.train.folder import BEST, LAST, to_go_on_from


def save(state: dict[str, Any], path: Path) -> None:
    """Writes it; whenever that ends, `path` is its old or its new content.

    Raises:
        OSError: it cannot be written.
    """
    with files.replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole, or not one of effdense train's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} to go on with")
    state = tensor_files.load_tensors(path)
    if not isinstance(state, dict) or "settings" not in state or "state_dict" not in state:
        raise ValueError(f"{path} is not a checkpoint of effdense train")
    return state


def load_latest(out: Path) -> dict[str, Any]:
    """Reads the checkpoint of a run's folder with which it goes on, as `load` does."""
    path = to_go_on_from(out)
    if path.name == BEST:
        print(f"effdense train: there is no {out / LAST}; going on from {path}", file=sys.stderr)
    try:
        return load(path)
    except ValueError as error:
        if path.name == LAST and (out / BEST).is_file():
            raise ValueError(f"{error}. Once it is moved away, --resume goes on from {out / BEST}") from error
        raise


def check_same(
    path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], free: Container[str] = ()
) -> None:
    """Refuses to go on with a run of other settings, and says which. `free`: those that may be others.

    Files of earlier versions do not have all of them.
    """
    different = [
        _difference(name, saved[name], value)
        for name, value in now.items()
        if name in saved and name not in free and saved[name] != value
    ]
    if different:
        raise ValueError(f"{path} is of another run: {'; '.join(different)}")


def _difference(name: str, was: Any, now: Any) -> str:
    """Says what differs; of long lists the first place where they do."""
    if not (isinstance(was, list) and isinstance(now, list) and len(was) + len(now) > 10):
        return f"{name} was {was!r} and is {now!r}"
    if len(was) != len(now):
        return f"{name} were {len(was)} and are {len(now)}"
    place = next(i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
    return f"{name}: number {place} was {was[place]!r} and is {now[place]!r}"
