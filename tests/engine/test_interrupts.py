"""Ctrl-C at lines of a step, and of functions that change a module: what comes afterwards is right. `python -m tests.engine._faults.interrupts` does every line."""

from __future__ import annotations

import pytest
import torch

from effdense.ops import reference
from tests.engine._faults.in_place import CHANGES
from tests.engine._faults.interrupts import PARTS
from tests.engine._faults.lines import PACKAGE, Lines, attempts, visits
from tests.engine._faults.steps import NETS

pytestmark = pytest.mark.compiled
# Of the first and the last visits of lines, only so many are tried here: every line of what takes no time.
TRIED = {
    **{f"a step: {name}": 12 for name in NETS},
    "a first step: a stage": 8,
    "a first step: a whole net": 8,
    "convert": 4,
    "convert, another memory": 20,
    "revert": 99,
    "load_weights": 30,
    "reset_classifier": 30,
}


@pytest.mark.parametrize("name", TRIED)
def test_at_lines(name: str) -> None:
    part = PARTS[name]()
    numbers = visits(part)
    chosen = numbers[:: max(1, len(numbers) // TRIED[name])]
    tried = list(attempts(part, chosen))
    assert len(tried) == len(chosen) >= 4
    assert not [t for t in tried if t.problem]


def test_no_part_is_left_out() -> None:
    assert set(CHANGES) <= set(TRIED)


@pytest.mark.parametrize("repeated", [False, True])
def test_statistics_are_never_half_moved(repeated: bool) -> None:
    """By the operator in plain PyTorch, which runs on GPUs and without the compiled module."""
    start, batch = [torch.ones(3), torch.ones(4)], [torch.full((3,), 2.0), torch.full((4,), 3.0)]
    places = [0, 0] if repeated else [0, 1]
    batch = [batch[i] for i in places]

    def move(lines: Lines) -> list[torch.Tensor]:
        running = [t.clone() for t in start]
        try:
            with lines.running():
                reference.update_running_statistics(
                    [running[i] for i in places], batch, [0.5, 0.25], [0.5, 0.75]
                )
        except KeyboardInterrupt:
            assert lines.where is not None
        return running

    moved = move(counted := Lines(files=(f"{PACKAGE}/ops/reference.py",)))
    once = [start[0] * 0.5 + batch[0] * 0.5, start[1]] if repeated else moved
    assert len(counted.seen) > 4
    for at in range(len(counted.seen)):
        for now, *allowed in zip(move(Lines(at, counted.files)), start, once, moved, strict=True):
            assert any(torch.equal(now, a) for a in allowed), at
