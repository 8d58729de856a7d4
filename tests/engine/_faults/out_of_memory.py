"""Lets every allocation of a step fail, one after the other; run by tests/engine/test_faults.py with failing_malloc.c before the C library.

LD_PRELOAD=failing_malloc.so python -m tests.engine._faults.out_of_memory failing_malloc.so
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, Transition

MAKE: dict[str, Callable[[], nn.Module]] = {
    "a block": lambda: DenseBlock(3, 6, 2, 4, 0.2),
    "a block that keeps less": lambda: DenseBlock(3, 6, 2, 4, 0.0, memory="minimal"),
    "a plain block and a transition": lambda: DenseFeatures(
        DenseBlock(2, 6, None, 4, 0.0), Transition(14, 7)
    ),
    "a layer": lambda: DenseLayer(6, 4, 2, 0.0),
}


def state_of(model: nn.Module) -> list[Tensor]:
    """Copies of its parameters and buffers."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether they are the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(model: nn.Module, x: Tensor, on_forward: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Output, gradients and buffers of a training step, always with the same dropout."""
    torch.manual_seed(1)
    y = model(x)
    on_forward()
    y.square().sum().backward()
    grads: list[Any] = [p.grad for p in model.parameters()]
    return [y.detach(), *(g.clone() for g in grads), *(b.clone() for b in model.buffers())]


def try_all(name: str, allocations: Any) -> tuple[int, int]:
    """How many allocations have failed, in the forward and in the backward; raises where one was not survived."""
    torch.manual_seed(0)
    model, x = MAKE[name](), torch.randn(2, 6, 6, 6)
    before = state_of(model)

    def start_again() -> None:
        model.zero_grad()
        with torch.no_grad():
            for now, then in zip((*model.parameters(), *model.buffers()), before, strict=True):
                now.copy_(then)

    expected = step(model, x)
    failures = {"forward": 0, "backward": 0}
    while True:
        start_again()
        direction = ["forward"]
        allocations.fail_after(sum(failures.values()))
        try:
            step(model, x, lambda direction=direction: direction.append("backward"))  # type: ignore[misc]
        except RuntimeError as error:
            allocations.fail_after(-1)
            assert "can't allocate memory" in str(error), error
            failures[direction[-1]] += 1
            if direction[-1] == "forward":
                assert same(state_of(model), before), f"{name}: a failed forward has changed the model"
            assert same(
                state_of(model)[: len(list(model.parameters()))], before[: len(list(model.parameters()))]
            )
            start_again()
            assert same(step(model, x), expected), f"{name}: another step after a failed one"
        else:
            survived = not allocations.has_failed()
            allocations.fail_after(-1)
            assert survived, f"{name}: a failed allocation went unnoticed"
            return failures["forward"], failures["backward"]


def main() -> None:
    """Prints a line for every model."""
    torch.set_num_threads(2)
    allocations = ctypes.CDLL(sys.argv[1])
    for name in MAKE:
        print(name, *try_all(name, allocations))


if __name__ == "__main__":
    main()
