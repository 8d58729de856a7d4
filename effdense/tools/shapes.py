"""What the commonest operators of a step make of meta tensors, by their shapes.

PyTorch goes through their decompositions in Python for it, which takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


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


def _addmm(args: Sequence[Any]) -> Any:
    x, weight = args[1:3]
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0] and x.dtype == weight.dtype
    return x.new_empty(x.shape[0], weight.shape[1]) if fits else NotImplemented


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


# Of an operator's arguments, its results; NotImplemented: it is to be asked itself.
MADE: dict[Any, Callable[[Sequence[Any]], Any]] = {
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.add_.Tensor: lambda args: args[0],
    torch.ops.aten.add.Tensor: _alike,
    torch.ops.aten.mul.Tensor: _alike,
    torch.ops.aten.threshold_backward.default: _alike,
}
