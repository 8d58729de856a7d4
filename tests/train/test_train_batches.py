"""Order, augmentation and form of the batches, and the data sets: folders of images, CIFAR."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from effdense.models import preparation
from effdense.train import batches, images
from effdense.train.settings import RECIPES, RunConfig
from tests._training import TEST, TRAIN, assert_same_end, load, rows, train, write_data


def settings(data: str, root: Path | None, *, channels: int | None = None, **recipe: Any) -> RunConfig:
    changed = dataclasses.replace(RECIPES["d2l"], **({"resize": None} | recipe))
    return RunConfig("densenet_bc_10_4", data, "d2l", changed, Path("out"), data_root=root, channels=channels)


def test_an_epochs_chance_is_its_own() -> None:
    first, again = (batches.draw(50, "crop-flip", seed=3, epoch=1) for _ in range(2))
    others = [batches.draw(50, "crop-flip", seed, epoch) for seed, epoch in ((3, 2), (4, 1))]
    assert first.order.sort().values.tolist() == list(range(50))
    for a, b in zip(first, again, strict=True):
        assert (a is b is None) or torch.equal(a, b)
    assert all(not torch.equal(first.order, other.order) for other in others)
    assert first.offsets is not None and first.flips is not None
    assert (first.offsets.min(), first.offsets.max()) == (0, 8) and 0 < first.flips.sum() < 50  # type: ignore[comparison-overlap]


def test_crop_and_flip() -> None:
    x = torch.arange(2 * 3 * 5 * 6, dtype=torch.uint8).view(2, 3, 5, 6)
    still = torch.full((2, 2), batches.BORDER)
    no, yes = torch.tensor([False, False]), torch.tensor([True, False])
    assert torch.equal(batches.crop_and_flip(x, still, no), x)
    flipped = batches.crop_and_flip(x, None, yes)
    assert torch.equal(flipped[0], x[0].flip(-1)) and torch.equal(flipped[1], x[1])
    moved = batches.crop_and_flip(x, torch.tensor([[0, 8], [6, 3]]), no)
    border = F.pad(x, (4, 4, 4, 4))
    assert torch.equal(moved[0], border[0, :, 0:5, 8:14]) and torch.equal(moved[1], border[1, :, 6:11, 3:9])


def test_pad_puts_images_in_the_middle() -> None:
    x = torch.ones(1, 1, 28, 28)
    padded = preparation.padded(x, 32)
    assert padded.shape == (1, 1, 32, 32) and padded[..., 2:30, 2:30].sum() == padded.sum() == 28 * 28


def test_cut_is_what_interpolation_gives() -> None:
    """A box of whole pixels at twice its size."""
    x = torch.rand(1, 2, 12, 12, dtype=torch.float64)
    box = torch.tensor([[1 / 9, 1.0, 0.5, 0.25]], dtype=torch.float64)  # 4x4 pixels at row 2, column 4
    cut = batches.cut(x, box, 8)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 4:12, 8:16]
    torch.testing.assert_close(cut, expected)


def test_boxes_are_within_the_image() -> None:
    boxes = batches.draw(500, "resized-crop", 0, 0).boxes
    assert boxes is not None
    for box in boxes.tolist():
        left, top, width, height = images.pixels(box, 30, 20)
        assert 0 <= left <= 30 - width + 1e-9 and 0 <= top <= 20 - height + 1e-9
        assert width * height >= 0.079 * 600 or width in (20, 30) or height in (20, 30)


def test_torchvisions_download_of_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_data(raw)
    data = images.load(settings("fashion-mnist", tmp_path))
    assert (len(data.train.labels), len(data.test.labels), data.channels) == (TRAIN, TEST, 1)


def test_fashion_mnist_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchvision, if it is in none of the places; here by something in its stead."""

    def download(root: str, download: bool) -> None:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        write_data(raw)

    new, never = tmp_path / "new", tmp_path / "never"
    mnist = SimpleNamespace(FashionMNIST=download)
    monkeypatch.setitem(sys.modules, "torchvision.datasets.mnist", mnist)
    assert len(images.load(settings("fashion-mnist", new)).train.labels) == TRAIN

    def unreachable(root: str, download: bool) -> None:
        raise RuntimeError("no network")

    mnist.FashionMNIST = unreachable
    assert len(images.load(settings("fashion-mnist", new)).train.labels) == TRAIN
    nowhere = rf"no Fashion-MNIST in {never} \(--data-root\): .* A download failed: "
    with pytest.raises(FileNotFoundError, match=nowhere + r"FashionMNIST in .* cannot be read: no network"):
        images.load(settings("fashion-mnist", never))
    monkeypatch.setitem(sys.modules, "torchvision.datasets.mnist", None)
    with pytest.raises(FileNotFoundError, match=nowhere + "FashionMNIST needs torchvision"):
        images.load(settings("fashion-mnist", never))


def write_png(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four red and four blue images for training, one each for the test."""
    for i in range(4):
        write_png(tmp_path / "train" / "blue" / f"{i}.png", (0, 0, 255))
        write_png(tmp_path / "train" / "red" / f"{i}.png", (255, 0, 0))
    write_png(tmp_path / "val" / "blue" / "0.png", (0, 0, 255))
    write_png(tmp_path / "val" / "red" / "0.png", (255, 0, 0))
    return tmp_path


def test_a_folder(folder: Path) -> None:
    data = images.load(settings("folder", folder))
    assert (data.classes, data.channels, len(data.train.labels), len(data.test.labels)) == (2, 3, 8, 2)
    assert data.train.labels.tolist() == [0, 1] * 4  # --limit-train leaves some of each
    x = data.train.read(torch.tensor([2, 5]), None)
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.uint8
    assert x[0, :, 0, 0].tolist() == [0, 0, 255] and x[1, :, 5, 5].tolist() == [255, 0, 0]
    write_png(folder / "train" / "red" / "9.png", (255, 0, 0), size=(10, 20))
    boxes = batches.draw(300, "resized-crop", 0, 0).boxes
    wide = images.load(settings("folder", folder, resize=8)).train
    assert wide.read(torch.full((300,), 8), boxes).shape == (300, 3, 8, 8)
    for crop in ("none", "resized-crop"):
        data = images.load(settings("folder", folder, resize=8, augment=crop))
        boxes = batches.draw(9, crop, 0, 0).boxes
        x = data.train.read(torch.tensor([8]), None if boxes is None else boxes[[8]])
        assert x.shape == (1, 3, 8, 8) and x[0, :, 7, 7].tolist() == [255, 0, 0]


def test_training_on_a_folder(folder: Path, tmp_path: Path) -> None:
    run = (
        "--data",
        "folder",
        "--recipe",
        "imagenet",
        "--resize",
        "16",
        "--drop-rate",
        "0",
        "--batch-size",
        "4",
    )
    assert train(folder, tmp_path / "run", *run) == 0
    assert (
        load(tmp_path / "run")["class_names"] == ["blue", "red"]
        and load(tmp_path / "run")["in_channels"] == 3
    )
    assert len(rows(tmp_path / "run")) == 2 * (2 + 2)


def test_a_damaged_image_costs_no_training(folder: Path, tmp_path: Path) -> None:
    run = ("--data", "folder", "--recipe", "imagenet", "--resize", "16", "--batch-size", "4", "--epochs", "1")
    path = folder / "val" / "red" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert train(folder, tmp_path / "run", *run) == 2
    assert load(tmp_path / "run")["step"] == 2
    path.write_bytes(whole)
    assert train(folder, tmp_path / "run", *run, "--resume") == 0
    assert train(folder, tmp_path / "whole", *run) == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda root: write_png(root / "train" / "red" / "9.png", (0, 0, 0), (17, 16)),
            "images of mixed sizes: .*blue/0.png is 16x16, .*red/9.png 17x16; --resize",
        ),
        (
            lambda root: (root / "val" / "red").rename(root / "val" / "green"),
            "train and val have different classes: green, red",
        ),
        (
            lambda root: [write_png(root / "val" / c / "0.png", (0, 0, 0), (9, 16)) for c in ("red", "blue")],
            "images of mixed sizes: .*train/blue/0.png is 16x16, .*val/blue/0.png 9x16; --resize",
        ),
        (
            lambda root: (root / "val" / "red").rename(root / "val" / ".red"),
            r"val: folders of two classes or more were expected, found \['blue'\]",
        ),
        (lambda root: (root / "val" / "red" / "0.png").unlink(), r"val: no images \(\.bmp, .*\) in red"),
        (lambda root: (root / "val").rename(root / "other"), "no folder .*val: --data folder wants"),
    ],
    ids=["sizes", "classes", "val sizes", "one class", "empty", "no val"],
)
def test_damaged_folders(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        images.load(settings("folder", folder))


def test_a_damaged_image(folder: Path) -> None:
    path = folder / "train" / "red" / "0.png"
    data = images.load(settings("folder", folder))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"red/0\.png cannot be read: "):
        data.train.read(torch.tensor([1]), None)


def test_a_damaged_image_of_any_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's readers raise what the bytes bring about."""
    data = images.load(settings("folder", folder, resize=8))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: b""[3])
    with pytest.raises(ValueError, match=r"red/0\.png cannot be read: index out of range"):
        data.train.read(torch.tensor([1]), None)


def test_an_image_that_is_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"blue/0\.png cannot be read: .*decompression bomb"):
        images.load(settings("folder", folder))


def test_files_that_only_look_like_images(folder: Path) -> None:
    (folder / "train" / "red" / "._0.png").write_bytes(b"macOS")
    for name in (".ipynb_checkpoints", "__MACOSX", "red/@eaDir"):
        (folder / "train" / name).mkdir()
    (folder / "train" / "red" / "@eaDir" / "0.png").write_bytes((folder / "train/red/0.png").read_bytes())
    assert len(images.load(settings("folder", folder)).train.labels) == 8


def test_padding_and_resizing_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="--pad and --resize exclude each other for --data folder"):
        images.load(settings("folder", folder, pad=20, resize=16))


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torchvision's reader, one that has downloaded a little."""

    class Fake:
        classes = [str(i) for i in range(10)]  # noqa: RUF012

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert root == str(tmp_path) and download
            self.data = np.full((6 if train else 2, 32, 32, 3), (1, 2, 3), np.uint8)
            self.targets = list(range(len(self.data)))

    monkeypatch.setitem(sys.modules, "torchvision.datasets.cifar", SimpleNamespace(CIFAR10=Fake))
    data = images.load(settings("cifar10", tmp_path))
    assert data.train.read(torch.tensor([5]), None)[0, :, 0, 0].tolist() == [1, 2, 3]
    assert (data.classes, data.channels, len(data.test.labels)) == (10, 3, 2)


def test_cifars_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision reads them: a few images in CIFAR-100's form."""
    cifar = pytest.importorskip("torchvision.datasets.cifar")
    folder = tmp_path / cifar.CIFAR100.base_folder
    folder.mkdir()

    def write(name: str, content: Any) -> tuple[str, str]:
        (folder / name).write_bytes(data := pickle.dumps(content))
        return name, hashlib.md5(data).hexdigest()

    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    files = {
        "train_list": [write("train", {"data": pixels[:4].reshape(4, -1), "fine_labels": [0, 99, 3, 3]})],
        "test_list": [write("test", {"data": pixels[4:].reshape(2, -1), "fine_labels": [7, 8]})],
    }
    name, md5 = write("meta", {"fine_label_names": [str(i) for i in range(100)]})
    meta = {"filename": name, "key": "fine_label_names", "md5": md5}
    for name, value in {**files, "meta": meta, "url": "file:///nowhere"}.items():
        monkeypatch.setattr(cifar.CIFAR100, name, value)
    data = images.load(settings("cifar100", tmp_path))
    assert torch.equal(data.train.read(torch.arange(4), None), torch.from_numpy(pixels[:4]))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 99, 3, 3], [7, 8])
    assert (data.classes, data.channels) == (100, 3)
    (folder / "test").write_bytes((folder / "test").read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"CIFAR100 in {tmp_path} .*{folder}/test \(100 bytes\) is damaged"):
        images.load(settings("cifar100", tmp_path))


@pytest.mark.parametrize(
    "name, module, package", [("cifar10", "torchvision.datasets", "torchvision"), ("folder", "PIL", "pillow")]
)
def test_what_is_not_installed(
    name: str, module: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for part in ("torchvision.datasets.cifar", "PIL.Image"):
        monkeypatch.delitem(sys.modules, part, raising=False)
    with pytest.raises(
        ImportError,
        match=rf"needs {package}, which is not installed: pip install 'effdense\[(vision|train)\]'",
    ):
        images.load(settings(name, folder))


def test_gray_images_for_three_channels() -> None:
    pixels = torch.randint(256, (2, 1, 6, 6), dtype=torch.uint8)
    part = images.InMemory(pixels, torch.tensor([0, 1]))
    prepare = preparation.Preparation((0.5,), (0.25,), 3)
    form = batches.Batches(prepare, torch.empty(0), channels_last=True)
    ((x, labels),) = form.each(part, [torch.tensor([1, 0])], None)
    assert x.shape == (2, 3, 6, 6) and x.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [1, 0]
    torch.testing.assert_close(x[:, 2], (pixels[[1, 0], 0] / 255 - 0.5) / 0.25)
