"""Runs for the tests of evaluate and predict: a folder of images of two classes, one rare, and a net that has seen them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effdense import cli
from tests._training import rows

CLASSES, TRAIN, VAL = ("healthy", "sick"), (12, 4), (9, 2)


def write_images(root: Path) -> Path:
    """`root`/train and `root`/val; sick ones have a bright spot. One is grey, one has 16 bits, one alpha."""
    generator = np.random.default_rng(0)
    for split, counts in (("train", TRAIN), ("val", VAL)):
        for name, count in zip(CLASSES, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (30 + i, 34, 3), np.uint8)
                pixels[12:18, 14:20] += 130 if name == "sick" else 0
                image = Image.fromarray(pixels)
                if split == "val" and i == 1:
                    image = image.convert("L" if name == "sick" else "RGBA")
                if split == "val" and name == "healthy" and i == 2:
                    image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
                image.save(root / split / name / f"{i}.png")
    return root


def train_on(root: Path, out: Path, *more: str) -> Path:
    command = "train --model densenet_bc_10_4 --data folder --recipe imagenet --resize 16 --device cpu --epochs 1 --batch-size 8"
    assert cli.main([*command.split(), "--data-root", str(root), "--out", str(out), *more]) == 0
    return out


def reported(out: Path) -> dict[str, Any]:
    """What a run says of its last test."""
    return [row for row in rows(out) if row["split"] == "test"][-1]


def evaluate(path: Path, tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """What the command writes as JSON."""
    to = tmp_path / "evaluated.json"
    command = ["evaluate", str(path), *arguments, "--device", "cpu", "--json", str(to)]
    assert cli.main(command) == status
    return json.loads(to.read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong call gets."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err
