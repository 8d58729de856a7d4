"""Notes and compares what a forward reaches outside of its modules' attributes: functions, globals, class attributes.

convert notes them when it compares a forward, and looks at them again before the forward runs fused. So a look is short: it
compares by identity, and by value only where something is another object.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_NUMBERS = (bool, int, float, str)
_MISSING = object()


class _Name(NamedTuple):
    """A name in a class, a module or a function's globals, and what it stood for."""

    space: Mapping[str, Any]
    name: str
    value: Any
    shown: str


class _Function(NamedTuple):
    """A function and what can be replaced in it."""

    function: types.FunctionType
    parts: tuple[Any, ...]


_PARTS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")


class Reached:
    """What code reaches, as it was when it was read."""

    def __init__(self) -> None:
        self.names: dict[tuple[Any, ...], _Name] = {}
        self.cells: dict[int, tuple[Any, Any, str]] = {}
        self.functions: dict[types.FunctionType, _Function] = {}
        # How many attributes a class had, and names that code reads and the class did not have.
        self.classes: dict[type, tuple[int, frozenset[str]]] = {}

    def name(self, space: Mapping[str, Any], name: str, shown: str) -> None:
        """A name in a class's, a module's or the global namespace, whether it is there or not."""
        # vars(cls) is a new object at every call.
        owner = shown if isinstance(space, types.MappingProxyType) else id(space)
        value = space.get(name, _MISSING)
        self.names.setdefault((owner, name, id(value)), _Name(space, name, value, shown))

    def cell(self, cell: Any, name: str) -> None:
        """A variable of the function around."""
        self.cells[id(cell)] = cell, _contents(cell), name

    def function(self, function: types.FunctionType) -> None:
        """A function that may run."""
        self.functions[function] = _Function(function, _PARTS(function))

    def lacks(self, cls: type, names: Iterable[str]) -> None:
        """Names that code reads, of which a class has some only."""
        own = vars(cls)
        self.classes[cls] = len(own), frozenset(names) - own.keys()

    def add(self, other: Reached) -> None:
        """All that another one has."""
        for mine, others in zip(vars(self).values(), vars(other).values(), strict=True):
            for key, value in others.items():
                mine.setdefault(key, value)
        for cls, (count, names) in other.classes.items():
            self.classes[cls] = count, names | self.classes[cls][1]

    def changed(self) -> str | None:
        """What is not as it was, or None."""
        for space, name, value, shown in self.names.values():
            now = space.get(name, _MISSING)
            if now is not value and not _equal(now, value):
                return shown
        for function, parts in self.functions.values():
            now = _PARTS(function)
            if now[0] is not parts[0] or now[1] is not parts[1] or now[2] is not parts[2]:
                return function.__qualname__
        for cell, value, name in self.cells.values():
            now = _contents(cell)
            if now is not value and not _equal(now, value):
                return name
        for cls, (count, names) in self.classes.items():
            if len(vars(cls)) != count:
                if added := names & vars(cls).keys():
                    return f"{cls.__name__}.{min(added)}"
                self.classes[cls] = len(vars(cls)), names
                return self.changed()
        return None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _MISSING


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, _NUMBERS) and a == b


def frozen(value: Any) -> Any:
    """A container's copy, whose elements are the same objects; other values as they are."""
    if isinstance(value, dict):
        return _Frozen(type(value), tuple((k, frozen(v)) for k, v in dict.items(value)))
    if isinstance(value, (list, tuple)):
        return _Frozen(type(value), tuple(map(frozen, value)))
    if isinstance(value, (set, frozenset)):
        return _Frozen(type(value), frozenset(value))
    return value


class _Frozen(NamedTuple):
    kind: type
    content: Any


def same(now: Any, then: Any) -> bool:
    """Whether a value is what was frozen: the same object or an equal number or string, and containers of such."""
    if now is then or _equal(now, then):
        return True
    if not isinstance(then, _Frozen) or type(now) is not then.kind:
        return False
    if isinstance(now, (set, frozenset)):
        return bool(now == then.content)
    values: Any = dict.items(now) if isinstance(now, dict) else now
    if len(values) != len(then.content):
        return False
    if isinstance(now, dict):
        pairs = zip(values, then.content, strict=True)
        return all(same(k, a) and same(v, b) for (k, v), (a, b) in pairs)
    return all(map(same, values, then.content))


# ---- PyTorch's own code: what fused operators compute in its place

_FORWARDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.ReLU, nn.Identity, nn.Flatten, nn.Sequential),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_CONVS = _FORWARDS[:3]
_FUNCTIONAL = (
    *("conv1d", "conv2d", "conv3d", "batch_norm", "relu"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)
_TORCH = ("cat", "relu", "relu_", "conv1d", "conv2d", "conv3d", "batch_norm")
_METHODS = (
    *(f"{cls.__name__}.forward" for cls in _FORWARDS),
    *(f"{cls.__name__}._conv_forward" for cls in _CONVS),
    *("Module.__call__", "Module._call_impl"),
)
_FORWARD, _CONV_FORWARD = operator.attrgetter("forward"), operator.attrgetter("_conv_forward")
_CALL = operator.attrgetter("__call__", "_call_impl")
_OF_FUNCTIONAL = operator.itemgetter(*_FUNCTIONAL)
_OF_TORCH = operator.itemgetter(*_TORCH)
_SPACES = vars(F), vars(torch)


def _own_code() -> tuple[Any, ...]:
    functional, of_torch = _SPACES
    methods = *map(_FORWARD, _FORWARDS), *map(_CONV_FORWARD, _CONVS), *_CALL(nn.Module)
    return methods, _OF_FUNCTIONAL(functional), _OF_TORCH(of_torch)


_AT_IMPORT = _own_code()


def replaced() -> str | None:
    """What of PyTorch's code that fused operators stand for is not what it was when effdense was imported, or None."""
    now = _own_code()
    if now == _AT_IMPORT:
        return None
    prefixes = "torch.nn.", "torch.nn.functional.", "torch."
    shown = [f"{p}{n}" for p, of in zip(prefixes, (_METHODS, _FUNCTIONAL, _TORCH), strict=True) for n in of]
    flat = [[f for part in parts for f in part] for parts in (now, _AT_IMPORT)]
    return next(n for n, a, b in zip(shown, *flat, strict=True) if a != b)


# Beside those that dispatch on their tensors: what asks nothing that can change a fused forward's result, and factories.
# effdense runs on PyTorch's own operators where torch.jit and torch.onnx trace.
_FURTHER = (
    *("is_tensor", "_assert", "relu_", "threshold_", "zeros", "ones", "empty", "full", "tensor", "as_tensor"),
    *("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "dropout_", "selu_", "celu_"),
    *("jit.is_scripting", "jit.is_tracing", "jit.annotate", "jit.unused", "jit.ignore", "jit.export"),
    *("onnx.is_in_onnx_export", "utils.checkpoint.checkpoint", "utils.checkpoint.checkpoint_sequential"),
)


@functools.cache
def _of_arguments() -> frozenset[int]:
    """The functions of PyTorch's whose result their arguments alone determine, and random numbers; by identity."""
    found = {id(f) for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    found |= {id(f) for n, f in vars(F).items() if callable(f) and not n.startswith("_")}
    for path in _FURTHER:
        try:
            found.add(id(operator.attrgetter(path)(torch)))
        except AttributeError:
            continue  # not in this torch
    return frozenset(found)


def depends_on_arguments(function: Any) -> bool:
    """Whether a function of PyTorch's asks for nothing but its arguments, such as whether gradients are switched on."""
    return id(function) in _of_arguments()
