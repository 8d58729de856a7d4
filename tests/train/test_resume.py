"""`effdense train --resume` and `--weights`: the same classes and data, longer runs, classifiers that are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense.train import checkpoint, images
from tests._training import TRAIN, assert_same_end, load, train, write_flowers, write_idx

SHORT = ("--epochs", "1", "--limit-train", "12")
ON_FOLDER = ("--data", "folder", "--recipe", "d2l", "--resize", "16", "--batch-size", "4", "--epochs", "1")


@pytest.fixture(scope="module")
def short(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, without drops of the learning rate."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert train(root, out, "--epochs", "1", "--drops=") == 0
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_flowers(tmp_path, images=4, size=16)


def rename(folder: Path, name: str, new: str) -> None:
    for split in ("train", "val"):
        (folder / split / name).rename(folder / split / new)


def test_a_longer_run_is_the_run_of_that_length(short: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    out = shutil.copytree(short, tmp_path / "run")
    assert train(root, out, "--epochs", "3", "--drops=", "--resume") == 0
    assert "--epochs was 1 and is 3, which the learning rate follows" in capsys.readouterr().err
    assert train(root, tmp_path / "whole", "--epochs", "3", "--drops=") == 0
    assert_same_end(out, tmp_path / "whole")


def test_epochs_that_were_not_given_again(short: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    """The recipe's 300 are not what somebody wants who has forgotten his own."""
    from effdense import cli
    from tests._training import arguments

    given = arguments(root, short, "--drops=", "--resume")
    del given[given.index("--epochs") : given.index("--epochs") + 2]
    assert cli.main(given) == 2
    assert "epochs was 1 and is 300" in capsys.readouterr().err


def test_a_shorter_run_has_nothing_to_do(short: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    out = shutil.copytree(short, tmp_path / "run")
    assert train(root, out, "--epochs", "3", "--drops=", "--resume") == 0
    assert train(root, out, "--epochs", "2", "--drops=", "--resume") == 0
    assert "epoch 3 was the last: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: rename(f, "red", "amber"), "class names was ['blue', 'red'] and is ['amber', 'blue']"),
        (
            lambda f: (f / "train" / "red" / "3.png").rename(f / "train" / "red" / "x.png"),
            "training data was",
        ),
    ],
    ids=["order of classes", "names of images"],
)
def test_a_folder_that_has_changed(
    change: Any, message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert train(folder, tmp_path / "run", *ON_FOLDER) == 0
    change(folder)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert train(folder, tmp_path / "run", *ON_FOLDER, "--epochs", "2", "--resume") == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_folder_that_has_moved(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "run", *ON_FOLDER) == 0
    moved = folder.rename(tmp_path / "moved")
    assert train(moved, tmp_path / "run", *ON_FOLDER, "--epochs", "2", "--resume") == 0
    assert load(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_is_repaired(split: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Where it is; in another folder it is another data set with the same names."""
    assert train(folder, tmp_path / "run", *ON_FOLDER) == 0
    moved = shutil.copytree(folder, tmp_path / "moved")
    for root in (folder, moved):
        Image.new("L", (9, 9)).save(root / split / "red" / "0.png")
    assert train(moved, tmp_path / "run", *ON_FOLDER, "--epochs", "2", "--resume") == 2
    assert "file sizes was " in capsys.readouterr().err
    if split == "val":
        (folder / "val" / "red" / "1.png").unlink()
    assert train(folder, tmp_path / "run", *ON_FOLDER, "--epochs", "2", "--resume") == 0


@pytest.mark.parametrize("what", ["pixels", "labels"])
def test_another_data_set_of_the_same_form(
    what: str, short: Path, root: Path, tmp_path: Path, capsys: Any
) -> None:
    other = shutil.copytree(root, tmp_path / "other")
    kind, values = (
        ("images-idx3", np.zeros((TRAIN, 28, 28), np.uint8))
        if what == "pixels"
        else (*("labels-idx1", np.arange(TRAIN).astype(np.uint8) % 10),)
    )
    write_idx(other / f"train-{kind}-ubyte.gz", values)
    assert train(other, short, "--epochs", "2", "--drops=", "--resume") == 2
    assert f"training data was '{TRAIN} images, " in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version(short: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    """It does not say all that is compared today, and goes on."""
    out = shutil.copytree(short, tmp_path / "run")
    saved = load(out)
    for name in ("class names", "training data", "test data", "file sizes", "data root", "keep_classifier"):
        del saved["settings"][name]
    for name in ("ema_decay", "val_split", "schedule", "class_weights"):
        del saved["settings"][name], saved["recipe"][name]
    del saved["settings"]["pretrained"]
    for name in ("ema", "stale", "tested"):
        del saved[name]
    torch.save(saved, out / "last.pt")
    assert train(root, out, "--epochs", "2", "--drops=", "--resume", "--ema-decay", "0.9") == 2
    assert "ema_decay was 0.0 and is 0.9" in capsys.readouterr().err
    assert train(root, out, "--epochs", "2", "--drops=", "--resume") == 0
    assert load(out)["epoch"] == 2


def test_long_lists_are_not_printed() -> None:
    names = [str(i) for i in range(1000)]
    other = [*names[:500], "x", *names[501:]]
    for now, message in {
        "class names: number 500 was '500' and is 'x'": other,
        "class names were 1000 and are 999": names[1:],
    }.items():
        with pytest.raises(ValueError, match=f"^run is of another run: {now}$"):
            checkpoint.check_same(Path("run"), {"class names": names}, {"class names": message})


def test_every_value_counts() -> None:
    values = torch.randint(0, 256, (3, 1, 700, 700), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2])
    whole = images.InMemory(values, labels).fingerprint()
    assert images.InMemory(values.clone(), labels).fingerprint() == whole
    for place in ((0, 0, 0, 0), (1, 0, 350, 3), (2, 0, 699, 699)):
        other = values.clone()
        other[place] ^= 1
        assert images.InMemory(other, labels).fingerprint() != whole
    assert images.InMemory(values[[1, 0, 2]], labels).fingerprint() != whole
    assert images.InMemory(values, labels[[1, 0, 2]]).fingerprint() != whole


def test_a_classifier_that_is_kept(short: Path, root: Path, tmp_path: Path) -> None:
    """With a learning rate of nothing, the weights stay what they were."""
    weights = ("--weights", str(short / "last.pt"))
    for keep in (True, False):
        out = tmp_path / str(keep)
        assert train(root, out, *SHORT, "--lr", "0", *weights, *(["--keep-classifier"] if keep else [])) == 0
        state, before = load(out)["state_dict"], load(short)["state_dict"]
        assert torch.equal(state["features.conv0.weight"], before["features.conv0.weight"])
        assert torch.equal(state["classifier.weight"], before["classifier.weight"]) == keep


def test_a_classifier_of_other_classes(folder: Path, short: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(folder, tmp_path / "run", *ON_FOLDER) == 0
    rename(folder, "red", "amber")
    kept = ("--weights", str(tmp_path / "run" / "last.pt"), "--keep-classifier")
    assert train(folder, tmp_path / "tuned", *ON_FOLDER, *kept) == 2
    said = capsys.readouterr().err
    assert (
        "is for other classes, or for these in another order: blue, red, and the data have amber, blue"
        in said
    )
    torch.save(load(short)["state_dict"], tmp_path / "ten.pt")  # which does not say for which
    assert (
        train(folder, tmp_path / "tuned", *ON_FOLDER, "--weights", str(tmp_path / "ten.pt"), *kept[2:]) == 2
    )
    said = capsys.readouterr().err
    assert (
        "(10, " in said and "for (2, " in said and "; without --keep-classifier the classifier is new" in said
    )
    assert "strip_classifier" not in said


def test_a_classifier_of_nothing(root: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(root, tmp_path, *SHORT, "--keep-classifier") == 2
    assert "--keep-classifier needs --weights" in capsys.readouterr().err
