"""A radiologist's day, command by command: train on a folder, Ctrl-C, resume, evaluate, predict, export, run elsewhere."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import effdense

CLASSES = {"normal": 24, "nodule": 9}  # images for training of each; rare is what matters


def write_scans(root: Path) -> Path:
    """16-bit grey images of two sizes: noise, and in one class a bright disc somewhere."""
    rng = np.random.default_rng(0)
    for split, part in (("train", 1), ("val", 3)):
        for name, count in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count // part):
                height, width = ((40, 36), (36, 48))[i % 2]
                pixels = rng.normal(12000, 1500, (height, width))
                if name == "nodule":
                    y, x = rng.integers(10, 26, 2)
                    rows, columns = np.ogrid[:height, :width]
                    pixels[(rows - y) ** 2 + (columns - x) ** 2 < 49] += 30000
                Image.fromarray(pixels.clip(0, 65535).astype(np.uint16)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def effdense_command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "effdense", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> str:
    program = effdense_command(folder, *arguments)
    out, error = program.communicate(timeout=300)
    assert program.returncode == 0, (arguments, out, error)
    return out


def test_a_day(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    recipe = (
        "--recipe finetune --class-weights balanced --augment none --resize 40 --epochs 12 --early-stop 12"
    )
    train = [
        *("train", "--model", "densenet_bc_10_8", "--data", "folder", "--data-root", "scans", "--out", "run"),
        *(*recipe.split(), "--batch-size", "8", "--lr", "0.01", "--ema-decay", "0.5", "--device", "cpu"),
    ]

    interrupted = effdense_command(tmp_path, *train)
    metrics = tmp_path / "run" / "metrics.csv"
    for _ in range(3000):  # Ctrl-C once the first epoch is over
        if interrupted.poll() is not None or (metrics.exists() and metrics.read_text().count("\n1,") >= 2):
            break
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    said = "\n".join(interrupted.communicate(timeout=300))
    assert interrupted.returncode == 130 and "Traceback" not in said, said
    run(tmp_path, *train, "--resume")
    reported = json.loads((tmp_path / "run" / "results.json").read_text())

    run(tmp_path, "evaluate", "run", "--json", "evaluation.json", "--predictions", "images.csv")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["images"] == 11 and evaluation["accuracy"] > 0.9, evaluation
    expected = reported["test of the best epoch"]
    assert evaluation["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert evaluation["loss"] == pytest.approx(expected["loss"], rel=1e-4)

    run(tmp_path, "predict", "run", "scans/val", "--csv", "predictions.csv")
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    right = sum(Path(row["file"]).parent.name == row["predicted"] for row in rows)
    assert right / len(rows) == pytest.approx(evaluation["accuracy"])

    model = effdense.models.load_checkpoint(tmp_path / "run" / "best.pt")
    images = model.prepare([tmp_path / row["file"] for row in rows])
    run(tmp_path, "export", "run", "-o", "model.pt2")
    scores = torch.export.load(tmp_path / "model.pt2").module()(images)
    check(scores, rows, model.class_names)
    onnxruntime = pytest.importorskip("onnxruntime")
    run(tmp_path, "export", "run", "-o", "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    check(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), rows, model.class_names)


def check(scores: torch.Tensor, rows: list[dict[str, str]], names: list[str]) -> None:
    """The same probabilities as `effdense predict` has written."""
    written = torch.tensor([[float(row[f"p({name})"]) for name in names] for row in rows])
    torch.testing.assert_close(scores.softmax(1), written, rtol=0, atol=1e-4)
