"""Shared by the benchmarks' command lines: a missing package is one line on stderr."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

Main = Callable[..., int]


def reports_missing_packages(main: Main) -> Main:
    """Decorate a program's `main`: where a package is missing that an extra brings, say which one, and return 2."""
    started = sys.modules["__main__"].__spec__
    module = started.name if main.__module__ == "__main__" and started is not None else main.__module__

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        try:
            return main(*arguments)
        except ModuleNotFoundError as error:
            from effdense import extras  # here: peers are measured beside an effdense that does not load

            if error.name is None or not extras.has(error.name):
                raise
            print(f"python -m {module} {extras.needed(error.name, 'bench')}", file=sys.stderr)
            return 2

    return run
