"""The engine in Python: forward and backward of a whole dense stage, operator by operator. csrc/stage_*.cpp do the same in C++.

A stage is a dense block and, where the caller knows it, the BN-ReLU-average-pool behind it (a transition's, or a head's).
It owns one feature buffer in channels-last layout. Each layer reads what is there, a prefix, and appends its channels (or
a suffix, and puts them in front: stage.py says where); a channel's statistics are taken once, when it comes, and serve
every norm that reads it:

    y = W1 relu(norm1(earlier))      new = conv3x3(relu(norm2(y)))      plain layers: new = conv3x3(relu(norm1(earlier)))

The backward walks the layers in reverse over one gradient buffer of the same size. What batch normalisation's backward
subtracts is affine in x, so each reader adds two numbers per channel to (a, b) and the correction is made once, when the
channel's own gradient is taken (docs/mathematics.md). node.py makes this a node of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.engine import workspace
from effdense.engine.autograd import (
    dropout_scale,
    empty_channels_last,
    empty_rows,
    matrix,
    shaped,
    sum_per_channel,
    vector,
)
from effdense.engine.batch_norm import Folded
from effdense.engine.convolution import (
    Gradients,
    bn_relu_convolve,
    bn_relu_convolve_backward,
    convolve,
    convolve_backward,
)
from effdense.engine.stage import (
    BackwardInputs,
    ForwardInputs,
    Layer,
    LayerParameters,
    Parameters,
    PoolParameters,
    Stage,
    StageConfig,
    Vectors,
    by_name,
    in_pairs,
)
from effdense.engine.synchronize import join_coefficients, join_statistics
from effdense.engine.workspace import on_large_pages
from effdense.ops.reference import accumulate_dtype, channels_last


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
    ops: Any,
    layer: Layer,
    norm1: Folded,
    earlier: Sequence[Tensor],
    y: Tensor,
    then: Folded | None,
    statistics: bool,
) -> Any:
    """Writes y = W1 relu(norm1(earlier)), or relu(then(y)); returns y's statistics."""
    own, out = layer.parameters, (None, None) if then is None else (then.scale, then.shift)
    weight, bias = matrix(own.conv1_weight), vector(own.conv1_bias, norm1.mean)
    return ops.bottleneck(earlier, norm1.scale, norm1.shift, weight, bias, *out, statistics, y)


def _first_half(
    ops: Any,
    stage: Stage,
    layer: Layer,
    norm1: Folded,
    earlier: Sequence[Tensor],
    norms: Vectors,
    kept: dict[int, Tensor],
    scratch: workspace.Lease,
) -> tuple[Tensor, Folded | None]:
    """A bottleneck's output, and what is to come before the 3x3 convolution: norm2, or nothing where it is done already."""
    if stage.straight_to_z(ops, layer):
        z = scratch.channels_last(earlier[0], layer.width)
        _bottleneck(ops, layer, norm1, earlier, z, stage.norm2(layer, norms), False)
        return z, None
    y = kept.get(layer.position)
    y = scratch.channels_last(earlier[0], layer.width) if y is None else y
    batch, mask = stage.settings.batch_statistics[layer.norm1 + 1], layer.masks[0]
    statistics = _bottleneck(ops, layer, norm1, earlier, y, None, batch and mask is None)
    if mask is not None:
        _drop_(y, mask, layer.keep[0])
        statistics = ops.channel_statistics([y]) if batch else None
    if batch:
        _set_joint(norms[layer.norm1 + 1], statistics, stage.settings.group, y)
    return y, stage.norm2(layer, norms)


def layer_forward(
    ops: Any,
    stage: Stage,
    layer: Layer,
    earlier: Sequence[Tensor],
    norms: Vectors,
    kept: dict[int, Tensor],
    new: Tensor,
    scratch: workspace.Lease,
) -> Any:
    """One layer without dropout behind it, from the list of all that it reads; returns the statistics of the new features."""
    norm1, conv2 = stage.norm1(layer, norms), (layer.parameters.conv2_weight, layer.parameters.conv2_bias)
    source: tuple[Tensor, Folded | None] = earlier[0], norm1
    if layer.width:
        source = _first_half(ops, stage, layer, norm1, earlier, norms, kept, scratch)
    return bn_relu_convolve(ops, *source, *conv2, new, scratch, layer.dilation)


def forward(ops: Any, settings: StageConfig, given: ForwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole stage: returns the pooled output (or nothing), the feature buffer, every kept y, the norms' vectors."""
    x, parameters, running, masks = given
    stage = Stage(settings, x.shape[1], parameters, masks)
    features = on_large_pages(empty_buffer(x, stage.channels))
    saved = on_large_pages(x.new_empty(stage.saved_size(x)))
    kept = stage.split_saved(saved, x)
    vectors = x.new_empty(stage.vector_size(), dtype=accumulate_dtype(x.dtype))
    (mean, var), norms = stage.split_vectors(vectors)
    for statistics, batch, known in zip(norms, settings.batch_statistics, in_pairs(running), strict=True):
        if not batch:
            _set(statistics, known)

    first = stage.at(0, x.shape[1])
    _set_joint((mean[first], var[first]), ops.append_features(x, features[:, first]), settings.group, x)
    size = workspace.size_of(x, stage.forward_scratch(ops))
    for layer in stage.layers:
        own = stage.made_by(layer)
        earlier, new = [features[:, stage.read_by(layer)]], features[:, own]
        with workspace.lease(x.device, size) as scratch:
            statistics = layer_forward(ops, stage, layer, earlier, norms, kept, new, scratch)
        if layer.masks[1] is not None:
            statistics = ops.channel_statistics([_drop_(new, layer.masks[1], layer.keep[1])])
        _set_joint((mean[own], var[own]), statistics, settings.group, x)
    out = x.new_empty(0)
    if settings.pool:
        norm = stage.pool_norm(norms)
        out = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, settings.pool)
        weight, bias = stage.pool_parameters.conv_weight, stage.pool_parameters.conv_bias
        out = out if weight is None else channels_last(convolve(out, weight, bias))
    return out, features, saved, vectors


def backward(ops: Any, settings: StageConfig, given: BackwardInputs) -> list[Tensor | None]:
    """Gradients of the input and of every parameter, as far as `given.needs` asks for them."""
    features, channels, needs = given.features, given.channels, given.needs
    stage = Stage(settings, channels, given.parameters, given.masks)
    run = _Backward(ops, stage, features, given.saved, given.vectors, needs[1:])
    run.pool(given.grad)
    per_layer = settings.parameters_per_layer
    lowest = (
        -1 if needs[0] else next((i - 1 for i, need in enumerate(needs) if need), len(needs)) // per_layer
    )
    size = workspace.size_of(features, stage.backward_scratch(ops))
    for layer in reversed(stage.layers[max(lowest, 0) :]):
        with workspace.lease(features.device, size) as scratch:
            run.layer(layer, scratch, need_inputs=layer.position > lowest)
    grad_x = run.finish_gradient(0, channels, empty_channels_last(features, channels)) if needs[0] else None
    return [grad_x, *run.gradients(given.parameters)]


class _Backward:
    """The gradient buffer, the corrections to come, and the parameters' gradients made so far. `needs`: of which there are any."""

    def __init__(
        self,
        ops: Any,
        stage: Stage,
        features: Tensor,
        saved: Tensor,
        vectors: Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.ops, self.stage, self.features = ops, stage, features
        self.flat_needs, (self.needs, self.pool_needs) = needs, by_name(stage.settings, needs)
        self.grads, self.pool_grads = [LayerParameters() for _ in stage.layers], PoolParameters()
        (self.mean, _), self.norms = stage.split_vectors(vectors)
        self.kept = stage.split_saved(saved, features)
        self.count = features.shape[0] * features.shape[2:].numel()
        self.grad_features = on_large_pages(empty_buffer(features, stage.channels))
        self.a, self.b = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def finish_gradient(self, start: int, end: int, out: Tensor) -> Tensor:
        """The finished gradient of the channels that came as the start-th to the end-th."""
        of = self.stage.at(start, end)
        x, grad = self.features[:, of], self.grad_features[:, of]
        a, b = join_coefficients(self.stage.settings.group, self.a[of], self.b[of], self.count)
        self.ops.apply_correction(x, self.mean[of], a, b, grad, out)
        return out

    def gradients(self, parameters: Parameters) -> list[Tensor | None]:
        """All that were needed, in the operators' order, shaped as their parameters."""
        names = LayerParameters.names(self.stage.settings.bottleneck)
        made = [getattr(own, name) for own in self.grads for name in names]
        made += self.pool_grads if self.stage.settings.pool else []
        self.grads, self.pool_grads = [], PoolParameters()
        for i, (need, like) in enumerate(zip(self.flat_needs, parameters, strict=True)):
            # One after the other: never two of all gradients.
            made[i] = shaped(like, made[i]).contiguous() if need and like is not None else None
        return made

    def _norm_gradients(self, norm: Folded, sums: Sequence[Tensor], of: slice) -> tuple[Tensor, Tensor]:
        """The gradients of a norm's weight and bias that reads the buffer; its part of the correction to come is added."""
        if norm.batch_statistics:
            norm.accumulate_correction(sums[0], sums[1], self.count, self.a[of], self.b[of])
        return _affine(norm, sums)

    def pool(self, grad: Tensor) -> None:
        """Starts the gradient buffer: from the pool behind the block, or from the block's own gradient."""
        stage, features, ops = self.stage, self.features, self.ops
        kernel = stage.settings.pool
        if not kernel:
            self.grad_features.copy_(grad)
            return
        norm, own, needs = stage.pool_norm(self.norms), stage.pool_parameters, self.pool_needs
        grads: dict[str, Tensor] = {}
        if (
            own.conv_weight is not None
        ):  # what went into the convolution is made again: one read of the features
            pooled = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, kernel)
            wanted = True, needs.conv_weight, needs.conv_bias
            grad, grads["conv_weight"], grads["conv_bias"] = convolve_backward(
                grad, pooled, own.conv_weight, own.conv_bias, wanted
            )
        sums = ops.bn_relu_avg_pool_backward(
            channels_last(grad), features, norm.scale, norm.shift, norm.mean, kernel, self.grad_features
        )
        grads["norm_weight"], grads["norm_bias"] = self._norm_gradients(norm, sums, slice(None))
        self.pool_grads = PoolParameters(**grads)

    def layer(self, layer: Layer, scratch: workspace.Lease, need_inputs: bool) -> None:
        """One layer; what it makes is gone when the next one starts. `need_inputs`: whether what the layer reads needs a gradient."""
        stage, of = self.stage, self.stage.read_by(layer)
        grad = scratch.channels_last(self.features, layer.growth)
        self.finish_gradient(layer.channels, layer.channels + layer.growth, grad)
        _drop_(grad, layer.masks[1], layer.keep[1])
        reads = Reads([self.features[:, of]], [self.grad_features[:, of]], True, need_inputs)
        y, needs = self.kept.get(layer.position), self.needs[layer.position]
        grads, sums = layer_backward(self.ops, stage, layer, grad, reads, self.norms, y, needs, scratch)
        if sums is not None:
            weight, bias = self._norm_gradients(stage.norm1(layer, self.norms), sums, of)
            grads = grads._replace(norm1_weight=weight, norm1_bias=bias)
        self.grads[layer.position] = grads


class Reads(NamedTuple):
    """What a layer reads, and where its gradient goes."""

    features: Sequence[Tensor]
    grads: Sequence[Tensor]  # empty where none is needed; of a plain layer to be added to
    accumulate: bool  # add to `grads`, else write them
    need: bool  # whether any is needed


def layer_backward(
    ops: Any,
    stage: Stage,
    layer: Layer,
    grad: Tensor,
    reads: Reads,
    norms: Vectors,
    y: Tensor | None,
    needs: LayerParameters,
    scratch: workspace.Lease,
) -> tuple[LayerParameters, Sequence[Tensor] | None]:
    """One layer without dropout behind it, from the gradient of its new features on; `y`: None where it was not kept.

    Returns the parameters' gradients but those of norm1, and norm1's sum d and sum d (x - mean), or None where nothing needs
    them. What norm1 subtracts from the gradients with the batch's statistics is for the caller.
    """
    own, norm1 = layer.parameters, stage.norm1(layer, norms)
    source, norm = reads.features[0], norm1
    if layer.width:
        source, norm = _y(ops, layer, norm1, reads.features, y, scratch), stage.norm2(layer, norms)
    need_features = reads.need or needs.norm1_weight or needs.norm1_bias
    need_y = need_features or needs.conv1_weight or needs.conv1_bias
    # y's gradient is wanted whole where it goes through dropout or is summed up
    corrects_later = bool(layer.width) and layer.masks[0] is None and not needs.conv1_bias
    conv2 = bn_relu_convolve_backward(
        ops,
        grad,
        source,
        norm,
        own.conv2_weight,
        own.conv2_bias,
        (need_y or needs.norm2_weight or needs.norm2_bias, needs.conv2_weight, needs.conv2_bias),
        scratch,
        None if layer.width else reads.grads[0],
        corrects_later,
        layer.dilation,
    )
    grads = {"conv2_weight": conv2.weight, "conv2_bias": conv2.bias}
    sums: Sequence[Tensor] | None = None
    if conv2.x is not None and conv2.sums is not None:
        if not layer.width:
            sums = conv2.sums
        else:
            grads["norm2_weight"], grads["norm2_bias"] = _affine(norm, conv2.sums)
            if need_y:
                grad_y, correction = _grad_y(ops, layer, conv2, source, norm, corrects_later)
                grads["conv1_bias"] = sum_per_channel(grad_y) if needs.conv1_bias else None
                grads["conv1_weight"], *sums = ops.bottleneck_backward(
                    reads.features,
                    grad_y,
                    norm1.scale,
                    norm1.shift,
                    norm1.mean,
                    matrix(own.conv1_weight),
                    reads.grads,
                    reads.accumulate,
                    need_features,
                    needs.conv1_weight,
                    [] if correction is None else correction.tensors(),
                )
    return LayerParameters(**grads), sums


def _y(
    ops: Any,
    layer: Layer,
    norm1: Folded,
    earlier: Sequence[Tensor],
    kept: Tensor | None,
    scratch: workspace.Lease,
) -> Tensor:
    """A bottleneck's output, kept or made again."""
    if kept is not None:
        return kept
    y = scratch.channels_last(earlier[0], layer.width)
    _bottleneck(ops, layer, norm1, earlier, y, None, False)
    return _drop_(y, layer.masks[0], layer.keep[0])


class Correction(NamedTuple):
    """What a gradient still misses: -a - b * (y - mean), and before that the backward of relu(scale * y + shift), if those are given."""

    y: Tensor
    mean: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """As the operators take it: 4 or 6 tensors."""
        return [tensor for tensor in self if tensor is not None]


def _grad_y(
    ops: Any, layer: Layer, conv2: Gradients, y: Tensor, norm2: Folded, corrects_later: bool
) -> tuple[Tensor, Correction | None]:
    """The gradient of y, and what it misses."""
    assert conv2.x is not None
    correction = _correction(conv2, y, norm2)
    if corrects_later:
        return conv2.x, correction
    if correction is not None:
        ops.apply_correction(y, correction.mean, correction.a, correction.b, conv2.x, conv2.x)
    return _drop_(conv2.x, layer.masks[0], layer.keep[0]), None


def _correction(conv2: Gradients, y: Tensor, norm2: Folded) -> Correction | None:
    """What y's gradient misses as conv2's backward has made it."""
    assert conv2.sums is not None
    if norm2.batch_statistics:
        a, b = norm2.correction(conv2.sums[0], conv2.sums[1], y.shape[0] * y.shape[2:].numel())
    elif conv2.masked:
        return None
    else:
        a = b = torch.zeros_like(norm2.mean)
    mask = () if conv2.masked else (norm2.scale, norm2.shift)
    return Correction(y, norm2.mean, a, b, *mask)


def _affine(norm: Folded, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's weight and bias, of sum d and sum d (x - mean)."""
    return sums[1] * norm.rstd, sums[0]
