"""A folder of images: what is taken and what is left out, links that lead back, and images of other forms than 8-bit colour."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense.models import Preparation, load_checkpoint
from effdense.train import images
from effdense.train.listing import images_by_class
from tests._training import load, train
from tests.train.test_train_batches import settings

CLASSES = ("blue", "red")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), name).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def names(root: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    found, left_out = images_by_class(root)
    return {c: [os.path.relpath(path, root) for path in paths] for c, paths in found.items()}, left_out


PLAIN = {name: [f"{name}/{i}.png" for i in range(4)] for name in CLASSES}
BACK = "links to folders that are read anyway, or hold this one"


@pytest.mark.parametrize("target", [".", "..", "../..", "../blue", "../../train", "/"])
def test_a_link_that_leads_back(target: str, folder: Path) -> None:
    (folder / "train" / "red" / "a link").symlink_to(target)
    assert names(folder / "train") == (PLAIN, {BACK: 1})
    through = folder / "another name"
    through.symlink_to("train")
    found, left_out = images_by_class(through)
    assert [len(paths) for paths in found.values()] == [4, 4] and left_out == {BACK: 1}


def test_links_to_elsewhere_are_followed_once(folder: Path) -> None:
    more = folder / "more" / "deeper"
    more.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(more / "x.png")
    for link in ("one", "two"):
        (folder / "train" / "red" / link).symlink_to(folder / "more")
    (folder / "more" / "round").symlink_to(folder / "more")
    (folder / "train" / "red" / "file.png").symlink_to(folder / "val" / "red" / "0.png")
    found, left_out = names(folder / "train")
    assert found["red"] == [*PLAIN["red"], "red/file.png", "red/one/deeper/x.png"] and left_out == {BACK: 2}


def test_classes_that_are_links(folder: Path) -> None:
    (folder / "train" / "green").symlink_to(folder / "val" / "red")
    assert names(folder / "train")[0] == {**PLAIN, "green": [f"green/{i}.png" for i in range(4)]}
    (folder / "train" / "violet").symlink_to("red")
    with pytest.raises(ValueError, match=r"train: class violet is the same folder as .*/train/red"):
        images_by_class(folder / "train")
    (folder / "train" / "violet").unlink()
    (folder / "train" / "up").symlink_to("..")
    with pytest.raises(ValueError, match=f"train: class up is the same folder as {folder}"):
        images_by_class(folder / "train")


def test_files_that_are_left_out_are_counted(folder: Path) -> None:
    red = folder / "train" / "red"
    for name in ("a.gif", "b.GIF", "notes.txt", "README", ".hidden.png"):
        (red / name).write_bytes(b"")
    os.mkfifo(red / "pipe.png")  # reading it would wait for ever
    (red / "broken.png").symlink_to("nowhere.png")
    (red / "itself.png").symlink_to("itself.png")
    (red / "to a pipe.png").symlink_to("pipe.png")
    (red / ".ipynb_checkpoints").mkdir()
    (red / ".ipynb_checkpoints" / "0.png").write_bytes(b"")
    (folder / "train" / "list.csv").touch()
    left_out = {
        **{".gif": 2, ".txt": 1, "without an extension": 1, "beside the classes' folders": 1},
        **{"pipes, sockets or devices": 1, "broken links": 3},
    }
    assert names(folder / "train") == (PLAIN, left_out)
    assert images.load(settings("folder", folder)).train.labels.tolist() == [0, 1] * 4


def test_a_class_of_other_files(folder: Path) -> None:
    for path in (folder / "val" / "red").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"val: no images \(\.bmp, .*\) in red; left out: 4 \.gif"):
        images.load(settings("folder", folder))


def test_a_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for an empty one; root may read all, so that the system's answer is put in."""
    (folder / "train" / "red" / "deeper").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="deeper"):
        images_by_class(folder / "train")


# --- images of other forms


def png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write in colour; `kind`: PNG's type of colour."""
    height, width = values.shape[:2]

    def chunk(name: bytes, content: bytes) -> bytes:
        whole = name + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


DEEP = np.random.default_rng(0).integers(0, 2**16, (16, 16)).astype(np.uint16)


def write_deep(path: Path, form: str) -> Path:
    path = path.with_suffix(f".{form}")
    if form == "pgm":
        path.write_bytes(b"P5\n16 16\n65535\n" + DEEP.astype(">u2").tobytes())
    elif form == "png":
        path.write_bytes(png(DEEP, 0))
    else:
        Image.fromarray(DEEP).save(path)
    return path


@pytest.mark.parametrize("form", ["png", "pgm", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_of_16_bits_keeps_them(form: str, channels: int, folder: Path) -> None:
    path = write_deep(folder / "train" / "red" / "deep", form)
    data = images.load(settings("folder", folder, channels=channels)).train
    assert isinstance(data, images.Folder)
    x = data.read(torch.tensor([data.paths.index(str(path)), 0]), None)
    assert x.shape == (2, channels, 16, 16) and x.dtype == torch.float32
    torch.testing.assert_close(x[0] * 257, torch.from_numpy(DEEP.astype(np.float32)).expand(channels, -1, -1))
    assert x[1, channels - 1].unique().tolist() == [255 if channels == 3 else 29]  # 8 bits, of blue
    prepare = Preparation((0.5,) * channels, (1.0,) * channels, channels)
    torch.testing.assert_close(prepare(path)[0], x[0] / 255 - 0.5)


def test_gray_of_16_bits_is_resized(folder: Path) -> None:
    path = write_deep(folder / "deep", "png")
    prepare = Preparation((0.0,), (1.0,), 1, resize=8, centre=0.5)
    expected = Image.fromarray(DEEP.astype(np.float32)).resize(
        (8, 8), Image.Resampling.BILINEAR, box=(4, 4, 12, 12)
    )
    torch.testing.assert_close(prepare(path)[0, 0], torch.from_numpy(np.array(expected)) / 65535)


def test_floats_have_no_known_range(folder: Path) -> None:
    Image.fromarray(np.ones((16, 16), np.float32)).save(path := folder / "train" / "red" / "0.tif")
    data = images.load(settings("folder", folder))
    assert isinstance(data.train, images.Folder)
    with pytest.raises(
        ValueError, match=rf"{path} cannot be read: 32 bits a pixel, whose range is not known"
    ):
        data.train.read(torch.tensor([data.train.paths.index(str(path))]), None)


def test_other_forms_are_counted(folder: Path) -> None:
    red, colors = folder / "train" / "red", np.repeat(DEEP[:, :, None], 4, 2)
    write_deep(red / "deep", "png")
    (red / "deep color.png").write_bytes(png(colors[:, :, :3], 2))
    (red / "deep alpha.png").write_bytes(png(colors, 6))
    (red / "deep color.ppm").write_bytes(b"P6\n16 16\n65535\n" + colors[:, :, :3].astype(">u2").tobytes())
    Image.new("L", (16, 16)).save(red / "gray.png")
    Image.new("LA", (16, 16)).save(red / "gray alpha.png")
    Image.new("RGBA", (16, 16)).save(red / "alpha.png")
    palette = Image.new("P", (16, 16))
    palette.save(red / "palette.png", transparency=0)
    (red / "damaged.png").write_bytes(b"no image")
    eight, alpha = "with 16 bits a channel, of which 8 are read", "transparent, which is left out"
    data = images.load(settings("folder", folder, resize=8)).train
    assert isinstance(data, images.Folder)
    gray, damaged = "grey, repeated to 3 channels", "damaged, at which the run will end"
    assert data.kinds() == (
        17,
        {
            **{damaged: 1, f"{gray} and with 16 bits": 1, eight: 2, f"{eight} and {alpha}": 1},
            **{gray: 1, f"{gray} and {alpha}": 1, alpha: 2},
        },
    )
    data = images.load(settings("folder", folder, resize=8, channels=1)).train
    assert isinstance(data, images.Folder)
    color = "in colour, read as grey"
    assert data.kinds()[1] == {
        **{damaged: 1, "with 16 bits": 1, f"{color} and {eight}": 2, f"{color} and {eight} and {alpha}": 1},
        **{f"{color}": 8, alpha: 1, f"{color} and {alpha}": 2},
    }


def test_turned_images_and_further_pages_are_counted(tmp_path: Path) -> None:
    turned, blank = Image.Exif(), Image.new("RGB", (16, 16))
    turned[0x0112] = 6
    blank.save(tmp_path / "turned.jpg", exif=turned)
    blank.save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    prepare, found = Preparation((0.5,) * 3, (0.5,) * 3, 3), []
    for name in ("turned.jpg", "pages.tif"):
        with Image.open(tmp_path / name) as file:
            found.append(prepare.loses(file))
            assert not prepare.pixels(file).any()
    assert found == [
        "turned by its EXIF data, which are left out",
        "of several pages, of which the first is read",
    ]


def test_a_bitmap_of_16_bits_a_pixel_has_5_a_channel(folder: Path) -> None:
    file = Image.new("RGB", (16, 16))
    file.tile = [("raw", (0, 0, 16, 16), 0, ("BGR;16", 0, 1))]  # type: ignore[attr-defined]  # as Pillow has it of a BMP
    assert Preparation((0.5,) * 3, (0.5,) * 3, 3).loses(file) == ""


def test_training_in_gray(folder: Path, tmp_path: Path) -> None:
    run = ("--data", "folder", "--recipe", "d2l", "--resize", "16", "--batch-size", "4", "--channels", "1")
    assert train(folder, tmp_path / "run", *run, "--epochs", "1") == 0
    assert load(tmp_path / "run")["in_channels"] == 1
    model: Any = load_checkpoint(tmp_path / "run" / "last.pt")
    assert model.prepare(folder / "val" / "red" / "0.png").shape == (1, 1, 16, 16)
    assert train(folder, tmp_path / "run", *run, "--epochs", "2", "--resume") == 0
    assert train(folder, tmp_path / "run", *run[:-2], "--epochs", "3", "--resume") == 2


def test_channels_of_other_data(tmp_path: Path, capsys: Any) -> None:
    assert train(tmp_path, tmp_path / "run", "--channels", "1") == 2
    assert "--channels is for --data folder; fashion-mnist has its own" in capsys.readouterr().err
