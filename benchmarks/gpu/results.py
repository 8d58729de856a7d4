"""The result of a stage: a JSON file, written anew after every piece, so that a stage that is ended keeps what it had.

Nothing here needs torch: the runner works where torch does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"  # scratch: objects, the launchers' program


def write(path: Path, text: str) -> None:
    """Writes a file so that it has its old or all of its new content at any moment."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON; infinite numbers and NaN, which JSON does not have, as null."""
    write(path, json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Result:
    """A stage's result: `rows`, other values, and `finding`, the line that the table at the end has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"finding": "", "rows": []}

    def save(self, finding: str | None = None, **values: Any) -> None:
        """Adds values and writes everything."""
        self.values.update(values)
        if finding is not None:
            self.values["finding"] = finding
        write_json(self._path, self.values)

    def add(self, row: dict[str, Any], finding: str | None = None) -> None:
        """Adds a row and writes everything."""
        self.values["rows"].append(row)
        self.save(finding)


def arguments(description: str, given: Sequence[str] | None = None, **more: Any) -> argparse.Namespace:
    """Parses what every stage takes: --json and --device; `more`: further options, name=default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    for name, default in more.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args(given)


def fail(reason: str) -> int:
    """Says why a stage failed, in the last line of its log; returns the exit status."""
    print(reason, file=sys.stderr)
    return 1


def program(name: str) -> str | None:
    """Where a program is, also one of an environment that is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
