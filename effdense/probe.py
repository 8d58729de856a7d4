"""Whether a module's own forward does what ours does: both run on copies with random weights, on a small random input."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effdense.nn import DenseBlock, DenseLayer, DenseNet, Transition
from effdense.nn.classes import LAYERS, adopt
from effdense.nn.foreign import ForeignTransition
from effdense.nn.structure import DROPOUTS, drop_attributes


def _bare_copy(module: nn.Module, ours: type) -> nn.Module:
    """A copy in float64 with random parameters and buffers and without hooks.

    A block's layers become small ones, a net's features a convolution; a foreign block stays whole, but what could drop does.
    """
    memo: dict[int, Any] = {}
    if ours is DenseBlock:
        for i, layer in enumerate(module._modules.values()):
            memo[id(layer)] = DenseLayer(_CHANNELS + 2 * i, 2, 1, 0.0)
    if ours is DenseNet:
        conv, classifier = _first_conv(module), module.classifier
        width = classifier.in_features if isinstance(classifier, nn.Linear) else _CHANNELS
        memo[id(module.features)] = nn.Sequential(type(conv)(_CHANNELS, width, 1))
    for submodule in module.modules():
        for name, value in submodule.__dict__.items():
            if name.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
            elif name == "process_group":
                memo[id(value)] = None
        if id(submodule) in memo:
            continue
        for tensor in (*submodule._parameters.values(), *submodule._buffers.values()):
            if tensor is not None:
                bare = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
                memo[id(tensor)] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare
    probe = copy.deepcopy(module, memo).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*probe.named_parameters(), *probe.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
                if name.endswith(("bias", "running_mean")) or tensor.dim() > 1:
                    tensor.sub_(1)
                if tensor.dim() > 1:
                    tensor.mul_(4 / tensor[0].numel() ** 0.5)
    for submodule in probe.modules():
        if not isinstance(submodule, DROPOUTS):
            for attribute in drop_attributes(submodule):
                setattr(submodule, attribute, 0.5)
        if isinstance(submodule, DROPOUTS) and submodule.p == 0:
            submodule.p = 0.5
    return probe


_CHANNELS = 3  # of a block's probe


def _first_conv(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def _run(probe: nn.Module, training: bool, ours: type) -> list[Tensor]:
    """Output, buffers and gradients of one step on a small random input of unequal sizes."""
    conv = _first_conv(probe)
    generator = torch.Generator().manual_seed(1)
    size = 4 if ours in (Transition, ForeignTransition) else 2  # a pool's windows must fit
    shape = (2, conv.in_channels, *(size,) * (len(conv.kernel_size) - 1), size + 1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    probe.train(training).zero_grad()
    torch.manual_seed(2)  # the same dropout both times
    with _alone(probe):
        y = probe([x] if ours in LAYERS else x)
        # Before the backward: checkpointing updates them again there.
        buffers = [b.clone() for b in probe.buffers()]
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (y * weights).sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *probe.parameters()))
    return [y.detach(), *buffers, *grads]


def _autocasts() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


@contextlib.contextmanager
def _alone(probe: nn.Module) -> Iterator[None]:
    """Lets SyncBatchNorms take their batch's statistics without other processes, on the CPU too: in evaluation, with none running."""
    norms = [m for m in probe.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
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


def difference(module: nn.Module, ours: type, everywhere: bool = False) -> str | None:
    """Compares a module's forward with the fused one on copies; says what differs, or None."""
    try:
        theirs = _bare_copy(module, ours)
        mine = copy.deepcopy(theirs)
        adopt(mine, ours, "balanced", everywhere)
        outside, inside = _autocasts(), list[Any]()
        _first_conv(theirs).register_forward_pre_hook(lambda *_: inside.append(_autocasts()))
        for training in (True, False):
            # Where theirs is checkpointed, its backward has moved the statistics once more.
            for buffer, moved_once in zip(theirs.buffers(), mine.buffers(), strict=True):
                buffer.copy_(moved_once)
            expected, got = (_run(probe, training, ours) for probe in (theirs, mine))
            if any(autocasts != outside for autocasts in inside):
                return "its forward switches autocast"
            if expected[0].shape != got[0].shape:
                return f"its forward gives {tuple(expected[0].shape)} on a probe, not {tuple(got[0].shape)}"
            if not all(_close(a, b) for a, b in zip(got, expected, strict=True)):
                mode = "training" if training else "evaluation"
                return f"its forward computes something else ({mode}, on a probe)"
    except Exception as error:
        return f"its forward failed on a probe ({type(error).__name__}: {error})"
    return None
