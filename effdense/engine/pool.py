"""BN-ReLU-pool as one node of autograd: transitions and heads that stand alone (average), and stems (maximum).

Neither the normalised map nor relu's is stored. The maximum keeps the place of its pixel in the window, in one byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdense.engine.autograd import empty_channels_last, gradients, prepare, shaped, without_autocast
from effdense.engine.batch_norm import Folded, bn_relu_backward, fold, plain_bn_relu, refuse_group
from effdense.engine.norm import Norm
from effdense.engine.single_layer import statistics
from effdense.engine.validation import check_norm
from effdense.ops.dispatch import operators

Windows = tuple[Sequence[int], Sequence[int], Sequence[int]]  # of a max pool: kernel size, stride, padding


def _gradients(
    needs: Sequence[bool],
    norm: Folded,
    sums: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    grad_x: Tensor,
) -> tuple[Tensor | None, ...]:
    """What a backward returns for weight, bias and x."""
    return (
        shaped(weight, sums[1] * norm.rstd) if needs[0] and weight is not None else None,
        shaped(bias, sums[0]) if needs[1] and bias is not None else None,
        grad_x if needs[2] else None,
    )


class AvgPoolNode(torch.autograd.Function):
    """avg_pool(relu(bn(x))) over windows side by side; gradients for x, weight and bias."""

    @staticmethod
    def forward(
        kernel_size: Sequence[int],
        eps: float,
        batch_statistics: bool,
        group: str,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        norm = fold(mean, var, eps, weight, bias, batch_statistics, group)
        out: Tensor = operators(x).bn_relu_avg_pool(x, norm.scale, norm.shift, list(kernel_size))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kernel_size, ctx.eps, *ctx.source, mean, var, weight, bias, x = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, var, weight, bias, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[6:]
        if grad is None:
            return (None,) * 9
        mean, var, weight, bias, x = ctx.saved_tensors

        def once(grad: Tensor) -> tuple[Tensor | None, ...]:
            ops, norm = operators(x), fold(mean, var, ctx.eps, weight, bias, *ctx.source)
            grad_x = empty_channels_last(x, x.shape[1])
            sum_d, sum_dx = ops.bn_relu_avg_pool_backward(
                grad, x, norm.scale, norm.shift, norm.mean, list(ctx.kernel_size), grad_x
            )
            if norm.batch_statistics:
                a, b = norm.correction(sum_d, sum_dx, x.numel() // x.shape[1])
                ops.apply_correction(x, norm.mean, a, b, grad_x, grad_x)
            return _gradients(needs, norm, (sum_d, sum_dx), weight, bias, grad_x)

        pool = functools.partial(plain_avg_pool, kernel_size=ctx.kernel_size)
        plain = functools.partial(_plain, "bn_relu_avg_pool", pool, ctx.eps, ctx.source, (mean, var))
        result = gradients("bn_relu_avg_pool", once, plain, grad, lambda: (weight, bias, x), needs)
        return (None,) * 6 + result


class MaxPoolNode(torch.autograd.Function):
    """max_pool(relu(bn(x))) and the taps; gradients for x, weight and bias."""

    @staticmethod
    def forward(
        windows: tuple[Sequence[int], ...],
        eps: float,
        batch_statistics: bool,
        group: str,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
    ) -> tuple[Tensor, Tensor]:
        norm = fold(mean, var, eps, weight, bias, batch_statistics, group)
        out, where = operators(x).bn_relu_max_pool(x, norm.scale, norm.shift, *map(list, windows))
        return out, where

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.windows, ctx.eps, *ctx.source, mean, var, weight, bias, x = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], mean, var, weight, bias, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        needs = ctx.needs_input_grad[6:]
        if grad is None:
            return (None,) * 9
        where, mean, var, weight, bias, x = ctx.saved_tensors

        def once(grad: Tensor) -> tuple[Tensor | None, ...]:
            ops, norm = operators(x), fold(mean, var, ctx.eps, weight, bias, *ctx.source)
            grad_x = empty_channels_last(x, x.shape[1])
            ops.max_pool_backward(grad, where, *map(list, ctx.windows), grad_x)
            return _gradients(needs, norm, bn_relu_backward(grad_x, x, norm), weight, bias, grad_x)

        pool = functools.partial(plain_max_pool, windows=ctx.windows)
        plain = functools.partial(_plain, "bn_relu_max_pool", pool, ctx.eps, ctx.source, (mean, var))
        result = gradients("bn_relu_max_pool", once, plain, grad, lambda: (weight, bias, x), needs)
        return (None,) * 6 + result


def plain_avg_pool(x: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """PyTorch's average pool over windows side by side."""
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel_size) - 1]
    pooled: Tensor = pool(x, tuple(kernel_size))
    return pooled


def plain_max_pool(x: Tensor, windows: Sequence[Sequence[int]]) -> Tensor:
    """PyTorch's maximum pool."""
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(windows[0]) - 1]
    pooled: Tensor = pool(x, *windows)
    return pooled


def _plain(
    op: str,
    pool: Callable[[Tensor], Tensor],
    eps: float,
    source: Sequence[Any],
    statistics: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """A node's computation by PyTorch's own operators; `source`: whether the statistics are the batch's, and its group."""
    batch, group = source
    refuse_group(op, [group])
    return pool(plain_bn_relu(x, None if batch else statistics, eps, weight, bias)).to(x.dtype)


def _run(op: str, names: Sequence[str], node: Any, windows: Any, x: Tensor, norm: Norm) -> Any:
    channels, features, _, _ = prepare(op, [x], ())
    x = features[0]
    check_norm(op, names, norm, channels, x)
    with without_autocast(x):
        mean, var = statistics([x], norm)
        how = windows, norm.eps, norm.batch_statistics, norm.group
        out = node.apply(*how, mean, var, norm.weight, norm.bias, x)
    return out, mean, var


def bn_relu_avg_pool(
    op: str, names: Sequence[str], x: Tensor, norm: Norm, kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks and runs; `names` are the norm's tensors' names in messages. Returns the pooled map, norm's statistics."""
    pooled, mean, var = _run(op, names, AvgPoolNode, tuple(kernel_size), x, norm)
    return pooled, mean, var


def bn_relu_max_pool(
    op: str,
    names: Sequence[str],
    x: Tensor,
    norm: Norm,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with windows as in torch.nn.MaxPool."""
    (pooled, _), mean, var = _run(
        op, names, MaxPoolNode, (tuple(kernel_size), tuple(stride), tuple(padding)), x, norm
    )
    return pooled, mean, var
