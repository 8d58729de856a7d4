"""Readers of files, whole files for them, and damage: a reader gives what is in a file or one error of ours, soon and in little memory."""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib.util
import io
import json
import resource
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from effdense import models
from effdense.models.preparation import Preparation
from effdense.tensor_files import load_tensors, save_tensors
from effdense.tools import plots
from effdense.train import checkpoint, idx, images

SECONDS = 20  # of processor time, until a reader counts as hanging
MEMORY = 512 * 2**20  # bytes beyond what the process has


class TooLong(BaseException):
    """A reader hangs."""


class Reader(NamedTuple):
    """How a kind of file is read, and whole ones of them."""

    read: Callable[[Path], Any]
    whole: Callable[[], list[bytes]]
    name: str  # of the file


def _small() -> nn.Module:
    torch.manual_seed(0)
    return models.build("densenet_bc_10_4", num_classes=2)


def saved(content: Any, legacy: bool = False) -> bytes:
    """As torch.save has it."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def _safetensors(content: dict[str, Any]) -> list[bytes]:
    if importlib.util.find_spec("safetensors") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(content, path := Path(folder) / "x.safetensors")
        return [path.read_bytes()]


def some_tensors() -> dict[str, Any]:
    """A few, of several dtypes."""
    return {"a.weight": torch.ones(2, 3), "b": torch.tensor(3), "c": torch.zeros(0, 2).half()}


def a_checkpoint() -> dict[str, Any]:
    """What `effdense train` saves, less what only `--resume` reads."""
    recipe = {"name": "paper", "augment": "none", "resize": None, "pad": None}
    return {
        "model": "densenet_bc_10_4",
        "options": {"num_classes": 2, "in_channels": 3},
        "class_names": ["blue", "red"],
        "in_channels": 3,
        "preparation": {"mean": (0.4,) * 3, "std": (0.2,) * 3, "channels": 3, "pad": None, "resize": 8},
        "state_dict": _small().state_dict(),
        "recipe": recipe,
        "settings": {"data": "folder"},
    }


def idx_bytes(array: np.ndarray, packed: bool = True) -> bytes:
    """An array in IDX's form."""
    magic = {3: 2051, 1: 2049}[array.ndim]
    plain = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
    return gzip.compress(plain, 1, mtime=0) if packed else plain


LABELS = np.arange(3, dtype=np.uint8)


def read_idx(path: Path) -> Any:
    """As the images of a training set, with labels that are whole."""
    path.rename(path.with_name("train-images-idx3-ubyte.gz"))
    path.with_name("train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(LABELS))
    return idx.read_split(path.parent, "train")


PREPARE = Preparation((0.4,) * 3, (0.2,) * 3, 3, resize=8, centre=0.875)


def read_image(path: Path) -> Any:
    """By itself, and as one of a folder's."""
    for name in ("a", "b"):
        (path.parent / name).mkdir(exist_ok=True)
        (path.parent / name / path.name).write_bytes(path.read_bytes())
    folder = images.Folder(path.parent, PREPARE, 1)
    folder.kinds()
    with contextlib.suppress(ValueError):  # the same that is raised below
        folder.sizes()
    try:
        folder.read(torch.tensor([0]), None)
    finally:
        folder._threads.shutdown()
        PREPARE(path)


def some_images() -> list[bytes]:
    """In every format that a folder may hold, with and without colour, transparency and 16 bits."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    every: list[tuple[Any, str, dict[str, Any]]] = [
        (Image.fromarray(pixels[..., :3]), f, {}) for f in ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")
    ]
    every += [
        (Image.fromarray(pixels), "PNG", {}),
        (Image.fromarray(pixels[..., 0]), "JPEG", {"progressive": True}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "PNG", {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "TIFF", {}),
        (Image.fromarray(pixels[..., :3]).convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(pixels[..., :3]), "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(pixels[..., :3]), "TIFF", {"compression": "tiff_adobe_deflate"}),
    ]
    found = []
    for image, form, options in every:
        image.save(file := io.BytesIO(), form, **options)
        found.append(file.getvalue())
    return found


def _metrics() -> list[bytes]:
    head = "epoch,step,split,loss,accuracy,lr,images_per_second,peak_bytes,seconds\n"
    row = "1,5,{},2.25,0.25,0.1,100.0,1000000,1.5\n"
    return [(head + row.format("train") + row.format("test")).encode()]


READERS = {
    "tensors": Reader(
        load_tensors,
        lambda: [saved(some_tensors()), saved(some_tensors(), True), *_safetensors(some_tensors())],
        "x.pt",
    ),
    "weights": Reader(
        lambda path: models.load_weights(_small(), path),
        lambda: [saved(_small().state_dict()), *_safetensors(_small().state_dict())],
        "x.pt",
    ),
    "checkpoint": Reader(models.load_checkpoint, lambda: [saved(a_checkpoint())], "x.pt"),
    "resume": Reader(checkpoint.load, lambda: [saved(a_checkpoint())], "last.pt"),
    "idx": Reader(
        read_idx,
        lambda: [
            idx_bytes(np.zeros((3, 28, 28), np.uint8)),
            idx_bytes(np.zeros((3, 28, 28), np.uint8), False),
        ],
        "x.gz",
    ),
    "image": Reader(read_image, some_images, "x.png"),
    "metrics": Reader(plots.read_run, _metrics, "metrics.csv"),
}


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long; raises AssertionError where too much memory was taken."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s of processor time")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, limits = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        resource.getrlimit(resource.RLIMIT_AS),
    )
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 8 * MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert more < MEMORY, f"a file of few bytes has taken {more / 2**20:.0f} MiB"


def read_damaged(name: str, content: bytes) -> None:
    """Raises what is not one of a reader's own errors, which name the file."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / reader.name).write_bytes(content)
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            try:
                reader.read(path)
            except (ValueError, OSError) as error:
                if isinstance(error, UnicodeError):
                    raise AssertionError(f"no error of ours: {error!r}") from error
                text = str(error)
                assert folder in text, f"an error that does not name the file: {error!r}"
                assert "\n" not in text, f"an error of several lines: {error!r}"


# --- damage

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


class Damage(NamedTuple):
    """One thing that happens to a file's bytes, at a place (in millionths of its length)."""

    kind: str  # of KINDS
    place: int
    value: int


def _at(content: bytearray, place: int) -> int:
    return place * len(content) // 1_000_000


KINDS: dict[str, Callable[[bytearray, int, int], Any]] = {
    "flip": lambda c, i, v: c.__setitem__(slice(i, i + 1), bytes(b ^ 1 << v % 8 for b in c[i : i + 1])),
    "byte": lambda c, i, v: c.__setitem__(slice(i, i + 1), bytes([v % 256])),
    "cut": lambda c, i, v: c.__delitem__(slice(i, None)),
    "delete": lambda c, i, v: c.__delitem__(slice(i, i + v % 64)),
    "insert": lambda c, i, v: c.__setitem__(slice(i, i), bytes([v % 256]) * (1 + v % 9)),
    "repeat": lambda c, i, v: c.__setitem__(slice(i, i), c[i : i + v % 64]),
    "number": lambda c, i, v: c.__setitem__(
        slice(i, i + 4), struct.pack((">I", "<I")[v % 2], NUMBERS[v % len(NUMBERS)])
    ),
    "zeros": lambda c, i, v: c.__setitem__(slice(i, i + v % 300), bytes(v % 300)),
}


def damaged(content: bytes, damage: list[Damage]) -> bytes:
    """The bytes after all of that."""
    changed = bytearray(content)
    for one in damage:
        KINDS[one.kind](changed, _at(changed, one.place), one.value)
    return bytes(changed)


ODD: list[Any] = [None, 0, -1, 2**40, 1.5, float("nan"), "", "x", [], {}, [None], {"x": 1}, (), True, b"x"]


class Change(NamedTuple):
    """A value inside of a saved object that becomes another one, or goes; `path`: which entry, level by level."""

    path: tuple[int, ...]
    odd: int  # of ODD; beyond: it goes


def changed(content: Any, changes: list[Change]) -> Any:
    """A copy of a saved object with odd values in it."""
    content = copy.deepcopy(content)
    odd = [*ODD, torch.zeros(2, 3), torch.zeros(0), torch.tensor(1)]
    for change in changes:
        holder, parent, key = content, None, None
        for step in change.path:
            if not isinstance(holder, dict) or not holder:
                break
            key = list(holder)[step % len(holder)]
            parent, holder = holder, holder[key]
        if parent is None:
            continue
        if change.odd >= len(odd):
            del parent[key]
        else:
            parent[key] = odd[change.odd]
    return content


def safetensors_of(header: Any, data: bytes) -> bytes:
    """A file of safetensors with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
