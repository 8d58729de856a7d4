"""Lets every `operator new` of the compiled module fail in a step, one after the other; failing_new.cpp stands before the C++ library.

python -m tests.engine._faults.out_of_new [--every N]: compiles it, runs itself with it, and says how many have failed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.engine._faults.out_of_memory import MAKE, same, state_of, step
from tests.engine._faults.steps import whole_net

SOURCE = Path(__file__).with_name("failing_new.cpp")
MANY = 2**40
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    **{name: (make, (2, 6, 6, 6), False) for name, make in MAKE.items()},
    "a block of doubles": (lambda: MAKE["a block"]().double(), (2, 6, 6, 6), False),
    "a net's first step": (whole_net, (2, 3, 32, 32), True),
}


def try_all(name: str, allocations: Any, every: int) -> int:
    """How many allocations have failed; raises where one was not survived."""
    make, shape, is_first = NETS[name]
    torch.manual_seed(0)
    model: nn.Module = make()
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    before, parameters = state_of(model), len(list(model.parameters()))

    def start_again() -> None:
        nonlocal model
        if is_first:
            model = make()
        model.zero_grad()
        with torch.no_grad():
            for now, then in zip((*model.parameters(), *model.buffers()), before, strict=True):
                now.copy_(then)

    expected, count = step(model, x), 0
    moved = state_of(model)
    start_again()
    allocations.fail_after(MANY)
    step(model, x)
    there = allocations.counted(MANY)
    for at in range(0, there, every):
        start_again()
        allocations.fail_after(at)
        try:
            step(model, x)
        except (RuntimeError, MemoryError) as error:
            allocations.fail_after(-1)
            assert "bad_alloc" in str(error) or isinstance(error, MemoryError), f"{name}, {at}: {error!r}"
            count += 1
        else:
            survived = not allocations.has_failed()
            allocations.fail_after(-1)
            assert survived, f"{name}, {at}: a failed allocation went unnoticed"
            continue
        now = state_of(model)
        assert same(now[:parameters], before[:parameters]), f"{name}, {at}: a parameter has changed"
        for a, b, c in zip(now[parameters:], before[parameters:], moved[parameters:], strict=True):
            assert torch.equal(a, b) or torch.equal(a, c), (
                f"{name}, {at}: statistics have moved by a part of a step"
            )
        start_again()
        assert same(step(model, x), expected), f"{name}, {at}: another step after a failed one"
    return count


def run(every: int, only: str = "") -> subprocess.CompletedProcess[str]:
    """Compiles the library and runs this file with it, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "failing_new.so"
        compiler = os.environ.get("CXX") or "g++"
        subprocess.run([compiler, "-shared", "-fPIC", "-std=c++17", "-O1", "-o", library, SOURCE], check=True)
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.engine._faults.out_of_new",
                "--every",
                str(every),
                "--only",
                only,
                "--library",
                library,
            ],
            env=os.environ | {"LD_PRELOAD": str(library)},
            cwd=SOURCE.parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def main() -> int:
    """Prints a line for every model."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine._faults.out_of_new", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every n-th allocation (default: 1)")
    parser.add_argument("--only", default="", help="models whose names hold this (default: all)")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library is None:
        made = run(options.every, options.only)
        print(made.stdout, end="")
        return made.returncode
    torch.set_num_threads(2)
    from effdense.ops.extension import extension

    allocations = ctypes.CDLL(options.library)
    allocations.counted.restype, allocations.counted.argtypes = ctypes.c_long, [ctypes.c_long]
    allocations.fail_after.argtypes = [ctypes.c_long]
    if extension is None or not allocations.watch(b"_effdense"):
        print("the compiled module is not there")
        return 2
    for name in (name for name in NETS if options.only in name):
        print(f"{name}: {try_all(name, allocations, options.every)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
