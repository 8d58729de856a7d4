"""Ctrl-C and SIGTERM: they end a run after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a terminal that is closed


class Stopped(Exception):
    """The user asked for an end; everything is saved."""


class Interrupt:
    """These signals are remembered until a step or a batch of the test has ended; a second one ends the program at once.

    One that is ignored (SIGHUP under nohup) stays ignored.
    """

    def __enter__(self) -> Interrupt:
        self.asked = False
        here = threading.current_thread() is threading.main_thread()  # Python's rule for handlers
        before = {s: signal.getsignal(s) for s in SIGNALS if here}
        self._before = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, b"effdense train: stopping soon, then saving; once more stops at once, without\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
