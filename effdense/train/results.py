"""Writes results.json: a run's settings, its machine, and the figures of every epoch."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from effdense import files
from effdense.machine import cpu_model
from effdense.ops.extension import build_info
from effdense.train.settings import RunConfig


def write(
    folder: Path, settings: RunConfig, sizes: dict[str, int], device: torch.device, watched: str = "test"
) -> None:
    """Writes `folder`/results.json, with the epochs that metrics.csv has.

    Args:
        folder: the run's.
        settings: the run's.
        sizes: of the data, the model and the group of processes.
        device: on which this process runs.
        watched: what is tested after every epoch, "test" or "val".

    Raises:
        OSError: it cannot be written.
    """
    epochs, test = _epochs(folder / "metrics.csv", watched)
    content = {
        "settings": {name: _plain(value) for name, value in dataclasses.asdict(settings).items()},
        **sizes,
        "machine": machine(device),
        "epochs": epochs,
        f"best {watched} accuracy": max((epoch[watched]["accuracy"] for epoch in epochs), default=None),
        **({} if watched == "test" else {"test of the best epoch": test}),
    }
    files.write_json(content, folder / "results.json")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _epochs(metrics: Path, watched: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The epochs, and the last test."""
    with metrics.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = {(int(row["epoch"]), row["split"]): row for row in lines}
    epochs = [
        {
            "epoch": epoch,
            **{split: _values(rows[epoch, split], ("loss", "accuracy")) for split in ("train", watched)},
            **_values(row, ("step", "lr", "images_per_second", "peak_bytes")),
            **_values(rows[epoch, watched], ("seconds",)),
        }
        for (epoch, split), row in rows.items()
        if split == "train"
    ]
    tests = [row for row in lines if row["split"] == "test"]
    return epochs, _values(tests[-1], ("epoch", "loss", "accuracy")) if tests else None


def _values(row: dict[str, str], names: tuple[str, ...]) -> dict[str, float]:
    return {name: json.loads(row[name]) for name in names}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, and the software that decides about times."""
    build = build_info()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effdense": build,
    }
