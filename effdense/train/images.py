"""The data sets. In memory images are uint8 [N, C, H, W]; a folder's images are read when they are needed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from effdense import extras
from effdense.models.preparation import STATISTICS, Preparation, for_test
from effdense.train import idx
from effdense.train.listing import images_by_class
from effdense.train.settings import RunConfig


class Images(Protocol):
    """Some images with labels int64 [N]."""

    labels: Tensor

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """uint8 [n, C, H, W]: the images of these numbers, of each what its box (see `pixels`) holds.

        Where one has 16 bits they are float32, of 0 to 255 all the same.
        """
        ...

    def subset(self, numbers: Tensor) -> Images:
        """Those of these numbers, in this order."""
        ...

    def fingerprint(self) -> str:
        """Tells these images from others, and from themselves in another order."""
        ...

    def file_sizes(self) -> str:
        """Tells files from others of the same names; empty where the fingerprint is of all they hold."""
        ...


class DataSet(NamedTuple):
    """What a run is trained and tested on."""

    train: Images
    test: Images
    class_names: list[str]
    prepare: Preparation  # of its `channels`, what the model takes is not known yet

    @property
    def channels(self) -> int:
        """That images are read with."""
        return len(self.prepare.mean)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def fixed(self, root: Path | None) -> dict[str, Any]:
        """What is compared where a run goes on; `root`: the folder of the data."""
        return {
            "class names": self.class_names,
            "training data": self.train.fingerprint(),
            "test data": self.test.fingerprint(),
            "file sizes": f"{self.train.file_sizes()} {self.test.file_sizes()}",
            "data root": os.path.realpath(root or ""),
        }


@dataclasses.dataclass
class InMemory:
    """Images uint8 [N, C, H, W] that are there as a whole."""

    images: Tensor
    labels: Tensor

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """See Images. Boxes are cut out by `cut`, on the device and after all else."""
        return self.images[chosen]

    def subset(self, numbers: Tensor) -> InMemory:
        """See Images."""
        return InMemory(self.images[numbers], self.labels[numbers])

    def fingerprint(self) -> str:
        """See Images. Of every value and its place."""
        return f"{len(self.labels)} images, {_checksum(self.images) ^ _checksum(self.labels):x}"

    def file_sizes(self) -> str:
        """See Images."""
        return ""


def _checksum(values: Tensor) -> int:
    parts = values.flatten().split(2**20)
    places = torch.arange(1, len(parts[0]) + 1) if parts else values
    sums = ((part.long() * places[: len(part)]).sum().item() for part in parts)
    return sum(i * int(n) for i, n in enumerate(sums, 1)) % 2**48


DOWNLOADS = Path("data")  # where torchvision puts what it downloads, without --data-root


class Folder:
    """The images of a folder with one folder a class, as torchvision's ImageFolder has them.

    The first of every class come first, then the second, so that --limit-train leaves some of each.

    Args:
        root: the folder.
        prepare: how an image's pixels become those that are read.
        workers: how many threads read.
        least: the least number of classes.
    """

    def __init__(self, root: Path, prepare: Preparation, workers: int, least: int = 2) -> None:
        found, self.left_out = images_by_class(root, least)
        self.classes = list(found)
        ordered = sorted(
            (i, label, path) for label, paths in enumerate(found.values()) for i, path in enumerate(paths)
        )
        self.paths = [path for _, _, path in ordered]
        self._root = root
        self.labels = torch.tensor([label for _, label, _ in ordered])
        self._prepare = prepare
        self._threads = ThreadPoolExecutor(max(1, workers))
        self._pil = extras.load("PIL.Image", "a folder of images")

    def subset(self, numbers: Tensor) -> Folder:
        """See Images."""
        part = copy.copy(self)
        part.paths, part.labels = [self.paths[i] for i in numbers.tolist()], self.labels[numbers]
        return part

    def fingerprint(self) -> str:
        """See Images. Of all names below the folder, which may move."""
        names = "\0".join(os.path.relpath(path, self._root) for path in self.paths)
        return f"{len(self.paths)} images, {_digest(names)}"

    def file_sizes(self) -> str:
        """See Images. Of a thousand files."""
        some = self.paths[:: 1 + len(self.paths) // 1000]
        return _digest(str(list(self._threads.map(os.path.getsize, some))))

    def kinds(self) -> tuple[int, Counter[str]]:
        """How many images were looked at, up to some thousand of them, and how many of which kind there are."""
        some = self.paths[:: 1 + len(self.paths) // 2000]
        return len(some), Counter(kind for kind in self._threads.map(self._kind_of, some) if kind)

    def _kind_of(self, path: str) -> str:
        try:
            with self._pil.open(path) as image:
                return self._prepare.loses(image)
        except Exception:  # whatever a damaged one makes of it, it is named when it is read
            return "damaged, at which the run will end"

    def sizes(self) -> list[tuple[int, int]]:
        """Every image's width and height."""
        return list(self._threads.map(self._size_of, self.paths))

    def _size_of(self, path: str) -> Any:
        with self._opened(path) as image:
            return image.size

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        try:
            with self._pil.open(path) as image:
                yield image
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged one makes of it
            raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """See Images."""
        own: Sequence[Any] = [None] * len(chosen) if boxes is None else boxes.tolist()
        paths = [self.paths[i] for i in chosen.tolist()]
        read = list(self._threads.map(self._read_one, paths, own))
        exact = next((image.dtype for image in read if image.dtype != torch.uint8), torch.uint8)
        return torch.stack([image.to(exact) for image in read])

    def _read_one(self, path: str, box: Any) -> Tensor:
        with self._opened(path) as file:
            return self._prepare.pixels(file, None if box is None else pixels(box, *file.size))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def pixels(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of a box (area, ratio, x, y) in an image; x and y are parts of the room that is left."""
    area, ratio, x, y = box
    w = min(float(width), (area * width * height * ratio) ** 0.5)
    h = min(float(height), (area * width * height / ratio) ** 0.5)
    return x * (width - w), y * (height - h), w, h


def load(settings: RunConfig) -> DataSet:
    """Reads the data set of a run, or finds the images.

    Raises:
        ImportError: it needs a library that is missing.
        OSError: a file or folder is missing.
        ValueError: the data are damaged, or too few.
    """
    if settings.data not in STATISTICS:
        raise ValueError(f"data must be one of {', '.join(STATISTICS)}, got {settings.data!r}")
    if settings.channels is not None and settings.data != "folder":
        raise ValueError(f"--channels is for --data folder; {settings.data} has its own")
    recipe, channels = settings.recipe, settings.channels or len(STATISTICS[settings.data][0])
    prepare = for_test(settings.data, channels, recipe.augment, recipe.resize, recipe.pad)
    parts, names = _read(settings, prepare)
    for name, part in zip(("training", "test"), parts, strict=True):
        if not len(part.labels):
            raise ValueError(f"{settings.data}: there are no {name} images")
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(names):
            found = f"{int(part.labels.min())} to {int(part.labels.max())}"
            raise ValueError(
                f"{settings.data}: the {name} labels must be 0 to {len(names) - 1}, found {found}"
            )
    return DataSet(*parts, names, prepare)


def _read(settings: RunConfig, prepare: Preparation) -> tuple[tuple[Images, Images], list[str]]:
    """Training and test images, and the classes' names; in Fashion-MNIST's form classes have numbers only."""
    if settings.data == "fashion-mnist":
        root = _find_fashion_mnist(settings.data_root)
        gray = (idx.read_split(root, split) for split in ("train", "test"))
        train, test = (InMemory(x.unsqueeze(1), y.long()) for x, y in gray)
        return (train, test), [str(label) for label in range(idx.CLASSES)]
    if settings.data == "folder":
        return _read_folder(settings, prepare)
    root = settings.data_root or DOWNLOADS
    both = [_torchvisions("cifar", settings.data.upper(), root, train=train) for train in (True, False)]
    train, test = (
        InMemory(torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)) for data in both
    )
    return (train, test), list(both[0].classes)


def _check_sizes(*parts: Folder) -> None:
    found = [(path, size) for part in parts for path, size in zip(part.paths, part.sizes(), strict=True)]
    first, wanted = found[0]
    for path, size in found:
        if size != wanted:
            raise ValueError(
                f"images of mixed sizes: {first} is {wanted[0]}x{wanted[1]}, {path} {size[0]}x{size[1]}; "
                "--resize brings them to one"
            )


def _find_fashion_mnist(data_root: Path | None) -> Path:
    try:
        return idx.find(data_root)
    except FileNotFoundError as nowhere:
        root = data_root or DOWNLOADS
        try:
            _torchvisions("mnist", "FashionMNIST", root)
        except (ImportError, ValueError) as error:
            raise FileNotFoundError(f"{nowhere}. A download failed: {error}") from error
        return idx.find(root)


def _torchvisions(module: str, name: str, root: Path, **options: Any) -> Any:
    """One of torchvision's data sets, downloaded if it is not in `root`."""
    reader = getattr(extras.load(f"torchvision.datasets.{module}", name), name)
    try:
        return reader(str(root), download=True, **options)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{name} in {root} cannot be read: {error}{_damaged(reader, root)}") from error


def _damaged(reader: Any, root: Path) -> str:
    """Which of a data set's files are there, but not as they were published."""
    listed = [*getattr(reader, "train_list", ()), *getattr(reader, "test_list", ())]
    paths = [(root / reader.base_folder / name, md5) for name, md5 in listed]
    return "".join(
        f"; {path} ({path.stat().st_size} bytes) is damaged, its MD5 is not {md5}"
        for path, md5 in paths
        if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5
    )


def _read_folder(settings: RunConfig, prepare: Preparation) -> tuple[tuple[Images, Images], list[str]]:
    """DATA_ROOT/train and DATA_ROOT/val or DATA_ROOT/test."""
    root = settings.data_root
    if root is None:
        raise ValueError("--data folder needs --data-root, a folder with train and val (or test) in it")
    names = ["train", next((name for name in ("val", "test") if (root / name).is_dir()), "val")]
    for name in names:
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"no folder {root / name}: --data folder wants {root} to hold train and val (or test)"
            )
    size = settings.recipe.resize
    crops = settings.recipe.augment == "resized-crop"
    if crops and size is None:
        raise ValueError("--augment resized-crop on a folder needs --resize, the size of what is cut out")
    if settings.recipe.pad is not None and size is not None:
        raise ValueError(
            "--pad and --resize exclude each other for --data folder, whose images are resized first"
        )
    train, test = (Folder(root / name, prepare, settings.workers) for name in names)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{root}: {names[0]} and {names[1]} have different classes: {', '.join(differ[:5])}")
    if size is None:
        _check_sizes(train, test)
    return (train, test), train.classes
