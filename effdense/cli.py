"""The command line: `effdense` or `python -m effdense`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from effdense._extension import build_info
from effdense.check import check
from effdense.operators import operators


def _check(arguments: argparse.Namespace) -> int:
    try:
        where = operators(torch.empty(0, device=arguments.device))
    except (RuntimeError, AssertionError) as error:
        print(f"effdense check: device {arguments.device!r} cannot be used here: {error}", file=sys.stderr)
        return 2
    for key, value in build_info().items():
        print(f"{key}: {value}")
    kind = "compiled operators" if where is torch.ops.effdense else "plain PyTorch (no compiled operators)"
    print(f"\n{kind} on {arguments.device} against the float64 twin:")
    results = check(arguments.device)
    for result in results:
        name = str(result.dtype).removeprefix("torch.")
        verdict = "passed" if result.passed else "FAILED"
        print(
            f"  {result.operator:<25} {name:<9} error {result.error:.1e} of {result.allowed:.1e}  {verdict}"
        )
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 when something failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="effdense", description="Memory-efficient DenseNet training.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "check", help="run every operator on this machine against plain PyTorch in float64"
    )
    command.add_argument("--device", default="cpu", help="where to run them (default: %(default)s)")
    command.set_defaults(run=_check)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
