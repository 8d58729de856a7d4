"""The folder of a run: one run's at a time, and never written over another's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
    out = settings.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a+")
    except FileExistsError as error:
        raise OSError(f"--out {out} cannot be written: it is there, and no folder") from error
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"--out {out} is in use by another run ({lock.read().strip()}): wait for its end, or name another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            _leave_note(lock.fileno())
            with tempfile.TemporaryFile(dir=out):
                pass
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
        yield


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
