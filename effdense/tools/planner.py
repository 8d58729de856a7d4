"""The planner: the peak memory of one training step, and what takes it, without running the step.

The step is walked through on meta tensors, which have shapes and no memory, while storages are followed from birth to
death; so is the inside of the block engine (engine/passes.py), so that a plan comes from what the engine does and not from
a description of it. Of "naive" and "checkpoint" the submodules are walked through one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effdense.conversion import convert_parts
from effdense.conversion.class_swap import is_fused_kind
from effdense.engine import passes, stem
from effdense.engine.stage import StageConfig
from effdense.nn.foreign import ForeignBlock
from effdense.nn.modules import kind_of
from effdense.nn.plain import CHECKPOINTED
from effdense.ops import dispatch

Impl: TypeAlias = Literal["naive", "checkpoint", "balanced", "minimal"]
MEMORY: tuple[Impl, ...] = ("naive", "checkpoint", "balanced", "minimal")
CATEGORIES = ("features", "bottlenecks", "scratch", "stem", "activations", "gradients", "other")


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


# What operators take for their tiles while they run, in bytes a thread: up to twice that on large images, less on small
# ones (csrc/cpu; what stays in a core's cache).
_TILES = 2**19
_TILED = {f"effdense::{name}{way}" for name in ("bottleneck", "bn_relu_conv3x3") for way in ("", "_backward")}

# A stem's operators: what they do, and how many of their arguments come before the settings.
_STEM: dict[Any, tuple[Callable[..., Any], int]] = {
    torch.ops.effdense.stem.default: (stem.forward, stem.FORWARD_TENSORS),
    torch.ops.effdense.stem_backward.default: (stem.backward, stem.BACKWARD_TENSORS),
}


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _alike(args: Sequence[Any]) -> Any:
    """What an element-wise operator makes of tensors that are alike; else it is asked itself."""
    first, *others = (t for t in args if isinstance(t, Tensor))
    if any((t.shape, t.dtype) != (first.shape, first.dtype) for t in others):
        return NotImplemented
    return torch.empty_like(first)


def _cat(args: Sequence[Any]) -> Any:
    first, dim = args[0][0], args[1] if len(args) > 1 else 0
    if any(t.dim() != first.dim() or t.dtype != first.dtype for t in args[0]):
        return NotImplemented
    sizes = list(first.shape)
    sizes[dim] = sum(t.shape[dim] for t in args[0])
    return torch.empty(sizes, dtype=first.dtype, device="meta", memory_format=suggest_memory_format(first))


def _convolution(args: Sequence[Any]) -> Any:
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    axes = range(x.dim() - 2)
    if transposed or x.dim() != weight.dim() or any(len(s) != len(axes) for s in (stride, padding, dilation)):
        return NotImplemented
    if x.shape[1] != weight.shape[1] * args[8] or x.dtype != weight.dtype:
        return NotImplemented  # where it fails, and says why
    spatial = (
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in axes
    )
    sizes = [x.shape[0], weight.shape[0], *spatial]
    return x.new_empty(sizes) if min(sizes) > 0 else NotImplemented


def _convolution_backward(args: Sequence[Any]) -> Any:
    grad, x, weight, wanted = args[0], args[1], args[2], args[10]
    bias = grad.new_empty(grad.shape[1]) if wanted[2] else None
    return (
        *(torch.empty_like(t) if want else None for t, want in zip((x, weight), wanted, strict=False)),
        bias,
    )


def _batch_norm(args: Sequence[Any]) -> Any:
    x, training = args[0], args[5]
    size = x.shape[1] if training else 0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(size, dtype=wide), x.new_empty(size, dtype=wide)


def _batch_norm_backward(args: Sequence[Any]) -> Any:
    x, weight, wanted = args[1], args[2], args[9]
    dtype = x.dtype if weight is None else weight.dtype
    sums = (x.new_empty(x.shape[1], dtype=dtype) if want else None for want in wanted[1:])
    return torch.empty_like(x) if wanted[0] else None, *sums


# What most operators of a step make. On meta tensors PyTorch goes through their decompositions in Python for it, which takes
# ten times as long.
_MADE: dict[Any, Callable[[Sequence[Any]], Any]] = {
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
    torch.ops.aten.addmm.default: lambda args: args[1].new_empty(args[1].shape[0], args[2].shape[1]),
    torch.ops.aten.add_.Tensor: lambda args: args[0],
    torch.ops.aten.add.Tensor: _alike,
    torch.ops.aten.mul.Tensor: _alike,
    torch.ops.aten.threshold_backward.default: _alike,
}


@dataclasses.dataclass
class _Block:
    """Some memory that exists at the moment."""

    size: int
    category: str


class _Timeline(TorchDispatchMode):
    """Follows every storage that an operator makes, and knows what existed when the sum was largest."""

    effdense_may_fuse = True

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._live: dict[int, _Block] = {}  # by the storage's id
        self._at_peak: list[_Block] = []
        self._workspace = _Block(0, "scratch")
        self._in_stage = self._in_stem = self._after_stem = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by PyTorch, which would import its compiler for the first operator: that takes longer than a plan."""
        return False

    def finish(self) -> tuple[int, dict[str, int]]:
        """The peak and its breakdown."""
        self._note()
        sums = {c: sum(b.size for b in self._at_peak if b.category == c) for c in CATEGORIES}
        if not self._after_stem:  # no block runs as a whole
            sums["activations"], sums["stem"] = sums["stem"], 0
        return self.peak, sums

    def _note(self, tiles: int = 0) -> None:
        """Called before anything goes: in between the level only rises. `tiles`: what an operator takes in passing."""
        if self.level + tiles > self.peak:
            self.peak = self.level + tiles
            self._at_peak = [*self._live.values(), _Block(self._workspace.size + tiles, "scratch")]

    def _follow(self, tensor: Tensor, category: str) -> None:
        """Counts a tensor's storage from now until it dies."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._live:
            self._live[id(storage)] = _Block(storage.nbytes(), category)
            self.level += storage.nbytes()
            weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        self._note()
        self.level -= self._live.pop(key).size

    def _lease(self, size: int) -> None:
        """What workspace._Pool.take does for a single thread, for which there is never more than one block."""
        if not size <= self._workspace.size <= 2 * size:
            self._note()
            self.level += size - self._workspace.size
            self._workspace.size = size

    def _category(self) -> str:
        if self._in_stem:
            return "stem"
        if torch._C._current_graph_task_id() != -1:
            return "gradients"
        return "scratch" if self._in_stage else "other" if self._after_stem else "stem"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.effdense.dense_stage.default:
            self._after_stem = True
            stage: list[Tensor] = self._inside(passes.forward, args[:4], StageConfig(*args[4:]))
            for tensor, category in zip(stage, ("other", "features", "bottlenecks", "other"), strict=True):
                self._live[id(tensor.untyped_storage())].category = category
            return tuple(stage)
        if func is torch.ops.effdense.dense_stage_backward.default:
            return self._inside(passes.backward, args[:8], StageConfig(*args[8:]))
        if func in _STEM:
            function, count = _STEM[func]
            self._in_stem = True
            try:
                made = self._inside(function, args[:count], stem.StemConfig(*args[count:]))
            finally:
                self._in_stem = False
            return tuple(made) if function is stem.forward else made
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        shaped = _MADE.get(func)
        result = NotImplemented if shaped is None or kwargs else shaped(args)
        if result is NotImplemented:
            result = func(*args, **kwargs or {})
        if self._in_stage and func.name() in _TILED:
            self._note(_TILES * torch.get_num_threads())
        if func is torch.ops.aten.convolution.default:  # on meta it does not follow its arguments' layout
            layouts = {suggest_memory_format(t) for t in args[:2]} - {torch.contiguous_format}
            result = result.contiguous(memory_format=layouts.pop()) if layouts else result
        for tensor in _tensors((result,)):
            if id(tensor.untyped_storage()) in given:
                continue
            if self._in_stage and tensor.dtype == torch.uint8 and tensor.dim() == 1:
                self._lease(tensor.numel())
            else:
                self._follow(tensor, self._category())
        return result

    def _inside(self, function: Callable[..., Any], tensors: Any, settings: Any) -> list[Tensor]:
        """Walks through one function of the engine, or of a stem."""
        self._in_stage = True
        try:
            with torch.no_grad(), self:
                result = function(dispatch.operators(tensors[0]), settings, *tensors)
        finally:
            self._in_stage = False
        return [t for t in result if t is not None]


class _OneByOne(_Timeline):
    """Of a step without effdense: under this mode every module calls its submodules."""

    effdense_may_fuse = False

    def __init__(self) -> None:
        super().__init__()
        self._after_stem = True

    def _category(self) -> str:
        # Checkpointing computes again with gradients on, which a backward has off.
        backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        return "gradients" if backward else "activations"


@contextmanager
def _compiled_on_meta() -> Iterator[None]:
    """Meta tensors take the way of the compiled operators, whose fakes know what those allocate."""
    with dispatch.override("meta", *dispatch.implementation("cpu")):
        yield


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
    if not 3 <= len(sizes) <= 5 or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{op}: input_shape must be batch, channels and one to three sizes, all positive, got {input_shape!r}"
        )
    return sizes


def _checked(input_shape: Any, memory: str) -> tuple[int, ...]:
    if memory not in MEMORY:
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
        training: False: of one forward of the model in evaluation mode, without gradients. Where maps are smaller than
            weights, and for "naive", up to a quarter more has been measured: oneDNN's.

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
                _compiled_on_meta(),
            ):
                x = torch.empty(shape, dtype=dtype)
                with _OneByOne() if memory in ("naive", "checkpoint") else _Timeline() as timeline:
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
