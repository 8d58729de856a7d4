"""The data sets. In memory images are uint8 [N, C, H, W]; a folder's images are read when they are needed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from effdense import extras
from effdense.train import idx
from effdense.train.settings import RunConfig

# Mean and standard deviation of the training images, as fractions of 255; a folder's are ImageNet's.
STATISTICS = {
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Images(Protocol):
    """Some images with labels int64 [N]."""

    labels: Tensor

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """uint8 [n, C, H, W]: the images of these numbers, each cut to its box (see `pixels`)."""
        ...


class DataSet(NamedTuple):
    """What a run is trained and tested on."""

    train: Images
    test: Images
    class_names: list[str]
    channels: int
    mean: Tensor
    std: Tensor

    @property
    def classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass
class InMemory:
    """Images uint8 [N, C, H, W] that are there as a whole."""

    images: Tensor
    labels: Tensor

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """See Images. Boxes are cut out by `cut`, on the device and after all else."""
        return self.images[chosen]


DOWNLOADS = Path("data")  # where torchvision puts what it downloads, without --data-root
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Folder:
    """The images of a folder with one folder a class, as torchvision's ImageFolder has them; [3, size, size] each.

    The first of every class come first, then the second, so that --limit-train leaves some of each.

    Args:
        root: the folder.
        size: to which the square in an image's middle is brought; None: images stay as they are.
        workers: how many threads read.
        centre: what part of that square's sides is taken.
    """

    def __init__(self, root: Path, size: int | None, workers: int, centre: float = 1.0) -> None:
        folders = (entry.name for entry in root.iterdir() if entry.is_dir())
        self.classes = sorted(name for name in folders if not name.startswith("."))
        if len(self.classes) < 2:
            raise ValueError(
                f"{root}: folders of two classes or more were expected, found {self.classes or 'none'}"
            )
        found = [sorted(_images_below(root / name)) for name in self.classes]
        if empty := [name for name, paths in zip(self.classes, found, strict=True) if not paths]:
            raise ValueError(f"{root}: no images ({', '.join(EXTENSIONS)}) in {', '.join(empty[:5])}")
        ordered = sorted(
            (i, label, path) for label, paths in enumerate(found) for i, path in enumerate(paths)
        )
        self.paths = [path for _, _, path in ordered]
        self.labels = torch.tensor([label for _, label, _ in ordered])
        self._size, self._centre = size, centre
        self._threads = ThreadPoolExecutor(max(1, workers))
        self._pil = extras.load("PIL.Image", "a folder of images")

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
        except (OSError, SyntaxError, ValueError, self._pil.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def read(self, chosen: Tensor, boxes: Tensor | None) -> Tensor:
        """See Images."""
        own: Sequence[Any] = [None] * len(chosen) if boxes is None else boxes.tolist()
        paths = [self.paths[i] for i in chosen.tolist()]
        return torch.stack(list(self._threads.map(self._read_one, paths, own)))

    def _read_one(self, path: str, box: Any) -> Tensor:
        with self._opened(path) as file:
            if file.mode.startswith(("I", "F")):  # which Pillow would cut off at 255
                raise ValueError(f"more than 8 bits a channel (Pillow's mode {file.mode})")
            image = file.convert("RGB")
        if self._size is not None:
            width, height = image.size
            side = self._centre * min(width, height)
            left, top, w, h = (width - side) / 2, (height - side) / 2, side, side
            if box is not None:
                left, top, w, h = pixels(box, width, height)
            size = (self._size, self._size)
            box = (left, top, min(left + w, width), min(top + h, height))  # rounding aside
            image = image.resize(size, self._pil.Resampling.BILINEAR, box=box)
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return values.view(image.height, image.width, 3).permute(2, 0, 1)


def _images_below(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(where, name)


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
    parts, names = _read(settings)
    for name, part in zip(("training", "test"), parts, strict=True):
        if not len(part.labels):
            raise ValueError(f"{settings.data}: there are no {name} images")
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(names):
            found = f"{int(part.labels.min())} to {int(part.labels.max())}"
            raise ValueError(
                f"{settings.data}: the {name} labels must be 0 to {len(names) - 1}, found {found}"
            )
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in STATISTICS[settings.data])
    return DataSet(*parts, names, mean.shape[1], mean, std)


def _read(settings: RunConfig) -> tuple[tuple[Images, Images], list[str]]:
    """Training and test images, and the classes' names; in Fashion-MNIST's form classes have numbers only."""
    if settings.data == "fashion-mnist":
        root = _find_fashion_mnist(settings.data_root)
        gray = (idx.read_split(root, split) for split in ("train", "test"))
        train, test = (InMemory(x.unsqueeze(1), y.long()) for x, y in gray)
        return (train, test), [str(label) for label in range(idx.CLASSES)]
    if settings.data == "folder":
        return _read_folder(settings)
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


def _read_folder(settings: RunConfig) -> tuple[tuple[Images, Images], list[str]]:
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
    train = Folder(root / names[0], size, settings.workers)
    test = Folder(root / names[1], size, settings.workers, centre=0.875 if crops else 1.0)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{root}: {names[0]} and {names[1]} have different classes: {', '.join(differ[:5])}")
    if size is None:
        _check_sizes(train, test)
    return (train, test), train.classes
