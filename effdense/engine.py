"""The block engine: a whole dense stage, forward and backward, as operators strung together.

A stage is a dense block and, where the caller knows it, the BN-ReLU-average-pool behind it (a transition's, or a head's).
It owns one feature buffer in channels-last layout. Each layer reads what is there, a prefix, and appends its channels (or
a suffix, and puts them in front: stage.py says where); a channel's statistics are taken once, when it comes, and serve
every norm that reads it:

    y = W1 relu(norm1(earlier))      new = conv3x3(relu(norm2(y)))      plain layers: new = conv3x3(relu(norm1(earlier)))

The backward walks the layers in reverse over one gradient buffer of the same size. What batch normalisation's backward
subtracts is affine in x, so each reader adds two numbers per channel to (a, b) and the correction is made once, when the
channel's own gradient is taken (docs/design.md, "The mathematics"). dense_block.py makes this a node of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdense import workspace
from effdense.autograd import (
    dropout_scale,
    empty_channels_last,
    empty_rows,
    matrix,
    shaped,
    sum_per_channel,
    vector,
)
from effdense.batch_norm import Folded
from effdense.convolution import (
    Gradients,
    bn_relu_convolve,
    bn_relu_convolve_backward,
    convolve,
    convolve_backward,
)
from effdense.reference import accumulate_dtype, channels_last
from effdense.stage import POOL_PARAMETERS, Layer, Parameters, Settings, Stage, Vectors
from effdense.synchronize import join_coefficients, join_statistics
from effdense.workspace import on_large_pages


def empty_buffer(like: Tensor, channels: int) -> Tensor:
    """An uninitialised [N, channels, *spatial], channels-last, in rows of whole 16 bytes."""
    unit = max(1, 16 // like.element_size())
    return empty_rows(like, channels, -(-channels // unit) * unit)


def _drop_(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Dropout and its backward, in place: zero where the mask is, the rest scaled up."""
    return x if mask is None else x.mul_(mask).mul_(dropout_scale(keep))


def _set(vectors: tuple[Tensor, Tensor], values: Parameters) -> None:
    for to, value in zip(vectors, values, strict=True):
        assert value is not None
        to.copy_(value)


def _set_joint(
    vectors: tuple[Tensor, Tensor], statistics: tuple[Tensor, Tensor], group: str, of: Tensor
) -> None:
    """Sets mean and variance to those of all processes; `statistics` are those of the map `of`."""
    _set(vectors, join_statistics(group, *statistics, of.shape[0] * of.shape[2:].numel()))


def _bottleneck(
    ops: Any, layer: Layer, norm1: Folded, earlier: Tensor, y: Tensor, then: Folded | None, statistics: bool
) -> Any:
    """Writes y = W1 relu(norm1(earlier)), or relu(then(y)); returns y's statistics."""
    assert layer.conv1 is not None
    out = (None, None) if then is None else (then.scale, then.shift)
    bias = vector(layer.conv1_bias, norm1.mean)
    return ops.bottleneck([earlier], norm1.scale, norm1.shift, matrix(layer.conv1), bias, *out, statistics, y)


def _first_half(
    ops: Any,
    stage: Stage,
    layer: Layer,
    norm1: Folded,
    earlier: Tensor,
    norms: Vectors,
    kept: dict[int, Tensor],
    scratch: workspace.Lease,
) -> tuple[Tensor, Folded | None]:
    """A bottleneck's output, and what is to come before the 3x3 convolution: norm2, or nothing where it is done already."""
    if stage.straight_to_z(ops, layer):
        z = scratch.channels_last(earlier, layer.width)
        _bottleneck(ops, layer, norm1, earlier, z, stage.norm2(layer, norms), False)
        return z, None
    y = kept.get(layer.position)
    y = scratch.channels_last(earlier, layer.width) if y is None else y
    batch, mask = stage.settings.batch_statistics[layer.norm1 + 1], layer.masks[0]
    statistics = _bottleneck(ops, layer, norm1, earlier, y, None, batch and mask is None)
    if mask is not None:
        _drop_(y, mask, layer.keep[0])
        statistics = ops.channel_statistics([y]) if batch else None
    if batch:
        _set_joint(norms[layer.norm1 + 1], statistics, stage.settings.group, y)
    return y, stage.norm2(layer, norms)


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

    first = stage.at(0, x.shape[1])
    _set_joint((mean[first], var[first]), ops.append_features(x, features[:, first]), settings.group, x)
    size = workspace.size_of(x, stage.forward_scratch(ops))
    for layer in stage.layers:
        own = stage.made_by(layer)
        earlier, new, norm1 = features[:, stage.read_by(layer)], features[:, own], stage.norm1(layer, norms)
        with workspace.lease(x.device, size) as scratch:
            source: tuple[Tensor, Folded | None] = earlier, norm1
            if layer.width:
                source = _first_half(ops, stage, layer, norm1, earlier, norms, kept, scratch)
            statistics = bn_relu_convolve(
                ops, *source, layer.conv2, layer.conv2_bias, new, scratch, layer.dilation
            )
        if layer.masks[1] is not None:
            statistics = ops.channel_statistics([_drop_(new, layer.masks[1], layer.keep[1])])
        _set_joint((mean[own], var[own]), statistics, settings.group, x)
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
    way = _Backward(ops, stage, features, saved, vectors, needs)
    way.pool(grad)
    del grad  # of the pooled size
    step = settings.step
    lowest = -1 if needs[0] else next((i - 1 for i, need in enumerate(needs) if need), len(needs)) // step
    size = workspace.size_of(features, stage.backward_scratch(ops))
    for layer in reversed(stage.layers[max(lowest, 0) :]):
        with workspace.lease(features.device, size) as scratch:
            way.layer(layer, scratch, below=layer.position > lowest)
    result = way.result
    if needs[0]:
        result[0] = way.take(0, channels, empty_channels_last(features, channels))
    for i, (need, like) in enumerate(zip(needs, (None, *parameters), strict=True)):
        value = result[i] if need else None
        # One after the other: never two of all gradients.
        result[i] = value if value is None or like is None else shaped(like, value).contiguous()
    return result


class _Backward:
    """The gradient buffer, the deferred corrections, and the gradients made so far (input, then parameters)."""

    def __init__(
        self,
        ops: Any,
        stage: Stage,
        features: Tensor,
        saved: Tensor,
        vectors: Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.ops, self.stage, self.features, self.needs = ops, stage, features, needs
        (self.mean, _), self.norms = stage.split_vectors(vectors)
        self.kept = stage.split_saved(saved, features)
        self.count = features.shape[0] * features.shape[2:].numel()
        self.grad_features = on_large_pages(empty_buffer(features, stage.channels))
        self.a, self.b = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self.result: list[Tensor | None] = [None] * len(needs)

    def take(self, start: int, end: int, out: Tensor) -> Tensor:
        """The finished gradient of the channels that came as the start-th to the end-th."""
        of = self.stage.at(start, end)
        x, grad = self.features[:, of], self.grad_features[:, of]
        a, b = join_coefficients(self.stage.settings.group, self.a[of], self.b[of], self.count)
        self.ops.take_gradient(x, self.mean[of], a, b, grad, out)
        return out

    def _normalised(self, norm: Folded, sums: Sequence[Tensor], position: int) -> None:
        """The gradients of a norm's parameters."""
        self.result[position], self.result[position + 1] = sums[1] * norm.rstd, sums[0]

    def _read(self, norm: Folded, sums: Sequence[Tensor], position: int, of: slice = slice(None)) -> None:
        """The same of a norm that reads the buffer, and its part of the deferred correction."""
        self._normalised(norm, sums, position)
        if norm.batch_statistics:
            norm.defer(sums[0], sums[1], self.count, self.a[of], self.b[of])

    def pool(self, grad: Tensor) -> None:
        """Starts the gradient buffer: from the pool behind the block, or from the block's own gradient."""
        stage, features, ops = self.stage, self.features, self.ops
        kernel = stage.settings.pool
        if not kernel:
            self.grad_features.copy_(grad)
            return
        norm, (weight, bias) = stage.pool_norm(self.norms), stage.pool_parameters[2:]
        if weight is not None:  # what went into the convolution is made again: one read of the features
            pooled = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, kernel)
            needs = True, self.needs[-2], self.needs[-1]
            grad, *self.result[-2:] = convolve_backward(grad, pooled, weight, bias, needs)
        sums = ops.bn_relu_avg_pool_backward(
            channels_last(grad), features, norm.scale, norm.shift, norm.mean, kernel, self.grad_features
        )
        self._read(norm, sums, len(self.needs) - POOL_PARAMETERS)

    def layer(self, layer: Layer, scratch: workspace.Lease, below: bool) -> None:
        """One layer; what it makes is gone when the next one starts. `below`: whether what the layer reads needs a gradient."""
        stage, ops, step = self.stage, self.ops, self.stage.settings.step
        first = 1 + step * layer.position
        wanted = self.needs[first : first + step]
        of = stage.read_by(layer)
        earlier, grad_earlier, norm1 = (
            self.features[:, of],
            self.grad_features[:, of],
            stage.norm1(layer, self.norms),
        )
        g = scratch.channels_last(self.features, layer.growth)
        self.take(layer.channels, layer.channels + layer.growth, g)
        _drop_(g, layer.masks[1], layer.keep[1])
        source, norm = earlier, norm1
        if layer.width:
            source, norm = self._y(layer, norm1, earlier, scratch), stage.norm2(layer, self.norms)
        # y's gradient is wanted whole where it goes through dropout or is summed up
        defers = bool(layer.width) and layer.masks[0] is None and not wanted[3]
        conv2 = bn_relu_convolve_backward(
            ops,
            g,
            source,
            norm,
            layer.conv2,
            layer.conv2_bias,
            (below or any(wanted[:-2]), wanted[-2], wanted[-1]),
            scratch,
            None if layer.width else grad_earlier,
            defers,
            layer.dilation,
        )
        self.result[first + step - 2 : first + step] = conv2.weight, conv2.bias
        if conv2.x is None or conv2.sums is None:
            return
        if not layer.width:
            self._read(norm1, conv2.sums, first, of)
            return
        self._normalised(norm, conv2.sums, first + 4)
        if not (below or any(wanted[:4])):
            return
        grad_y, deferred = self._grad_y(layer, conv2, source, norm, defers)
        if wanted[3]:
            self.result[first + 3] = sum_per_channel(grad_y)
        assert layer.conv1 is not None
        need_features = below or wanted[0] or wanted[1]
        vectors = norm1.scale, norm1.shift, norm1.mean
        grad_conv1, *sums = ops.bottleneck_backward(
            [earlier],
            grad_y,
            *vectors,
            matrix(layer.conv1),
            [grad_earlier],
            True,
            need_features,
            wanted[2],
            deferred,
        )
        self.result[first + 2] = grad_conv1
        self._read(norm1, sums, first, of)

    def _y(self, layer: Layer, norm1: Folded, earlier: Tensor, scratch: workspace.Lease) -> Tensor:
        """A bottleneck's output, kept or made again."""
        y = self.kept.get(layer.position)
        if y is None:
            y = scratch.channels_last(self.features, layer.width)
            _bottleneck(self.ops, layer, norm1, earlier, y, None, False)
            _drop_(y, layer.masks[0], layer.keep[0])
        return y

    def _grad_y(
        self, layer: Layer, conv2: Gradients, y: Tensor, norm2: Folded, defers: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of y, and what is deferred of it."""
        assert conv2.x is not None and conv2.sums is not None
        deferred: list[Tensor] = []
        if norm2.batch_statistics:
            deferred = [y, norm2.mean, *norm2.deferred(conv2.sums[0], conv2.sums[1], self.count)]
        elif not conv2.masked:
            nothing = torch.zeros_like(norm2.mean)
            deferred = [y, norm2.mean, nothing, nothing]
        if not conv2.masked:
            deferred += [norm2.scale, norm2.shift]
        if defers:
            return conv2.x, deferred
        if deferred:
            self.ops.take_gradient(*deferred, conv2.x, conv2.x)
        return _drop_(conv2.x, layer.masks[0], layer.keep[0]), []
