"""A dense layer by itself, for blocks that cannot run as a whole: over a list of features, read where they lie.

One node of autograd is a bottleneck alone (`BottleneckNode`) or a whole layer (`DenseLayerNode`):

    y = W1 relu(bn1(cat(features)))        new = conv3x3(relu(bn2(y)))

A node saves its features and, with memory="balanced", y; relu(bn2(y)) is always made again, and with memory="minimal"
so is y. Nothing else is kept. Statistics come in from outside (bn1) or are taken while y is made (bn2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdense.autograd import (
    empty_channels_last,
    gradients,
    matrix,
    prepare,
    shaped,
    sum_per_channel,
    vector,
    without_autocast,
)
from effdense.batch_norm import Folded, Norm, bn_relu_backward, fold, refuse_group
from effdense.checks import check_conv_weight, check_norm, check_vector
from effdense.convolution import convolve, convolve_backward, plain_bn_relu_convolve
from effdense.operators import operators
from effdense.reference import channels_last
from effdense.synchronize import join_statistics


def statistics(features: Sequence[Tensor], norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] that `norm` normalises the features with."""
    x = features[0]
    if not norm.batch_statistics:
        return norm.running(x.dtype)
    with torch.no_grad():
        mean, var = operators(x).channel_statistics(features)
        return join_statistics(norm.group, mean, var, x.shape[0] * x.shape[2:].numel())


def _bottleneck_backward(
    features: Sequence[Tensor],
    norm: Folded,
    conv_weight: Tensor,
    grad_y: Tensor,
    need_features: Sequence[bool],
    need_norm: bool,
    need_conv: bool,
) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
    """Gradients of the features, of norm1's weight and bias, and of the 1x1 convolution's weight."""
    ops = operators(features[0])
    grads = [
        empty_channels_last(x, x.shape[1]) if need else x.new_empty(0)
        for x, need in zip(features, need_features, strict=True)
    ]
    grad_weight, sum_d, sum_dx = ops.bottleneck_backward(
        features,
        grad_y,
        norm.scale,
        norm.shift,
        norm.mean,
        matrix(conv_weight),
        grads,
        False,
        any(need_features) or need_norm,
        need_conv,
        [],
    )
    if norm.batch_statistics and any(need_features):
        sizes = [x.shape[1] for x in features]
        deferred = norm.deferred(sum_d, sum_dx, grad_y.numel() // grad_y.shape[1])
        parts = zip(*(v.split(sizes) for v in (norm.mean, *deferred)), strict=True)
        for x, grad, (mean, a, b) in zip(features, grads, parts, strict=True):
            if grad.numel():
                ops.take_gradient(x, mean, a, b, grad, grad)
    wanted = [grad if need else None for grad, need in zip(grads, need_features, strict=True)]
    return wanted, sum_dx * norm.rstd, sum_d, grad_weight


def _bottleneck(
    features: Sequence[Tensor], norm: Folded, conv_weight: Tensor, conv_bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, its mean and its variance."""
    y = empty_channels_last(features[0], conv_weight.shape[0])
    bias = vector(conv_bias, norm.mean)
    mean, var = operators(y).bottleneck(
        features, norm.scale, norm.shift, matrix(conv_weight), bias, None, None, statistics, y
    )
    return y, mean, var


class BottleneckNode(torch.autograd.Function):
    """y = W relu(bn(cat(features))) + b; gradients for everything but the statistics."""

    @staticmethod
    def forward(
        mean: Tensor,
        var: Tensor,
        eps: float,
        batch_statistics: bool,
        group: str,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        norm = fold(mean, var, eps, norm_weight, norm_bias, batch_statistics, group)
        return _bottleneck(features, norm, conv_weight, conv_bias, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        mean, var, ctx.eps, ctx.batch_statistics, ctx.group, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, var, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[5:]
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, var, *tensors = ctx.saved_tensors
        norm_weight, norm_bias, conv_weight, conv_bias, *features = tensors

        def once(grad_y: Tensor) -> tuple[Tensor | None, ...]:
            norm = fold(mean, var, ctx.eps, norm_weight, norm_bias, ctx.batch_statistics, ctx.group)
            grads, grad_scale, grad_shift, grad_conv = _bottleneck_backward(
                features, norm, conv_weight, grad_y, needs[4:], needs[0] or needs[1], needs[2]
            )
            return (
                shaped(norm_weight, grad_scale) if needs[0] else None,
                shaped(norm_bias, grad_shift) if needs[1] else None,
                shaped(conv_weight, grad_conv) if needs[2] else None,
                shaped(conv_bias, sum_per_channel(grad_y)) if needs[3] else None,
                *grads,
            )

        statistics = None if ctx.batch_statistics else (mean, var)
        plain = functools.partial(_plain_bottleneck, statistics, ctx.eps, ctx.group)
        op = "cat_bn_relu_conv1x1"
        return (None,) * 5 + gradients(op, once, plain, grad_y, lambda: tensors, needs)


def _plain_bottleneck(
    statistics: tuple[Tensor, Tensor] | None, eps: float, group: str, *tensors: Any
) -> Tensor:
    """The bottleneck by PyTorch's own operators; `tensors`: as BottleneckNode takes them behind its settings."""
    refuse_group("cat_bn_relu_conv1x1", [group])
    first, features = tensors[:4], tensors[4:]
    return plain_bn_relu_convolve(torch.cat(features, 1), statistics, eps, *first).to(features[0].dtype)


class DenseLayerNode(torch.autograd.Function):
    """new = conv3x3(relu(bn2(conv1x1(relu(bn1(cat(features))))))); also returns bn2's mean and variance, and y.

    mean2 and var2 are None where bn2 takes the batch's statistics: they are made here. y is returned because autograd
    saves nothing but inputs and outputs; the caller drops it.
    """

    @staticmethod
    def forward(
        memory: str,
        eps: tuple[float, float],
        batch_statistics: tuple[bool, bool],
        groups: tuple[str, str],
        mean1: Tensor,
        var1: Tensor,
        mean2: Tensor | None,
        var2: Tensor | None,
        norm1_weight: Tensor | None,
        norm1_bias: Tensor | None,
        conv1_weight: Tensor,
        conv1_bias: Tensor | None,
        norm2_weight: Tensor | None,
        norm2_bias: Tensor | None,
        conv2_weight: Tensor,
        conv2_bias: Tensor | None,
        *features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops = operators(features[0])
        norm1 = fold(mean1, var1, eps[0], norm1_weight, norm1_bias, batch_statistics[0], groups[0])
        y, mean, var = _bottleneck(features, norm1, conv1_weight, conv1_bias, batch_statistics[1])
        if mean2 is not None and var2 is not None:
            mean, var = mean2.clone(), var2.clone()  # an input may not be an output
        else:
            mean, var = join_statistics(groups[1], mean, var, y.numel() // y.shape[1])
        norm2 = fold(mean, var, eps[1], norm2_weight, norm2_bias, batch_statistics[1], groups[1])
        z = torch.empty_like(y)
        ops.bn_relu(y, norm2.scale, norm2.shift, z)
        return convolve(z, conv2_weight, conv2_bias), mean, var, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        memory, ctx.eps, ctx.batch_statistics, ctx.groups, mean1, var1, _, _, *tensors = inputs
        _, mean2, var2, y = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean2, var2, y)
        ctx.save_for_backward(mean1, var1, mean2, var2, y if memory == "balanced" else None, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_new: Tensor | None, *_: None) -> Any:
        needs = ctx.needs_input_grad[8:]
        if grad_new is None:
            return (None,) * len(ctx.needs_input_grad)
        mean1, var1, mean2, var2, y, *tensors = ctx.saved_tensors
        statistics = (mean1, var1), (mean2, var2)

        def once(grad_new: Tensor) -> tuple[Tensor | None, ...]:
            return _layer_backward(ctx, statistics, y, tensors, grad_new)

        fixed = [None if batch else s for batch, s in zip(ctx.batch_statistics, statistics, strict=True)]
        plain = functools.partial(_plain_layer, fixed, ctx.eps, ctx.groups)
        return (None,) * 8 + gradients("DenseLayer", once, plain, grad_new, lambda: tensors, needs)


def _layer_backward(
    ctx: Any,
    statistics: Sequence[tuple[Tensor, Tensor]],
    y: Tensor | None,
    tensors: Sequence[Any],
    grad_new: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's parameters and features, as DenseLayerNode takes them."""
    needs = ctx.needs_input_grad[8:]
    weight1, bias1, conv1, conv1_bias, weight2, bias2, conv2, conv2_bias, *features = tensors
    ops = operators(features[0])
    norm1, norm2 = (
        fold(*statistics[i], ctx.eps[i], *affine, ctx.batch_statistics[i], ctx.groups[i])
        for i, affine in enumerate(((weight1, bias1), (weight2, bias2)))
    )
    if y is None:
        y = _bottleneck(features, norm1, conv1, conv1_bias, False)[0]
    z = torch.empty_like(y)
    ops.bn_relu(y, norm2.scale, norm2.shift, z)
    need_dz = any(needs[:6]) or any(needs[8:])
    grad_y, grad_conv2, grad_conv2_bias = convolve_backward(
        grad_new, z, conv2, conv2_bias, (need_dz, needs[6], needs[7])
    )
    del z
    if not need_dz:
        return (*[None] * 6, grad_conv2, grad_conv2_bias, *[None] * len(features))
    grad_y = channels_last(grad_y)
    sum_d, sum_dx = bn_relu_backward(grad_y, y, norm2)
    del y
    grads, grad_scale, grad_shift, grad_conv1 = _bottleneck_backward(
        features, norm1, conv1, grad_y, needs[8:], needs[0] or needs[1], needs[2]
    )
    return (
        shaped(weight1, grad_scale) if needs[0] else None,
        shaped(bias1, grad_shift) if needs[1] else None,
        shaped(conv1, grad_conv1) if needs[2] else None,
        shaped(conv1_bias, sum_per_channel(grad_y)) if needs[3] else None,
        shaped(weight2, sum_dx * norm2.rstd) if needs[4] else None,
        shaped(bias2, sum_d) if needs[5] else None,
        grad_conv2,
        grad_conv2_bias,
        *grads,
    )


def _plain_layer(
    statistics: Sequence[tuple[Tensor, Tensor] | None],
    eps: Sequence[float],
    groups: Sequence[str],
    *tensors: Any,
) -> Tensor:
    """The layer by PyTorch's own operators; `tensors`: as DenseLayerNode takes them behind its settings."""
    refuse_group("DenseLayer", groups)
    first, second, features = tensors[:4], tensors[4:8], tensors[8:]
    y = plain_bn_relu_convolve(torch.cat(features, 1), statistics[0], eps[0], *first)
    return plain_bn_relu_convolve(y, statistics[1], eps[1], *second).to(features[0].dtype)


def bottleneck(
    op: str,
    names: Sequence[str],
    features: Sequence[Tensor],
    norm: Norm,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks and runs the bottleneck; `names` are the parameters' names in messages. Returns y and norm's statistics."""
    channels, features, (weight, bias), result = prepare(op, features, (conv_weight, conv_bias))
    x = features[0]
    check_norm(op, names[:4], norm, channels, x)
    check_conv_weight(op, names[4], weight, channels, 1, x)
    check_vector(op, names[5], bias, conv_weight.shape[0], x, "the convolution's output channels")
    with without_autocast(x):
        mean, var = statistics(features, norm)
        y = BottleneckNode.apply(
            mean,
            var,
            norm.eps,
            norm.batch_statistics,
            norm.group,
            norm.weight,
            norm.bias,
            weight,
            bias,
            *features,
        )
    return y if result is None else y.to(result), mean, var


_NORM_NAMES = [
    [f"norm{i}.{part}" for part in ("weight", "bias", "running_mean", "running_var")] for i in (1, 2)
]


def dense_layer(
    memory: str, features: Sequence[Tensor], norm1: Norm, conv1: Any, norm2: Norm, conv2: Any
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Checks and runs a whole layer; conv1 and conv2 are modules. Returns the new features and both norms' statistics."""
    op, width = "DenseLayer", conv1.out_channels
    channels, features, convs, result = prepare(
        op, features, (conv1.weight, conv1.bias, conv2.weight, conv2.bias)
    )
    x = features[0]
    for i, norm, conv, inputs, kernel in ((1, norm1, conv1, channels, 1), (2, norm2, conv2, width, 3)):
        weight, bias = convs[2 * i - 2 : 2 * i]
        check_norm(op, _NORM_NAMES[i - 1], norm, inputs, x)
        check_conv_weight(op, f"conv{i}.weight", weight, inputs, kernel, x)
        check_vector(op, f"conv{i}.bias", bias, conv.out_channels, x, "the convolution's output channels")
    with without_autocast(x):
        mean1, var1 = statistics(features, norm1)
        new, mean2, var2, _ = DenseLayerNode.apply(
            memory,
            (norm1.eps, norm2.eps),
            (norm1.batch_statistics, norm2.batch_statistics),
            (norm1.group, norm2.group),
            mean1,
            var1,
            *((None, None) if norm2.batch_statistics else norm2.running(x.dtype)),
            norm1.weight,
            norm1.bias,
            *convs[:2],
            norm2.weight,
            norm2.bias,
            *convs[2:],
            *features,
        )
    return new if result is None else new.to(result), (mean1, var1), (mean2, var2)
