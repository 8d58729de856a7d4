"""convert: the dense parts of an existing model run fused, in place; report: what was done; revert: as it was.

A module is recognised by its structure, then its own forward is compared with ours on a copy with random weights, in
training and in evaluation, outputs and gradients. Only then does it change its class: the object, its submodules,
parameters, buffers and hooks stay what they are. What has torchvision's names becomes one of effdense.nn's classes; a
block or transition with others keeps its own class with a fused forward in front, and its layers stay as they are.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense.checks import check_memory
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, DenseNet, PlainDenseLayer, Transition
from effdense.nn.foreign import Foreign, ForeignBlock, ForeignTransition, foreign_class
from effdense.nn.obstacles import chain_obstacle, transition_obstacle
from effdense.nn.structure import (
    DROPOUTS,
    Obstacle,
    drop_attribute,
    kinds_of,
    layers_of,
    looks_like_block,
    read_block,
    read_transition,
)

_OURS = (DenseLayer, PlainDenseLayer, DenseBlock, Transition, DenseFeatures, DenseNet)
_LAYERS = (DenseLayer, PlainDenseLayer)


class Entry(NamedTuple):
    """One line of a report."""

    name: str  # as in model.named_modules()
    kind: str  # the class in effdense.nn that it has, or would have
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
    if type(module).forward is nn.Module.forward:
        return None  # a container that nobody calls
    if type(module) is nn.Sequential and _holds_blocks(module):
        return DenseFeatures
    if {"norm1", "conv1", "norm2", "conv2"} <= names:
        return DenseLayer
    if {"norm1", "conv1"} <= names and "conv2" not in names:
        return PlainDenseLayer
    if {"norm", "conv", "pool"} <= names:
        return Transition
    if {"features", "classifier"} == names and _holds_blocks(module._modules["features"]):
        return DenseNet
    layers = list(module._modules.values())
    if layers and all(m is not None and _looks_like(m) in _LAYERS for m in layers):
        return DenseBlock
    return None


def _holds_blocks(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and any(
        isinstance(m, ForeignBlock) or _looks_like(m) is DenseBlock or looks_like_block(m) for m in module
    )


def _behind_blocks(model: nn.Module) -> set[nn.Module]:
    """What comes behind a dense block in a sequence."""
    return {
        after
        for m in model.modules()
        if isinstance(m, nn.Sequential)
        for before, after in itertools.pairwise(m)
        if isinstance(before, ForeignBlock) or looks_like_block(before)
    }


# Parts of torchvision's own layer that are of no use outside of its forward.
_INTERNAL = {"any_requires_grad", "bn_function", "call_checkpoint_bottleneck"}


def _structure_obstacle(module: nn.Module, ours: type) -> str | None:
    """Why a module is not made like ours, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    own = [*module._parameters, *module._buffers]
    if own:
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if issubclass(ours, Foreign):
        taken = {n for n in (*vars(ours), *vars(Foreign)) if not n.startswith("__")} & set(dir(module)) - {
            "forward"
        }
        if taken:
            return f"its class has attributes that would be hidden: {', '.join(sorted(taken))}"
        try:
            read_block(module, hooks=False) if ours is ForeignBlock else read_transition(module, hooks=False)
        except Obstacle as reason:
            return str(reason)
        return None
    lost = {name for name in set(dir(type(module))) - set(dir(ours)) - _INTERNAL if not name.startswith("_")}
    if lost:
        return f"its class has more than a DenseNet's: {', '.join(sorted(lost))}"
    if ours is Transition:
        return transition_obstacle(module._modules, ignore_hooks=True)
    if not issubclass(ours, _LAYERS):
        return None
    extra = set(module._modules) - set(ours.parts)
    if extra:
        return f"it has further submodules: {', '.join(sorted(extra))}"
    return chain_obstacle(module._modules, ours.parts, ignore_hooks=True)


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
    for layer in layers_of(probe).values() if ours is ForeignBlock else ():
        if (attribute := drop_attribute(layer)) is not None:
            setattr(layer, attribute, 0.5)
    for submodule in probe.modules():
        if isinstance(submodule, DROPOUTS) and submodule.p == 0:
            submodule.p = 0.5
    return probe


_CHANNELS = 3  # of a block's probe


def _first_conv(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))


def _run(probe: nn.Module, training: bool, ours: type) -> list[Tensor]:
    """Output, buffers and gradients of one step on a small random input."""
    conv = _first_conv(probe)
    generator = torch.Generator().manual_seed(1)
    shape = (2, conv.in_channels, *(2,) * len(conv.kernel_size))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    probe.train(training)
    torch.manual_seed(2)  # the same dropout both times
    y = probe([x] if ours in _LAYERS else x)
    # Before the backward: checkpointing updates them again there.
    buffers = [b.clone() for b in probe.buffers()]
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((y * weights).sum(), [x, *probe.parameters()], materialize_grads=True)
    return [y.detach(), *buffers, *grads]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return a.numel() == 0 or bool((a - b).abs().max() <= 1e-9 * (1 + b.abs().max()))


def _difference(module: nn.Module, ours: type, everywhere: bool = False) -> str | None:
    """Compares a module's forward with the fused one on copies; says what differs, or None."""
    for training in (True, False):
        try:
            expected = _run(_bare_copy(module, ours), training, ours)
            mine = _bare_copy(module, ours)
            _adopt(mine, ours, "balanced", everywhere)
            got = _run(mine, training, ours)
        except Exception as error:
            return f"its forward failed on a probe ({type(error).__name__}: {error})"
        if expected[0].shape != got[0].shape:
            return f"its forward gives {tuple(expected[0].shape)} on a probe, not {tuple(got[0].shape)}"
        if not all(_close(a, b) for a, b in zip(got, expected, strict=True)):
            mode = "training" if training else "evaluation"
            return f"its forward computes something else ({mode}, on a probe)"
    return None


def _adopt(module: Any, ours: type, memory: str, everywhere: bool = False) -> None:
    if issubclass(ours, Foreign):
        if isinstance(module, Foreign):
            everywhere = module._effdense[1]
        else:
            classes: Any = ours, type(module)
            module.__class__ = foreign_class(*classes)
        module._effdense = memory, everywhere, kinds_of(module)
        return
    if type(module) is not ours:
        module._effdense_original = type(module), set(vars(module))
        module.__class__ = ours
    if issubclass(ours, _LAYERS):
        module.memory = memory
        module.__dict__.setdefault("drop_rate", 0.0)  # a class without dropout need not have it


class _Examiner:
    """Says why a module cannot become one of ours, or None.

    Every module's structure is looked at. The comparison on a copy is made once for all modules that run the same code:
    the same class with the same attributes, on submodules of the same names and classes.
    """

    def __init__(self) -> None:
        self.known: dict[Any, str | None] = {}
        self.everywhere: dict[nn.Module, bool] = {}  # blocks that drop behind every convolution

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, type, str | None]]:
        """Every part that is converted or might be: its name, itself, its class in effdense.nn, why it is not that.

        What is inside a foreign block or transition is left out.
        """
        behind = _behind_blocks(model)
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if module in inside:
                continue
            if isinstance(module, (*_OURS, Foreign)):
                ours: type | None = type(module)
                reason = None
            else:
                ours, reason = self._kind(module, module in behind)
            if ours is not None:
                yield name, module, ours, reason
            if ours is not None and issubclass(ours, Foreign):
                inside.update(module.modules())

    def _kind(self, module: nn.Module, behind: bool) -> tuple[type | None, str | None]:
        """What a module might become, and why not."""
        ours = _looks_like(module)
        if ours in (None, DenseBlock) and not any(self._is_layer(m) for m in module._modules.values()):
            if looks_like_block(module):
                return ForeignBlock, self(module, ForeignBlock)
            ours = None
        reason = None if ours is None else self(module, ours)
        untold = ours is None or (ours is Transition and reason is not None)
        if untold and behind and self(module, ForeignTransition) is None:
            return ForeignTransition, None
        return ours, reason

    def _is_layer(self, module: Any) -> bool:
        """Whether it is one of our layers, or can be."""
        ours = type(module) if isinstance(module, _LAYERS) else _looks_like(module)
        return isinstance(module, _LAYERS) or (ours in _LAYERS and self(module, ours) is None)

    def __call__(self, module: nn.Module, ours: type) -> str | None:
        structure = _structure_obstacle(module, ours)
        if (
            structure is not None or ours is DenseFeatures
        ):  # nn.Sequential itself: there is nothing to compare
            return structure
        attributes = {k: repr(v) for k, v in vars(module).items() if k not in _MODULE_STATE}
        whole = ours not in (DenseBlock, DenseNet)
        children = tuple((n, type(m)) for n, m in module.named_modules()) if whole else ()
        key = (
            ours,
            type(module),
            *sorted(attributes.items()),
            *children,
            module if ours is ForeignBlock else None,
        )
        if key not in self.known:
            # Whatever is switched on around the call must not reach the probe, nor the probe the random numbers.
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.device("cpu"),
                torch.autocast("cpu", enabled=False),
                torch.random.fork_rng(devices=[]),
            ):
                self.known[key] = _difference(module, ours)
                if (
                    self.known[key] is not None
                    and ours is ForeignBlock
                    and _difference(module, ours, True) is None
                ):
                    self.known[key], self.everywhere[module] = None, True
        return self.known[key]


_MODULE_STATE = frozenset(vars(nn.Module()))


def convert(model: nn.Module, *, memory: str = "balanced") -> nn.Module:
    """Makes the dense layers, blocks, transitions, stem and head of `model` run fused, in place.

    Parameters, buffers, submodules, hooks, modes and state_dict keys stay the same objects and names, so an optimizer
    built before keeps working; converted modules change their class. What is not recognised stays as it is, and
    `report(model)` says why. Converting again changes `memory` only.

    Layers that were checkpointed (torchvision's `memory_efficient=True`) are not any more. Their batch norm statistics
    then move once per step, as without checkpointing; so they do inside a user's own `torch.utils.checkpoint`.

    Args:
        model: any module that holds DenseNet layers with torchvision's structure, or such a layer itself.
        memory: "balanced" keeps each layer's bottleneck output for the backward, "minimal" computes it again.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module.  ValueError: there is no such memory mode. The model is then as it was, whatever
            is raised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_memory("convert", memory)
    examine = _Examiner()
    found = [(m, ours) for _, m, ours, reason in examine.find(model) if reason is None]
    before = [(m, m.__class__, dict(vars(m))) for m, _ in found]
    try:
        for module, ours in found:
            base = ours if not issubclass(ours, Foreign) else _foreign_base(ours)
            _adopt(module, base, memory, examine.everywhere.get(module, False))
    except BaseException:  # such as Ctrl-C: all or nothing
        for module, kind, state in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        raise
    return model


def _foreign_base(ours: type) -> type:
    return ForeignBlock if issubclass(ours, ForeignBlock) else ForeignTransition


def revert(model: nn.Module) -> nn.Module:
    """Gives back to every module that `convert` has changed the class that it had, in place.

    For torch.jit.script, export by tools that know the original classes, or saving the model where effdense is not
    installed. Modules that were built as effdense.nn's stay what they are.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        state = module.__dict__
        if isinstance(module, Foreign):
            module.__class__ = module.original
            del state["_effdense"]
        elif "_effdense_original" in state:
            module.__class__, had = state.pop("_effdense_original")
            for name in {"_memory", "drop_rate"} - had:
                state.pop(name, None)
    return model


def report(model: nn.Module) -> Report:
    """Says of every part of `model` that effdense knows whether it runs fused, and why not.

    It looks at the model as it is now: a hook that was put on after `convert` shows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    entries = Report()
    for name, module, ours, reason in _Examiner().find(model):
        converted = isinstance(module, (*_OURS, Foreign))
        if converted:
            reason = module.obstacle()  # type: ignore[operator]
        elif reason is None:
            reason = "effdense.convert has not been called since it was built"
        kind = (
            ours.kind if issubclass(ours, Foreign) else next(c.__name__ for c in _OURS if issubclass(ours, c))
        )
        entries.append(Entry(name, kind, converted, reason))
    return entries


__all__ = ["Entry", "Report", "convert", "report", "revert"]
