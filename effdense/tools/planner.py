"""The planner: the peak memory of one training step, and what takes it, without running the step.

The step is walked through on meta tensors (timeline.py).
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effdense.conversion import convert_parts
from effdense.conversion.class_swap import is_fused_kind
from effdense.nn.foreign import ForeignBlock
from effdense.nn.modules import kind_of
from effdense.nn.plain import CHECKPOINTED
from effdense.tools.timeline import OneByOne, Timeline, compiled_on_meta

Impl: TypeAlias = Literal["naive", "checkpoint", "balanced", "minimal"]
MEMORY: tuple[Impl, ...] = ("naive", "checkpoint", "balanced", "minimal")


class Plan(NamedTuple):
    """The memory of one training step, in bytes.

    `total` is the peak above the built model, for which parameters, buffers, gradients and optimizer exist before and the
    workspace does not; `breakdown` is where it comes from, at the moment of the peak:

    features: the feature buffers.  bottlenecks: y, the bottlenecks' outputs that are kept.  scratch: the workspace and
    what a stage's forward makes in passing.  stem: what comes before the first block.  activations: naive and
    checkpoint, everything that a forward makes.  gradients: of features, of activations, and of parameters before they
    are added to those that exist.  other: the head, dropout's masks, norms' vectors, what effdense does not know.
    """

    memory: str
    input_shape: tuple[int, ...]
    total: int
    breakdown: Mapping[str, int]
    parameters: int  # with the buffers
    gradients: int  # of all parameters that want them
    optimizer: int  # of SGD with momentum: one more copy of these parameters

    @property
    def everything(self) -> int:
        """The peak with parameters, gradients and optimizer."""
        return self.total + self.parameters + self.gradients + self.optimizer

    def __str__(self) -> str:
        rows = [(f"{self.memory}, input {'x'.join(map(str, self.input_shape))}", self.total)]
        rows += [(f"  {name}", size) for name, size in self.breakdown.items() if size]
        rows += [("parameters and buffers", self.parameters), ("parameters' gradients", self.gradients)]
        rows += [("optimizer (SGD with momentum)", self.optimizer), ("everything", self.everything)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / 2**20:10.1f} MiB" for name, size in rows)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy on meta tensors. Hooks are there, because they stand in the way of fusing, but do nothing."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                memo[id(value)] = OrderedDict.fromkeys(value, _nothing)
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                bare: Tensor = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
                )
                memo[id(tensor)] = (
                    nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
                )
    bare_model = copy.deepcopy(model, memo)
    for module in bare_model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            module.momentum = 0.1  # the average over all batches would read the counter
    for parameter in bare_model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return bare_model


class NotCheckpointed(ValueError):
    """What memory="checkpoint" would be of other libraries' blocks is not known."""


def _step(model: nn.Module, x: Tensor) -> None:
    """A forward and, where something learns, a backward, with a loss that keeps as much as the output."""
    losses = [y.square().sum() for y in tree_leaves(model(x)) if isinstance(y, Tensor) and y.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()


def check_input_shape(op: str, input_shape: Any) -> tuple[int, ...]:
    """Checks and returns the shape of a batch of images."""
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    whole = (isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in sizes)
    if not 3 <= len(sizes) <= 5 or not all(whole):
        raise ValueError(
            f"{op}: input_shape must be batch, channels and one to three sizes, all positive, got {input_shape!r}"
        )
    return tuple(int(n) for n in sizes)


def _checked(input_shape: Any, memory: str) -> tuple[int, ...]:
    if not isinstance(memory, str) or memory not in MEMORY:
        raise ValueError(f"plan: memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    return check_input_shape("plan", input_shape)


def plan(
    model: nn.Module, input_shape: Sequence[int], *, memory: Impl = "balanced", training: bool = True
) -> Plan:
    """Predicts the memory of one training step of `model` on the CPU, or of a forward in inference, without running it.

    The model is not touched: a copy without memory is converted, in the dtype and the modes that the model is in.
    "balanced" and "minimal" are within a few per cent of what is measured. Not modelled is what oneDNN takes for itself
    in passing, and a loss that keeps more than one copy of the output.

    Args:
        model: any module that `effdense.convert` could convert, or has converted.
        input_shape: of one batch, [N, C, *spatial].
        memory: "balanced" or "minimal" as in `effdense.convert`; "naive": its submodules one by one; "checkpoint": the
            same with every layer's bottleneck (of a plain layer: all of it) computed again in the backward, for
            blocks with torchvision's layers only.
        training: False: of one forward of the model in evaluation mode, without gradients. For "naive", and where maps are
            smaller than weights, oneDNN's copies of one convolution's image, weight and result may come on top.

    Raises:
        TypeError: model is not a module.
        ValueError: input_shape or memory is wrong, nothing of the model can be converted, or it does not run.

    Examples:
        >>> model = effdense.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8)
        >>> plans = {memory: effdense.plan(model, (8, 3, 32, 32), memory=memory) for memory in ("naive", "minimal")}
        >>> plans["naive"].total > plans["minimal"].total
        True
    """
    shape = _checked(input_shape, memory)
    return Planner(model, training).plan(shape, memory)


class Planner:
    """Plans of one model: in every mode and for any number of shapes, of copies without memory that are made once."""

    def __init__(self, model: nn.Module, training: bool = True) -> None:
        """Takes the same models as `plan`, and refuses the same; `training` as there."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"plan: model must be a torch.nn.Module, got {type(model).__name__}")
        self._training, self._bare = training, bare_copy(model)
        if not training:
            self._bare.eval().requires_grad_(False)
        convert_parts(self._bare, "balanced")
        self._prepared: dict[str, nn.Module] = {}
        self._known: dict[tuple[str, tuple[int, ...]], Plan] = {}
        if not any(is_fused_kind(module) for module in self._bare.modules()):
            raise ValueError("plan: nothing in this model can be converted; effdense.report(model) tells why")

    def _of(self, memory: str) -> nn.Module:
        """The copy that is walked through in a mode."""
        if memory not in self._prepared:
            model = bare_copy(self._bare)
            if memory == "minimal":
                convert_parts(model, "minimal")
            for module in model.modules() if memory == "checkpoint" else ():
                if isinstance(module, ForeignBlock):
                    raise NotCheckpointed(
                        f'plan: memory="checkpoint" is not known of {type(module).__name__}, only of blocks with torchvision\'s layers'
                    )
                module.__class__ = CHECKPOINTED.get(kind_of(module), type(module))
            self._prepared[memory] = model
        return self._prepared[memory]

    def plan(self, input_shape: Sequence[int], memory: str) -> Plan:
        """As the function of that name."""
        shape = _checked(input_shape, memory)
        if (memory, shape) not in self._known:
            self._known[memory, shape] = self._walk(shape, memory)
        return self._known[memory, shape]

    def _walk(self, shape: tuple[int, ...], memory: str) -> Plan:
        bare = self._of(memory)
        tensors = [*bare.parameters(), *bare.buffers()]
        wanted = [p for p in bare.parameters() if p.requires_grad]
        dtype = next((p.dtype for p in tensors if p.is_floating_point()), torch.float32)
        try:
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(self._training),
                torch.device("meta"),
                compiled_on_meta(),
            ):
                x = torch.empty(shape, dtype=dtype)
                with OneByOne() if memory in ("naive", "checkpoint") else Timeline() as timeline:
                    _step(bare, x)
                total, breakdown = timeline.finish()
        except Exception as error:
            raise ValueError(f"plan: the model does not run on an input of shape {shape}: {error}") from error
        return Plan(memory, shape, total, breakdown, _bytes(tensors), _bytes(wanted), _bytes(wanted))

    def largest_batch(
        self, input_shape: Sequence[int], budget: int, memory: str, most: int = 2**31 - 1, extra: int = 0
    ) -> int:
        """As the function of that name."""
        shape = _checked(input_shape, memory)
        batch, fits, too_large = min(shape[0], most), 0, most + 1
        last: tuple[int, int] | None = None
        while too_large - fits > 1:
            found = self.plan((batch, *shape[1:]), memory)
            now = found.everything + batch * extra
            fits, too_large = (batch, too_large) if now <= budget else (fits, batch)
            before = last or (0, found.everything - found.total)  # a batch of none needs what the model does
            slope = (now - before[1]) / (batch - before[0]) or 1.0
            last = batch, now
            batch = min(max(batch + math.floor((budget - now) / slope), fits + 1), too_large - 1)
        return fits


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def largest_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    budget: int,
    *,
    memory: str = "balanced",
    training: bool = True,
    most: int = 2**31 - 1,
    extra: int = 0,
) -> int:
    """The largest batch, up to `most`, of which `plan(...).everything` is at most `budget` bytes; 0 where one image is too much.

    `extra`: bytes that every image takes besides. By bisection from the batch of `input_shape`, where possible at the place where a straight line crosses the budget.
    """
    shape = _checked(input_shape, memory)
    return Planner(model, training).largest_batch(shape, budget, memory, most, extra)
