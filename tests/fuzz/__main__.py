"""Fuzzes for as long as is wanted: `python -m tests.fuzz --seconds 600` (`make fuzz`). Prints what ran; fails where something was found."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz._fuzz import TARGETS, run

FILES = [path.stem for path in sorted(Path(__file__).parent.glob("test_fuzz_*.py"))]
ROUND = 100  # examples of one target, then comes the next


def main() -> int:
    """Every target in turn until the time is up."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for how long, in all (default: 600)")
    parser.add_argument("--only", default="", help="targets with this in their names")
    parser.add_argument(
        "--corpus",
        type=Path,
        default="build/fuzz",
        help="cases that failed, tried first (default: build/fuzz)",
    )
    arguments = parser.parse_args()
    for name in FILES:
        importlib.import_module(f"tests.fuzz.{name}")
    wanted = {name: target for name, target in TARGETS.items() if arguments.only in name}
    if not wanted:
        parser.error(f"no target has {arguments.only!r} in its name; there are {', '.join(TARGETS)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    database = DirectoryBasedExampleDatabase(arguments.corpus)
    counts, seconds = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0.0)
    found: dict[str, str] = {}
    start = time.monotonic()
    while time.monotonic() - start < arguments.seconds and len(found) < len(wanted):
        for name, target in wanted.items():
            if name in found or time.monotonic() - start >= arguments.seconds:
                continue
            before = time.process_time()
            try:
                counts[name] += run(target, ROUND, database)
            except Exception:
                found[name] = traceback.format_exc()
                print(f"{name}:\n{found[name]}", file=sys.stderr, flush=True)
            seconds[name] += time.process_time() - before
    print(f"{'target':<30} {'examples':>9} {'CPU s':>8}")
    for name in wanted:
        verdict = "  FOUND, see above" if name in found else ""
        print(f"{name:<30} {counts[name]:>9} {seconds[name]:>8.0f}{verdict}")
    print(f"{sum(counts.values())} examples, {len(found)} finds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
