"""Which files of a folder with a folder per class are images, and what else is there."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Folders that systems make beside or among images, some with previews of them.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

_Identity = tuple[int, int]  # of a folder, under whatever name


def images_by_class(root: Path, least: int = 2) -> tuple[dict[str, list[str]], Counter[str]]:
    """The paths of every class's images in order, and how many files of which kind are left out.

    Links are followed, to folders that have not been read yet and do not hold `root`, so that one that leads back brings no
    other classes' images. Hidden files and folders do not count. Where one class is enough, those without images are left out.

    Raises:
        OSError: a folder cannot be read.
        ValueError: there are fewer than `least` classes, one without images, or two with the same folder.
    """
    left_out: Counter[str] = Counter()
    folders: dict[str, str] = {}
    for entry in _entries(root):
        if _is(entry.is_dir):
            folders[entry.name] = entry.path
        else:
            left_out["beside the classes' folders"] += 1
    classes = sorted(folders)
    if len(classes) < least:
        wanted = "two classes or more" if least == 2 else "classes"
        raise ValueError(f"{root}: folders of {wanted} were expected, found {classes or 'none'}")
    resolved = root.resolve()
    entered = {_identity(path): str(path) for path in (resolved, *resolved.parents)}
    for name in classes:
        path = folders[name]
        if (other := entered.setdefault(_identity(path), path)) != path:
            raise ValueError(f"{root}: class {name} is the same folder as {other}")
    found = {name: sorted(_below(folders[name], entered, left_out)) for name in classes}
    empty = [name for name, paths in found.items() if not paths]
    if least == 1 and len(empty) < len(found):
        for name in empty:
            del found[name]
            left_out["folders without images"] += 1
    elif empty:
        rest = f"; left out: {in_words(left_out)}" if left_out else ""
        raise ValueError(f"{root}: no images ({', '.join(EXTENSIONS)}) in {', '.join(empty[:5])}{rest}")
    return found, left_out


def images_below(root: Path) -> tuple[list[str], Counter[str]]:
    """The paths of a folder's images and of all folders below, in order, and how many files of which kind are left out.

    Raises:
        OSError: a folder cannot be read.
        ValueError: there are no images.
    """
    left_out: Counter[str] = Counter()
    resolved = root.resolve()
    entered = {_identity(path): str(path) for path in (resolved, *resolved.parents)}
    found = sorted(_below(str(root), entered, left_out))
    if not found:
        rest = f"; left out: {in_words(left_out)}" if left_out else ""
        raise ValueError(f"{root}: no images ({', '.join(EXTENSIONS)}) there or in the folders below{rest}")
    return found, left_out


def in_words(left_out: Counter[str]) -> str:
    """What was left out: 12 .gif, 3 .txt."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {what}" for what, count in ordered)


def _below(folder: str, entered: dict[_Identity, str], left_out: Counter[str]) -> Iterator[str]:
    for entry in _entries(folder):
        if _is(entry.is_dir):
            if entered.setdefault(_identity(entry.path), entry.path) != entry.path:
                left_out["links to folders that are read anyway, or hold this one"] += 1
            else:
                yield from _below(entry.path, entered, left_out)
        elif not entry.name.lower().endswith(EXTENSIONS):
            left_out[os.path.splitext(entry.name)[1].lower() or "without an extension"] += 1
        elif not _is(entry.is_file):  # reading a pipe would wait for ever
            left_out["broken links" if entry.is_symlink() else "pipes, sockets or devices"] += 1
        else:
            yield entry.path


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, what is really there before links."""
    with os.scandir(folder) as entries:
        shown = [e for e in entries if not e.name.startswith(".") and e.name not in _OF_SYSTEMS]
    return sorted(shown, key=lambda entry: (entry.is_symlink(), entry.name))


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link to itself is of none."""
    with contextlib.suppress(OSError):
        return kind()
    return False


def _identity(path: str | Path) -> _Identity:
    there = os.stat(path)
    return there.st_dev, there.st_ino
