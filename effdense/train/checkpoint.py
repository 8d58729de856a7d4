"""Checkpoints: written so that a file is always a whole one, read so that what is wrong is said."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Writes beside `path`, down to the disk, then moves there: whenever it ends, `path` is its old or its new content.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is torch's, for a disk that is full
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        before = "the one before it is as it was" if path.exists() else "there is none"
        raise OSError(f"{path} cannot be written: {error}; {before}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole, or not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} to go on with")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
        *(EOFError, OSError, KeyError, ValueError),
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is not a whole checkpoint ({path.stat().st_size} bytes): {reason}"
        ) from error
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
