"""The stages of `make gpu` as data: in order of value, each with its command line, its limit, and what it needs.

    machine 40 s, build 140, check 20, tests 45, operators 25, steps 85, launchers 50, kernelbench 15, counters 25, host 10,
    compile: what is left, 25 s at least where all others have taken all of theirs

which is 480 s, eight minutes. What a stage does not use goes to `compile`. A stage that has a limit of its own inside
(--seconds) ends by itself shortly before and reports what it has.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

REST = 3600  # a limit that only the budget ends


class Stage(NamedTuple):
    """One process. Words in braces in its command are filled in by `command_line`."""

    name: str
    title: str
    seconds: int  # its limit
    command: tuple[str, ...]
    needs: tuple[str, ...] = ("build",)  # stages that must have succeeded, where they were to run at all
    tools: tuple[str, ...] = ()  # programs without which it is left out
    checked: bool = (
        False  # whether effdense checks the card by itself in it; `check` does that once for all others
    )


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (
        "{python}",
        "-m",
        f"benchmarks.gpu.{name}",
        "--json",
        "{json}",
        "--device",
        "{device}",
        *arguments,
    )


PLAN: tuple[Stage, ...] = (
    Stage("machine", "what the machine is", 40, _module("machine"), needs=()),
    Stage("build", "build for this card alone, offline", 140, _module("build"), needs=()),
    Stage(
        "check",
        "every operator against float64",
        20,
        ("{python}", "-m", "effdense", "check", "--device", "{device}"),
        checked=True,
    ),
    Stage(
        "tests",
        "pytest -m gpu, a random sample in a time limit",
        45,
        _module("card_tests", "--seconds", "{seconds}"),
        checked=True,
    ),
    Stage("operators", "ceilings, every operator's time to floor", 25, _module("operators")),
    Stage("steps", "training step and peak memory", 85, _module("steps", "--seconds", "{seconds}")),
    Stage(
        "launchers",
        "all launchers under compute-sanitizer",
        50,
        _module("launchers", "--seconds", "{seconds}"),
        tools=("nvcc", "compute-sanitizer"),
    ),
    Stage("kernelbench", "forward of KernelBench level 3, problems 13 to 16", 15, _module("kernelbench")),
    Stage("counters", "the two GEMM kernels' counters", 25, _module("counters"), tools=("ncu",)),
    Stage("host", "host time against device time of a step", 10, _module("host")),
    Stage(
        "compile",
        "training step under torch.compile",
        REST,
        _module("steps", "--compile", "--seconds", "{seconds}"),
    ),
)
NAMES = tuple(stage.name for stage in PLAN)


def command_line(stage: Stage, *, json: str, device: str, seconds: float, python: str = "") -> list[str]:
    """The stage's command with all that depends on the run.

    Args:
        json: the file where it writes its result.
        device: cuda or cuda:N.
        seconds: until it is ended; it is told 5 % and 2 s less.
        python: the interpreter; "": this one.
    """
    values = {
        "{python}": python or sys.executable,
        "{json}": json,
        "{device}": device,
        "{seconds}": f"{max(1.0, 0.95 * seconds - 2):.0f}",
    }
    return [values.get(word, word) for word in stage.command]
