"""What a run shows while it goes: how far it is, and a line for every epoch."""

from __future__ import annotations

import contextlib
import sys

from effdense import files
from effdense.progress import Progress
from effdense.train.metrics import Row
from effdense.train.settings import Recipe


class Display:
    """A bar on a terminal, else a line a minute, and a line for every epoch.

    Args:
        recipe: the run's.
        steps: in an epoch.
        tested: what the images behind an epoch are called, test or val.
    """

    def __init__(self, recipe: Recipe, steps: int, tested: str = "test") -> None:
        self._recipe, self._steps, self._tested = recipe, steps, tested
        self._mute = False
        self._progress = Progress(steps, self.say)

    def show(self, row: Row, done: int) -> None:
        """How far the epoch is."""
        name = self._name(row.epoch)
        left = _duration((self._steps - done) * self._recipe.batch_size / row.images_per_second)
        line = f"{name}, step {done} of {self._steps}: {_words(row)}; {left} left of it"
        self._progress.show(name, done, self._steps, _wordings(row), line)

    def show_test(self, epoch: int, done: int, batches: int, tested: str = "test") -> None:
        """How far the test behind an epoch is; `tested`: test or val."""
        name = self._name(epoch)
        line = f"{name}, {tested}, batch {done} of {batches}"
        self._progress.show(name, done, batches, [tested], line)

    def _name(self, epoch: int) -> str:
        return f"epoch {epoch}/{self._recipe.epochs}"

    def line(self, train: Row, test: Row) -> None:
        """Says what an epoch has come to."""
        self.say(
            f"{self._name(train.epoch)}: {_words(train)}; {self._tested} loss {test.loss:.4f}, accuracy {test.accuracy:.4f}"
        )

    def say(self, text: str) -> None:
        """Prints a line, above the bar. The run outlives the reader: where nothing can be printed, it goes on without."""
        if self._mute:
            return
        try:
            self._progress.print(text)
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
        """Takes the bar away."""
        self._progress.close()


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
