"""Reads a class's forward: what code it can reach, which attributes it reads, and whether running it leaves a trace.

`convert` compares a forward with the fused one by running it on a copy. A user's own code may do more than compute: append to a
global list, count calls in a class attribute, draw from `random`. So it is read before it is run. What it may use: its module,
tensors, local names, PyTorch's functions, and functions of the same kind. Code of the libraries is known to do nothing else.
"""

from __future__ import annotations

import builtins
import dis
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from effdense.nn.outside import Reached, depends_on_arguments

# The root packages of PyTorch, of effdense, and of the libraries whose DenseNets `convert` knows.
LIBRARIES = frozenset(
    (
        "torch",
        "effdense",
        "torchvision",
        "timm",
        "monai",
        "torchxrayvision",
        "segmentation_models_pytorch",
        "pytorchcv",
    )
)
_TORCH = "torch"
# Called by statements, not by name.
_IMPLICIT = frozenset(
    [
        "__getattr__",
        "__getattribute__",
        "__setattr__",
        "__iter__",
        "__len__",
        "__bool__",
        "__getitem__",
        "__contains__",
        "__next__",
        "__enter__",
    ]
)
_BUILTINS = frozenset(
    [
        "abs",
        "all",
        "any",
        "bool",
        "callable",
        "dict",
        "enumerate",
        "filter",
        "float",
        "getattr",
        "hasattr",
        "id",
        "int",
        "isinstance",
        "issubclass",
        "iter",
        "len",
        "list",
        "map",
        "max",
        "min",
        "next",
        "object",
        "pow",
        "range",
        "repr",
        "reversed",
        "round",
        "set",
        "slice",
        "sorted",
        "str",
        "sum",
        "super",
        "tuple",
        "type",
        "zip",
        "NotImplemented",
    ]
)
_MODULES = frozenset(("torch", "math", "functools", "itertools", "operator", "collections", "typing"))
# Of torch's functions, those that do something that stays, and those that ask what is switched on around the call.
_LASTING = tuple(
    [
        "save",
        "load",
        "manual_seed",
        "seed",
        "set_",
        "use_deterministic",
        "compile",
        "fork_rng",
        "_C",
        "library",
        "is_autocast",
        "get_",
    ]
)
_STATELESS = (nn.ReLU, nn.Identity)  # modules that may be globals
# Names through which code can read every attribute.
_EVERY = frozenset(
    [
        "__dict__",
        "vars",
        "dir",
        "getattr",
        "_parameters",
        "_buffers",
        "parameters",
        "buffers",
        "named_parameters",
        "named_buffers",
        "state_dict",
    ]
)
_SIMPLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)


class Reads(NamedTuple):
    """The attributes that code may read: what else a module has changes nothing that it computes."""

    names: frozenset[str] = frozenset()
    every: bool = False  # all but `without`
    without: frozenset[str] = frozenset()  # of which it is known that their values make no difference
    own: frozenset[str] = (
        frozenset()
    )  # those that a user's code reads: of norms too, which are read at every forward


def counts(name: str, reads: Reads) -> bool:
    """Whether code may read an attribute."""
    return (reads.every or name in reads.names) and name not in reads.without


class Code(NamedTuple):
    """What is known of a forward."""

    own: frozenset[types.FunctionType]  # functions that it can reach and that are no library's
    reads: Reads
    obstacle: str | None  # why it must not be run on a probe
    reached: Reached  # what it may use outside of its modules' attributes


def is_librarys(function: Any) -> bool:
    """Whether a function is what a known library defines, and not something put in its place."""
    name = getattr(function, "__module__", None) or ""
    if name.partition(".")[0] not in LIBRARIES:
        return False
    code = getattr(function, "__code__", None)
    if code is None:  # compiled
        return True
    package = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
    return package is not None and code.co_filename.startswith(os.path.dirname(package) + os.sep)


def _is_compiled(function: Any) -> bool:
    """Whether it is a compiled function of a module that may be used."""
    owner = getattr(function, "__self__", None)
    name = str(getattr(owner, "__module__", None) or getattr(owner, "__name__", ""))
    return isinstance(function, types.BuiltinFunctionType) and name.partition(".")[0] in _MODULES


def plain(function: Any) -> Any:
    """The function inside a method."""
    return getattr(function, "__func__", function)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of all functions defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def _names(function: types.FunctionType) -> frozenset[str]:
    """Global names, attributes, and strings that may name some."""
    found: set[str] = set()
    for code in codes_in(function.__code__):
        found.update(code.co_names)
        found.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(found)


def owners_of(cls: type) -> list[type]:
    """A class and its bases without torch's, which are known: what its containers do is call their submodules."""
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] != _TORCH and c is not object]


class Reader:
    """Follows a class's forward through all that it can reach."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.owners = owners_of(cls)
        self.done: dict[types.FunctionType, None] = {}
        self.names: set[str] = set()
        self.obstacle: str | None = None
        self.reached = Reached()

    def refuse(self, reason: str) -> None:
        """Keeps the first reason."""
        self.obstacle = self.obstacle or reason

    def read(self, start: Any, called: frozenset[str]) -> Code:
        """All that `start`, the class's forward, can reach, and what has one of the names `called`."""
        self.visit(start, "forward")
        for owner in self.owners:
            for name in (_IMPLICIT | called) & vars(owner).keys():
                self.attribute(owner, name)
        own = frozenset(f for f in self.done if not is_librarys(f))
        every = any(_names(f) & _EVERY for f in own)
        for owner in self.owners:
            for name in ("forward", "__call__"):
                if name in vars(owner):
                    self.reached.name(vars(owner), name, f"{owner.__name__}.{name}")
            self.reached.lacks(owner, self.names | _IMPLICIT | called | {"forward", "__call__"})
        reads = Reads(frozenset(self.names), every, own=frozenset(n for f in own for n in _names(f)))
        return Code(own, reads, self.obstacle, self.reached)

    def visit(self, function: Any, name: str) -> None:
        """A function that may be called."""
        function = plain(function)
        if function in self.done:
            return
        if not isinstance(function, types.FunctionType):
            if not (is_librarys(function) or _is_compiled(function)):
                self.refuse(
                    f"its forward uses {name}, which convert cannot look into ({type(function).__name__})"
                )
            elif isinstance(function, nn.Module) and type(function) not in _STATELESS:
                self.refuse(f"its forward reads {name}, {with_article(function)} that is no submodule")
            elif isinstance(function, types.BuiltinFunctionType) and _is_torchs(function):
                self.call(function, name)
            return
        if function.__module__ is not None and _is_torchs(function) and is_librarys(function):
            self.call(function, name)
            return
        self.done[function] = None
        self.reached.function(function)
        names = _names(function)
        self.names |= names
        if not is_librarys(function):
            self.inspect(function)
        for owner in self.owners:
            for found in names & vars(owner).keys():
                self.attribute(owner, found)

    def call(self, function: Any, name: str) -> None:
        """A function of PyTorch's that a user's code calls; its modules' methods are known."""
        method = isinstance(function, types.FunctionType) and "." in function.__qualname__
        if not (method or function is nn.Module.forward) and not depends_on_arguments(function):
            self.refuse(f"its forward uses {name}, which depends on more than its arguments")

    def attribute(self, owner: type, name: str) -> None:
        """A class attribute that the code may read."""
        value = vars(owner)[name]
        self.reached.name(vars(owner), name, f"{owner.__name__}.{name}")
        if isinstance(value, property):
            self.visit(value.fget, name)
        elif isinstance(value, (staticmethod, classmethod, types.FunctionType)):
            self.visit(plain(value), name)
        elif (
            not (isinstance(value, type) or is_simple(value))
            and owner.__module__.partition(".")[0] not in LIBRARIES
        ):
            self.refuse(
                f"its forward reads {owner.__name__}.{name}, {with_article(value)} that all objects share"
            )

    def inspect(self, function: types.FunctionType) -> None:
        """A function of a user's: everything it does that could be seen afterwards."""
        free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self.defaults(function)
        for code in codes_in(function.__code__):
            instructions = list(dis.get_instructions(code))
            for i, instruction in enumerate(instructions):
                op, name = instruction.opname, instruction.argval
                if op in ("STORE_ATTR", "DELETE_ATTR"):
                    self.refuse(f"its {function.__name__} sets the attribute {name}")
                elif op in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
                    self.refuse(f"its {function.__name__} changes the global {name}")
                elif op in ("STORE_DEREF", "DELETE_DEREF") and name in free:
                    self.refuse(f"its {function.__name__} changes {name} of the function around it")
                elif op in ("LOAD_GLOBAL", "LOAD_NAME"):
                    self.reached.name(function.__globals__, name, name)
                    self.loaded(name, _global(function, name), instructions[i + 1 :])
                elif "DEREF" in op and name in free and name != "__class__":
                    self.reached.cell(free[name], name)
                    self.loaded(name, _contents(free[name]), instructions[i + 1 :])

    def defaults(self, function: types.FunctionType) -> None:
        """What a function's arguments are where they are not given: one object for all calls."""
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if callable(value) and not isinstance(value, type):
                self.visit(value, getattr(value, "__name__", "a default argument"))
            elif not (isinstance(value, type) or is_simple(value)):
                self.refuse(f"its {function.__name__} has {with_article(value)} as a default argument")

    def loaded(self, name: str, value: Any, behind: list[dis.Instruction]) -> None:
        """A global name, or one of the function around; `behind`: the instructions that may take attributes of it."""
        if isinstance(value, types.ModuleType):
            value, path = _follow(value, behind, name, self.reached)
            if isinstance(value, types.ModuleType) or value is None:
                self.refuse(f"its forward uses the module {path}")
                return
            name = path
            if any(part.startswith(_LASTING) for part in path.split(".")[1:]):
                self.refuse(f"its forward uses {path}")
                return
        if isinstance(value, type):
            known = issubclass(value, (nn.Module, BaseException)) or _is_torchs(value)
            if known and _asks(value):
                self.refuse(f"its forward uses {name}, which depends on more than its arguments")
            if not known and not (value.__module__ == "builtins" and value.__name__ in _BUILTINS):
                self.refuse(f"its forward uses the class {name}")
        elif value is getattr(builtins, name, builtins):
            if name not in _BUILTINS:
                self.refuse(f"its forward uses {name}()")
        elif callable(value):
            self.visit(value, name)
        elif not (name.startswith("torch.") and isinstance(value, (torch.dtype, torch.memory_format))):
            self.refuse(f"its forward reads the global {name}, {with_article(value)}")


def _is_torchs(value: Any) -> bool:
    """Whether a function or class is PyTorch's, by its module's name."""
    name = getattr(value, "__module__", None) or getattr(getattr(value, "__self__", None), "__name__", None)
    return str(name).partition(".")[0] == _TORCH


def _asks(cls: type) -> bool:
    """Whether it is a kind of tensor, which a forward can ask its input for, or switches gradients on."""
    tensors = issubclass(cls, torch.Tensor) and cls is not torch.Tensor
    return tensors or type(cls) is type(torch.FloatTensor) or cls.__name__ in _SWITCHES


_SWITCHES = frozenset(("enable_grad", "inference_mode", "set_grad_enabled", "Parameter", "Buffer"))


def _follow(module: Any, behind: list[dis.Instruction], path: str, reached: Reached) -> tuple[Any, str]:
    """What a chain of attributes that begins with a module ends with, as far as it leads through allowed modules."""
    value: Any = module
    for instruction in behind:
        root = value.__name__.partition(".")[0] if isinstance(value, types.ModuleType) else None
        if root is None or ("ATTR" not in instruction.opname and "METHOD" not in instruction.opname):
            break
        if root not in _MODULES and root not in LIBRARIES:
            break
        space, path = vars(value), f"{path}.{instruction.argval}"
        value = getattr(value, instruction.argval, None)
        if instruction.argval in space:  # else its module makes it when it is asked for
            reached.name(space, instruction.argval, path)
    return value, path


def _global(function: types.FunctionType, name: str) -> Any:
    return function.__globals__.get(name, getattr(builtins, name, None))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def with_article(value: Any) -> str:
    """A value's kind, with its article: "a Generator"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def is_simple(value: Any) -> bool:
    """Whether nothing can be changed in a value, or through it."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_simple, value))
    return isinstance(value, _SIMPLE)
