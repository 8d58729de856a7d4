"""BN-ReLU-convolution, the second half of a layer (all of a plain one), forward and backward.

On the CPU a 3, 3x3 or 3x3x3 convolution takes the norm and the ReLU into its tiles (csrc/cpu/conv3x3.cpp). Everything else
normalises into scratch and runs PyTorch's own convolutions, channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.engine.autograd import sum_per_channel, vector
from effdense.engine.batch_norm import Folded, plain_bn_relu
from effdense.engine.workspace import Lease
from effdense.ops.dispatch import has_kernel
from effdense.ops.reference import accumulate_dtype, channels_last


def fuses(ops: Any, weight: Tensor, dilation: int = 1) -> bool:
    """Whether these operators have a fused kernel for this convolution."""
    return (
        all(size == 3 for size in weight.shape[2:])
        and dilation == 1
        and has_kernel(ops, "bn_relu_conv3x3", weight.device.type)
    )


def bn_relu_convolve(
    ops: Any,
    x: Tensor,
    norm: Folded | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scratch: Lease,
    dilation: int = 1,
) -> Any:
    """Writes out = weight * relu(norm(x)) + bias (None: x is normalised already); returns out's mean and variance."""
    if norm is not None and fuses(ops, weight, dilation):
        return ops.bn_relu_conv3x3(x, norm.scale, norm.shift, weight, vector(bias, norm.mean), out)
    z = x
    if norm is not None:
        z = scratch.channels_last(x, x.shape[1])
        ops.bn_relu(x, norm.scale, norm.shift, z)
    return ops.append_features(convolve(z, weight, bias, dilation), out)


def plain_bn_relu_convolve(
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int = 1,
) -> Tensor:
    """The same by PyTorch's own operators, which can be differentiated any number of times; see `plain_bn_relu`."""
    wide = accumulate_dtype(x.dtype)
    z = plain_bn_relu(x, statistics, eps, norm_weight, norm_bias)
    return convolve(z, weight.to(wide), None if bias is None else bias.to(wide), dilation)


class Gradients(NamedTuple):
    """What the backward of `bn_relu_convolve` makes; None where it was not needed."""

    # scale * d, d the gradient masked by relu: what the batch's statistics subtract is missing. Not even masked: the
    # gradient of relu(norm(x))
    x: Tensor | None
    sums: Sequence[Tensor] | None  # sum d, sum d (x - mean)
    weight: Tensor | None
    bias: Tensor | None
    masked: bool = True


def bn_relu_convolve_backward(
    ops: Any,
    grad: Tensor,
    x: Tensor,
    norm: Folded,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    scratch: Lease,
    add_to: Tensor | None,
    masks_later: bool,
    dilation: int = 1,
) -> Gradients:
    """Gradients of x, weight and bias, as far as `needs` asks; that of x is new, or is added to `add_to`.

    `masks_later`: the caller takes a gradient of x that is not masked.
    """
    need_x, need_weight, need_bias = needs
    vectors = norm.scale, norm.shift, norm.mean
    if fuses(ops, weight, dilation):
        grad_bias = sum_per_channel(grad) if need_bias else None
        if not (need_x or need_weight):
            return Gradients(None, None, None, grad_bias)
        grad_x = x.new_empty(0)
        if need_x:
            grad_x = scratch.channels_last(x, x.shape[1]) if add_to is None else add_to
        grad_weight, *sums = ops.bn_relu_conv3x3_backward(
            grad, x, *vectors, weight, grad_x, add_to is not None, need_x, need_weight
        )
        grad_weight = grad_weight if need_weight else None
        if not need_x:
            return Gradients(None, None, grad_weight, grad_bias)
        return Gradients(grad_x, sums, grad_weight, grad_bias)
    z = scratch.channels_last(x, x.shape[1])
    if need_x and masks_later:  # one pass makes z and takes the sums
        grad_z = channels_last(convolve_backward(grad, z, weight, bias, (True, False, False), dilation)[0])
        sums = ops.bn_relu_backward_sums(grad_z, x, *vectors, z)
        needs = False, need_weight, need_bias
        _, grad_weight, grad_bias = convolve_backward(grad, z, weight, bias, needs, dilation)
        return Gradients(grad_z, sums, grad_weight, grad_bias, masked=False)
    ops.bn_relu(x, norm.scale, norm.shift, z)
    grad_x, grad_weight, grad_bias = convolve_backward(grad, z, weight, bias, needs, dilation)
    if not need_x:
        return Gradients(None, None, grad_weight, grad_bias)
    grad_x = channels_last(grad_x)
    if add_to is None:
        sums = ops.bn_relu_backward(grad_x, x, *vectors, norm.rstd, False)
    else:
        sums = ops.bn_relu_backward_accumulate(grad_x, x, *vectors, add_to)
    return Gradients(grad_x, sums, grad_weight, grad_bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """A convolution of odd kernel size that keeps the image's size, on PyTorch's own kernels."""
    x_, weight_, settings = _conv_form(x, weight, dilation)
    y: Tensor = torch.ops.aten.convolution(x_, weight_, bias, *settings)
    return y.squeeze(2) if x.dim() == 3 else y


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, as far as `needs` asks for them."""
    x_, weight_, settings = _conv_form(x, weight, dilation)
    bias_sizes = None if bias is None else list(bias.shape)
    grad_ = grad.unsqueeze(2) if x.dim() == 3 else grad
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_, x_, weight_, bias_sizes, *settings, list(needs)
    )
    if x.dim() == 3:
        grad_x = grad_x.squeeze(2) if needs[0] else grad_x
        grad_weight = grad_weight.squeeze(2) if needs[1] else grad_weight
    return grad_x, grad_weight, grad_bias


def _conv_form(x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """x, weight, and stride, padding, dilation, transposed, output_padding, groups; 1D as 2D, which knows channels-last."""
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    if x.dim() == 3:
        x, weight, padding = x.unsqueeze(2), weight.unsqueeze(2), [0, *padding]
    ones = [1] * len(padding)
    return x, weight, (ones, padding, [dilation] * len(padding), False, [0] * len(padding), 1)
