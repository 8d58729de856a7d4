"""Images to use a model on: files, or a data set in memory. What cannot be read is named, and the rest goes on."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from effdense import extras
from effdense.models import Preparation
from effdense.train.listing import images_below

Pixels = Tensor | str  # of an image [channels, height, width], or why there are none


class Source(Protocol):
    """Some images, by number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What tells a user which image it is."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Pixels]:
        """Their pixels, or why they cannot be read."""
        ...

    def largest(self) -> tuple[int, int]:
        """The largest height and width of all, where they are left as they are."""
        ...


class Files:
    """Image files; `workers`: how many threads read them."""

    def __init__(self, paths: Sequence[str], prepare: Preparation, workers: int) -> None:
        self.paths = paths
        self._prepare = prepare
        self._pil = extras.load("PIL.Image", "reading images")
        self._threads = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """See Source."""
        return self.paths[number]

    def read(self, numbers: Sequence[int]) -> list[Pixels]:
        """See Source."""
        return list(self._threads.map(self._read_one, [self.paths[i] for i in numbers]))

    def _read_one(self, path: str) -> Pixels:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
                return f"{path} cannot be read: it is no file"
            pixels = self._prepare.of_file(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        except ValueError as error:
            return str(error)
        except Exception as error:  # whatever a damaged one makes of it
            return f"{path} cannot be read: {type(error).__name__} {error}"
        return _too_large(path, pixels, self._prepare.pad) or pixels

    def largest(self) -> tuple[int, int]:
        """See Source; of files that cannot be read there is none."""
        sizes = list(self._threads.map(self._size_of, self.paths))
        return max((height for _, height in sizes), default=1), max((width for width, _ in sizes), default=1)

    def _size_of(self, path: str) -> Any:
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                with self._pil.open(path) as image:
                    return image.size
        except Exception:  # it is named when it is read
            pass
        return 1, 1


class InMemory:
    """Images uint8 [N, channels, height, width]."""

    def __init__(self, images: Tensor, prepare: Preparation) -> None:
        self._images, self._prepare = images, prepare

    def __len__(self) -> int:
        return len(self._images)

    def name(self, number: int) -> str:
        """See Source."""
        return str(number)

    def read(self, numbers: Sequence[int]) -> list[Pixels]:
        """See Source."""
        pixels = self._prepare.of_tensors(self._images[list(numbers)])
        return [
            _too_large(f"image {i}", x, self._prepare.pad) or x for i, x in zip(numbers, pixels, strict=True)
        ]

    def largest(self) -> tuple[int, int]:
        """See Source."""
        height, width = self._images.shape[-2:]
        return height, width


def _too_large(name: str, pixels: Tensor, pad: int | None) -> str:
    height, width = pixels.shape[-2:]
    if pad is None or max(height, width) <= pad:
        return ""
    return f"{name} is {height}x{width}, and the model has learned from images padded to {pad}x{pad}, which are no larger"


def named(given: Sequence[Path]) -> tuple[list[str], Counter[str]]:
    """Files, and the images in folders and all below, in the order that they are given in; and what is left out of folders.

    Raises:
        OSError: a folder cannot be read.
        ValueError: a folder has no images.
    """
    found: list[str] = []
    left_out: Counter[str] = Counter()
    for path in given:
        if path.is_dir():
            below, others = images_below(path)
            found += below
            left_out += others
        else:
            found.append(str(path))
    return found, left_out
