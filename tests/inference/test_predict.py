"""`effdense predict`: a row of CSV for every image, and a line for what cannot be read."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense import cli, progress
from effdense.models import load_checkpoint
from tests._training import Terminal, train, write_data
from tests.inference._runs import CLASSES, VAL, read_csv, refused, train_on, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on(images, tmp_path_factory.mktemp("run") / "run")


def predict(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> tuple[list[dict[str, str]], str]:
    capsys.readouterr()
    assert cli.main(["predict", *map(str, arguments), "--device", "cpu"]) == status
    said = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(said.out))), said.err


def probabilities(run: Path, path: str | Path) -> list[float]:
    model: Any = load_checkpoint(run / "best.pt").eval()
    with torch.no_grad():
        return model(model.prepare(path)).softmax(1)[0].tolist()


def test_a_folder_and_all_below(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey, 16-bit and transparent ones too, prepared as for the test."""
    found, error = predict(capsys, run, images / "val", "--batch", 4)
    assert (
        not error
        and len(found) == sum(VAL)
        and list(found[0]) == ["file", "predicted", "p(healthy)", "p(sick)"]
    )
    for row in found:
        p = probabilities(run, row["file"])
        assert [float(row[f"p({name})"]) for name in CLASSES] == pytest.approx(p, rel=1e-4)
        assert row["predicted"] == CLASSES[p.index(max(p))]


def test_files_top_and_csv(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [images / "val" / "sick" / "1.png", images / "val" / "healthy" / "0.png"]
    to = tmp_path / "table.csv"
    shown, _ = predict(capsys, run / "best.pt", *some, "--top", 5, "--csv", to)
    assert not shown
    found = read_csv(to)
    assert [row["file"] for row in found] == list(map(str, some))
    for row in found:
        assert list(row) == ["file", "predicted 1", "p 1", "predicted 2", "p 2"]
        p = dict(zip(CLASSES, probabilities(run, row["file"]), strict=True))
        assert float(row["p 1"]) == pytest.approx(max(p.values()), rel=1e-4)
        assert p[row["predicted 1"]] == max(p.values()) and float(row["p 1"]) >= float(row["p 2"])


def test_what_cannot_be_read(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.png").write_bytes((images / "val" / "sick" / "0.png").read_bytes()[:200])
    (tmp_path / "scan.gif").touch()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "whole.png")
    os.mkfifo(tmp_path / "pipe")
    given = (run, tmp_path, tmp_path / "missing.png", tmp_path / "pipe", tmp_path / "scan.gif")
    found, error = predict(capsys, *given, status=1)
    assert [Path(row["file"]).name for row in found] == ["whole.png"]
    lines = error.splitlines()
    assert len(lines) == 6 and all(
        kind in lines[0] for kind in ("left out: ", "1 .gif", "1 without an extension")
    )
    for line, what in zip(
        lines[1:],
        (
            "cut.png cannot be read",
            "missing.png cannot be read: No such file",
            "pipe cannot be read: it is no file",
            "scan.gif cannot be read",
            "4 of 5 images left out",
        ),
        strict=True,
    ):
        assert line.startswith("effdense predict: ") and what in line
    predict(capsys, *given, "--ignore-unreadable", status=0)
    predict(capsys, run, tmp_path / "cut.png", "--ignore-unreadable", status=1)  # there is nothing else


def test_images_of_several_sizes_that_stay_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a run has not resized, as on Fashion-MNIST's; and where it has padded, larger ones do not fit."""
    root = write_data(tmp_path)
    for i, size in enumerate((28, 40, 28)):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size - 4 * i, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    given = [tmp_path / f"{i}.png" for i in range(3)]
    more = ("--epochs", "1", "--limit-train", "12")
    assert (
        train(root, tmp_path / "still", *more) == train(root, tmp_path / "padded", *more, "--pad", "32") == 0
    )
    found, error = predict(capsys, tmp_path / "still", *given)
    assert not error and [row["file"] for row in found] == list(map(str, given))
    for row in found:
        expected = probabilities(tmp_path / "still", row["file"])
        assert [float(row[f"p({i})"]) for i in range(10)] == pytest.approx(expected, rel=1e-4)
    found, error = predict(capsys, tmp_path / "padded", *given, status=1)
    assert (
        len(found) == 2 and "1.png is 40x36, and the model has learned from images padded to 32x32" in error
    )


def test_lines_where_there_is_no_terminal(
    images: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, where they are no part of the table."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    found, error = predict(capsys, run, images / "val", "--batch", 4)
    said = [line.split(", ") for line in error.splitlines()]
    assert len(found) == sum(VAL) == 11
    assert [counts for counts, _ in said] == [f"{done} of 11 images" for done in (4, 8, 11)]
    assert all(rate.endswith(" images/s") for _, rate in said)


def test_a_bar_on_a_terminal(
    images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table above it, and names as they are."""
    name = tmp_path / "a :smile: [b].png"
    name.write_bytes((images / "val" / "sick" / "0.png").read_bytes())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["predict", str(run), str(name), "--device", "cpu"]) == 0
    shown = terminal.getvalue()
    assert f"{name},{CLASSES[0]}," in shown or f"{name},{CLASSES[1]}," in shown
    assert "1/1" in shown and "images/s" in shown


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images (.bmp, " in refused(["predict", run, tmp_path / "empty"], capsys)
    (tmp_path / "empty" / "scan.dcm").touch()
    assert "left out: 1 .dcm" in refused(["predict", run, tmp_path / "empty"], capsys)
    assert "a folder of effdense train" in refused(["predict", "/nowhere", tmp_path], capsys)
    assert "cannot be written: it is a folder" in refused(
        ["predict", run, tmp_path, "--csv", tmp_path], capsys
    )
