"""A disk that is full from the n-th write of a checkpoint on: every write, flush, sync and renaming of effdense/files.py counts."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effdense import files


class Disk:
    """Counts what is asked of it, and refuses all from the `at`-th on; `once`: that one alone."""

    def __init__(self, at: int = -1, once: bool = False) -> None:
        self.at, self.once, self.count = at, once, 0

    def asked(self) -> None:
        """Raises OSError where the disk is full."""
        self.count += 1
        number = self.count - 1
        if self.at >= 0 and (number == self.at if self.once else number >= self.at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Within it files.py writes to this disk."""
        replace, fsync, open_path = Path.replace, os.fsync, Path.open

        def replace_(path: Path, target: Any) -> Any:
            if path.name.endswith(files.PART):
                self.asked()
            return replace(path, target)

        def fsync_(number: int) -> None:
            self.asked()
            fsync(number)

        def open_(path: Path, *arguments: Any, **options: Any) -> Any:
            if not path.name.endswith(files.PART):
                return open_path(path, *arguments, **options)
            self.asked()
            return _File(open_path(path, *arguments, **options), self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace_)
            patch.setattr(os, "fsync", fsync_)
            patch.setattr(Path, "open", open_)
            yield


class _File:
    """A file on that disk: what has been written before it was full is there."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: Any) -> int:
        self._disk.asked()
        written: int = self._file.write(content)
        return written

    def flush(self) -> None:
        self._disk.asked()
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
