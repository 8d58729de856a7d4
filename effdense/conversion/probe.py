"""Compares a module's own forward with the fused one: both run on copies with random weights, on a small random input."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.conversion.class_swap import LAYERS, adopt
from effdense.conversion.watch import Attributes, Watch, chance
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, DenseNet, Transition
from effdense.nn.code import code_of_tree
from effdense.nn.foreign import NO_FORM, ForeignBlock, ForeignTransition, Form
from effdense.nn.kinds import CONVS, DROPOUTS
from effdense.nn.looks import KEPT
from effdense.nn.modules import named, original, walk
from effdense.nn.network import tail_of
from effdense.nn.obstacles import global_obstacle, probing
from effdense.nn.structure import StandIn, drop_attributes, layers_of, lead_of, read_transition


class _Copier:
    """Copies modules in float64 with random parameters and buffers and without hooks, and calls no method of theirs."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def module(self, module: nn.Module) -> Any:
        """The copy of a module; attributes that are neither containers nor tensors are the same objects."""
        if id(module) in self.known:
            return self.known[id(module)]
        cls: Any = original(type(module))
        copied = object.__new__(cls)
        self.known[id(module)] = copied
        state = vars(nn.Module())
        for name, value in vars(module).items():
            if name == "process_group":
                state[name] = None
            elif not name.endswith("_hooks") and name not in _OWN_STATE:
                state[name] = self.value(value)
        for name in ("_modules", "_parameters", "_buffers"):
            state[name] = {k: self.value(v) for k, v in vars(module)[name].items()}
        vars(copied).update(state)
        return copied

    def value(self, value: Any) -> Any:
        """What an attribute of the copy holds."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            if id(value) not in self.known:
                dtype = torch.float64 if value.is_floating_point() else value.dtype
                bare = torch.zeros(value.shape, dtype=dtype, device="cpu")
                self.known[id(value)] = nn.Parameter(bare) if isinstance(value, nn.Parameter) else bare
            return self.known[id(value)]
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            return self.container(value)
        return value

    def container(self, value: Any) -> Any:
        """A copy of a container, of a subclass's too, made without a call of its methods."""
        base: Any = next(b for b in _CONTAINERS if isinstance(value, b))
        if issubclass(base, dict):
            copied = base.__new__(type(value))
            for k, v in base.items(value):
                base.__setitem__(copied, k, self.value(v))
            if base is defaultdict:
                copied.default_factory = value.default_factory
        elif issubclass(base, (tuple, frozenset)):
            copied = base.__new__(type(value), map(self.value, base.__iter__(value)))
        else:
            copied = base.__new__(type(value))
            fill = base.extend if base is list else base.update
            fill(copied, map(self.value, base.__iter__(value)))
        if (attributes := getattr(value, "__dict__", None)) is not None:
            self.known[id(value)] = copied  # which may hold itself
            vars(copied).update({k: copied if v is value else self.value(v) for k, v in attributes.items()})
        return copied

    def tensors(self) -> list[Tensor]:
        """The copies of tensors, in the order in which they were made."""
        return [t for t in self.known.values() if isinstance(t, Tensor)]


_OWN_STATE = ("_modules", "_parameters", "_buffers", KEPT, "_effdense", "_compiled_call_impl", "_call_impl")
_CONTAINERS = (defaultdict, OrderedDict, dict, list, tuple, set, frozenset)


def _parameters(module: nn.Module) -> list[Any]:
    return list(dict.fromkeys(p for m in walk(module) for p in m._parameters.values() if p is not None))


def _buffers(module: nn.Module) -> list[Tensor]:
    return list(dict.fromkeys(b for m in walk(module) for b in m._buffers.values() if b is not None))


class _Averaged(DenseFeatures):
    """A probe's features, whose average is taken by the fused head, as a converted net takes it."""

    forward = nn.Sequential.forward

    def pooled(self, input: Tensor, relu_before: bool = False) -> Tensor:
        """See DenseFeatures."""
        return F.relu(self(input)).flatten(2).mean(2)


def _bare_copy(module: nn.Module, kind: type, form: Form, flipped: str | None = None) -> nn.Module:
    """A copy with random weights on which every dropout is switched on.

    A block's layers become small ones, a net's features a convolution, and a ReLU if they end with one; a foreign block
    stays whole. What is called behind a transition's convolution, and is no class of PyTorch's, or behind a net's pool gets a
    stand-in. `flipped`: an attribute whose truth values are turned round.
    """
    copier = _Copier()
    if kind is DenseBlock:
        for i, layer in enumerate(module._modules.values()):
            copier.known[id(layer)] = DenseLayer(_CHANNELS + 2 * i, 2, 1, 0.0).double()
    if kind is DenseNet:
        tail = tail_of(module, form.head) or []
        width = next((m.in_features for m in tail if type(m) is nn.Linear), _CHANNELS)
        relu = [nn.ReLU()] if form.head.relu_before else []
        small = _Averaged(type(_first_conv(module))(_CHANNELS, width, 1), *relu)
        copier.known[id(module._modules["features"])] = small.double()
        for behind in tail:
            if type(behind) not in (nn.Linear, nn.Dropout):
                copier.known[id(behind)] = StandIn()
    if (lead := lead_of(module) if kind is ForeignBlock else None) is not None:
        copier.known[id(lead)] = StandIn()
    if kind is ForeignTransition:
        for behind in read_transition(module, hooks=False)[0].behind:
            if type(behind).__module__.partition(".")[0] != "torch":
                copier.known[id(behind)] = StandIn()
    probe = copier.module(module)
    generator = torch.Generator().manual_seed(0)
    modules = list(walk(probe))
    with torch.no_grad():
        for m in modules:
            for name, tensor in (*m._parameters.items(), *m._buffers.items()):
                if tensor is None or not tensor.is_floating_point():
                    continue
                tensor.uniform_(0.5, 1.5, generator=generator)
                if name.endswith(("bias", "running_mean")) or tensor.dim() > 1:
                    tensor.sub_(1)
                if tensor.dim() > 1:
                    tensor.mul_(4 / tensor[0].numel() ** 0.5)
        _randomise(copier.tensors(), {id(t) for t in (*_parameters(probe), *_buffers(probe))}, generator)
    for m in modules:
        if not isinstance(m, DROPOUTS):
            for attribute in drop_attributes(m):
                m.__dict__[attribute] = 0.5
        elif m.p == 0:
            m.p = 0.5
        if flipped is not None and isinstance(m.__dict__.get(flipped), bool):
            m.__dict__[flipped] = not m.__dict__[flipped]
        m.__dict__["_call_impl"] = functools.partial(_call, m)
    return probe


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a module without the global hooks, which a probe is no business of."""
    return module.forward(*args, **kwargs)


def _randomise(tensors: list[Tensor], known: set[int], generator: torch.Generator) -> None:
    """Of those that are no parameters or buffers but attributes, numbers too."""
    for tensor in tensors:
        if id(tensor) in known:
            continue
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif not tensor.is_complex():
            low, high = (0, 2) if tensor.dtype == torch.bool else (1, 4)
            tensor.random_(low, high, generator=generator)


_CHANNELS = 3  # of a block's probe


def _first_conv(module: nn.Module) -> Any:
    return next(m for m in walk(module) if isinstance(m, CONVS))


class _Mode(NamedTuple):
    """How a probe runs."""

    training: bool
    other: tuple[int, ...] = ()  # modules in the other mode: their places in `walk`
    input_grad: bool = True  # whether its input requires a gradient
    weights_grad: bool = True  # whether its parameters do

    def set(self, probe: nn.Module) -> None:
        """Puts a probe into it."""
        for i, m in enumerate(walk(probe)):
            m.__dict__["training"] = self.training is not (i in self.other)
        for p in _parameters(probe):
            p.grad = None
            p.requires_grad_(self.weights_grad)

    def further(self) -> bool:
        """Whether it is one of those in which outputs and statistics alone are compared."""
        return bool(self.other) or not (self.input_grad and self.weights_grad)

    def __str__(self) -> str:
        words = ["training" if self.training else "evaluation"]
        words += ["some modules in the other mode"] if self.other else []
        words += [] if self.input_grad else ["an input without gradient"]
        words += [] if self.weights_grad else ["frozen parameters"]
        return ", ".join(words)


def _further_modes(theirs: nn.Module, kind: type, names: Container[str]) -> Iterator[_Mode]:
    """Modes that differ for a user's code which reads `names`."""
    for training in (True, False):
        if "requires_grad" in names:
            for input_grad, weights_grad in ((False, True), (True, False), (False, False)):
                yield _Mode(training, (), input_grad, weights_grad)
        if "training" in names:
            for group in _groups(theirs, kind):
                yield _Mode(training, group)


def _groups(theirs: nn.Module, kind: type) -> list[tuple[int, ...]]:
    """Places of modules to be put into another mode together: in a foreign block, the same of all layers."""
    modules = {m: i for i, m in enumerate(walk(theirs))}
    groups: dict[Any, list[int]] = {}
    if kind is ForeignBlock:
        for layer in layers_of(theirs).values():
            for path, m in named(layer):
                groups.setdefault((path, type(m)), []).append(modules.pop(m, -1))
    groups.update({i: [i] for i in modules.values()})
    return [tuple(group) for group in groups.values()]


def _run(probe: nn.Module, mode: _Mode, kind: type, watch: Watch | None = None) -> list[Tensor]:
    """Output, buffers and gradients of one step on a small random input of unequal sizes."""
    conv = _first_conv(probe)
    generator = torch.Generator().manual_seed(1)
    size = 4 if kind in (Transition, ForeignTransition) else 2  # a pool's windows must fit
    shape = (2, conv.in_channels, *(size,) * (len(conv.kernel_size) - 1), size + 1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (x if watch is None or not watch.codes else watch.asking(x)).requires_grad_(mode.input_grad)
    parameters = _parameters(probe)
    mode.set(probe)
    torch.manual_seed(2)  # the same dropout both times
    given: Any = [x] if kind in LAYERS else x
    with _alone(probe):
        y = probe(given)
        if kind in LAYERS and (len(given) != 1 or given[0] is not x):
            raise Unseen("its forward changes the list that it is given")
        # Before the backward: checkpointing updates them again there.
        buffers = [b.clone() for b in _buffers(probe)]
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        if not mode.further():
            (y * weights).sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *parameters))
    return [t.as_subclass(Tensor) for t in (y.detach(), *buffers, *grads)]


def _autocasts() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


@contextlib.contextmanager
def _alone(probe: nn.Module) -> Iterator[None]:
    """Lets SyncBatchNorms take their batch's statistics without other processes, on the CPU too: in evaluation, with none running."""
    norms = [m for m in walk(probe) if isinstance(m, nn.SyncBatchNorm) and m.training]
    buffers = [norm._buffers for norm in norms]
    for norm in norms:
        norm.training, norm._buffers = False, dict.fromkeys(norm._buffers)
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm.training, norm._buffers = True, own


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return a.numel() == 0 or bool((a - b).abs().max() <= 1e-9 * (1 + b.abs().max()))


class Unseen(Exception):
    """What a comparison of numbers does not show."""


def difference(module: nn.Module, kind: type, form: Form = NO_FORM, flipped: str | None = None) -> str | None:
    """Compares a module's forward with the fused one on copies; says what differs, or None. `flipped`: see _bare_copy."""
    with probing():
        return _difference(module, kind, form, flipped)


def _difference(module: nn.Module, kind: type, form: Form, flipped: str | None) -> str | None:
    others = chance()
    try:
        theirs, mine = (_bare_copy(module, kind, form, flipped) for _ in range(2))
        code = code_of_tree(theirs)
        if code.obstacle is not None:
            return code.obstacle
        adopt(mine, kind, "balanced", form)
        reason = global_obstacle() if kind is DenseNet else cast(Any, mine).obstacle()
        if reason is not None:
            return f"it cannot be compared: {reason}"  # its own forward would run both times
        outside, inside = _autocasts(), list[Any]()

        def call_conv(*args: Any, **kwargs: Any) -> Any:
            inside.append(_autocasts())
            return first.forward(*args, **kwargs)

        first = _first_conv(theirs)
        first.__dict__["_call_impl"] = call_conv
        attributes = Attributes(theirs)
        modes = [_Mode(True), _Mode(False)]
        modes += _further_modes(theirs, kind, code.reads.own) if flipped is None else ()
        for mode in modes:
            # Where theirs is checkpointed, its backward has moved the statistics once more.
            for buffer, moved_once in zip(_buffers(theirs), _buffers(mine), strict=True):
                buffer.copy_(moved_once)
            with Watch(code.own) as watch:
                expected = _run(theirs, mode, kind, watch)
            got = _run(mine, mode, kind)
            if any(autocasts != outside for autocasts in inside):
                return "its forward switches autocast"
            if expected[0].shape != got[0].shape:
                return f"its forward gives {tuple(expected[0].shape)} on a probe, not {tuple(got[0].shape)}"
            if not all(_close(a, b) for a, b in zip(got, expected, strict=True)):
                return f"its forward computes something else ({mode}, on a probe)"
            if watch.found is not None:
                return watch.found
            if (name := attributes.changed()) is not None:
                return f"its forward changes its attribute {name}"
        expected = _run(theirs, modes[1], kind)
        if not _close(_run(theirs, modes[1], kind)[0], expected[0]):
            return "its forward gives another result when it is called again"
        if chance() != others:
            return "its forward draws random numbers"
    except Unseen as reason:
        return str(reason)
    except Exception as error:
        return f"its forward failed on a probe ({type(error).__name__}: {error})"
    return None
