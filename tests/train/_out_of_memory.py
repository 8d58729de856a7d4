"""Lets allocations of the optimizer's part of `effdense train` fail: its steps, the average of the weights and its making; run as tests/engine/_faults/out_of_memory.py is.

LD_PRELOAD=failing_malloc.so python -m tests.train._out_of_memory failing_malloc.so [EVERY]

PyTorch's optimizers are not whole after that. The run says that there is not enough memory, and ends; --resume ends as an
undisturbed run, to the bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effdense.train.learner import Learner
from tests._training import assert_same_end, train, write_data

RUNS = {
    "sgd": (),
    "adamw": ("--optimizer", "adamw", "--clip-norm", "1", "--ema-decay", "0.9"),
}
SHORT = ("--epochs", "1", "--drops=", "--save-steps", "2", "--log-every", "99")
MANY = 2**40


@contextlib.contextmanager
def failing(allocations: Any, at: int) -> Iterator[list[int]]:
    """Within it the at-th allocation of learners fails; how many there have been."""
    left, count = [at], [0]

    def counted(method: Any) -> Any:
        @functools.wraps(method)
        def run(*arguments: Any, **options: Any) -> Any:
            allocations.fail_after(left[0])
            try:
                return method(*arguments, **options)
            finally:
                count[0] += left[0] - allocations.remaining()
                left[0] = allocations.remaining()
                allocations.fail_after(-1)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("__init__", "step"):
            patch.setattr(Learner, name, counted(getattr(Learner, name)))
        yield count


def quiet(root: Path, out: Path, *more: str) -> tuple[int, str]:
    """The exit status, and what was said as an error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        return train(root, out, *SHORT, *more), said.getvalue()


def try_all(name: str, allocations: Any, folder: Path, every: int) -> tuple[int, int]:
    """How many allocations have failed, and how many there are; raises where a run did not go on."""
    options, root, whole, failed = RUNS[name], folder, folder / name, 0
    with failing(allocations, MANY) as count:
        assert quiet(root, whole, *options)[0] == 0
    for at in range(0, count[0], every):
        out = folder / "run"
        with failing(allocations, at):
            status, said = quiet(root, out, *options)
        assert (status, "there is not enough memory for this run" in said) == (1, True), (
            name,
            at,
            status,
            said,
        )
        failed += 1
        again = ("--resume",) if any(out.glob("*.pt")) else ()
        status, said = quiet(root, out, *options, *again)
        assert status == 0, (name, at, said)
        assert_same_end(out, whole)
        shutil.rmtree(out)
    return failed, count[0]


def main() -> None:
    """Prints a line for each kind of run."""
    allocations = ctypes.CDLL(sys.argv[1])
    allocations.remaining.restype = ctypes.c_long
    allocations.fail_after.argtypes = [ctypes.c_long]
    every = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as folder:
        root = write_data(Path(folder))
        for name in RUNS:
            print(name, *try_all(name, allocations, root, every), flush=True)


if __name__ == "__main__":
    main()
