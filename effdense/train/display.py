"""What a run shows while it goes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from typing import Any

from effdense import extras, files
from effdense.train.metrics import Row
from effdense.train.settings import Recipe

FIRST, EVERY = 10.0, 60.0  # seconds until the first line of an epoch that goes on, and between them
BAR = 10  # columns


class Display:
    """A bar on a terminal, else a line a minute, and a line for every epoch.

    Args:
        recipe: the run's.
        steps: in an epoch.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self._recipe, self._steps = recipe, steps
        self._bar: Any = None
        self._mute = False
        self._due = time.monotonic() + FIRST
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
            progress.BarColumn(BAR),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[now]}", markup=False),
            console=console.Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
        )
        bar.start()
        self._task = bar.add_task("", total=self._steps, now="")
        return bar

    def show(self, row: Row, done: int) -> None:
        """How far the epoch is."""
        name = self._name(row.epoch)
        if self._bar is not None:
            self._move(name, done, self._steps, _wordings(row))
        elif self._is_due():
            left = (self._steps - done) * self._recipe.batch_size / row.images_per_second
            self.say(f"{name}, step {done} of {self._steps}: {_words(row)}; {_duration(left)} left of it")

    def show_test(self, epoch: int, done: int, batches: int) -> None:
        """How far the test behind an epoch is."""
        name = self._name(epoch)
        if self._bar is not None:
            self._move(name, done, batches, ["test"])
        elif self._is_due():
            self.say(f"{name}, test, batch {done} of {batches}")

    def _name(self, epoch: int) -> str:
        return f"epoch {epoch}/{self._recipe.epochs}"

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + EVERY
        return True

    def _move(self, name: str, done: int, total: int, wordings: list[str]) -> None:
        """Shows the longest of some wordings that is not cut off, nor cuts off anything before it."""
        counts = 2 * len(str(total)) + 1
        room = self._bar.console.width - len(name) - BAR - counts - len("0:00:00") - 5
        now = next((words for words in wordings if len(words) <= room), "")
        # What ends is shown, however short it was.
        self._bar.update(
            self._task, completed=done, total=total, description=name, now=now, refresh=done == total
        )

    def line(self, train: Row, test: Row) -> None:
        """Says what an epoch has come to."""
        self.say(
            f"{self._name(train.epoch)}: {_words(train)}; test loss {test.loss:.4f}, accuracy {test.accuracy:.4f}"
        )

    def say(self, text: str) -> None:
        """Prints a line, above the bar. The run outlives the reader: where nothing can be printed, it goes on without."""
        if self._mute:
            return
        try:
            if self._bar is not None and sys.stdout.isatty():
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError as error:
            self._mute = True
            files.silence(sys.stdout)
            with contextlib.suppress(OSError):
                reason = error.strerror or error
                print(
                    f"effdense train: standard output takes nothing more ({reason}); the run goes on, see metrics.csv",
                    file=sys.stderr,
                )

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()


def _wordings(row: Row) -> list[str]:
    """The same, ever shorter."""
    rate = f"{row.images_per_second:.1f} images/s"
    short = f"loss {row.loss:.3g}, accuracy {row.accuracy:.3f}"
    return [_words(row), f"{short}, {rate}", short, f"loss {row.loss:.3g}"]


def _words(row: Row) -> str:
    return (
        f"loss {row.loss:.4f}, accuracy {row.accuracy:.4f}, {row.images_per_second:.1f} images/s, "
        f"peak {row.peak_bytes / 2**20:.0f} MiB"
    )


def _duration(seconds: float) -> str:
    """Of 0:00:00's form."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
