"""Ctrl-C while the program `effdense` still imports torch: it ends at once, as a program in C does, without a traceback.

Importing this file arranges it, so it is the first that effdense imports. In any other program it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any


def is_started(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether this process is the command `effdense` or `python -m effdense`, from sys.argv and sys.orig_argv."""
    module = original.index("-m") + 1 if "-m" in original else len(original)
    return os.path.basename(argv[0]) == "effdense" or list(original[module : module + 1]) == ["effdense"]


def interrupt_as_usual() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt again."""
    _replace(signal.SIG_DFL, signal.default_int_handler)


def _replace(there: Any, handler: Any) -> None:
    """Another handler, such as one that ignores SIGINT under nohup, stays."""
    main = threading.current_thread() is threading.main_thread()
    if main and is_started(sys.argv or [""], sys.orig_argv) and signal.getsignal(signal.SIGINT) is there:
        signal.signal(signal.SIGINT, handler)


_replace(signal.default_int_handler, signal.SIG_DFL)
