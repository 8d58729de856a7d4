"""Steps that are cut short: no memory for one allocation after the other, Ctrl-C. The next step is right."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import effdense
from effdense.nn import DenseBlock
from tests.engine._faults import out_of_new
from tests.engine._faults.preload import with_failing_malloc


def test_out_of_memory_at_every_allocation_of_a_step(tmp_path: Path) -> None:
    if not effdense.build_info()["compiled"]:
        pytest.skip("the models run on PyTorch's own operators")
    out = with_failing_malloc(tmp_path, "tests.engine._faults.out_of_memory")
    lines = [line.rsplit(maxsplit=2) for line in out.splitlines()]
    assert len(lines) == 4
    # Buffers, vectors, scratch, statistics, results and gradients: a layer makes several of each.
    assert all(int(forward) > 10 and int(backward) > 10 for _, forward, backward in lines), out


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the loaded modules as Linux has them")
def test_operator_new_fails_in_a_step() -> None:
    """At every 41st of what the compiled module asks for; `python -m tests.engine._faults.out_of_new` does all."""
    if not effdense.build_info()["compiled"]:
        pytest.skip("the models run on PyTorch's own operators")
    made = out_of_new.run(41, "block")
    assert made.returncode == 0, made.stdout
    counts = [int(line.rsplit(maxsplit=1)[1]) for line in made.stdout.splitlines()]
    assert len(counts) == 4 and min(counts) > 5, made.stdout


@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_an_interrupt_is_not_lost(memory: str) -> None:
    # Who starts pytest in the background may have switched SIGINT off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt(memory)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(memory: str) -> None:
    torch.manual_seed(0)
    block = DenseBlock(6, 16, 4, 12, 0.0, memory=memory)
    x = torch.randn(16, 16, 64, 64)
    state = {k: v.clone() for k, v in block.state_dict().items()}

    def step() -> list[torch.Tensor]:
        block.load_state_dict(state)
        block.zero_grad()
        y = block(x)
        y.sum().backward()
        return [y.detach(), *(p.grad.clone() for p in block.parameters())]

    expected = step()
    for seconds in (0.01, 0.05, 0.2):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(100):
                step()
        timer.join()
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
