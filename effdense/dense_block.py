"""The block engine: a whole dense stage, forward and backward, as one node of autograd.

A stage is a dense block and, where the caller knows it, the BN-ReLU-average-pool behind it (a transition's, or a head's).
It owns one feature buffer in channels-last layout. Each layer reads a prefix and appends its channels; a channel's
statistics are taken once, when it is appended, and serve every norm that reads it:

    y = W1 relu(norm1(prefix))      new = conv3x3(relu(norm2(y)))      plain layers: new = conv3x3(relu(norm1(prefix)))

The backward walks the layers in reverse over one gradient buffer of the same size. What batch normalisation's backward
subtracts is affine in x, so each reader adds two numbers per channel to (a, b) and the correction is made once, when the
channel's own gradient is taken (docs/design.md, "The mathematics").

`forward` and `backward` string the operators together; `dense_stage` and `dense_stage_backward` are they as opaque
operators (so that torch.compile sees one node each way); `run` is what modules call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effdense import workspace
from effdense.autograd import (
    channels_last,
    convolve,
    convolve_backward,
    differentiable_once,
    empty_channels_last,
    empty_rows,
    matrix,
    shaped,
    sum_per_channel,
    vector,
    without_autocast,
)
from effdense.batch_norm import Folded
from effdense.operators import operators
from effdense.reference import accumulate_dtype
from effdense.stage import POOL_PARAMETERS, Layer, Settings, Stage
from effdense.workspace import on_large_pages

Parameters = Sequence[Tensor | None]


def empty_buffer(like: Tensor, channels: int) -> Tensor:
    """An uninitialised [N, channels, *spatial], channels-last, in rows of whole 16 bytes."""
    unit = max(1, 16 // like.element_size())
    return empty_rows(like, channels, -(-channels // unit) * unit)


def _drop_(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Dropout and its backward, in place: zero where the mask is, the rest scaled up."""
    return x if mask is None else x.mul_(mask).mul_(1 / keep if keep > 0 else 0.0)


def _set(vectors: tuple[Tensor, Tensor], values: Parameters) -> None:
    for to, value in zip(vectors, values, strict=True):
        assert value is not None
        to.copy_(value)


def _bottleneck(
    ops: Any, layer: Layer, norm1: Folded, prefix: Tensor, y: Tensor, then: Folded | None, statistics: bool
) -> Any:
    """Writes y = W1 relu(norm1(prefix)), or relu(then(y)); returns y's statistics."""
    assert layer.conv1 is not None
    out = (None, None) if then is None else (then.scale, then.shift)
    bias = vector(layer.conv1_bias, norm1.mean)
    return ops.bottleneck([prefix], norm1.scale, norm1.shift, matrix(layer.conv1), bias, *out, statistics, y)


def forward(
    ops: Any,
    settings: Settings,
    x: Tensor,
    parameters: Parameters,
    running: Parameters,
    masks: Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole stage: returns the pooled output (or nothing), the feature buffer, every kept y, the norms' vectors.

    `parameters`: per layer norm1's weight and bias, conv1's weight and bias, norm2's, conv2's (plain: norm1's, conv2's),
    then the pool's norm's, and those of a transition's 1x1 convolution, which comes after the pool (they commute, and
    there it has less to do); None for a head. `running`: mean and variance of every norm that does not use the batch's, else None.
    `masks`: of dropout, per layer y's and the new features' (bool, or None), or nothing.
    """
    stage = Stage(settings, x.shape[1], parameters, masks)
    features = on_large_pages(empty_buffer(x, stage.channels))
    saved = on_large_pages(x.new_empty(stage.saved_size(x)))
    kept = stage.split_saved(saved, x)
    vectors = x.new_empty(stage.vector_size(), dtype=accumulate_dtype(x.dtype))
    (mean, var), norms = stage.split_vectors(vectors)
    for i, batch in enumerate(settings.batch_statistics):
        if not batch:
            _set(norms[i], running[2 * i : 2 * i + 2])

    def append(new: Tensor, start: int) -> None:
        end = start + new.shape[1]
        _set((mean[start:end], var[start:end]), ops.append_features(new, features[:, start:end]))

    append(x, 0)
    size = workspace.size_of(x, stage.forward_scratch())
    for layer in stage.layers:
        prefix, norm1 = features[:, : layer.channels], stage.norm1(layer, norms)
        with workspace.lease(x.device, size) as scratch:
            z = scratch.channels_last(x, layer.width or layer.channels)
            if not layer.width:
                ops.bn_relu(prefix, norm1.scale, norm1.shift, z)
            elif stage.straight_to_z(layer):
                _bottleneck(ops, layer, norm1, prefix, z, stage.norm2(layer, norms), False)
            else:
                y = kept[layer.position] if layer.position in kept else scratch.channels_last(x, layer.width)
                batch, mask = settings.batch_statistics[layer.norm1 + 1], layer.masks[0]
                statistics = _bottleneck(ops, layer, norm1, prefix, y, None, batch and mask is None)
                if mask is not None:
                    _drop_(y, mask, layer.keep[0])
                    statistics = ops.channel_statistics([y]) if batch else None
                if batch:
                    _set(norms[layer.norm1 + 1], statistics)
                norm2 = stage.norm2(layer, norms)
                ops.bn_relu(y, norm2.scale, norm2.shift, z)
            new = convolve(z, layer.conv2, layer.conv2_bias)
        append(_drop_(new, layer.masks[1], layer.keep[1]), layer.channels)
        del new
    out = x.new_empty(0)
    if settings.pool:
        norm = stage.pool_norm(norms)
        out = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, settings.pool)
        weight, bias = stage.pool_parameters[2:]
        out = out if weight is None else channels_last(convolve(out, weight, bias))
    return out, features, saved, vectors


def backward(
    ops: Any,
    settings: Settings,
    grad: Tensor,
    channels: int,
    features: Tensor,
    saved: Tensor,
    vectors: Tensor,
    parameters: Parameters,
    masks: Parameters,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the input (of `channels` channels) and of every parameter, as far as `needs` asks for them."""
    stage = Stage(settings, channels, parameters, masks)
    (mean, _), norms = stage.split_vectors(vectors)
    kept = stage.split_saved(saved, features)
    count = features.shape[0] * features.shape[2:].numel()
    step = settings.step
    result: list[Tensor | None] = [None] * len(needs)
    grad_features = on_large_pages(empty_buffer(features, stage.channels))
    a, b = torch.zeros_like(mean), torch.zeros_like(mean)

    def normalised(norm: Folded, sums: Sequence[Tensor], position: int) -> None:
        """The gradients of a norm's parameters, and its part of the deferred correction."""
        sum_d, sum_dx = sums
        result[position], result[position + 1] = sum_dx * norm.rstd, sum_d
        if norm.batch_statistics:
            ops.defer(sum_d, sum_dx, norm.rstd, norm.scale, count, a, b)

    def take(start: int, end: int, out: Tensor) -> Tensor:
        """The finished gradient of channels start..end."""
        of = slice(start, end)
        ops.take_gradient(features[:, of], mean[of], a[of], b[of], grad_features[:, of], out)
        return out

    if settings.pool:
        norm, (weight, bias) = stage.pool_norm(norms), stage.pool_parameters[2:]
        if weight is not None:  # what went into the convolution is made again: one read of the features
            pooled = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, settings.pool)
            grad, *result[-2:] = convolve_backward(grad, pooled, weight, bias, (True, needs[-2], needs[-1]))
            del pooled
        sums = ops.bn_relu_avg_pool_backward(
            channels_last(grad), features, norm.scale, norm.shift, norm.mean, settings.pool, grad_features
        )
        normalised(norm, sums, len(needs) - POOL_PARAMETERS)
        del grad  # of the pooled size
    else:
        grad_features.copy_(grad)
    lowest = -1 if needs[0] else next((i - 1 for i, need in enumerate(needs) if need), len(needs)) // step

    def descend(layer: Layer, scratch: workspace.Lease) -> None:
        """One layer's backward; what it makes is gone when the next one starts."""
        first = 1 + step * layer.position
        wanted = needs[first : first + step]
        below = layer.position > lowest  # something before this layer needs a gradient
        prefix, norm1 = features[:, : layer.channels], stage.norm1(layer, norms)
        new_end = layer.channels + layer.growth
        g = take(layer.channels, new_end, scratch.channels_last(features, layer.growth))
        _drop_(g, layer.masks[1], layer.keep[1])
        z = scratch.channels_last(features, layer.width or layer.channels)
        if layer.width:
            norm2 = stage.norm2(layer, norms)
            y = kept.get(layer.position)
            if y is None:
                y = scratch.channels_last(features, layer.width)
                _bottleneck(ops, layer, norm1, prefix, y, None, False)
                _drop_(y, layer.masks[0], layer.keep[0])
            ops.bn_relu(y, norm2.scale, norm2.shift, z)
        else:
            ops.bn_relu(prefix, norm1.scale, norm1.shift, z)
        need_z = below or any(wanted[:-2])
        grad_z, *grad_conv2 = convolve_backward(
            g, z, layer.conv2, layer.conv2_bias, (need_z, wanted[-2], wanted[-1])
        )
        result[first + step - 2 : first + step] = grad_conv2
        if not need_z:
            return
        grad_z = channels_last(grad_z)
        below_prefix = grad_features[:, : layer.channels]
        if not layer.width:
            vectors1 = norm1.scale, norm1.shift, norm1.mean
            normalised(norm1, ops.bn_relu_accumulate(grad_z, prefix, *vectors1, below_prefix), first)
            return
        sums = ops.bn_relu_backward(
            grad_z, y, norm2.scale, norm2.shift, norm2.mean, norm2.rstd, norm2.batch_statistics
        )
        result[first + 4], result[first + 5] = sums[1] * norm2.rstd, sums[0]
        grad_y = _drop_(grad_z, layer.masks[0], layer.keep[0])
        if wanted[3]:
            result[first + 3] = sum_per_channel(grad_y)
        if not (below or any(wanted[:3])):
            return
        assert layer.conv1 is not None
        grad_conv1, *sums = ops.bottleneck_backward(
            [prefix],
            grad_y,
            norm1.scale,
            norm1.shift,
            norm1.mean,
            matrix(layer.conv1),
            [below_prefix],
            True,
            below or wanted[0] or wanted[1],
            wanted[2],
        )
        result[first + 2] = grad_conv1
        normalised(norm1, sums, first)

    size = workspace.size_of(features, stage.backward_scratch())
    for layer in reversed(stage.layers[max(lowest, 0) :]):
        with workspace.lease(features.device, size) as scratch:
            descend(layer, scratch)
    if needs[0]:
        result[0] = take(0, channels, empty_channels_last(features, channels))
    for i, (need, like) in enumerate(zip(needs, (None, *parameters), strict=True)):
        value = result[i] if need else None
        # One after the other: never two of all gradients.
        result[i] = value if value is None or like is None else shaped(like, value).contiguous()
    return result


_SETTINGS = (
    "bool bottleneck, str memory, int lowest, float[] eps, bool[] batch_statistics, float[] drop, int[] pool"
)
_library = torch.library.Library("effdense", "FRAGMENT")
_library.define(
    f"dense_stage(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor?[] masks, {_SETTINGS})"
    " -> (Tensor out, Tensor features, Tensor saved, Tensor vectors)"
)
_library.define(
    "dense_stage_backward(Tensor grad, int channels, Tensor features, Tensor saved, Tensor vectors,"
    f" Tensor?[] parameters, Tensor?[] masks, bool[] needs, {_SETTINGS}) -> Tensor[]"
)


@torch.library.impl(_library, "dense_stage", "CompositeExplicitAutograd")
def _dense_stage(
    x: Tensor, parameters: Parameters, running: Parameters, masks: Parameters, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return forward(operators(x), Settings(*settings), x, parameters, running, masks)


@torch.library.impl(_library, "dense_stage_backward", "CompositeExplicitAutograd")
def _dense_stage_backward(
    grad: Tensor,
    channels: int,
    features: Tensor,
    saved: Tensor,
    vectors: Tensor,
    parameters: Parameters,
    masks: Parameters,
    needs: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    """Without the gradients that are not needed: an operator cannot return None."""
    with torch.no_grad():
        grads = backward(
            operators(features),
            Settings(*settings),
            grad,
            channels,
            features,
            saved,
            vectors,
            parameters,
            masks,
            needs,
        )
    return [g for g in grads if g is not None]


@torch.library.register_fake("effdense::dense_stage")
def _(
    x: Tensor, parameters: Parameters, running: Parameters, masks: Parameters, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stage = Stage(Settings(*settings), x.shape[1], parameters, masks)
    features, pool = empty_buffer(x, stage.channels), stage.settings.pool
    out = x.new_empty(0)
    if pool:
        spatial = [n // k for n, k in zip(x.shape[2:], pool, strict=True)]
        weight = stage.pool_parameters[2]
        channels = stage.channels if weight is None else weight.shape[0]
        out = x.new_empty(x.shape[0], *spatial, channels).movedim(-1, 1)
    vectors = x.new_empty(stage.vector_size(), dtype=accumulate_dtype(x.dtype))
    return out, features, x.new_empty(stage.saved_size(x)), vectors


@torch.library.register_fake("effdense::dense_stage_backward")
def _(
    grad: Tensor,
    channels: int,
    features: Tensor,
    saved: Tensor,
    vectors: Tensor,
    parameters: Parameters,
    masks: Parameters,
    needs: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    of_x = [empty_channels_last(features, channels)] if needs[0] else []
    wanted = (p for p, need in zip(parameters, needs[1:], strict=True) if need and p is not None)
    return of_x + [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]


class StageNode(torch.autograd.Function):
    """The stage for autograd: returns its output (the pool's, or the feature buffer) and the norms' vectors."""

    @staticmethod
    def forward(
        settings: tuple[Any, ...], norms: int, masks: int, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parameters, running, drops = _parts(norms, masks, tensors)
        out, features, saved, vectors = torch.ops.effdense.dense_stage(
            x, parameters, running, drops, *settings
        )
        return (out, vectors, saved, features) if settings[-1] else (features, vectors, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, norms, masks, x, *tensors = inputs
        parameters, _, drops = _parts(norms, masks, tensors)
        ctx.channels, ctx.count = x.shape[1], len(parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        features = output[-1] if ctx.settings[-1] else output[0]
        ctx.save_for_backward(features, output[2], output[1], *parameters, *drops)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = list(ctx.needs_input_grad[3 : 4 + ctx.count])
        features, saved, vectors, *tensors = ctx.saved_tensors
        with torch.no_grad(), without_autocast(grad):
            grads = iter(
                torch.ops.effdense.dense_stage_backward(
                    grad,
                    ctx.channels,
                    features,
                    saved,
                    vectors,
                    tensors[: ctx.count],
                    tensors[ctx.count :],
                    needs,
                    *ctx.settings,
                )
            )
            result = tuple(next(grads) if need else None for need in needs)
        rest = len(ctx.needs_input_grad) - 3 - len(result)
        return (None,) * 3 + differentiable_once("DenseBlock", result) + (None,) * rest


def _parts(
    norms: int, masks: int, tensors: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Parameters, running statistics, masks."""
    end = len(tensors) - masks
    start = end - 2 * norms
    return list(tensors[:start]), list(tensors[start:end]), list(tensors[end:])


def run(
    settings: Settings, x: Tensor, parameters: Parameters, running: Parameters, masks: Parameters
) -> tuple[Tensor, Stage, Tensor]:
    """Runs a stage whose arguments have been checked, in x's dtype; `settings.lowest` and "inference" are set here.

    Returns its output (the pool's, or the feature buffer), the stage, and its vectors (see `Stage.split_vectors`).
    """
    tensors = (x, *parameters)
    needs = [t is not None and t.requires_grad for t in tensors]
    # A node is also what refuses forward mode, where nothing need require a gradient.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward_mode or (torch.is_grad_enabled() and any(needs)):
        lowest = -1 if needs[0] or not any(needs) else (needs.index(True) - 1) // settings.step
        settings = settings._replace(lowest=lowest)
        out, vectors, *_ = StageNode.apply(
            tuple(settings), len(settings.eps), len(masks), x, *parameters, *running, *masks
        )
    else:
        settings = settings._replace(memory="inference")
        out, features, _, vectors = torch.ops.effdense.dense_stage(x, parameters, running, masks, *settings)
        out = out if settings.pool else features
    return out, Stage(settings, x.shape[1], parameters, masks), vectors
