"""A run's checkpoints: read only if they are whole, and resumed only with the settings that they were begun with."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdense import files, tensor_files
from effdense.train.folder import BEST, LAST, to_go_on_from
from effdense.train.metrics import Sums

_PLAIN = (bool, int, float, str, type(None))
_COUNTS = ("epoch", "step_in_epoch", "step", "metrics_size")
_LATER = {"stale": 0, "tested": None, "ema": None}  # entries that earlier versions do not have


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
    return {**_LATER, **state}


def load_epoch(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of an epoch's end, to test it: `epoch`, `step` and `state_dict` are of their kinds."""
    state = load(path)
    for name in ("epoch", "step"):
        check_entry(path, state, name, _is_count(state.get(name)), "a whole number of 0 or more")
    check_entry(path, state, "state_dict", isinstance(state["state_dict"], Mapping), "a dict of tensors")
    return state


def load_latest(out: Path) -> tuple[Path, dict[str, Any]]:
    """Finds and reads the checkpoint of a run's folder with which it goes on, as `load` does, with all that it goes on from."""
    path = to_go_on_from(out)
    if path.name == BEST:
        print(f"effdense train: there is no {out / LAST}; going on from {path}", file=sys.stderr)
    try:
        _check_entries(path, state := load(path))
    except ValueError as error:
        if path.name == LAST and (out / BEST).is_file():
            raise ValueError(f"{error}. Once it is moved away, --resume goes on from {out / BEST}") from error
        raise
    return path, state


def check_entry(path: Path, state: Mapping[str, Any], name: str, is_right: bool, wanted: str) -> None:
    """Refuses a checkpoint whose entry of that name is missing, or is not what it has to be."""
    if not is_right:
        found = f"it is {_kind(state[name])}" if name in state else "it is missing"
        raise ValueError(f"{path} is damaged: its entry {name!r} must be {wanted}, {found}")


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Names the file and the entry where something cannot go on from what is in there."""
    try:
        yield
    except Exception as error:  # whatever PyTorch makes of it
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"{reason} is missing" if isinstance(error, KeyError) else reason
        raise ValueError(f"{path} is damaged: its entry {name!r} cannot be read: {reason:.300}") from error


def _check_entries(path: Path, state: Mapping[str, Any]) -> None:
    """All that a run goes on from, but for what is in the learner's own entries and the random states."""

    def check(name: str, is_right: bool, wanted: str) -> None:
        check_entry(path, state, name, is_right, wanted)

    for name in _COUNTS:
        check(name, _is_count(state.get(name)), "a whole number of 0 or more")
    for name in ("best", "seconds"):
        check(name, _is_number(state.get(name)), "a number")
    check("stale", _is_count(state["stale"]), "a whole number of 0 or more")
    check("tested", isinstance(state["tested"], (Mapping, type(None))), "a dict, or None")
    fields = {field.name for field in dataclasses.fields(Sums)}
    for name in ("in_epoch", "in_row"):
        sums = state.get(name)
        is_right = isinstance(sums, Mapping) and sums.keys() == fields and all(map(_is_number, sums.values()))
        check(name, is_right, f"numbers named {', '.join(sorted(fields))}")
    names = state.get("class_names")
    check("class_names", _is_plain(names) and isinstance(names, list), "a list of names")
    settings = state["settings"]
    is_right = isinstance(settings, Mapping) and all(map(_is_plain, (*settings, *settings.values())))
    check("settings", is_right, "a dict of plain values")
    epochs = settings.get("epochs")
    check_entry(path, settings, "epochs", _is_count(epochs), "a whole number of 0 or more (in 'settings')")
    for name in ("state_dict", "optimizer", "scaler"):
        check(name, isinstance(state.get(name), Mapping), "a dict")
    check("ema", isinstance(state["ema"], (Mapping, type(None))), "a dict, or None")
    chance = state.get("random")
    is_right = isinstance(chance, list) and bool(chance) and all(isinstance(c, Mapping) for c in chance)
    check("random", is_right, "a list of dicts, one a process")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_plain(value: Any) -> bool:
    """Whether it can be compared and shown."""
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _kind(value: Any) -> str:
    short = isinstance(value, _PLAIN) and len(repr(value)) < 40
    return repr(value) if short else f"of type {type(value).__name__}"


def check_tensors(saved: Any, wanted: Mapping[str, Tensor]) -> None:
    """Refuses tensors by names that are not those of a model.

    Raises:
        ValueError: one is missing, too many, of another kind, shape or dtype; the message names it.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"a dict of tensors was expected, it is {_kind(saved)}")
    for name in [*wanted, *saved]:
        if name not in saved or name not in wanted:
            raise ValueError(f"{name} is {'missing' if name in wanted else 'not of this model'}")
        found, expected = saved[name], wanted[name]
        if not isinstance(found, Tensor):
            raise ValueError(f"{name} must be a tensor, it is {_kind(found)}")
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{name} must be {expected.dtype} {list(expected.shape)}, it is {found.dtype} {list(found.shape)}"
            )


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
