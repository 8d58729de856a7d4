"""A step on meta tensors, which have shapes and no memory: its storages are followed from birth to death.

So is the inside of the block engine (engine/passes.py): what is counted comes from what the engine does and not from a
description of it. Of "naive" and "checkpoint" the submodules are walked through one by one.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from effdense.engine import passes, stem
from effdense.engine.stage import BackwardInputs, ForwardInputs, split_arguments
from effdense.ops import dispatch
from effdense.tools.shapes import MADE

CATEGORIES = ("features", "bottlenecks", "scratch", "stem", "activations", "gradients", "other")

# What operators take for their tiles while they run, in bytes a thread: up to twice that on large images, less on small
# ones (csrc/cpu; what stays in a core's cache).
_TILES = 2**19
_TILED = {f"effdense::{name}{way}" for name in ("bottleneck", "bn_relu_conv3x3") for way in ("", "_backward")}

# A stem's operators: what they do, and how many of their arguments come before the settings.
_STEM: dict[Any, tuple[Callable[..., Any], int]] = {
    torch.ops.effdense.stem.default: (stem.forward, stem.FORWARD_TENSORS),
    torch.ops.effdense.stem_backward.default: (stem.backward, stem.BACKWARD_TENSORS),
}


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


@dataclasses.dataclass
class _Block:
    """Some memory that exists at the moment."""

    size: int
    category: str


class Timeline(TorchDispatchMode):
    """Follows every storage that an operator makes, and knows what existed when the sum was largest."""

    effdense_may_fuse = True

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._live: dict[int, _Block] = {}  # by the storage's id
        self._at_peak: list[_Block] = []
        self._workspace = _Block(0, "scratch")
        self._in_stage = self._in_stem = self._after_stem = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by PyTorch, which would import its compiler for the first operator: that takes longer than a plan."""
        return False

    def finish(self) -> tuple[int, dict[str, int]]:
        """The peak and its breakdown."""
        self._note()
        sums = {c: sum(b.size for b in self._at_peak if b.category == c) for c in CATEGORIES}
        if not self._after_stem:  # no block runs as a whole
            sums["activations"], sums["stem"] = sums["stem"], 0
        return self.peak, sums

    def _note(self, tiles: int = 0) -> None:
        """Called before anything goes: in between the level only rises. `tiles`: what an operator takes in passing."""
        if self.level + tiles > self.peak:
            self.peak = self.level + tiles
            self._at_peak = [*self._live.values(), _Block(self._workspace.size + tiles, "scratch")]

    def _follow(self, tensor: Tensor, category: str) -> None:
        """Counts a tensor's storage from now until it dies."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            self._live[id(storage)] = _Block(storage.nbytes(), category)
            self.level += storage.nbytes()
            weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        self._note()
        self.level -= self._live.pop(key).size

    def _lease(self, size: int) -> None:
        """What workspace._Pool.take does for a single thread, for which there is never more than one block."""
        if not size <= self._workspace.size <= 2 * size:
            self._note()
            self.level += size - self._workspace.size
            self._workspace.size = size

    def _category(self) -> str:
        if self._in_stem:
            return "stem"
        if torch._C._current_graph_task_id() != -1:
            return "gradients"
        return "scratch" if self._in_stage else "other" if self._after_stem else "stem"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.effdense.dense_stage.default:
            self._after_stem = True
            forward, settings = split_arguments(ForwardInputs, args)
            stage: list[Tensor] = self._inside(passes.forward, settings, forward)
            for tensor, category in zip(stage, ("other", "features", "bottlenecks", "other"), strict=True):
                self._live[id(tensor.untyped_storage())].category = category
            return tuple(stage)
        if func is torch.ops.effdense.dense_stage_backward.default:
            backward, settings = split_arguments(BackwardInputs, args)
            return self._inside(passes.backward, settings, backward)
        if func in _STEM:
            function, count = _STEM[func]
            self._in_stem = True
            try:
                made = self._inside(function, stem.StemConfig(*args[count:]), *args[:count])
            finally:
                self._in_stem = False
            return tuple(made) if function is stem.forward else made
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        shaped = MADE.get(func)
        result = NotImplemented if shaped is None or kwargs else shaped(args)
        if result is NotImplemented:
            result = func(*args, **kwargs or {})
        if self._in_stage and func.name() in _TILED:
            self._note(_TILES * torch.get_num_threads())
        if func is torch.ops.aten.convolution.default:  # on meta it does not follow its arguments' layout
            layouts = {suggest_memory_format(t) for t in args[:2]} - {torch.contiguous_format}
            result = result.contiguous(memory_format=layouts.pop()) if layouts else result
        for tensor in _tensors((result,)):
            if id(tensor.untyped_storage()) in given:
                continue
            if self._in_stage and tensor.dtype == torch.uint8 and tensor.dim() == 1:
                self._lease(tensor.numel())
            else:
                self._follow(tensor, self._category())
        return result

    def _inside(self, function: Callable[..., Any], settings: Any, *inputs: Any) -> list[Tensor]:
        """Walks through one function of the engine, or of a stem."""
        self._in_stage = True
        try:
            with torch.no_grad(), self:
                result = function(dispatch.operators(next(_tensors(inputs))), settings, *inputs)
        finally:
            self._in_stage = False
        return [t for t in result if t is not None]


class OneByOne(Timeline):
    """Of a step without effdense: under this mode every module calls its submodules."""

    effdense_may_fuse = False

    def __init__(self) -> None:
        super().__init__()
        self._after_stem = True

    def _category(self) -> str:
        # Checkpointing computes again with gradients on, which a backward has off.
        backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        return "gradients" if backward else "activations"


@contextmanager
def compiled_on_meta() -> Iterator[None]:
    """Meta tensors take the way of the compiled operators, whose fakes know what those allocate."""
    with dispatch.override("meta", *dispatch.implementation("cpu")):
        yield
