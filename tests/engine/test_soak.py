"""Resident memory is flat over steps of changing shapes; `python -m tests.engine._faults.soak --steps 2000` runs longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled


def test_memory_is_flat() -> None:
    """In a process of its own: nothing else comes and goes there."""
    code = (
        "import torch; from tests.engine._faults.soak import soak; torch.set_num_threads(1); print(soak(200))"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 4 * 2**20  # one feature map that is lost in each step would be more
