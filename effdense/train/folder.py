"""The folder of a run: one run's at a time, and never written over another's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effdense import files
from effdense.train.settings import RunConfig

LAST, BEST = "last.pt", "best.pt"
LOCK = ".lock"
_FILES = (LAST, BEST, "metrics.csv", "results.json", "settings.toml")


@contextlib.contextmanager
def held(settings: RunConfig) -> Iterator[None]:
    """Holds the folder until the run ends, in whatever way: another run does not get it.

    Raises:
        OSError: it takes no files, which would be seen after hours otherwise.
        ValueError: another run holds it at the moment, or it is to begin where there is one, or something in its files' places.
    """
    out, before, made = settings.out, _names(settings.out), _first_missing(settings.out)
    try:
        lock = _lock(out)
    except OSError as error:
        _remove_empty(out, made)
        raise OSError(f"--out {out} cannot be written: {_reason(out, error)}") from error
    with lock:
        try:
            _check_writable(settings, lock.fileno())
            yield
        finally:
            if LOCK not in before and _names(out) == before | {LOCK}:  # nothing has come of it
                with contextlib.suppress(OSError):
                    (out / LOCK).unlink()
                _remove_empty(out, made)


def _lock(out: Path) -> Any:
    """Makes the folder and the locked file in it, which a run that has come to nothing may remove meanwhile."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = (out / LOCK).open("a+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                lock.close()
                raise ValueError(
                    f"--out {out} is in use by another run ({holder}): wait for its end, or name another --out"
                ) from None
            except OSError:
                return lock  # a file system without locks
            if os.path.samestat(os.fstat(lock.fileno()), (out / LOCK).stat()):
                return lock
            lock.close()


def _check_writable(settings: RunConfig, lock: int) -> None:
    """Refuses a folder that takes no files or holds another run; removes what killed writers have left."""
    out = settings.out
    try:
        _leave_note(lock)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x")
            file.flush()
        files.remove_parts(out, LAST, BEST, "results.json", "settings.toml")
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}") from error
    if other := [name for name in _FILES if (out / name).exists() and not (out / name).is_file()]:
        raise ValueError(
            f"--out {out} holds {other[0]}, which a run writes, and which is no regular file there"
        )
    there = [name for name in (LAST, BEST) if (out / name).exists()]
    if there and not settings.resume:
        raise ValueError(f"--out {out} holds a run: --resume goes on with it, another --out begins anew")


def _reason(out: Path, error: OSError) -> str:
    if os.path.lexists(out) and not out.is_dir():
        what = "a file" if out.exists() else f"a symbolic link to {os.readlink(out)}, which is missing"
        return f"it is {what}, and a folder was expected"
    return error.strerror or str(error)


def _names(folder: Path) -> set[str]:
    """Of what is in it; of none, nothing."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _first_missing(out: Path) -> Path | None:
    """The uppermost of the folders that are to be made."""
    missing = [path for path in (out, *out.parents) if not os.path.lexists(path)]
    return missing[-1] if missing else None


def _remove_empty(out: Path, made: Path | None) -> None:
    """Removes folders from `out` up to the one that was made first, as far as they are empty."""
    for path in (out, *out.parents) if made is not None else ():
        with contextlib.suppress(OSError):
            path.rmdir()
        if path == made:
            return


def _leave_note(lock: int) -> None:
    """Says in the locked file who has locked it."""
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}\n".encode())


def of_a_run(path: Path) -> list[Path]:
    """The files of the run whose folder that is, or one of its files."""
    folder = path if path.is_dir() else path.parent
    there = [folder / name for name in _FILES if (folder / name).is_file()]
    return there if any(p.name in (LAST, BEST) for p in there) else []


def to_go_on_from(out: Path) -> Path:
    """The checkpoint with which `--resume` begins: last.pt; where that could not be written any more, best.pt, of an epoch's end."""
    last, best = out / LAST, out / BEST
    return best if best.is_file() and not os.path.lexists(last) else last
