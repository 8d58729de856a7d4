"""What the autograd nodes share: autocast's rule, one differentiation only, gradients in the parameters' form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effdense.checks import check_features, check_same_dtype


def autocast_enabled(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x."""
    kind = x.device.type
    # torch.compile cannot trace is_autocast_available before torch 2.13, and what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def prepare(
    op: str, features: Sequence[Tensor], parameters: Sequence[Tensor | None]
) -> tuple[int, Sequence[Tensor], Sequence[Tensor | None], torch.dtype | None]:
    """Checks the features; returns their channels, features and convolution parameters as they run, the result's dtype.

    Under torch.autocast the widest feature decides, as in torch's own concatenation and batch norm: features of
    autocast's dtype stay as they are, and a float32 one makes all of it run in float32, up to the result (which has
    autocast's dtype; None without autocast). float64 stays out of autocast.
    """
    channels, result = check_features(op, features), None
    if autocast_enabled(features[0]):
        widest = features[0].dtype
        for x in features:
            widest = torch.promote_types(widest, x.dtype)
        features = [x.to(widest) for x in features]
        if widest != torch.float64:
            parameters = [p if p is None or p.dtype == torch.float64 else p.to(widest) for p in parameters]
            result = torch.get_autocast_dtype(features[0].device.type)
    else:
        check_same_dtype(op, features)
    tracing = torch.compiler.is_compiling()  # never of inference tensors
    if not tracing and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        # Inference tensors cannot be saved for a backward.
        features = [x.clone() if x.is_inference() else x for x in features]
    return channels, features, parameters, result


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients through, and says what is wrong when they are differentiated again."""

    @staticmethod
    def forward(ctx: Any, op: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(g if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.op}: double backward is not supported (its gradient was differentiated again, as by a gradient "
            "penalty or a Hessian); use the unconverted model for that"
        )


def differentiable_once(op: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What a backward returns: gradients that refuse, clearly, to be differentiated."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    result: tuple[Tensor | None, ...] = _OnceDifferentiable.apply(
        op, *(g if g is None else g.detach().requires_grad_() for g in grads)
    )
    return result


def matrix(conv_weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight as the operators want it: [O, C], contiguous."""
    return conv_weight.flatten(1).contiguous()


def vector(conv_bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A convolution's bias as the operators want it: in the dtype of the vector `like`, contiguous."""
    return None if conv_bias is None else conv_bias.to(like.dtype).contiguous()


def sum_per_channel(x: Tensor) -> Tensor:
    """[N, C, *spatial] -> [C]."""
    return x.sum([d for d in range(x.dim()) if d != 1])


def shaped(like: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the dtype and shape of its parameter, and a 1x1 convolution's in its strides.

    DistributedDataParallel compares strides also where they mean nothing, and warns.
    """
    grad = grad if grad.dtype == like.dtype else grad.to(like.dtype)
    if like.dim() > 2 and like.shape[2:].numel() == 1 and like.stride()[:2] == (like.shape[1], 1):
        return grad.flatten(1).contiguous().as_strided(like.shape, like.stride())
    return grad if grad.shape == like.shape else grad.view(like.shape)


def empty_channels_last(like: Tensor, channels: int) -> Tensor:
    """An uninitialised [N, channels, *spatial] in channels-last layout, of the batch and spatial sizes of `like`."""
    return empty_rows(like, channels, channels)


def empty_rows(like: Tensor, channels: int, step: int) -> Tensor:
    """The same with `step` elements from pixel to pixel. Not a view of anything: it may be the output of a node."""
    strides = [step]
    for n in reversed(like.shape[3:]):
        strides.insert(0, strides[0] * n)
    image = like.shape[2:].numel() * step
    return like.new_empty_strided((like.shape[0], channels, *like.shape[2:]), (image, 1, *strides))


def dropout_scale(keep: float) -> float:
    """What dropout multiplies the values with that it keeps with this probability."""
    return 1 / keep if keep > 0 else 0.0
