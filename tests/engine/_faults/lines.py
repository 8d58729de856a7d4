"""KeyboardInterrupt at one line of effdense's Python after the other, as Ctrl-C would come; `python -m tests.engine._faults.lines` does all."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import linecache
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import effdense
from effdense.engine import workspace
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, Transition
from tests.engine._faults.out_of_memory import same, state_of
from tests.fuzz._nets import engine

PACKAGE = str(Path(effdense.__file__).parent)


class Lines:
    """Counts the lines of effdense that run, and raises KeyboardInterrupt before the one of a number."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.count, self.where = at, 0, ""

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return functools.partial(self._line, set())

    def _line(self, entered: set[int], frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self._leaves(entered, frame):
            self.count += 1
            if self.count - 1 == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.where)
        return functools.partial(self._line, entered)

    def _leaves(self, entered: set[int], frame: FrameType) -> bool:
        """Whether it is a `with` that ends, whose line comes a second time: there Python looks for no signals."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        again = frame.f_lineno in entered
        entered.symmetric_difference_update({frame.f_lineno})
        return again

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it lines count."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)


def block_and_transition(memory: str) -> nn.Module:
    """A stage."""
    return DenseFeatures(DenseBlock(2, 5, 2, 4, 0.0, memory=memory), Transition(13, 6))


def averaging() -> nn.Module:
    """A stage one of whose norms averages over all batches, which goes another way."""
    model: Any = block_and_transition("balanced")
    model[0].denselayer2.norm1.momentum = None
    return model


def whole_net() -> nn.Module:
    """Stem, two stages and head."""
    options = {
        "growth_rate": 4,
        "block_config": (2, 1),
        "num_init_features": 5,
        "bn_size": 2,
        "num_classes": 3,
    }
    return effdense.models.DenseNet(**options, memory="minimal")


NETS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "a stage": (lambda: block_and_transition("balanced"), "compiled", (2, 5, 6, 6)),
    "a stage that keeps less": (lambda: block_and_transition("minimal"), "compiled", (2, 5, 6, 6)),
    "the engine in Python": (lambda: block_and_transition("balanced"), "python", (2, 5, 6, 6)),
    "without operators": (lambda: block_and_transition("minimal"), "reference", (2, 5, 6, 6)),
    "averaged statistics": (averaging, "compiled", (2, 5, 6, 6)),
    "a layer": (lambda: DenseLayer(5, 4, 2, 0.0), "compiled", (2, 5, 6, 6)),
    "a whole net": (whole_net, "compiled", (2, 3, 32, 32)),
}


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads: list[Any] = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *(g.clone() for g in grads), *(b.clone() for b in model.buffers())]


class Blocks:
    """Which blocks of the workspace there are."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        take = workspace._pool.take

        def noted(size: int) -> Any:
            block, emptied = take(size)
            self.made.append(weakref.ref(block))
            return block, emptied

        workspace._pool.take = noted  # type: ignore[method-assign]

    def lost(self) -> int:
        """How many are neither free nor gone."""
        free = {id(block) for block in workspace._pool._free}
        held = [ref for ref in self.made if id(ref()) not in free]
        if any(ref() is not None for ref in held):
            gc.collect()  # which takes longer than a step
        return sum(ref() is not None for ref in held)


def try_lines(name: str, cold: bool, every: int = 1, first: int = 0) -> int:
    """Interrupts each `every`-th line of a step; how many lines there were. `cold`: of the first step of a model.

    Raises:
        AssertionError: a parameter has changed, statistics have moved by more than one step, a norm's by a part of one, scratch
            memory is lost, or the next step is not that of an untouched model of the same state.
    """
    make, how, shape = NETS[name]
    torch.manual_seed(0)
    original, x = make(), torch.randn(shape)
    with engine(how):
        model = copy.deepcopy(original)
        step(model, x)
        parameters = len(list(model.parameters()))
        if cold:
            model = copy.deepcopy(original)
        start = state_of(model)
        count = Lines()
        with count.running():
            step(model, x)
        moved = state_of(model)
        for at in range(first, count.count, every):
            if cold:
                model = copy.deepcopy(original)
            with torch.no_grad():
                for now, then in zip((*model.parameters(), *model.buffers()), start, strict=True):
                    now.copy_(then)
            workspace.empty_cache()
            workspace._pool.__dict__.pop("take", None)
            blocks, lines = Blocks(), Lines(at)
            try:
                with lines.running():
                    step(model, x)
            except KeyboardInterrupt:
                pass
            else:  # fewer lines than the first time
                break
            assert workspace._pool._lock.acquire(blocking=False), f"{lines.where}: the lock is held"
            workspace._pool._lock.release()
            assert not blocks.lost(), f"{lines.where}: scratch memory is held"
            _check_state(model, start, moved, parameters, lines.where)
            other = copy.deepcopy(model)
            assert same(step(model, x), step(other, x)), f"{lines.where}: another step after it"
        workspace._pool.__dict__.pop("take", None)
    return count.count


def _check_state(
    model: nn.Module, start: list[Tensor], moved: list[Tensor], parameters: int, where: str
) -> None:
    now = state_of(model)
    assert same(now[:parameters], start[:parameters]), f"{where}: a parameter has changed"
    for a, before, after in zip(now[parameters:], start[parameters:], moved[parameters:], strict=True):
        once = torch.equal(a, before) or torch.equal(a, after)
        assert once, f"{where}: statistics have moved by other than one step"


def try_convert(every: int, first: int = 0) -> int:
    """Interrupts lines of `convert`; afterwards the model computes what it did, and can be converted."""
    from tests._stages import assert_close, make_input, make_naive
    from tests._stages import step as step_of

    naive, x = make_naive(tail="transition"), make_input()
    count = Lines()
    with count.running():
        effdense.convert(copy.deepcopy(naive))
    expected = step_of(copy.deepcopy(naive), x)
    for at in range(first, count.count, every):
        model, lines = copy.deepcopy(naive), Lines(at)
        try:
            with lines.running():
                effdense.convert(model)
        except KeyboardInterrupt:
            pass
        state = zip(model.state_dict().values(), naive.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in state), (
            f"{lines.where}: convert has changed the model's state"
        )
        assert [m.training for m in model.modules()] == [m.training for m in naive.modules()], lines.where
        assert all(p.grad is None for p in model.parameters()), lines.where
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), lines.where
        again = copy.deepcopy(model)
        assert_close(step_of(model, x), expected)
        effdense.convert(again)
        assert all(e.converted for e in effdense.report(again)), lines.where
        assert_close(step_of(again, x), expected)
    return count.count


def main() -> None:
    """Every line of everything; prints a line for each."""
    torch.set_num_threads(1)
    for name in NETS:
        print(
            f"{name}: {try_lines(name, False)} lines of a step, {try_lines(name, True)} of a first step",
            flush=True,
        )
    print(f"convert: every tenth of {try_convert(10)} lines", flush=True)


if __name__ == "__main__":
    main()
