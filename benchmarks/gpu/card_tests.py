"""`make gpu`, stage tests: runs the tests that are marked `gpu`, or a random sample of them where the time does not suffice.

In several processes where pytest-xdist is there. The files are found by what their tests ask for; opcheck's tests, which need
a package that may be missing, have no marker.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.sampling import VARIABLE

PROCESSES = 8  # a context on the card and a reference on the CPU each
OUTCOMES = ("passed", "failed", "skipped", "not run")


def files(folder: Path = results.ROOT / "tests") -> list[str]:
    """The test files whose tests run on a backend that may be a card (conftest.py), or are marked."""
    wanted = re.compile(
        r"^(?:@|pytestmark = )pytest\.mark\.gpu|(?:^def test_\w+\([^)]*\b|usefixtures\(.)(?:ops|any_ops|runs_on)\b",
        re.MULTILINE,
    )
    found = [file for file in sorted(folder.rglob("test_*.py")) if wanted.search(file.read_text())]
    return [f"tests/{file.relative_to(folder)}" for file in found]


def command(python: str = sys.executable) -> list[str]:
    """The command line of pytest."""
    line = [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "benchmarks.gpu.sampling"]
    line += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short", "-r", "fE"]
    cores = len(os.sched_getaffinity(0))
    if importlib.util.find_spec("xdist") and cores > 2:
        line += ["-n", str(min(PROCESSES, cores // 2)), "--dist", "load"]
    return [*line, *files()]


def summarize(lines: Sequence[str]) -> dict[str, Any]:
    """Counts by file, and the failures in their order; of a test that failed twice (in it and behind it), the first."""
    rows: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, str]] = []
    seen: set[str] = set()
    for line in lines:
        test = json.loads(line)
        if test["test"] in seen:
            continue
        seen.add(test["test"])
        file = test["test"].partition("::")[0]
        row = rows.setdefault(file, {"file": file, **dict.fromkeys(OUTCOMES, 0)})
        row[test["outcome"]] += 1
        if test["outcome"] == "failed":
            failures.append({"test": test["test"], "message": test["message"]})
    total = {outcome: sum(row[outcome] for row in rows.values()) for outcome in OUTCOMES}
    return {
        "rows": sorted(rows.values(), key=lambda row: row["file"]),
        "total": total,
        "failures": failures[:50],
    }


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    start = time.time()
    options = results.arguments(__doc__, given, seconds=45.0)
    result = results.Result(options.json)
    index = options.device.partition(":")[2]
    with tempfile.TemporaryDirectory() as folder:
        lines, status = Path(folder) / "tests", None
        sample = {"until": start + 0.9 * options.seconds, "file": str(lines)}
        environment = {**os.environ, VARIABLE: json.dumps(sample)}
        if index:
            environment["CUDA_VISIBLE_DEVICES"] = index
        running = subprocess.Popen(command(), cwd=results.ROOT, env=environment)
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = running.wait(timeout=1)
            text = lines.read_text() if lines.exists() else ""
            found = summarize(text[: text.rfind("\n") + 1].splitlines())
            total = found["total"]
            result.save(", ".join(f"{total[o]} {o}" for o in OUTCOMES if total[o] or o == "passed"), **found)
    if status or not total["passed"]:
        first = f"; first: {found['failures'][0]['test']}" if found["failures"] else ""
        return results.fail(f"pytest ended with status {status}{first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
