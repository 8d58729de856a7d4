"""A run's checkpoints: read only if they are whole, and resumed only with the settings that they were begun with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effdense import files


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
        ValueError: it is not whole, or not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} to go on with")
    state = files.load_tensors(path)
    if not isinstance(state, dict) or "settings" not in state or "state_dict" not in state:
        raise ValueError(f"{path} is not a checkpoint of effdense train")
    return state


def check_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run of other settings, and says which."""
    different = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in now
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(f"{path} is of another run: {'; '.join(different)}")
