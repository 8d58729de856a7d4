"""The workspace: what a lease gives, who else may use it meanwhile, and that nothing of it stays in what is handed out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from effdense.engine import node, workspace
from effdense.ops import dispatch
from tests._stages import (
    MEMORY,
    TAILS,
    assert_close,
    assert_same,
    converted,
    kept_tensors,
    make_input,
    make_naive,
    step,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    workspace.empty_cache()
    yield
    workspace.empty_cache()


def free() -> list[Tensor]:
    return workspace._pool._free


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's whole storage."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def overlap(a: Tensor, b: Tensor) -> bool:
    (start, end), (start2, end2) = extent(a), extent(b)
    return start < end2 and start2 < end


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1), (3, 2, 1, 2, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_a_lease_holds_what_it_was_sized_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.empty(shape, dtype=dtype)
    channels = [5, 1, 8]
    with workspace.lease(CPU, workspace.size_of(like, channels)) as scratch:
        maps = [scratch.channels_last(like, c) for c in channels]
        for i, (x, c) in enumerate(zip(maps, channels, strict=True)):
            assert x.shape == (shape[0], c, *shape[2:]) and x.dtype == dtype
            assert x.movedim(1, -1).is_contiguous()
            assert x.data_ptr() % 64 == 0
            x.fill_(i)
        for i, x in enumerate(maps):
            assert (x == i).all()


def test_more_than_it_was_sized_for_is_refused() -> None:
    like = torch.empty(2, 3, 4, 4)
    with workspace.lease(CPU, workspace.size_of(like, [3])) as scratch:
        scratch.channels_last(like, 3)
        with pytest.raises(RuntimeError):
            scratch.channels_last(like, 3)


def test_nested_leases_do_not_overlap_and_blocks_come_back() -> None:
    like = torch.empty(2, 3, 4, 4)
    size = workspace.size_of(like, [3])
    with workspace.lease(CPU, size) as outer:
        a = outer.channels_last(like, 3).zero_()
        with workspace.lease(CPU, size) as inner:
            inner.channels_last(like, 3).fill_(1)
        with workspace.lease(CPU, size) as inner:  # the block that was just given back
            inner.channels_last(like, 3).fill_(2)
        assert len(free()) == 1
        assert (a == 0).all()
    assert len(free()) == 2


def test_a_block_of_another_size_does_not_stay() -> None:
    for size in (100, 1000, 10, 2000, 2000, 1500):
        with workspace.lease(CPU, size):
            pass
        assert len(free()) == 1
        assert size <= free()[0].numel() <= 2 * size


def test_an_exception_gives_the_block_back() -> None:
    with pytest.raises(KeyError), workspace.lease(CPU, 64):
        raise KeyError
    assert len(free()) == 1


def test_a_failing_layer_gives_the_block_back(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = make_naive()
    fused = converted(naive, "minimal")
    y = fused(make_input())
    before = len(free())

    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    ops = dispatch.operators(make_input())
    failing = SimpleNamespace(
        **{name: getattr(ops, name) for name in ("stage_scratch", "stage_start_backward")},
        stage_forward=fail,
        stage_backward=fail,
    )
    with monkeypatch.context() as patch:
        patch.setattr(node, "operators", lambda _: failing)
        for call in (lambda: fused(make_input()), lambda: y.sum().backward()):
            with pytest.raises(MemoryError):
                call()
    assert len(free()) == before == 1
    fused.load_state_dict(naive.state_dict())
    assert_same((naive, fused))


def test_emptied_while_it_is_lent() -> None:
    like = torch.empty(2, 3, 4, 4)
    with workspace.lease(CPU, workspace.size_of(like, [3])) as scratch:
        x = scratch.channels_last(like, 3).fill_(3)
        workspace.empty_cache()
        with workspace.lease(CPU, workspace.size_of(like, [3])) as other:
            other.channels_last(like, 3).zero_()
        assert (x == 3).all()
    assert len(free()) == 1  # the second alone


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_nothing_that_is_handed_out_lies_in_the_pool(memory: str, tail: str, plain: bool) -> None:
    fused = converted(make_naive(plain, tail, drop_rate=0.3), memory)
    x = make_input((8, 8)).requires_grad_()
    kept, y = kept_tensors(fused, x)
    torch.autograd.grad(y.sum(), [x, *fused.parameters()], retain_graph=True)
    y.sum().backward()
    grads = [x.grad, *(p.grad for p in fused.parameters())]
    with torch.no_grad():
        y2 = fused(x)
    assert free()
    for block in free():
        for given in (y, y2, *kept, *grads, *fused.buffers()):
            assert not overlap(block, given)
    for i, grad in enumerate(grads):  # nor do gradients share memory with each other, or with what is kept
        assert not any(overlap(grad, other) for other in (*grads[:i], y, *kept))


@pytest.mark.parametrize("memory", MEMORY)
def test_whatever_the_pool_holds_does_not_matter(memory: str) -> None:
    naive = make_naive(tail="transition")
    pair = naive, converted(naive, memory)
    assert_same(pair, steps=1)
    for block in free():
        block.fill_(255)  # NaN
    assert_same(pair, steps=1)


def test_made_in_inference_mode_used_in_training() -> None:
    naive = make_naive()
    fused = converted(naive, "minimal")
    with torch.inference_mode():
        fused.eval()(make_input())
    assert free() and not any(block.is_inference() for block in free())
    assert_same((naive, fused.train()))


def test_another_default_device() -> None:
    naive = make_naive()
    fused = converted(naive, "minimal")
    x = make_input()
    with torch.device("meta"):
        y = fused(x)
    torch.testing.assert_close(y, naive(x), rtol=1e-9, atol=1e-10)
    assert all(block.device == CPU for block in free())


def train(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [t.detach() for t in (*model.parameters(), *model.buffers())]


@pytest.mark.core
def test_two_threads_with_a_model_each() -> None:
    models = [
        converted(make_naive(plain, "transition"), memory)
        for plain, memory in ((False, "minimal"), (True, "balanced"))
    ]
    inputs = [[make_input((12, 12)) for _ in range(10)] for _ in models]
    expected = [train(copy.deepcopy(m), i) for m, i in zip(models, inputs, strict=True)]
    start, results = threading.Barrier(2), [list[Tensor]()] * 2

    def work(i: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        results[i] = train(models[i], inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert_close(got, wanted, 0.0)


class Transformed(Dataset):
    """Items that a model made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(1)
        x = torch.linspace(-1, 1, 5 * 6 * 6, dtype=torch.float64).view(1, 5, 6, 6) + i
        return step(self.model, x)[1][0]  # a gradient: both ways run in the worker


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_worker() -> None:
    fused = converted(make_naive(), "minimal").eval()
    dataset = Transformed(fused)
    expected = [dataset[i] for i in range(2)]
    loader = DataLoader(dataset, 1, num_workers=1, multiprocessing_context="fork", timeout=30)
    with workspace.lease(CPU, 1 << 16), workspace._pool._lock:  # another thread may hold it at the fork
        items = [item[0] for item in loader]
    assert_close(items, expected, 0.0)
