"""convert: the dense layers, blocks and transitions of an existing model run fused, in place; report: what was done.

A module is recognised by its structure, then its own forward is compared with ours on a copy with random weights, in
training and in evaluation, outputs and gradients. Only then does it change its class: the object, its submodules,
parameters, buffers and hooks stay what they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense.checks import check_memory
from effdense.nn import DenseBlock, DenseLayer, Transition, obstacle

_OURS = (DenseLayer, DenseBlock, Transition)


class Entry(NamedTuple):
    """One line of a report."""

    name: str  # as in model.named_modules()
    kind: str  # the class that it has, or would have: DenseLayer, DenseBlock, Transition
    converted: bool
    reason: str | None  # why it was not converted, or why it runs its submodules one by one at the moment


class Report(list[Entry]):
    """What of a model runs fused; `print(effdense.report(model))`."""

    def __str__(self) -> str:
        if not self:
            return "effdense: the model has no dense layers"
        lines = []
        for kind in (ours.__name__ for ours in _OURS):
            entries = [e for e in self if e.kind == kind]
            if entries:
                fused = sum(e.converted and e.reason is None for e in entries)
                lines.append(f"{kind}: {fused} of {len(entries)} run fused")
        for e in self:
            if e.reason is not None:
                state = "converted, but runs one by one" if e.converted else "not converted"
                lines.append(f"  {e.name or '(the model itself)'}: {state}: {e.reason}")
        return "\n".join(lines)


def _looks_like(module: nn.Module) -> type | None:
    """Which of our classes a module might be, by the names of its submodules alone."""
    names = set(module._modules)
    if {"norm1", "conv1", "norm2", "conv2"} <= names:
        return DenseLayer
    if {"norm", "conv", "pool"} <= names:
        return Transition
    layers = list(module._modules.values())
    if layers and all(m is not None and _looks_like(m) is DenseLayer for m in layers):
        return DenseBlock
    return None


def _structure_obstacle(module: nn.Module, ours: type) -> str | None:
    if ours is DenseBlock:
        return None
    parts = DenseLayer.parts if ours is DenseLayer else Transition.parts
    extra = set(module._modules) - set(parts) - {"pool"}
    if extra:
        return f"it has further submodules: {', '.join(sorted(extra))}"
    if ours is Transition and list(module._modules) != ["norm", "relu", "conv", "pool"]:
        return f"the submodules are {list(module._modules)}, not norm, relu, conv, pool"
    return obstacle(module._modules, parts, ignore_hooks=True)


def _bare_copy(module: nn.Module, seed: int) -> nn.Module:
    """A copy on the CPU in float64 with random parameters and buffers and without anybody's hooks."""
    memo: dict[int, Any] = {}
    for submodule in module.modules():
        for name, value in submodule.__dict__.items():
            if name.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
        for tensor in (*submodule._parameters.values(), *submodule._buffers.values()):
            if tensor is not None:
                bare = torch.empty(
                    tensor.shape, dtype=torch.float64 if tensor.is_floating_point() else tensor.dtype
                )
                memo[id(tensor)] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare
    probe = copy.deepcopy(module, memo)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*probe.named_parameters(), *probe.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
                if name.endswith(("bias", "running_mean")) or "conv" in name:
                    tensor.sub_(1)
            else:
                tensor.zero_()
    return probe


def _run(probe: nn.Module, training: bool, channels: int, spatial: int, as_list: bool) -> list[Tensor]:
    """Output, gradients and buffers of one step on a small random input."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, channels, *(2,) * spatial)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    probe.train(training)
    probe.zero_grad()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)  # the same dropout both times
        y = probe([x] if as_list else x)
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad((y * weights).sum(), [x, *probe.parameters()], materialize_grads=True)
    return [y.detach(), *grads, *(b.clone() for b in probe.buffers())]


def _difference(module: nn.Module, ours: type, memory: str) -> str | None:
    """Compares a module's forward with the fused one on copies; says what differs, or None."""
    conv: Any = next((m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if conv is None:
        return "it has no convolution"
    channels, spatial, as_list = conv.in_channels, len(conv.kernel_size), ours is DenseLayer
    for training in (True, False):
        theirs = _bare_copy(module, 0)
        mine = _bare_copy(module, 0)
        _adopt(mine, ours, memory)
        try:
            expected = _run(theirs, training, channels, spatial, as_list)
        except Exception as error:
            return f"its forward failed on a probe ({type(error).__name__}: {error})"
        got = _run(mine, training, channels, spatial, as_list)
        mode = "training" if training else "evaluation"
        if expected[0].shape != got[0].shape:
            return f"its forward gives {tuple(expected[0].shape)} on a probe, not {tuple(got[0].shape)}"
        for a, b in zip(expected, got, strict=True):
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
                return f"its forward computes something else ({mode}, on a probe)"
    return None


def _adopt(module: Any, ours: type, memory: str) -> None:
    module.__class__ = ours
    if ours is DenseLayer:
        module.memory = memory


class _Examiner:
    """Says why a module cannot become one of ours, or None.

    Every module's structure is looked at. The comparison on a copy is made once for all modules that run the same code:
    the same class with the same attributes, on submodules of the same classes.
    """

    def __init__(self, memory: str) -> None:
        self.memory = memory
        self.known: dict[Any, str | None] = {}

    def __call__(self, module: nn.Module, ours: type) -> str | None:
        if "forward" in module.__dict__:
            return "its forward was replaced"
        structure = _structure_obstacle(module, ours)
        if structure is not None:
            return structure
        attributes = {k: repr(v) for k, v in vars(module).items() if k not in _MODULE_STATE}
        key = (type(module), *sorted(attributes.items()), *sorted({str(type(m)) for m in module.modules()}))
        if key not in self.known:
            self.known[key] = _difference(module, ours, self.memory)
        return self.known[key]


_MODULE_STATE = frozenset(vars(nn.Module()))


def convert(model: nn.Module, *, memory: str = "balanced") -> nn.Module:
    """Makes the dense layers, blocks and transitions of `model` run fused, in place.

    Parameters, buffers, submodules, hooks, modes and state_dict keys stay the same objects and names, so an optimizer
    built before keeps working. What is not recognised stays as it is; `report(model)` says why. Converting again
    changes `memory` only.

    Args:
        model: any module that holds DenseNet layers with torchvision's structure, or such a layer itself.
        memory: "balanced" keeps each layer's bottleneck output for the backward, "minimal" computes it again.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module.  ValueError: there is no such memory mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_memory("convert", memory)
    examine, found = _Examiner(memory), []
    for module in model.modules():
        ours = type(module) if isinstance(module, _OURS) else _looks_like(module)
        if ours is not None and (isinstance(module, _OURS) or examine(module, ours) is None):
            found.append((module, ours))
    for module, ours in found:
        _adopt(module, ours, memory)
    return model


def report(model: nn.Module) -> Report:
    """Says of every dense layer, block and transition of `model` whether it runs fused, and why not.

    It looks at the model as it is now: a hook that was put on after `convert` shows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    entries, examine = Report(), _Examiner("balanced")
    for name, module in model.named_modules():
        if isinstance(module, _OURS):
            reason = None if isinstance(module, DenseBlock) else module.obstacle()
            entries.append(Entry(name, type(module).__name__, True, reason))
        elif (ours := _looks_like(module)) is not None:
            reason = examine(module, ours) or "effdense.convert has not been called since it was built"
            entries.append(Entry(name, ours.__name__, False, reason))
    return entries


__all__ = ["Entry", "Report", "convert", "report"]
