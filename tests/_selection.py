"""Selects tests from what they use, so that none can be forgotten: `pytest -m isa` and `pytest -m libraries`.

`isa`: those that depend on the instruction set. A test of operators does where it runs on effdense's CPU kernels. Any other
test does, unless its file starts programs, tests a command or the benchmarks, or asks what convert makes of a model: blocks
and models run on these kernels too.

`libraries`: the files in which a test is skipped where one of the extras' libraries is missing.
"""

from __future__ import annotations

import functools
import re
import types
from pathlib import Path

import pytest

import benchmarks

OPERATOR_FIXTURES = ("ops", "any_ops", "runs_on")
# Where the names of a file come from that is about what stands around the computation: programs, processes, commands, convert.
AROUND = {
    "argparse",
    "subprocess",
    "tests._conversions.assert_same",
    "tests._conversions.kinds",
    "tests.engine._second_order.assert_ways_agree",  # second derivatives are PyTorch's operators'
    "tests._processes",
    "harness.simt.compiler",
    "tests._training",
    "effdense.cli",
}


def asks_of_the_instruction_set(item: pytest.Function) -> bool:
    """Whether the loops for another instruction set, which are picked at run time, could make this test fail."""
    # opcheck looks at shapes and strides alone, and the CUDA kernels are compiled for whatever the compiler takes.
    if "opcheck" in item.function.__code__.co_names or "simt" in item.fixturenames:
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backends = [parameters[name] for name in OPERATOR_FIXTURES if name in parameters]
    if backends:
        return "cpu" in backends
    of_benchmarks = item.module.__name__.startswith("tests.benchmarks.")
    return not of_benchmarks and not _sources(item.module) & (AROUND | _commands())


@functools.cache
def asks_for_libraries(file: Path) -> bool:
    """Whether tests of this file are skipped where a library is missing."""
    return re.search(r"\b(importorskip|find_spec|library)\(", file.read_text()) is not None


def _sources(module: types.ModuleType) -> set[str]:
    """The modules that a file's names come from, and the names in full."""
    sources: set[str] = set()
    for value in vars(module).values():
        if isinstance(value, types.ModuleType):
            sources.add(value.__name__)
        else:
            of = getattr(value, "__module__", "")
            sources |= {of, f"{of}.{getattr(value, '__name__', '')}"}
    return sources


@functools.cache
def _commands() -> set[str]:
    """The benchmarks that are programs."""
    files = Path(benchmarks.__path__[0]).glob("*.py")
    return {f"benchmarks.{file.stem}" for file in files if "__main__" in file.read_text()}
