"""The labelled images that a model is evaluated on: those of its run's test, a data set, or a folder with a folder per class."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.inference.sources import Files, InMemory, Source
from effdense.inference.trained import Trained
from effdense.tensor_files import shortly
from effdense.train import idx, images
from effdense.train.settings import AUGMENTATIONS, DATA, Recipe, RunConfig

_PLACES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's folders


class Labelled(NamedTuple):
    """Images, and of each the number of its class among those of the model."""

    where: str
    source: Source
    labels: Tensor
    left_out: Counter[str]
    of_the_run: bool  # the very images of its test


def load(trained: Trained, data: str | None, root: Path | None, workers: int) -> Labelled:
    """Finds the images.

    Args:
        trained: the model.
        data: one of `effdense train`'s data sets, or a folder; None: those of the run's test.
        root: where the data set is, as for `effdense train`.
        workers: how many threads read files.

    Raises:
        ImportError: a data set needs a library that is missing.
        OSError: a folder is missing, or cannot be read.
        ValueError: the model does not know all of the classes, or the data are damaged.
    """
    if data == "folder" and root is not None:
        data = str(root)
    if data is not None and (data not in DATA or data == "folder" or os.path.isdir(data)):
        return _folder(trained, Path(data), workers)
    name = data or trained.settings.get("data")
    if not isinstance(name, str) or name not in DATA:
        raise ValueError(
            f"{trained.path} does not say on which data it was tested (data in its entry 'settings'): name DATA"
        )
    return _data_set(trained, name, root, workers, own=data is None)


def _data_set(trained: Trained, name: str, root: Path | None, workers: int, own: bool) -> Labelled:
    """A data set's test images, found and read as a run does it; `own`: as the run did that trained the model."""
    root = root or _where(trained.settings, name)
    settings = (
        _run(trained.path, trained.settings, name, root, workers) if own else _plain(name, root, workers)
    )
    try:
        loaded = images.load(settings)
    except FileNotFoundError as error:
        if not own:
            raise
        raise FileNotFoundError(
            f"the data of the run's test are not where they were: {error}; name DATA"
        ) from error
    test = loaded.test
    source: Source
    if isinstance(test, images.Folder):
        source = Files(test.paths, trained.prepare, workers)
    else:
        source = InMemory(test.read(torch.arange(len(test.labels)), None), trained.prepare)
    left_out = test.left_out if isinstance(test, images.Folder) else Counter[str]()
    where = f"the test images of {name}" + (f" in {root}" if root else "")
    labels = _known(trained, where, loaded.class_names, test.labels)
    same = test.fingerprint() == trained.settings.get("test data")
    return Labelled(where, source, labels, left_out, same)


def _where(settings: Mapping[str, Any], name: str) -> Path | None:
    """Where a run found a data set, if it is still there. The run says the folder that it was started in where it was not told one."""
    if settings.get("data") != name or not isinstance(settings.get("data root"), str):
        return None
    root = Path(settings["data root"])
    if name == "folder":
        return root
    for place in (root, root / images.DOWNLOADS):
        if name == "fashion-mnist":
            try:
                idx.find(place)
            except FileNotFoundError:
                continue
            return place
        if (place / _PLACES[name]).is_dir():
            return place
    return None


def _run(path: Path, saved: Mapping[str, Any], name: str, root: Path | None, workers: int) -> RunConfig:
    """The settings of a run that decide how its test images are read, as far as its checkpoint has them."""
    plain = _plain(name, root, workers)
    found: dict[str, Any] = {"augment": plain.recipe.augment, "resize": None, "pad": None, "channels": None}
    found |= {key: saved[key] for key in found if key in saved}
    right = {
        "augment": isinstance(found["augment"], str) and found["augment"] in AUGMENTATIONS,
        "channels": found["channels"] is None
        or (type(found["channels"]) is int and found["channels"] in (1, 3)),
        **{key: found[key] is None or type(found[key]) is int for key in ("resize", "pad")},
    }
    for key, is_right in right.items():
        if not is_right:
            raise ValueError(f"{path} is damaged: its entry 'settings' has {key} {shortly(found[key])}")
    channels = found.pop("channels")
    recipe = dataclasses.replace(plain.recipe, **found)
    return dataclasses.replace(plain, recipe=recipe, channels=channels if name == "folder" else None)


def _plain(name: str, root: Path | None, workers: int) -> RunConfig:
    recipe = Recipe(epochs=1, batch_size=1)
    return RunConfig("", name, "", recipe, Path(), data_root=root, workers=workers)


def _folder(trained: Trained, root: Path, workers: int) -> Labelled:
    """A folder with a folder per class, or with such a folder named val or test."""
    if not root.is_dir():
        sets = ", ".join(name for name in DATA if name != "folder")
        raise FileNotFoundError(
            f"there is no folder {root}: DATA is {sets}, or a folder with a folder per class"
        )
    if not any((root / name).is_dir() for name in trained.class_names):
        root = next((root / name for name in ("val", "test") if (root / name).is_dir()), root)
    found = images.Folder(root, trained.prepare, workers, least=1)
    labels = _known(trained, str(root), found.classes, found.labels)
    same = found.fingerprint() == trained.settings.get("test data") and found.classes == trained.class_names
    return Labelled(str(root), Files(found.paths, trained.prepare, workers), labels, found.left_out, same)


def _known(trained: Trained, where: str, names: Sequence[str], labels: Tensor) -> Tensor:
    """Labels as the model numbers its classes, which are told by their names: it may know more than there are."""
    known = {name: number for number, name in enumerate(trained.class_names)}
    if unknown := [name for name in names if name not in known]:
        missing = [name for name in trained.class_names if name not in names]
        lacking = f", and there is no {_some(missing)}" if missing else ""
        raise ValueError(
            f"{where} has classes that {trained.path} does not know: {_some(unknown)}{lacking}; the model's are "
            f"{_some(trained.class_names)}"
        )
    return torch.tensor([known[name] for name in names])[labels]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" … ({len(names)})" if len(names) > 10 else "")
