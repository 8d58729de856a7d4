"""Ctrl-C at lines of a step and of `convert`: what comes afterwards is right. `python -m tests.engine._faults.lines` does every line."""

from __future__ import annotations

import pytest

from tests.engine._faults.lines import NETS, try_convert, try_lines

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("name", NETS)
def test_at_lines_of_a_step(name: str) -> None:
    assert try_lines(name, cold=False, every=11) > 30


@pytest.mark.parametrize("name", ["a stage", "a whole net"])
def test_at_lines_of_a_first_step(name: str) -> None:
    assert try_lines(name, cold=True, every=199) > 300


def test_at_lines_of_convert() -> None:
    assert try_convert(every=4001) > 1000
