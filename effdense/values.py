"""The values that commands take, each with one syntax everywhere, as argparse's types."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path, PosixPath

import torch

SIDE = 65_535  # pixels: the most that a JPEG has
_LARGEST = 2**31 - 1
_MOST_BYTES = 2**50


def path(text: str) -> Path:
    """A path of a file or a folder; an empty one is a variable that was not set more often than the present folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"a path was expected, got {text!r}; the present folder is .")
    return Path(text)


def new_path(text: str) -> Path:
    """A path for what is written, in characters that all who write there take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"a path in UTF-8 was expected, got {text!r}") from None
    return path(text)


class NewFile(PosixPath):
    """A file that a command writes: before it begins, `effdense.cli` looks whether it can be written."""


def new_file(text: str) -> NewFile:
    """A path of a file that is written."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "a path was expected, got '-'; standard output is /dev/stdout, and ./- a file of that name"
        )
    if text.endswith("/") and not os.path.isdir(text):  # which is said in other words
        raise argparse.ArgumentTypeError(f"the path of a file was expected, got {text!r}, as folders have it")
    return NewFile(new_path(text))


def number(text: str) -> float:
    """A number of 0 or more, in digits."""
    digits = text.strip()
    value = float(digits) if re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", digits, re.ASCII | re.I) else -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of 0 or more was expected, got {text!r}")
    return value


def whole(least: int = 1, most: int = _LARGEST) -> Callable[[str], int]:
    """A whole number in a range."""
    wanted = f"of {least} or more" if most == _LARGEST else f"from {least} to {most}"

    def read(text: str) -> int:
        digits = text.strip()
        if not re.fullmatch(r"\d{1,18}", digits, re.ASCII) or not least <= int(digits) <= most:
            raise argparse.ArgumentTypeError(f"a whole number {wanted} was expected, got {text!r}")
        return int(digits)

    return read


count = whole()
side = whole(1, SIDE)


def size(text: str) -> int:
    """Of memory, in bytes: 8GiB, 512 MiB, 2.5 GB, 4096, 8e9."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower(), re.ASCII)
    power = " kmgt".index(match[2] or " ") if match else 0
    found = float(match[1]) * (1024 if match[3] else 1000) ** power if match else 0.0
    if not 1 <= found <= _MOST_BYTES:  # infinity, too
        raise argparse.ArgumentTypeError(
            f"a size from 1 byte to 1024 TiB was expected, such as 8GiB, 512MiB or 8e9, got {text!r}"
        )
    return int(found)


def device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none, or it cannot compute, as "meta".
    """
    try:
        number = torch.ones(1, device=name)
        number.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    return number.device
