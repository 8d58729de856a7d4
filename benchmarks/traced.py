"""The operators of one training step, with the shapes of what they get: from a run on the meta device, which computes nothing.

effdense's models take the CUDA path: its operators, with PyTorch's 3x3 convolutions between them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from effdense.engine import batch_norm, node, stem
from effdense.ops import dispatch, reference, self_test

# The calls that are operators for torch.compile's sake: what is in them counts.
OPAQUE: dict[str, Callable[..., Any]] = {
    "dense_stage": node._dense_stage,
    "dense_stage_backward": node._dense_stage_backward,
    "move_running_statistics": batch_norm._move,
    "update_running_statistics": reference.update_running_statistics,
    "update_from_vectors": batch_norm._update_from_vectors,
    "count_batches": batch_norm._count,
    "stem": stem._stem,
    "stem_backward": stem._stem_backward,
}


class Like(NamedTuple):
    """A tensor without its data; `number`: which of a call's tensors it is, since one may come twice."""

    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of its first element in a piece of 16 bytes: how wide accesses can be depends on it
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def pixels(self) -> int:
        """Of all images."""
        return self.shape[0] * math.prod(self.shape[2:])

    def make(self, filled: Callable[..., Tensor] = torch.zeros) -> Tensor:
        """A tensor like this on the CPU, of zeros. With torch.empty as `filled`: of memory that nobody has touched."""
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        buffer = filled(self.offset + last + 1 if 0 not in self.shape else 0, dtype=self.dtype)
        return buffer.as_strided(self.shape, self.strides, self.offset if buffer.numel() else 0)


class Call(NamedTuple):
    """One operator's call. Lists have become tuples, so that equal calls are equal keys."""

    space: str  # "effdense" or "aten"
    op: str
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]


def tensors(of: Any) -> list[Like]:
    """Those among a call's arguments or results, or within one of them."""
    if isinstance(of, Like):
        return [of]
    return [like for part in of for like in tensors(part)] if isinstance(of, tuple) else []


class Recorder(TorchDispatchMode):
    """Notes every call that reads or writes data."""

    effdense_may_fuse = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None
    ) -> Any:
        space, op = function._schema.name.split("::")
        if op in OPAQUE:
            with self:
                return OPAQUE[op](*arguments)
        result = function(*arguments, **(options or {}))
        if op.startswith("convolution"):
            result = _in_cudnns_layout(result, arguments[:2])
        allocates = "empty" in op or op == "detach"
        if not (function.is_view or allocates):
            numbers: dict[int, int] = {}

            def describe(value: Any) -> Any:
                if isinstance(value, Tensor):
                    number = numbers.setdefault(id(value), len(numbers))
                    offset = int(value.storage_offset()) % (16 // value.element_size())
                    return Like(number, tuple(value.shape), value.stride(), offset, value.dtype)
                return tuple(map(describe, value)) if isinstance(value, list | tuple) else value

            self.calls.append(Call(space, op, describe(arguments), describe((result,))))
        return result


def _in_cudnns_layout(result: Any, inputs: Sequence[Tensor]) -> Any:
    """Channels-last where an input is: the meta device knows of no such rule."""
    last = torch.channels_last
    if not any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in inputs):
        return result
    parts = result if isinstance(result, tuple) else (result,)
    parts = tuple(t.contiguous(memory_format=last) if t is not None and t.dim() == 4 else t for t in parts)
    return parts if isinstance(result, tuple) else parts[0]


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Meta tensors take the operators that CUDA has."""
    names = [n for n in self_test.OPERATORS if dispatch.has_kernel(torch.ops.effdense, n, "cuda")]
    cuda = SimpleNamespace(**{name: getattr(torch.ops.effdense, name) for name in names})
    with dispatch.override("meta", cuda, (torch.half, torch.float32)):
        yield


def trace(model: nn.Module, x: Tensor) -> list[Call]:
    """The calls of one training step of `model`, which becomes one on the meta device, in half precision.

    Batch norms stay in float32, as under autocast. The casts that autocast makes of weights are not there.
    """
    model.train().to("meta", torch.half)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    x = x.detach().to("meta", torch.half).requires_grad_(x.requires_grad)
    recorder = Recorder()
    with _as_on_cuda(), recorder:
        model(x).sum().backward()
    return recorder.calls


def trace_model(name: str, impl: str, images: int, image_size: int) -> list[Call]:
    """The same of a model by name."""
    model = models.build(name, impl).model
    return trace(model, torch.empty(images, 3, image_size, image_size, device="meta"))
