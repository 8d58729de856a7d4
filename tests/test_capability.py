"""The instruction set that runs is the one that was asked for, and what is tested on others is all that depends on it.

    ATEN_CPU_CAPABILITY=default pytest -m isa
"""

from __future__ import annotations

import os

import pytest
import torch

import effdense
from effdense import check
from tests.selection import asks_of_the_instruction_set


def test_the_instruction_set_is_the_one_asked_for() -> None:
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    if wanted is None:
        pytest.skip("ATEN_CPU_CAPABILITY asks for none")
    assert torch.backends.cpu.get_cpu_capability().lower() == wanted
    assert effdense.build_info()["cpu_capability"].lower() == wanted
