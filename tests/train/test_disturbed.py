"""`effdense train` that is killed, or that runs out of memory in its optimizer: --resume ends as an undisturbed run, to the bit.

`python -m tests.train._signals` and `_out_of_memory` do it for many moments and for every allocation.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import effdense
from tests.engine._faults.preload import with_failing_malloc

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for processor times")
def test_a_signal_at_a_random_moment() -> None:
    """In a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.train._signals", "--times", "1", "--only", "KILL"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count(": 1 runs: 1 killed") == 1, made.stdout


def test_out_of_memory_in_the_optimizer(tmp_path: Path) -> None:
    if not effdense.build_info()["compiled"]:
        pytest.skip("the models run on PyTorch's own operators")
    out = with_failing_malloc(tmp_path, "tests.train._out_of_memory", "500")
    counts = [int(number) for line in out.splitlines() for number in line.split()[1:]]
    assert len(counts) == 4 and counts[0] > 0 and counts[2] > 0, out
