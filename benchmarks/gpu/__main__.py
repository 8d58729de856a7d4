"""Proves effdense on a GPU within minutes, without a network: builds it for the card, checks it, times it, and reports.

    python -m benchmarks.gpu --out DIR [--budget 8m] [--stages machine,build,check] [--device cuda] [--dry-run]

`make gpu OUT=DIR` is the same. stages.py has the plan, docs/cuda.md what the results mean. It runs in the repository, with
the torch that is installed, and installs nothing. The exit status is 1 where a stage failed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import predicted, processes, report
from benchmarks.gpu.runner import Run
from benchmarks.gpu.stages import NAMES, PLAN


def seconds(text: str) -> float:
    """8m, 480, 7m30s: seconds."""
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or not found or not (value := 60 * int(found[1] or 0) + int(found[2] or 0)):
        raise argparse.ArgumentTypeError(f"must be a time such as 8m, 7m30s or 480 (seconds), got {text!r}")
    return float(value)


def _stages(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"unknown stage {name!r}; there are {', '.join(NAMES)}")
    return names


def _folder(text: str) -> Path:
    path = Path(text).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be a folder: {text!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write into {text!r}")
    return path


def _device(text: str) -> str:
    if not re.fullmatch(r"cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cuda or cuda:N, got {text!r}")
    return text


def _interrupt(*_: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # once is enough: the report is being written
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.allow_abbrev = False
    parser.add_argument(
        "--out", type=_folder, required=True, metavar="DIR", help="where the report is written"
    )
    parser.add_argument("--budget", type=seconds, default=480.0, metavar="TIME", help="for all stages (8m)")
    parser.add_argument("--stages", type=_stages, default=list(NAMES), metavar="NAMES", help=", ".join(NAMES))
    parser.add_argument("--device", type=_device, default="cuda", help="cuda or cuda:N (cuda)")
    parser.add_argument("--dry-run", action="store_true", help="start nothing, say what would run")
    parsed = parser.parse_args(arguments)
    processes.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, a machine's time limit: report what there is
        signal.signal(number, _interrupt)
    chosen = [stage for stage in PLAN if stage.name in parsed.stages]
    run = Run(chosen, parsed.out, parsed.budget, parsed.device, parsed.dry_run)
    status = run.all()
    print(f"\n{report.table(run.document)}\n{parsed.out / 'report.md'}")
    if parsed.dry_run:
        for cells in predicted.without_a_card():
            print("predicted, not measured: {}, {}: {} launches, {} ms".format(*cells))
    return status


if __name__ == "__main__":
    sys.exit(main())
