"""Writes files whole or not at all, and reads files of tensors with their checksums."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that becomes `path` at the end: whenever the program ends, `path` has its old or all of its new content.

    Raises:
        OSError: it cannot be written; the message says what is there instead.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_names(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        before = "the one before it is as it was" if path.exists() else "there is none"
        raise OSError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}; {before}"
        ) from error


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Writes `content` as JSON, as `replacing` does."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _sync_names(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file that torch.save wrote, of tensors and plain values, to the CPU.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or something else.
    """
    with Path(path).open("rb") as file:
        try:
            if zipfile.is_zipfile(file):  # torch.load does not look at the checksums
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of {damaged} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive or pickle makes of it
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, pickle.UnpicklingError):  # whose own advice is to run what is in the file
                reason = "or it holds a whole model, of which only the state_dict should be saved"
            size = os.fstat(file.fileno()).st_size
            raise ValueError(
                f"{path} ({size} bytes) is damaged or was not written by torch.save: {reason}"
            ) from error
