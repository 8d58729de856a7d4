"""Files with a run's options: `--config FILE` reads them, and every run writes one, settings.toml."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effdense import extras, files
from effdense.train.settings import RunConfig

FILE = "settings.toml"
_NOT_IN_FILES = ("config", "help", "resume")
_NOT_OF_A_RUN = ("recipe", "recipe_name", "out", "resume", "epochs_given")


def expanded(command: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command line behind those that its `--config` stands for, so that the command line's count.

    A wrong file ends the program as argparse does, with a line that says what is wrong.
    """
    reader = argparse.ArgumentParser(add_help=False)
    reader.add_argument("--config", type=Path, nargs="?")
    path = reader.parse_known_args(list(words))[0].config
    if path is None:
        return list(words)
    try:
        return [*_words(command, path), *words]
    except (ImportError, OSError, ValueError) as error:
        command.error(f"--config {path}: {getattr(error, 'strerror', None) or error}")


def _words(command: argparse.ArgumentParser, path: Path) -> Iterator[str]:
    known = {
        name.removeprefix("--"): action
        for action in command._actions
        for name in action.option_strings
        if name.startswith("--") and action.dest not in _NOT_IN_FILES and not name.startswith("--no-")
    }
    said: dict[str, str] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if (other := said.setdefault(name, key)) != key:
            raise ValueError(f"{other!r} and {key!r} are the same option, which may be said once")
        action = known.get(name)
        if action is None:
            nearest = difflib.get_close_matches(name, known, n=1)
            meant = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"there is no option {key!r}{meant}; effdense train --help lists them")
        if isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, got {value!r}")
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield f"--{name}={_word(key, value)}"


def _word(key: str, value: Any) -> str:
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        return ",".join(map(repr, value))
    if type(value) not in (int, float, str):
        raise ValueError(f"{key} must be a number, a text or a list of numbers, got {value!r}")
    return value if isinstance(value, str) else repr(value)


def _read(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        ImportError: Python is 3.10, which does not read TOML, and tomli is missing.
        OSError: it cannot be opened.
        ValueError: it is no TOML.
    """
    if sys.version_info >= (3, 11):
        toml = importlib.import_module("tomllib")
    else:
        toml = extras.load("tomli", "reading TOML with Python 3.10")
    with path.open("rb") as file:
        try:
            content: dict[str, Any] = toml.load(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"TOML is in UTF-8, and byte {error.start} is not") from error
        except ValueError as error:
            hint = ', whose lines are as in model = "densenet121"' if path.suffix in (".yaml", ".yml") else ""
            raise ValueError(f"it is no TOML{hint}: {error}") from error
    return content


def write(folder: Path, settings: RunConfig) -> None:
    """Writes settings.toml: all of a run's options, each said, without where it goes to.

    Raises:
        OSError: it cannot be written.
    """
    values: dict[str, Any] = {"recipe": settings.recipe_name}
    for part in (settings, settings.recipe):
        for field in dataclasses.fields(part):
            if field.name not in _NOT_OF_A_RUN:
                values[field.name] = getattr(part, field.name)
    lines = [
        f"{name.replace('_', '-')} = {_plain(value)}"
        for name, value in values.items()
        if _is_said(name, value)
    ]
    head = "# effdense train --config THIS --out DIR"
    with files.replacing(folder / FILE) as file:
        file.write("\n".join([head, *lines, ""]).encode(errors="replace"))


def _is_said(name: str, value: Any) -> bool:
    """None of the recipe's values is "none", of the others that they are not given."""
    return value is not None or name in _NONE


_NONE = ("resize", "pad", "clip_norm", "class_weights", "early_stop")


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(repr, value)) + "]"
    if value is None:
        return '"none"'
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
