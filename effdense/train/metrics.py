"""Records a run while it trains: metrics.csv and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effdense import extras


class Row(NamedTuple):
    """A line of metrics.csv.

    `split` is "step" (mean of the epoch's steps since the line before), "train" (mean of an epoch), "val" (with a validation: after
    every epoch) or "test" (after every epoch, with a validation of the best one at the end); `epoch` counts from 1,
    `step` from the run's beginning; `loss` is the cross entropy in nats, in training what the recipe makes of it; `peak_bytes` is the first process's, in "train" and "test" the
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


@dataclasses.dataclass
class Sums:
    """Of the steps since some moment, of one epoch."""

    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: float, images: int, seconds: float) -> None:
        """One more step."""
        self.loss += loss
        self.correct += correct
        self.images += images
        self.seconds += seconds


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
        self._path = path = folder / "metrics.csv"
        if path.exists() and not path.is_file():
            raise OSError(f"{path} cannot be written: it is no regular file")
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
            with self._while_the_board_takes_it():
                self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except ImportError:
            hint = extras.pip_install("tensorboard")
            print(f"TensorBoard is not installed and gets nothing: {hint}", file=sys.stderr)

    @contextlib.contextmanager
    def _while_the_board_takes_it(self) -> Iterator[None]:
        """The curves are a second copy: where they cannot be written the run goes on without them."""
        try:
            yield
        except OSError as error:
            self._board = None
            print(f"TensorBoard gets nothing more: {error.strerror or error}", file=sys.stderr)

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def write(self, row: Row) -> None:
        with self._on_disk():
            self._csv.writerow(row)
            self._file.flush()
        if self._board is not None:
            with self._while_the_board_takes_it():
                for name in ("loss", "accuracy", "lr", "images_per_second", "peak_bytes"):
                    self._board.add_scalar(f"{name}/{row.split}", getattr(row, name), row.step)

    def size(self) -> int:
        """Of metrics.csv, in bytes, all of them on the disk; TensorBoard's events are too."""
        if self._board is not None:
            with self._while_the_board_takes_it():
                self._board.flush()
        with self._on_disk():
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        with self._on_disk():
            self._file.close()
        if self._board is not None:
            with self._while_the_board_takes_it():
                self._board.close()
