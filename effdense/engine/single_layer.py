"""A dense layer alone, for blocks that cannot run as a whole. It reads a list of features where they lie.

One node of autograd is a bottleneck alone (`BottleneckNode`) or a whole layer (`DenseLayerNode`):

    y = W1 relu(bn1(cat(features)))        new = conv3x3(relu(bn2(y)))

A layer is a stage's step (passes.py) over the features as they lie. A node saves its features and, with memory="balanced",
y; relu(bn2(y)) is always made again, and with memory="minimal" so is y. Nothing else is kept. Statistics come in from
outside (bn1) or are taken while y is made (bn2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effdense.engine import passes, workspace
from effdense.engine.autograd import (
    empty_channels_last,
    gradients,
    matrix,
    prepare,
    shaped,
    sum_per_channel,
    vector,
    without_autocast,
)
from effdense.engine.batch_norm import Folded, fold, refuse_group
from effdense.engine.convolution import plain_bn_relu_convolve
from effdense.engine.norm import Norm
from effdense.engine.stage import LayerParameters, Stage, StageConfig, Vectors, in_pairs
from effdense.engine.synchronize import join_statistics
from effdense.engine.validation import check_conv_weight, check_norm, check_vector
from effdense.ops.dispatch import operators
from effdense.ops.reference import channels_last


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
    grads = _empty_grads(features, need_features)
    grad_weight, *sums = operators(features[0]).bottleneck_backward(
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
    _finish(features, grads, norm, sums)
    return _wanted(grads, need_features), sums[1] * norm.rstd, sums[0], grad_weight


def _empty_grads(features: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Where the features' gradients go; empty where none is needed."""
    return [
        empty_channels_last(x, x.shape[1]) if need else x.new_empty(0)
        for x, need in zip(features, needs, strict=True)
    ]


def _wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _finish(
    features: Sequence[Tensor], grads: Sequence[Tensor], norm: Folded, sums: Sequence[Tensor]
) -> None:
    """Subtracts from the features' gradients what the batch's statistics demand; sums: sum d, sum d (x - mean)."""
    if not norm.batch_statistics or not any(grad.numel() for grad in grads):
        return
    x, sizes = features[0], [x.shape[1] for x in features]
    correction = norm.correction(sums[0], sums[1], x.shape[0] * x.shape[2:].numel())
    parts = zip(*(v.split(sizes) for v in (norm.mean, *correction)), strict=True)
    for x, grad, (mean, a, b) in zip(features, grads, parts, strict=True):
        if grad.numel():
            operators(x).apply_correction(x, mean, a, b, grad, grad)


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
        y, bias = empty_channels_last(features[0], conv_weight.shape[0]), vector(conv_bias, norm.mean)
        weight = matrix(conv_weight)
        operators(y).bottleneck(features, norm.scale, norm.shift, weight, bias, None, None, False, y)
        return y

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
    """A stage of one bottleneck layer over a list of features; also returns bn2's mean and variance, and the y that is kept.

    mean2 and var2 are None where bn2 takes the batch's statistics: they are made here. y is returned because autograd
    saves nothing but inputs and outputs; the caller drops it. `tensors`: the parameters, as LayerParameters has them, then
    the features.
    """

    @staticmethod
    def forward(
        settings: tuple[Any, ...],
        mean1: Tensor,
        var1: Tensor,
        mean2: Tensor | None,
        var2: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, features = _split(tensors)
        stage = _stage(settings, own, features)
        (layer,), x, ops = stage.layers, features[0], operators(features[0])
        own2 = (mean1.new_empty(layer.width), mean1.new_empty(layer.width))
        if mean2 is not None and var2 is not None:
            own2 = mean2.clone(), var2.clone()  # an input may not be an output
        keeps = stage.saved_size(x) > 0
        y = empty_channels_last(x, layer.width) if keeps else x.new_empty(0)
        kept, new = {0: y} if keeps else {}, empty_channels_last(x, layer.growth)
        norms = [(mean1, var1), own2]
        with _scratch(x, stage.forward_scratch(ops)) as scratch:
            passes.layer_forward(ops, stage, layer, features, norms, kept, new, scratch)
        return new, *own2, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, mean1, var1, _, _, *tensors = inputs
        _, mean2, var2, y = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean2, var2, y)
        ctx.save_for_backward(mean1, var1, mean2, var2, y, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_new: Tensor | None, *_: None) -> Any:
        needs = ctx.needs_input_grad[5:]
        if grad_new is None:
            return (None,) * len(ctx.needs_input_grad)
        mean1, var1, mean2, var2, y, *tensors = ctx.saved_tensors
        norms = [(mean1, var1), (mean2, var2)]

        def once(grad_new: Tensor) -> tuple[Tensor | None, ...]:
            return _layer_backward(ctx.settings, norms, y, tensors, grad_new, needs)

        settings = StageConfig(*ctx.settings)
        fixed = [None if batch else own for batch, own in zip(settings.batch_statistics, norms, strict=True)]
        plain = functools.partial(_plain_layer, fixed, settings.eps, settings.group)
        return (None,) * 5 + gradients("DenseLayer", once, plain, grad_new, lambda: tensors, needs)


def _split(tensors: Sequence[Any]) -> tuple[LayerParameters, list[Any]]:
    """The parameters, or what there is for each of them, and the same of the features."""
    count = len(LayerParameters._fields)
    return LayerParameters(*tensors[:count]), list(tensors[count:])


def _stage(settings: tuple[Any, ...], own: LayerParameters, features: Sequence[Tensor]) -> Stage:
    return Stage(StageConfig(*settings), sum(x.shape[1] for x in features), own, ())


class _Fresh(workspace.Lease):
    """Scratch that torch.compile can trace: every map is a new tensor."""

    def channels_last(self, like: Tensor, channels: int) -> Tensor:
        return empty_channels_last(like, channels)


def _scratch(x: Tensor, channels: Sequence[int]) -> AbstractContextManager[workspace.Lease]:
    """Scratch for maps of so many channels each."""
    if torch.compiler.is_compiling():
        return nullcontext(_Fresh(x))
    return workspace.lease(x.device, workspace.size_of(x, channels))


def _layer_backward(
    settings: tuple[Any, ...],
    norms: Vectors,
    y: Tensor,
    tensors: Sequence[Any],
    grad_new: Tensor,
    all_needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's parameters and features, as DenseLayerNode takes them."""
    (own, features), (needs, need_features) = _split(tensors), _split(all_needs)
    stage, ops = _stage(settings, own, features), operators(features[0])
    (layer,) = stage.layers
    kept = y if stage.saved_size(features[0]) > 0 else None
    reads = passes.Reads(features, _empty_grads(features, need_features), False, any(need_features))
    with _scratch(features[0], stage.backward_scratch(ops)) as scratch:
        grads, sums = passes.layer_backward(
            ops, stage, layer, channels_last(grad_new), reads, norms, kept, needs, scratch
        )
    if sums is not None:
        norm1 = stage.norm1(layer, norms)
        grads = grads._replace(norm1_weight=sums[1] * norm1.rstd, norm1_bias=sums[0])
        _finish(features, reads.grads, norm1, sums)
    made = (shaped(p, g) if need else None for p, g, need in zip(own, grads, needs, strict=True))
    return *made, *_wanted(reads.grads, need_features)


def _plain_layer(
    statistics: Sequence[tuple[Tensor, Tensor] | None],
    eps: Sequence[float],
    group: str,
    *tensors: Any,
) -> Tensor:
    """The layer by PyTorch's own operators; `tensors`: as DenseLayerNode takes them."""
    refuse_group("DenseLayer", [group])
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
    (weight1, bias1), (weight2, bias2) = in_pairs(convs)
    for i, norm, conv, inputs, kernel, weight, bias in (
        (1, norm1, conv1, channels, 1, weight1, bias1),
        (2, norm2, conv2, width, 3, weight2, bias2),
    ):
        check_norm(op, _NORM_NAMES[i - 1], norm, inputs, x)
        check_conv_weight(op, f"conv{i}.weight", weight, inputs, kernel, x)
        check_vector(op, f"conv{i}.bias", bias, conv.out_channels, x, "the convolution's output channels")
    norms = norm1, norm2
    settings = StageConfig(
        bottleneck=True,
        memory=memory if torch.is_grad_enabled() else "inference",
        lowest=-1,
        eps=[norm.eps for norm in norms],
        batch_statistics=[norm.batch_statistics for norm in norms],
        drop=[],
        pool=[],
        dilation=[],
        newest_first=False,
        group=next((norm.group for norm in norms if norm.batch_statistics), ""),
    )
    with without_autocast(x):
        mean1, var1 = statistics(features, norm1)
        first = norm1.weight, norm1.bias, weight1, bias1
        own = LayerParameters(*first, norm2.weight, norm2.bias, weight2, bias2)
        known = (None, None) if norm2.batch_statistics else norm2.running(x.dtype)
        new, mean2, var2, _ = DenseLayerNode.apply(tuple(settings), mean1, var1, *known, *own, *features)
    return new if result is None else new.to(result), (mean1, var1), (mean2, var2)
