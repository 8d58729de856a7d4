"""Ctrl-C and SIGTERM: they end a run after the current step."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Stopped(Exception):
    """The user asked for an end; everything is saved."""


class Interrupt:
    """Ctrl-C and SIGTERM are remembered until a step has ended; a second one ends the program at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        here = threading.current_thread() is threading.main_thread()  # Python's rule for handlers
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM) if here}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            os.write(
                2, b"effdense train: stopping behind this step; once more stops at once, without saving\n"
            )
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
