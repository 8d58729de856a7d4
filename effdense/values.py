"""The values that several commands take, as argparse's types."""

from __future__ import annotations

import argparse
from pathlib import Path


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
