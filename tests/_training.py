"""Shared by the tests of `effdense train`: a small Fashion-MNIST in the data set's form, and short runs on it."""

from __future__ import annotations

import csv
import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import data
from effdense import cli

TRAIN, TEST, BATCH = 60, 20, 12
STEPS = TRAIN // BATCH  # in an epoch
FLOAT_COLUMNS = ("loss", "accuracy", "lr")


class Terminal(io.StringIO):
    """As rich wants one."""

    def isatty(self) -> bool:
        return True


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    """`magic`: the file's first number, where it is to be a wrong one."""
    magic = {3: 2051, 1: 2049}[array.ndim] if magic is None else magic
    header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def write_data(folder: Path) -> Path:
    """The four files, with the first images of the cut."""
    images, labels = data.load_cut()
    for prefix, part in (("train", slice(TRAIN)), ("t10k", slice(TRAIN, TRAIN + TEST))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[part])
    return folder


def write_flowers(root: Path, images: int, size: int) -> Path:
    """`root`/flowers: train and val, each with so many random images of two classes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (root / "flowers" / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(root / "flowers" / split / name / f"{i}.png")
    return root / "flowers"


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    """Two epochs with augmentation and dropout, so that everything that is left to chance takes part."""
    return [
        *("train", "--model", "densenet_bc_10_4", "--data", "fashion-mnist", "--data-root", str(root)),
        *("--out", str(out), "--device", "cpu", "--epochs", "2", "--batch-size", str(BATCH)),
        *("--drop-rate", "0.2", "--log-every", "1", *more),
    ]


def train(root: Path, out: Path, *more: str) -> int:
    """With one thread, whoever calls: results are the same to the bit for one number of threads only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cli.main(arguments(root, out, *more))
    finally:
        torch.set_num_threads(threads)


def rows(out: Path) -> list[dict[str, Any]]:
    """metrics.csv without what the machine decides."""
    with (out / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    names = ("epoch", "step", "split")
    return [{n: row[n] for n in names} | {n: float(row[n]) for n in FLOAT_COLUMNS} for row in found]


def load(out: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(out / name, weights_only=True)


def assert_same_end(out: Path, other: Path) -> None:
    """The same losses and the same weights, momenta and random state, to the bit."""
    assert rows(out) == rows(other)
    got, expected = load(out), load(other)
    for part in ("state_dict", "random", "optimizer", "step", "best", "epoch"):
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)
