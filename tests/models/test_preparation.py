"""What a checkpoint's `prepare` does with images is what the run's test did: the same loss, the same accuracy."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import effdense
from effdense.models import Preparation, load_checkpoint
from effdense.train import idx
from tests._training import load, rows, train, write_data

CLASSES = ("blue", "red", "stripes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of unequal sides, whose border is another than their middle."""
    root = tmp_path_factory.mktemp("flowers")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40 + 3 * i, 50 - label, 3), np.uint8)
                pixels[4:-4, 6:-6, label] //= 2
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def result_of(model: Any, x: Tensor, labels: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        scores = model.eval()(x)
    return F.cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).double().mean().item()


def of_folder(folder: Path) -> tuple[list[Path], Tensor]:
    paths = [path for name in CLASSES for path in sorted((folder / "val" / name).iterdir())]
    return paths, torch.tensor([CLASSES.index(path.parent.name) for path in paths])


def assert_reported(out: Path, result: tuple[float, float]) -> None:
    reported = [row for row in rows(out) if row["split"] == "test"][-1]
    assert result[0] == pytest.approx(reported["loss"], rel=1e-6) and result[1] == reported["accuracy"]


@pytest.mark.parametrize("augment", ["resized-crop", "crop-flip"])
def test_a_folder(augment: str, folder: Path, tmp_path: Path) -> None:
    run = ("--data", "folder", "--recipe", "imagenet", "--resize", "16", "--batch-size", "6", "--lr", "0.02")
    assert train(folder, tmp_path, *run, "--augment", augment) == 0
    model: Any = load_checkpoint(tmp_path / "last.pt")
    assert model.class_names == list(CLASSES)
    assert model.prepare.centre == (0.875 if augment == "resized-crop" else 1.0)
    paths, labels = of_folder(folder)
    x = model.prepare(paths)
    assert x.shape == (9, 3, 16, 16) and x.dtype == torch.float32
    assert_reported(tmp_path, result_of(model, x, labels))
    wrong = dataclasses.replace(model.prepare, centre=1.875 - model.prepare.centre)  # the other one
    assert result_of(model, wrong(paths), labels)[0] != pytest.approx(
        result_of(model, x, labels)[0], rel=1e-4
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--recipe", "d2l", "--resize", "16"),
        ("--pad", "32"),
        ("--model", "densenet_bc_10_4", "--dtype", "float64"),
    ],
    ids=["as they are", "resized", "padded", "float64"],
)
def test_images_in_memory(options: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", "12", *options) == 0
    model: Any = load_checkpoint(tmp_path / "last.pt")
    images, labels = idx.read_split(root, "test")
    dtype = next(model.parameters()).dtype
    x = model.prepare(images.unsqueeze(1))
    assert_reported(tmp_path, result_of(model, x.to(dtype), labels.long()))
    Image.fromarray(images[3].numpy()).save(tmp_path / "one.png")
    assert torch.equal(model.prepare(tmp_path / "one.png"), x[3:4])


def test_another_librarys_model(folder: Path, tmp_path: Path) -> None:
    """A plain attribute stands in no way of converting."""
    pytest.importorskip("torchvision")
    run = ("--data", "folder", "--recipe", "imagenet", "--resize", "32", "--batch-size", "6", "--epochs", "1")
    assert train(folder, tmp_path, *run, "--model", "torchvision:densenet121") == 0
    model: Any = effdense.convert(load_checkpoint(tmp_path / "last.pt"))
    assert sum(entry.converted for entry in effdense.report(model)) > 0
    paths, labels = of_folder(folder)
    assert_reported(tmp_path, result_of(model, model.prepare(paths), labels))


def test_an_earlier_versions_checkpoint(folder: Path, tmp_path: Path) -> None:
    """It has the recipe, from which the same follows."""
    run = ("--data", "folder", "--recipe", "imagenet", "--resize", "16", "--batch-size", "6", "--epochs", "1")
    assert train(folder, tmp_path, *run) == 0
    now: Any = load_checkpoint(tmp_path / "last.pt")
    saved = load(tmp_path)
    del saved["preparation"]
    torch.save(saved, tmp_path / "earlier.pt")
    then: Any = load_checkpoint(tmp_path / "earlier.pt")
    assert then.prepare == now.prepare
    torch.save(saved["state_dict"], tmp_path / "weights.pt")
    bare: Any = load_checkpoint(tmp_path / "weights.pt", "densenet_bc_10_4")
    assert not hasattr(bare, "prepare")


FOLDERS = Preparation((0.5, 0.25, 0.75), (0.5, 1.0, 2.0), 3, resize=8, centre=0.5)


def test_what_it_takes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(path := tmp_path / "image.png")
    expected = FOLDERS(image)
    assert expected.shape == (1, 3, 8, 8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (path, str(path), [path], (image,), tensor, tensor.unsqueeze(0)):
        assert torch.equal(FOLDERS(given), expected)
    assert torch.equal(FOLDERS([path, image]), expected.expand(2, -1, -1, -1))
    gray = torch.full((1, 9, 9), 51, dtype=torch.uint8)
    assert FOLDERS(gray)[0, :, 4, 4].tolist() == pytest.approx([-0.6, -0.05, -0.275])


def test_by_hand(tmp_path: Path) -> None:
    """Pillow's own crop and resize of the middle, and the normalisation."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    middle = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR, box=(7, 3, 13, 9))
    x = torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1).float() / 255
    x = (x - torch.tensor(FOLDERS.mean).view(3, 1, 1)) / torch.tensor(FOLDERS.std).view(3, 1, 1)
    torch.testing.assert_close(FOLDERS(Image.fromarray(pixels))[0], x)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ([], ValueError, "one image or more was expected"),
        ("/nowhere.png", ValueError, "/nowhere.png cannot be read: "),
        (__file__, ValueError, "cannot be read: "),
        (7, TypeError, "a path, an image of Pillow's or a tensor was expected, got int"),
        (
            torch.zeros(3, 8, 8),
            ValueError,
            r"must be uint8 \[3, height, width\], .* torch.float32 \[3, 8, 8\]",
        ),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), ValueError, r"got torch.uint8 \[4, 8, 8\]"),
    ],
)
def test_mistakes(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FOLDERS(given)


def test_sizes_that_differ() -> None:
    still = Preparation((0.5,), (0.5,), 1)
    with pytest.raises(ValueError, match="images of one size were expected, got 8x8 and 9x8"):
        still([Image.new("L", (8, 9)), Image.new("L", (8, 8))])


def test_a_model_with_it_is_copied_and_pickled(root: Path, tmp_path: Path) -> None:
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", "12") == 0
    model: Any = load_checkpoint(tmp_path / "best.pt")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.prepare == model.prepare and isinstance(other, nn.Module)
