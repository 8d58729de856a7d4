"""Whether a module's own forward does what ours does: both run on copies with random weights, on a small random input."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.code import code_of_tree
from effdense.modules import original, walk
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, DenseNet, Transition
from effdense.nn.classes import LAYERS, adopt
from effdense.nn.foreign import NO_FORM, ForeignBlock, ForeignTransition, Form
from effdense.nn.looks import KEPT
from effdense.nn.model import tail_of
from effdense.nn.obstacles import CONVS
from effdense.nn.structure import DROPOUTS, StandIn, drop_attributes, lead_of, read_transition
from effdense.watch import Attributes, Watch, chance


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
            elif not name.endswith("_hooks") and name not in (
                "_modules",
                "_parameters",
                "_buffers",
                "_effdense",
                KEPT,
            ):
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
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(map(self.value, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self.value(v)) for k, v in value.items())
        return value


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


def _bare_copy(module: nn.Module, ours: type, form: Form, flipped: str | None = None) -> nn.Module:
    """A copy with random weights on which every dropout is switched on.

    A block's layers become small ones, a net's features a convolution, and a ReLU if they end with one; a foreign block
    stays whole. What is called behind a transition's convolution, and is no class of PyTorch's, or behind a net's pool gets a
    stand-in. `flipped`: an attribute whose truth values are turned round.
    """
    copier = _Copier()
    if ours is DenseBlock:
        for i, layer in enumerate(module._modules.values()):
            copier.known[id(layer)] = DenseLayer(_CHANNELS + 2 * i, 2, 1, 0.0).double()
    if ours is DenseNet:
        tail = tail_of(module, form.head) or []
        width = next((m.in_features for m in tail if type(m) is nn.Linear), _CHANNELS)
        relu = [nn.ReLU()] if form.head.relu_before else []
        small = _Averaged(type(_first_conv(module))(_CHANNELS, width, 1), *relu)
        copier.known[id(module._modules["features"])] = small.double()
        for behind in tail:
            if type(behind) not in (nn.Linear, nn.Dropout):
                copier.known[id(behind)] = StandIn()
    if (lead := lead_of(module) if ours is ForeignBlock else None) is not None:
        copier.known[id(lead)] = StandIn()
    if ours is ForeignTransition:
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
    for m in modules:
        if not isinstance(m, DROPOUTS):
            for attribute in drop_attributes(m):
                m.__dict__[attribute] = 0.5
        elif m.p == 0:
            m.p = 0.5
        if flipped is not None and isinstance(m.__dict__.get(flipped), bool):
            m.__dict__[flipped] = not m.__dict__[flipped]
    return probe


_CHANNELS = 3  # of a block's probe


def _first_conv(module: nn.Module) -> Any:
    return next(m for m in walk(module) if isinstance(m, CONVS))


def _set_modes(probe: nn.Module, training: bool) -> None:
    for m in walk(probe):
        m.__dict__["training"] = training


def _run(probe: nn.Module, training: bool, ours: type) -> list[Tensor]:
    """Output, buffers and gradients of one step on a small random input of unequal sizes."""
    conv = _first_conv(probe)
    generator = torch.Generator().manual_seed(1)
    size = 4 if ours in (Transition, ForeignTransition) else 2  # a pool's windows must fit
    shape = (2, conv.in_channels, *(size,) * (len(conv.kernel_size) - 1), size + 1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    parameters = _parameters(probe)
    _set_modes(probe, training)
    for p in parameters:
        p.grad = None
    torch.manual_seed(2)  # the same dropout both times
    given: Any = [x] if ours in LAYERS else x
    with _alone(probe):
        y = probe(given)
        if ours in LAYERS and (len(given) != 1 or given[0] is not x):
            raise Unseen("its forward changes the list that it is given")
        # Before the backward: checkpointing updates them again there.
        buffers = [b.clone() for b in _buffers(probe)]
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (y * weights).sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *parameters))
    return [y.detach(), *buffers, *grads]


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


def difference(module: nn.Module, ours: type, form: Form = NO_FORM, flipped: str | None = None) -> str | None:
    """Compares a module's forward with the fused one on copies; says what differs, or None. `flipped`: see _bare_copy."""
    others = chance()
    try:
        theirs, mine = (_bare_copy(module, ours, form, flipped) for _ in range(2))
        code = code_of_tree(theirs)
        if code.obstacle is not None:
            return code.obstacle
        adopt(mine, ours, "balanced", form)
        attributes = Attributes(theirs)
        outside, inside = _autocasts(), list[Any]()
        _first_conv(theirs).register_forward_pre_hook(lambda *_: inside.append(_autocasts()))
        for training in (True, False):
            # Where theirs is checkpointed, its backward has moved the statistics once more.
            for buffer, moved_once in zip(_buffers(theirs), _buffers(mine), strict=True):
                buffer.copy_(moved_once)
            with Watch(code.own) as watch:
                expected = _run(theirs, training, ours)
            got = _run(mine, training, ours)
            if any(autocasts != outside for autocasts in inside):
                return "its forward switches autocast"
            if expected[0].shape != got[0].shape:
                return f"its forward gives {tuple(expected[0].shape)} on a probe, not {tuple(got[0].shape)}"
            if not all(_close(a, b) for a, b in zip(got, expected, strict=True)):
                mode = "training" if training else "evaluation"
                return f"its forward computes something else ({mode}, on a probe)"
            if watch.found is not None:
                return watch.found
            if (name := attributes.changed()) is not None:
                return f"its forward changes its attribute {name}"
        if not _close(_run(theirs, False, ours)[0], expected[0]):
            return "its forward gives another result when it is called again"
        if chance() != others:
            return "its forward draws random numbers"
    except Unseen as reason:
        return str(reason)
    except Exception as error:
        return f"its forward failed on a probe ({type(error).__name__}: {error})"
    return None
