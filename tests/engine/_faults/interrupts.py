"""Ctrl-C at every line of every part: `python -m tests.engine._faults.interrupts`. A table at the end, and the exit status 1 where something was not right.

Every part runs in a process of its own, which is begun again behind a line at which it has crashed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tests.engine._faults.in_place import CHANGES
from tests.engine._faults.lines import Part, attempts, visits
from tests.engine._faults.steps import NETS, Step

PARTS: dict[str, Callable[[], Part]] = {
    **{f"a step: {name}": (lambda name=name: Step(name, False)) for name in NETS},  # type: ignore[misc]
    **{f"a first step: {name}": (lambda name=name: Step(name, True)) for name in NETS},  # type: ignore[misc]
    **CHANGES,
}
TOLD = 30.0  # seconds between lines of progress


class Result(NamedTuple):
    """What came of a part."""

    name: str
    tried: int
    lines: int  # different ones
    problems: list[str]
    seconds: float


def _of(name: str, every_visit: bool, first: int) -> None:
    """A part, in this process: a line for how many there are, and one for each try."""
    torch.set_num_threads(1)
    part = PARTS[name]()
    numbers = [n for n in visits(part, every_visit) if n >= first]
    print(f"{len(numbers)} to try", flush=True)
    for tried in attempts(part, numbers):
        print(f"{tried.number}\t{tried.where}\t{tried.problem}", flush=True)


def _run(name: str, every_visit: bool) -> Result:
    """A part, in processes of its own."""
    start = told = time.monotonic()
    problems: list[str] = []
    tried, lines, first, end = 0, set[str](), 0, False
    while not end:
        command = [
            sys.executable,
            "-m",
            "tests.engine._faults.interrupts",
            "--part",
            name,
            "--first",
            str(first),
        ]
        command += ["--every-visit"] if every_visit else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        before = tried
        for row in process.stdout:
            if "\t" not in row:
                print(f"{name}: {row.strip()}", flush=True)
                continue
            number, where, problem = row.rstrip("\n").split("\t", 2)
            tried, first = tried + 1, int(number) + 1
            lines.add(where)
            if problem:
                problems.append(f"{where} (line {number} of the run): {problem}")
                print(f"{name}: {problems[-1]}", flush=True)
            if time.monotonic() - told > TOLD:
                told = time.monotonic()
                print(f"{name}: {tried} tried", flush=True)
        end = process.wait() == 0 or tried == before  # one that gets nowhere is not begun again
        if process.returncode:
            problems.append(
                f"the process ended with {process.returncode} at line {first} of the run or behind it"
            )
            print(f"{name}: {problems[-1]}", flush=True)
            first += 1
    return Result(name, tried, len(lines), problems, time.monotonic() - start)


def main(words: Sequence[str] | None = None) -> int:
    """Tries the parts; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine._faults.interrupts", description=__doc__)
    parser.add_argument(
        "--every-visit", action="store_true", help="of a line, not the first and the last alone"
    )
    parser.add_argument("--only", default="", help="parts whose names hold this (default: all)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part is not None:
        _of(options.part, options.every_visit, options.first)
        return 0
    results = [_run(name, options.every_visit) for name in PARTS if options.only in name]
    print("\n| part | interrupts | lines | not right | seconds |\n|---|--:|--:|--:|--:|")
    for name, tried, lines, problems, seconds in results:
        print(f"| {name} | {tried} | {lines} | {len(problems)} | {seconds:.0f} |")
    bad = [f"{r.name}: {problem}" for r in results for problem in r.problems]
    print(f"\n{sum(r.tried for r in results)} interrupts, {len(bad)} not right", *bad, sep="\n", flush=True)
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
