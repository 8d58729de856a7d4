"""convert makes the dense parts of an existing model run fused, in place; report says what was done; revert undoes it.

A module is recognised by its structure, then its own forward is compared with effdense's on a copy with random weights, in
training and in evaluation, outputs and gradients (examine.py, probe.py). Only then does it change its class: the object,
its submodules, parameters, buffers and hooks stay what they are. What has torchvision's names becomes one of effdense.nn's
classes; a block or transition with others keeps its own class with a fused forward in front, and its layers stay as they are.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from effdense.conversion.class_swap import (
    OURS,
    Converted,
    Foreign,
    Form,
    adopt,
    all_or_nothing,
    give_back,
    is_fused_kind,
)
from effdense.conversion.examine import Examiner
from effdense.engine.validation import Memory, check_memory, check_module
from effdense.nn.modules import named, walk
from effdense.ops import extension, reference
from effdense.ops.dispatch import operators

_NOT_CALLED = "effdense.convert has not been called since it was built"
# What convert looks for, in words.
_LOOKED_FOR = "modules with a norm, ReLU and convolution that read all that came before them, in blocks, transitions between these"

Model = TypeVar("Model", bound=nn.Module)


class Entry(NamedTuple):
    """One line of a report."""

    name: str  # as in model.named_modules()
    kind: str  # the class in effdense.nn that it has, or would have
    converted: bool
    reason: str | None  # why it was not converted, or why it runs its submodules one by one at the moment


class Report(list[Entry]):
    """What of a model runs fused; `print(effdense.report(model))`."""

    plain: str | None = None  # why plain PyTorch's operators run on the model's device, or None

    def __str__(self) -> str:
        if not self:
            return "effdense: the model has no dense layers"
        waiting = Counter(e.kind for e in self if e.reason == _NOT_CALLED)
        unconverted = not any(e.converted for e in self)
        lines = []
        if unconverted and waiting:
            could = ", ".join(f"{n} {kind}" for kind, n in waiting.items())
            lines.append(
                f"effdense: nothing runs fused, as effdense.convert has not been called: it finds {could}"
            )
        else:
            lines += self._counts()
        for e in self:
            if e.reason is not None and not (unconverted and e.reason == _NOT_CALLED):
                state = "converted, but runs one by one" if e.converted else "not converted"
                lines.append(f"  {e.name or '(the model itself)'}: {state}: {e.reason}")
        return "\n".join(lines)

    def _counts(self) -> list[str]:
        """A line for each kind."""
        lines = (
            [] if self.plain is None else [f"effdense: plain PyTorch's operators run, because {self.plain}"]
        )
        way = "run fused" if self.plain is None else "run in plain PyTorch"
        for kind in (c.__name__ for c in OURS):
            entries = [e for e in self if e.kind == kind]
            if entries:
                fused = sum(e.converted and e.reason is None for e in entries)
                lines.append(f"{kind}: {fused} of {len(entries)} {way}")
        return lines


def _why_plain(model: nn.Module) -> str | None:
    """Why the operators are plain PyTorch's where the model is, or None."""
    if extension.extension is None:
        return extension.reason
    weights = (p for m in walk(model) for p in m._parameters.values() if p is not None)
    weight = next((p for p in weights if not is_lazy(p) and p.is_floating_point()), None)
    if weight is None or weight.is_meta or operators(weight) is not reference:
        return None
    return f"there are no compiled ones for {str(weight.dtype).removeprefix('torch.')} on {weight.device}"


def _check_model(op: str, model: Any) -> None:
    check_module(op, "model", model)
    for name, module in named(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{op}: {name or 'model'} is a {type(module).__name__}: its code is fixed already; "
                "convert before torch.jit.trace"
            )


def convert(model: Model, *, memory: Memory = "balanced") -> Model:
    """Makes the dense layers, blocks, transitions, stem and head of `model` run fused, in place.

    Parameters, buffers, submodules, hooks, modes and state_dict keys stay the same objects and names, so an optimizer
    built before keeps working; converted modules change their class. What is not recognised stays as it is, and
    `report(model)` says why. Converting again changes `memory` only.

    Layers that were checkpointed (torchvision's `memory_efficient=True`) are not any more. Their batch norm statistics
    then move once per step, as without checkpointing; so they do inside a user's own `torch.utils.checkpoint`.

    Args:
        model: any module that holds dense layers or blocks, or one itself.
        memory: "balanced" keeps each layer's bottleneck output for the backward, "minimal" computes it again.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module, or has parts that torch.jit has compiled.
        ValueError: there is no such memory mode.

    Whatever is raised, the model is then as it was. Where it has nothing like a dense layer, a warning says so.

    Examples:
        >>> model = torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8)
        >>> model = effdense.convert(model, memory="minimal")
        >>> print(effdense.report(model))
        DenseLayer: 4 of 4 run fused
        DenseBlock: 2 of 2 run fused
        Transition: 1 of 1 run fused
        DenseFeatures: 1 of 1 run fused
        DenseNet: 1 of 1 run fused
    """
    if not convert_parts(model, memory):
        warnings.warn(
            f"convert: {type(model).__name__} has no dense layers and stays as it is; looked for were {_LOOKED_FOR}",
            stacklevel=2,
        )
    return model


def convert_parts(model: nn.Module, memory: Memory) -> bool:
    """Does what `convert` says, and returns whether there was anything like a dense layer."""
    _check_model("convert", model)
    check_memory("convert", memory)
    examine = Examiner()
    looked_at = list(examine.find(model))
    found = [(m, target) for _, m, target, reason in looked_at if reason is None]
    with all_or_nothing(module for module, _ in found):
        for module, target in found:
            adopt(module, target, memory, examine.forms.get(module, Form()))
    return bool(looked_at)


def revert(model: Model) -> Model:
    """Gives back to every module that `convert` has changed the class that it had, in place.

    For torch.jit.script, export by tools that know the original classes, or saving the model where effdense is not
    installed. Modules that were built as effdense.nn's stay what they are.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module.

    Examples:
        >>> model = effdense.convert(torchvision.models.DenseNet(8, (2, 2), 8))
        >>> type(effdense.revert(model)) is torchvision.models.DenseNet
        True
    """
    check_module("revert", "model", model)
    converted = [module for module in walk(model) if isinstance(module, Converted)]
    with all_or_nothing(converted):
        for module in converted:
            give_back(module)
    return model


def report(model: nn.Module) -> Report:
    """Says of every part of `model` that effdense knows whether it runs fused, and why not.

    It looks at the model as it is now: a hook that was put on after `convert` shows.

    Raises:
        TypeError: model is not a module, or has parts that torch.jit has compiled.

    Examples:
        >>> block = effdense.nn.DenseBlock(1, 16, bn_size=4, growth_rate=8, drop_rate=0.0)
        >>> hook = block.denselayer1.norm1.register_forward_hook(print)
        >>> [(entry.name, entry.reason) for entry in effdense.report(block)]
        [('', 'denselayer1: norm1 has hooks'), ('denselayer1', 'norm1 has hooks')]
    """
    _check_model("report", model)
    entries = Report()
    entries.plain = _why_plain(model)
    for name, module, target, reason in Examiner().find(model):
        converted = is_fused_kind(module)
        if converted:
            reason = type(module).obstacle(module)  # type: ignore[attr-defined]
        elif reason is None:
            reason = _NOT_CALLED
        kind = (
            target.kind
            if issubclass(target, Foreign)
            else next(c.__name__ for c in OURS if issubclass(target, c))
        )
        entries.append(Entry(name, kind, converted, reason))
    return entries


__all__ = ["Entry", "Report", "convert", "report", "revert"]
