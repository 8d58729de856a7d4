"""Shows how far long work is: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from effdense import extras

FIRST, EVERY = 10.0, 60.0  # seconds until the first line, and between lines
BAR = 10  # columns


class Progress:
    """A bar on standard error if that is a terminal and rich is installed, else a line now and then.

    Args:
        total: how many steps there are, until `show` says otherwise.
        line: prints a line, where there is no bar.
    """

    def __init__(self, total: int, line: Callable[[str], None]) -> None:
        self._line = line
        self._bar: Any = None
        self._due = time.monotonic() + FIRST
        if sys.stderr.isatty():
            try:
                self._bar = self._start_bar(total)
            except ImportError:
                hint = extras.pip_install("rich", "train")
                print(f"no progress bar without rich: {hint}", file=sys.stderr)

    def _start_bar(self, total: int) -> Any:
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
        self._task = bar.add_task("", total=total, now="")
        return bar

    def show(self, name: str, done: int, total: int, wordings: Sequence[str], line: str) -> None:
        """Moves the bar, or prints a line if it is time to.

        Args:
            name: what stands in front of the bar.
            done: how many steps are.
            total: of so many.
            wordings: what stands behind the bar, ever shorter: the first one that fits.
            line: the same without a bar.
        """
        if self._bar is not None:
            self._move(name, done, total, wordings)
        elif self._is_due():
            self._line(line)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + EVERY
        return True

    def _move(self, name: str, done: int, total: int, wordings: Sequence[str]) -> None:
        """Shows the longest of some wordings that is not cut off, nor cuts off anything before it."""
        counts = 2 * len(str(total)) + 1
        room = self._bar.console.width - len(name) - BAR - counts - len("0:00:00") - 5
        now = next((words for words in wordings if len(words) <= room), "")
        # What ends is shown, however short it was.
        self._bar.update(
            self._task, completed=done, total=total, description=name, now=now, refresh=done == total
        )

    def print(self, text: str) -> None:
        """Prints a line to standard output, above the bar.

        Raises:
            OSError: it cannot be printed.
        """
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, emoji=False, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()
