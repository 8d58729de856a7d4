"""Threads, forks and loaders' workers in the middle of training: results to the bit, as alone."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from effdense.nn import DenseBlock, DenseFeatures, Transition
from tests.engine._faults.out_of_memory import same

pytestmark = pytest.mark.compiled


def make(memory: str = "balanced") -> nn.Module:
    torch.manual_seed(0)
    return DenseFeatures(DenseBlock(3, 5, 2, 4, 0.0, memory=memory), Transition(17, 6))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients; the weights move."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    grads: list[Any] = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.sub_(grad, alpha=0.1)
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What they return, all of them begun together."""
    start, results, errors = threading.Barrier(len(functions)), [None] * len(functions), list[BaseException]()

    def run(i: int, function: Callable[[], Any]) -> None:
        try:
            torch.set_num_threads(1)
            start.wait()
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def test_two_models_train_in_two_threads() -> None:
    x = torch.randn(2, 5, 9, 9)
    models = make(), make("minimal")
    alone = [[step(copied, x) for _ in range(6)] for copied in map(copy.deepcopy, models)]
    both = at_once(*(lambda m=m: [step(m, x) for _ in range(6)] for m in models))
    for got, expected in zip(both, alone, strict=True):
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_one_model_in_several_threads(first: bool) -> None:
    """Also its first forward, when what is known of its modules is not gathered yet."""
    for _ in range(20):
        model, xs = make().eval(), [torch.randn(1 + i, 5, 6, 6) for i in range(3)]
        with torch.no_grad():
            expected = [copy.deepcopy(model)(x) for x in xs]
            if not first:
                model(xs[0])
        got = at_once(*(lambda m=model, x=x: [m(x).detach() for _ in range(3)] for x in xs))
        for every, y in zip(got, expected, strict=True):
            assert all(torch.equal(a, y) for a in every)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_a_fork_between_forward_and_backward(memory: str) -> None:
    """The child has its own forwards (autograd's threads do not survive a fork); the parent's step is as without it."""
    model, x = make(memory), torch.randn(2, 5, 9, 9)
    other = copy.deepcopy(model)
    step(model, x), step(other, x)
    y, z = model(x), other(x)
    with torch.no_grad():
        expected = copy.deepcopy(other).eval()(x)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with torch.no_grad():
                status = 0 if torch.equal(model.eval()(x), expected) else 2
        finally:
            os._exit(status)
    y.square().mean().backward()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    z.square().mean().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert same(list(model.buffers()), list(other.buffers()))
    assert same(step(model, x), step(other, x))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loaders_workers_are_forked_between_steps() -> None:
    """And Ctrl-C comes while they are at work: the step after it is right."""
    images = TensorDataset(torch.randn(8, 5, 9, 9))
    model = make()
    other = copy.deepcopy(model)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for epoch in range(3):
            loaded = DataLoader(images, 2, num_workers=2, multiprocessing_context="fork")
            alone = DataLoader(images, 2)
            for i, ((x,), (y,)) in enumerate(zip(loaded, alone, strict=True)):
                if (epoch, i) == (1, 2):
                    with pytest.raises(KeyboardInterrupt):
                        os.kill(os.getpid(), signal.SIGINT)
                        model(x)
                    model.load_state_dict(other.state_dict())  # statistics have moved, or not
                assert same(step(model, x), step(other, y)), (epoch, i)
    finally:
        signal.signal(signal.SIGINT, before)
