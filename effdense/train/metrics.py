"""Reports a run while it trains: metrics.csv, TensorBoard, and the terminal."""

from __future__ import annotations

import csv
import importlib
import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effdense import extras


class Row(NamedTuple):
    """A line of metrics.csv.

    `split` is "step" (mean of the steps since the line before), "train" (mean of an epoch) or "test"; `epoch` counts from 1,
    `step` from the run's beginning; `loss` is the cross entropy in nats; `peak_bytes` is the first process's, in "train" and "test" the
    largest of all processes'; `seconds` is the time that the run has taken, all parts of it.
    """

    epoch: int
    step: int
    split: str
    loss: float
    accuracy: float
    lr: float
    images_per_second: float
    peak_bytes: int
    seconds: float


def peak_bytes(device: torch.device) -> int:
    """The most that this process has had: of a GPU's memory, PyTorch's allocator; else its resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()  # ru_maxrss would inherit the parent's through exec
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Metrics:
    """Writes rows.

    Args:
        folder: where metrics.csv and TensorBoard's events go.
        size: to how many bytes a former metrics.csv is cut, because the run goes on from there; 0: a new one.
        step: what comes behind it of TensorBoard's former events is void.
    """

    def __init__(self, folder: Path, size: int, step: int) -> None:
        path = folder / "metrics.csv"
        kept = path.read_bytes()[:size] if path.exists() else b""
        size = kept.rfind(b"\n") + 1  # whoever has shortened it may have left half a line
        self._file = path.open("r+" if size else "w", newline="")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        self._csv = csv.writer(self._file, lineterminator="\n")
        if not self._file.tell():
            self._csv.writerow(Row._fields)
        self._board: Any = None
        try:
            board = importlib.import_module("torch.utils.tensorboard")
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except ImportError:
            hint = extras.pip_install("tensorboard")
            print(f"TensorBoard is not installed and gets nothing: {hint}", file=sys.stderr)

    def write(self, row: Row) -> None:
        self._csv.writerow(row)
        self._file.flush()
        if self._board is not None:
            for name in ("loss", "accuracy", "lr", "images_per_second", "peak_bytes"):
                self._board.add_scalar(f"{name}/{row.split}", getattr(row, name), row.step)

    def size(self) -> int:
        """Of metrics.csv, in bytes, all of them on the disk; TensorBoard's events are too."""
        if self._board is not None:
            self._board.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Display:
    """A bar on a terminal that has one, and a line for every epoch.

    Args:
        epochs: how many there will be.
        steps: in an epoch.
    """

    def __init__(self, epochs: int, steps: int) -> None:
        self._epochs, self._steps = epochs, steps
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                self._bar = self._start_bar()
            except ImportError:
                hint = extras.pip_install("rich", "train")
                print(f"no progress bar without rich: {hint}", file=sys.stderr)

    def _start_bar(self) -> Any:
        progress, console = (importlib.import_module(f"rich.{name}") for name in ("progress", "console"))
        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[now]}"),
            console=console.Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
        )
        bar.start()
        self._task = bar.add_task("", total=self._steps, now="")
        return bar

    def show(self, row: Row, done: int) -> None:
        """How far the epoch is."""
        if self._bar is not None:
            epoch = f"epoch {row.epoch}/{self._epochs}"
            self._bar.update(self._task, completed=done, description=epoch, now=_words(row))

    def line(self, train: Row, test: Row) -> None:
        """Says what an epoch has come to."""
        text = f"epoch {train.epoch}/{self._epochs}: {_words(train)}; test loss {test.loss:.4f}, accuracy {test.accuracy:.4f}"
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, highlight=False)  # above the bar
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _words(row: Row) -> str:
    return (
        f"loss {row.loss:.4f}, accuracy {row.accuracy:.4f}, {row.images_per_second:.1f} images/s, "
        f"peak {row.peak_bytes / 2**20:.0f} MiB"
    )
