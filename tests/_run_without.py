"""Runs programs as `python -m` does, in a process in which some packages are not installed.

    python -m tests._run_without numpy,rich '[["benchmarks.compare", "--repeats", "1"], …]'

Prints, as JSON, every program's exit status and what it wrote to stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import traceback
import warnings
from typing import Any


class Without:
    """One of Python's finders, that does not find some packages."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self._finder, self._hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._hidden:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def run(program: str, *arguments: str) -> dict[str, Any]:
    """Run a program to its end."""
    sys.argv, stderr = [program, *arguments], io.StringIO()
    status: str | int = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return {"status": status, "stderr": stderr.getvalue()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, that there is no NumPy
    sys.meta_path[:] = [Without(finder, set(sys.argv[1].split(","))) for finder in sys.meta_path]
    print(json.dumps([run(*program) for program in json.loads(sys.argv[2])]))
