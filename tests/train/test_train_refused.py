"""`effdense train`: every wrong call and damaged file is one line that says what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effdense import models
from tests._training import TEST, TRAIN, load, train, write_data, write_idx

SHORT = ("--epochs", "1", "--limit-train", "12")


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(shared_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(shared_root, out, *SHORT) == 0
    return out


def said(capsys: Any) -> str:
    error: str = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "TensorBoard" not in line]
    assert len(lines) == 1 and lines[0].startswith("effdense train: "), error
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "densenet_bc_11_4"), "the nearest is 10"),
        (("--model", "densenet_d2l", "--drop-rate", "0.1"), "densenet_d2l' cannot be built with"),
        (("--batch-size", "64"), "--batch-size 64 is more than there are training images, 60"),
        (
            ("--batch-size", "12", "--accumulate", "5"),
            "must be a multiple of --accumulate 5 times 1 processes",
        ),
        (("--batch-size", "1"), "batch norm needs two images or more at a time"),
        (("--batch-size", "12", "--accumulate", "12"), "--batch-size 12 in 12 parts leaves one"),
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used here: "),
        (("--device", "gpu"), "device 'gpu' cannot be used here: "),
        (("--device", "meta"), "device 'meta' cannot be used here: "),
        (("--device", ""), "device '' cannot be used here: "),
        (
            ("--resize", "65535"),
            "a batch of images of 65535x65535 pixels alone takes 192 GiB, and this machine has",
        ),
        (("--model", "densenet_bc_1000000000_12"), "would have 499999998 layers with "),
        (("--sync-bn", "--impl", "naive"), "--sync-bn with --impl naive needs GPUs"),
        (("--pad", "20"), "--pad must be at least the images' size, 28x28, got 20"),
        (("--data", "folder", "--data-root", "/nowhere"), "no folder /nowhere/train"),
        (("--resume",), "no checkpoint"),
        (("--weights", "/nowhere.pt"), "/nowhere.pt"),
        (("--weights", __file__), "cannot be read: it is text"),
        (("--recipe", "tutorial", "--nesterov"), "--nesterov needs --momentum above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_calls(
    options: tuple[str, ...], message: str, shared_root: Path, tmp_path: Path, capsys: Any
) -> None:
    assert train(shared_root, tmp_path, *options) == 2
    assert message in said(capsys)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--data", "cifar"), "invalid choice: 'cifar'"),
        (("--epochs", "0"), "a whole number of 1 or more was expected, got '0'"),
        (("--seed", "-1"), "a whole number from 0 to 4294967295 was expected, got '-1'"),
        (("--epochs", "1e20"), "a whole number of 1 or more was expected, got '1e20'"),
        (("--batch-size", "99999999999999999999"), "a whole number of 1 or more was expected"),
        (("--resize", "1000000000"), "a whole number from 1 to 65535 was expected, got '1000000000'"),
        (("--pad", "-3"), "a whole number from 1 to 65535 was expected, got '-3'"),
        (("--workers", "1000000"), "a whole number from 1 to 1024 was expected"),
        (("--lr", "1e400"), "a number of 0 or more was expected, got '1e400'"),
        (("--lr", "nan"), "a number of 0 or more was expected, got 'nan'"),
        (("--drops", "150,225"), "parts of the run between 0 and 1 were expected"),
    ],
)
def test_wrong_values(
    options: tuple[str, ...], message: str, shared_root: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(shared_root, tmp_path, *options)
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_converted(
    shared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(models, "build", lambda name, **_: torch.nn.Sequential(torch.nn.Conv2d(1, 10, 28)))
    assert train(shared_root, tmp_path) == 2
    assert "nothing in model 'densenet_bc_10_4' can be converted; --impl naive trains it" in said(capsys)


@pytest.mark.parametrize(
    "count, message",
    [
        (61, "there are more processes (61) than training images (60)"),
        (5, "must be a multiple of --accumulate 1 times 5 processes"),
        (12, "--batch-size 12 in 12 parts leaves one; on several processes --sync-bn helps"),
    ],
)
def test_too_many_processes(
    count: int, message: str, shared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As the first of them sees it."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for name in ("init_process_group", "all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    assert train(shared_root, tmp_path) == 2
    assert message in said(capsys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "t10k-labels-idx1-ubyte.gz").unlink(), "t10k-labels-idx1-ubyte.gz is missing"),
        (
            lambda root: truncate(root / "train-images-idx3-ubyte.gz"),
            f"train-images-idx3-ubyte.gz must hold {16 + TRAIN * 28 * 28} bytes when unpacked, found ",
        ),
        (
            lambda root: (root / "train-images-idx3-ubyte.gz").write_text("no gzip"),
            "train-images-idx3-ubyte.gz is damaged or not gzip (7 bytes on disk",
        ),
        (
            lambda root: write_idx(root / "train-labels-idx1-ubyte.gz", np.full(TRAIN, 10, np.uint8)),
            "train-labels-idx1-ubyte.gz: labels must be 0 to 9, found 10",
        ),
        (
            lambda root: write_idx(root / "t10k-labels-idx1-ubyte.gz", np.zeros(TEST - 1, np.uint8)),
            f"has {TEST} images, t10k-labels-idx1-ubyte.gz {TEST - 1} labels",
        ),
        (
            lambda root: write_idx(root / "t10k-images-idx3-ubyte.gz", np.zeros((TEST, 32, 32), np.uint8)),
            f"must hold an array of shape ({TEST}, 28, 28), its header says ({TEST}, 32, 32)",
        ),
    ],
    ids=["missing", "truncated", "no gzip", "labels", "fewer labels", "sizes"],
)
def test_damaged_data(damage: Any, message: str, shared_root: Path, tmp_path: Path, capsys: Any) -> None:
    root = shutil.copytree(shared_root, tmp_path / "data")
    damage(root)
    assert train(root, tmp_path / "run") == 2
    assert message in said(capsys)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "densenet_bc_16_4"), "model was 'densenet_bc_10_4' and is 'densenet_bc_16_4'"),
        (("--lr", "0.2"), "lr was 0.1 and is 0.2"),
        (("--impl", "naive"), "impl was 'effdense' and is 'naive'"),
        (("--recipe", "d2l"), "momentum was 0.9 and is 0.0"),
        (("--seed", "7", "--limit-train", "24"), "limit_train was 12 and is 24; seed was 0 and is 7"),
    ],
)
def test_a_checkpoint_of_another_run(
    options: tuple[str, ...], message: str, shared_root: Path, run: Path, capsys: Any
) -> None:
    before = (run / "last.pt").read_bytes()
    assert train(shared_root, run, *SHORT, "--resume", *options) == 2
    assert message in said(capsys)
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "another"])
def test_a_corrupt_checkpoint(damage: str, shared_root: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    content = bytearray((run / "last.pt").read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        for place in range(len(content) // 2, len(content) // 2 + 200):  # more than the form's own padding
            content[place] ^= 255
    (tmp_path / "last.pt").write_bytes(b"no checkpoint" if damage == "text" else content)
    if damage == "another":
        torch.save(load(run)["state_dict"], tmp_path / "last.pt")
    assert train(shared_root, tmp_path, *SHORT, "--resume") == 2
    wanted = "is not a checkpoint of effdense train" if damage == "another" else "cannot be read: "
    assert re.search(rf"{tmp_path}/last\.pt (\(\d+ bytes\) )?{wanted}", said(capsys))


def test_a_folder_that_takes_nothing(shared_root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert train(shared_root, tmp_path / "file" / "run") == 2
    assert f"--out {tmp_path}/file/run cannot be written: Not a directory" in said(capsys)


def test_a_folder_with_a_run_in_it(shared_root: Path, run: Path, capsys: Any) -> None:
    assert train(shared_root, run, *SHORT) == 2
    assert f"--out {run} holds a run: --resume goes on with it" in said(capsys)
