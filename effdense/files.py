"""Writes files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

PART = ".part"  # the end of the names of files that are not whole yet


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that becomes `path` at the end: whenever the program ends, `path` has its old or all of its new content.

    A symbolic link stays, and the file that it means is replaced; permissions stay, too. Devices, pipes and the program's
    own standard output are never replaced: they are given the content at the end.

    Raises:
        OSError: it cannot be written; the message says what is there instead.
    """
    path = Path(path)
    try:
        target = _target(path)
        if target is None:
            content = io.BytesIO()
            yield content
            _give(path, content.getvalue())
        else:
            with _beside(target) as file:
                yield file
    except (OSError, RuntimeError) as error:
        raise _cannot_be_written(path, error) from error


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Says before long work what `replacing` would say after it, as far as that can be seen.

    Raises:
        OSError: the folder is missing or write-protected, or there is something that is not replaced.
    """
    path = Path(path)
    try:
        target = _target(path)
        if target is not None and not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}")
        if target is not None and not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, f"the folder {target.parent} is write-protected")
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {_reason(error)}") from error


def check_apart(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Refuses to write over what is read, and two files into one; pipes and devices take whatever comes.

    Args:
        outputs: files that are to be written, by the names of their options.
        inputs: files that are read, or belong to them.

    Raises:
        ValueError: the message names the options.
    """
    files = {name: path for name, path in outputs.items() if not path.exists() or path.is_file()}
    real: dict[str, str] = {}
    for name, path in files.items():
        if (other := real.setdefault(os.path.realpath(path), name)) != name:
            raise ValueError(f"{other} and {name} are the same file, {path}, which can hold one of them")
    there = {os.path.realpath(path) for path in inputs}
    for path in files.values():
        if os.path.realpath(path) in there and path.exists():
            raise ValueError(
                f"{path} is read, or belongs to what is read, and would be overwritten: name another file"
            )


def _cannot_be_written(path: Path, error: Exception) -> OSError:
    before = "it is no regular file" if os.path.exists(path) else "there is none"
    before = "the one before it is as it was" if os.path.isfile(path) else before
    before = "" if os.path.isdir(path) else f"; {before}"
    return OSError(f"{path} cannot be written: {_reason(error)}{before}")


def _reason(error: Exception) -> Any:
    cause = _cause(error)
    return getattr(cause, "strerror", None) or cause


def _cause(error: BaseException) -> BaseException:
    """What the system has said, where torch.save's writer has failed once more when it was closed."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _target(path: Path) -> Path | None:
    """The file that is to be replaced, behind symbolic links; None where there is something to be written to as it is."""
    try:
        there = path.stat()
    except FileNotFoundError:  # a link that leads nowhere says where the file is to be
        return Path(os.path.realpath(path))
    if _own_output(there) is not None or stat.S_ISCHR(there.st_mode) or stat.S_ISFIFO(there.st_mode):
        return None
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(there.st_mode):
        raise OSError("a disk or a socket is not overwritten")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected")
    return Path(os.path.realpath(path))


def _own_output(there: os.stat_result) -> int | None:
    """The number of this program's standard output or error, if that is what is there."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(there, os.fstat(number)):
                return number
    return None


def _give(path: Path, content: bytes) -> None:
    """Writes to something that is there and stays what it is."""
    own = _own_output(path.stat())
    if own is not None:  # behind what has been printed
        (sys.stdout if own == 1 else sys.stderr).flush()
    with open(path if own is None else os.dup(own), "wb") as stream:
        stream.write(content)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of a regular one, or of none, once it is whole."""
    part = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{PART}")  # no other writer's
    try:
        with part.open("xb") as file:
            _take_permissions(target, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_names(target.parent)


def _take_permissions(target: Path, file: int) -> None:
    """Gives a file the owner and the permissions of the one that is there, as far as that can be done here."""
    if not target.exists():
        return
    there = target.stat()
    with contextlib.suppress(OSError):
        os.fchown(file, there.st_uid, there.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(file, stat.S_IMODE(there.st_mode))


def silence(stream: Any) -> None:
    """Leads a stream that takes nothing more to nowhere, so that the rest of its buffer is no error when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # it is no file of the system's, or closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def remove_parts(folder: Path, *names: str) -> None:
    """Removes what writers of these files have left that were killed. None of them may be at work."""
    for name in names:
        for part in folder.glob(f".{name}.????????{PART}"):
            part.unlink(missing_ok=True)


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Writes `content` as JSON, as `replacing` does."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _sync_names(folder: Path) -> None:
    """Brings a folder's list of names to the disk, where it can be opened and its file system does that."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(opened)
