"""Watches a forward while it runs on a probe: which of PyTorch's functions its own code calls, and what it leaves behind.

A comparison of numbers speaks for the inputs that it was made with. It speaks for all inputs where the code never asks for its
input's shape, type or values, and calls nothing whose meaning depends on them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effdense.nn.code_reader import codes_in
from effdense.nn.modules import walk

_ALLOWED = frozenset(
    [
        "cat",
        "concat",
        "concatenate",
        "relu",
        "relu_",
        "threshold",
        "batch_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_dropout",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "flatten",
        "mean",
        "contiguous",
        "clone",
        "add",
        "mul",
        "sub",
        "div",
        "iadd",
        "imul",
        "fn",
    ]
)
# Whether something is kept for a backward changes no result: checkpointing asks for it.
_QUERIES = ("requires_grad",)


class Watch(TorchFunctionMode):
    """Notes the first thing that code of `own` functions does and a probe cannot speak for."""

    effdense_may_fuse = True

    def __init__(self, own: Iterable[FunctionType]) -> None:
        super().__init__()
        self.codes = {code for function in own for code in codes_in(function.__code__)}
        self.found: str | None = None

    def asking(self, x: Tensor) -> Tensor:
        """x as a tensor that notes for which attributes, that no tensor has, watched code asks it."""
        watch = self

        class Asked(Tensor):
            def __getattr__(self, name: str) -> Any:
                if watch.found is None and watch._is_own(sys._getframe(1)):
                    watch.found = (
                        f"its forward asks for its input's {name}: a probe does not speak for every input"
                    )
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")

        return x.as_subclass(Asked)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.found is None and self._is_own(sys._getframe(1)):
            self.found = _obstacle(func, result)
        return result

    def _is_own(self, frame: Any) -> bool:
        """Whether the function was called by watched code, directly or through PyTorch's overrides."""
        while frame is not None and frame.f_globals.get("__name__") in _THROUGH:
            frame = frame.f_back
        return frame is not None and frame.f_code in self.codes


_THROUGH = (
    "torch.overrides",
    "torch.nn.functional",
    "torch._jit_internal",
    "torch._tensor",
    "torch.functional",
    __name__,
)


def _obstacle(func: Any, result: Any) -> str | None:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if name in _QUERIES:
        return None
    shown = name.strip("_")
    if not _is_of_tensors(result):
        return f"its forward asks for its input's {shown}: a probe does not speak for every input"
    if shown in _ALLOWED or shown.rstrip("_") in _ALLOWED:
        return None
    return f"its forward calls {shown}, which a probe does not speak for"


def _is_of_tensors(result: Any) -> bool:
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        return len(result) > 0 and all(map(_is_of_tensors, result))
    return isinstance(result, Tensor)


class Attributes:
    """What the attributes of a module, and of all inside of it, hold: to see whether a forward has changed it."""

    def __init__(self, module: nn.Module) -> None:
        self.before = [
            (m, {k: _frozen(v) for k, v in vars(m).items() if k not in _STATE}) for m in walk(module)
        ]

    def changed(self) -> str | None:
        """The name of one that is not what it was."""
        for module, before in self.before:
            now = {k: _frozen(v) for k, v in vars(module).items() if k not in _STATE}
            for name in [*now, *before]:
                if name not in before or name not in now or now[name] != before[name]:
                    return name
        return None


_STATE = frozenset(vars(nn.Module()))


def _frozen(value: Any) -> Any:
    """Something to compare a value with later; of objects that are no containers or tensors, which they are."""
    if isinstance(value, Tensor):
        return id(value), repr(value.detach().tolist())
    if isinstance(value, dict):
        return "dict", [(_frozen(k), _frozen(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_frozen(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return "set", {_frozen(v) if isinstance(v, Tensor) else v for v in value}
    return value if isinstance(value, (bool, int, float, str, bytes)) else id(value)


def chance() -> tuple[Any, ...]:
    """The states of the random generators that are not PyTorch's."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, keys, place, *rest = numpy.random.get_state()
    return (random.getstate(), keys.tobytes(), place, *rest)
