"""A stem that keeps its image only: convolution, BN, ReLU and max pool as one node of autograd, for memory="minimal".

The convolution's map is the largest of a net. The node keeps the image, and computes the map again in its backward, by the
same convolution, so that all values are what they are with memory="balanced" (where the convolution is PyTorch's own node
and pool.py's reads the map). `stem` and `stem_backward` are opaque operators: in torch.compile's graph the second
convolution would be found to be the first one, and its map be kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.engine import workspace
from effdense.engine.autograd import (
    autocast_enabled,
    empty_channels_last,
    gradients,
    shaped,
    without_autocast,
)
from effdense.engine.batch_norm import Folded, bn_relu_backward, fold, plain_bn_relu, refuse_group
from effdense.engine.norm import Norm
from effdense.engine.pool import Windows, plain_max_pool
from effdense.engine.single_layer import statistics
from effdense.engine.validation import check_norm
from effdense.ops.dispatch import operators
from effdense.ops.reference import accumulate_dtype, channels_last
from effdense.ops.schemas import library


class StemConfig(NamedTuple):
    """What a stem is made of, beside its tensors. Flat, because operators' schemas are."""

    stride: Sequence[int]  # of the convolution
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    kernel_size: Sequence[int]  # of the pool
    pool_stride: Sequence[int]
    pool_padding: Sequence[int]
    eps: float
    batch_statistics: bool
    group: str

    @property
    def windows(self) -> Windows:
        """Of the pool."""
        return list(self.kernel_size), list(self.pool_stride), list(self.pool_padding)

    @property
    def convolution(self) -> tuple[Any, ...]:
        """What aten's convolutions take behind x, weight and bias."""
        nothing = [0] * len(self.stride)
        return list(self.stride), list(self.padding), list(self.dilation), False, nothing, self.groups

    def spatial(self, x: Tensor, weight: Tensor) -> list[int]:
        """The sizes of the convolution's map."""
        form = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in form]


class Parameters(NamedTuple):
    """Of a stem's parameters: the values, or whether their gradients are needed. None where there is none."""

    conv_weight: Any
    conv_bias: Any
    norm_weight: Any
    norm_bias: Any


FORWARD_TENSORS, BACKWARD_TENSORS = 7, 10  # the arguments before the settings
_NAMES = [f"norm0.{part}" for part in ("weight", "bias", "running_mean", "running_var")]


def _in_layout(conv_weight: Tensor) -> Tensor:
    """The weight in the layout that the map is to have: it needs no lasting copy of the image."""
    return channels_last(conv_weight) if conv_weight.dim() > 3 else conv_weight


def _convolve(settings: StemConfig, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.aten.convolution(x, _in_layout(weight), bias, *settings.convolution)
    return y


def forward(
    ops: Any, settings: StemConfig, x: Tensor, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pool's output, which tap of its window each value was, the norm's mean and variance.

    `tensors`: the parameters, then the running mean and variance.
    """
    *parameters, running_mean, running_var = tensors
    own = Parameters(*parameters)
    y = _convolve(settings, x, own.conv_weight, own.conv_bias)
    s = settings
    norm = Norm(own.norm_weight, own.norm_bias, running_mean, running_var, s.eps, s.batch_statistics, s.group)
    check_norm("stem", _NAMES, norm, y.shape[1], y)
    mean, var = statistics([y], norm)
    folded = fold(mean, var, s.eps, norm.weight, norm.bias, s.batch_statistics, s.group)
    out, where = ops.bn_relu_max_pool(y, folded.scale, folded.shift, *s.windows)
    return out, where, mean, var


def backward(
    ops: Any,
    settings: StemConfig,
    grad: Tensor,
    where: Tensor,
    mean: Tensor,
    var: Tensor,
    x: Tensor,
    *tensors: Any,
) -> list[Tensor | None]:
    """Gradients of the image and the parameters, as far as they are needed. `tensors`: the parameters, then `needs`."""
    own, (need_x, *needed) = Parameters(*tensors[:-1]), tensors[-1]
    needs, s = Parameters(*needed), settings
    norm = fold(mean, var, s.eps, own.norm_weight, own.norm_bias, s.batch_statistics, s.group)
    y = _convolve(s, x, own.conv_weight, own.conv_bias)
    if _fits_in_place(y, norm):
        sums = _to_map_in_place(ops, s, grad, where, y, norm)
        return _of_convolution(s, y, x, own, norm, sums, need_x, needs)
    with workspace.lease(x.device, workspace.size_of(y, [y.shape[1]])) as scratch:
        grad_y = scratch.channels_last(y, y.shape[1])
        sums = _to_map(ops, s, grad, where, y, norm, grad_y)
        del y
        return _of_convolution(s, grad_y, x, own, norm, sums, need_x, needs)


def _of_convolution(
    settings: StemConfig,
    grad_y: Tensor,
    x: Tensor,
    own: Parameters,
    norm: Folded,
    sums: tuple[Tensor, Tensor],
    need_x: bool,
    needs: Parameters,
) -> list[Tensor | None]:
    """What `backward` returns, from the gradient of the convolution's map on."""
    made: tuple[Any, Any, Any] = None, None, None
    wanted = [need_x, needs.conv_weight, needs.conv_bias]
    if any(wanted):
        sizes = None if own.conv_bias is None else list(own.conv_bias.shape)
        weight, form = _in_layout(own.conv_weight), settings.convolution
        made = torch.ops.aten.convolution_backward(grad_y, x, weight, sizes, *form, wanted)
    grad_x, grads = made[0], Parameters(*made[1:], sums[1] * norm.rstd, sums[0])
    if need_x:
        grad_x = channels_last(grad_x) if x.dim() > 3 else grad_x.contiguous()
    return [
        grad_x if need_x else None,
        *(shaped(p, g).contiguous() if need else None for p, g, need in zip(own, grads, needs, strict=True)),
    ]


def _to_map(
    ops: Any, settings: StemConfig, grad: Tensor, where: Tensor, y: Tensor, norm: Folded, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of the convolution's map y into `out`; sum d, sum d (y - mean)."""
    ops.max_pool_backward(grad, where, *settings.windows, out)
    return bn_relu_backward(out, y, norm)


def _fits_in_place(y: Tensor, norm: Folded) -> bool:
    """Whether y's gradient is to take y's place: of volumes, where two such maps would be a step's peak."""
    dense = y.dim() == 5 and y.movedim(1, -1).is_contiguous()
    return dense and y.device.type in ("cpu", "meta") and not norm.group


def _to_map_in_place(
    ops: Any, settings: StemConfig, grad: Tensor, where: Tensor, y: Tensor, norm: Folded
) -> tuple[Tensor, Tensor]:
    """The same into y, through scratch for half of the channels; whole vectors in each, so that no bit changes."""
    channels = y.shape[1]
    half, sums = -(-channels // 32) * 16, []
    # Not kept: oneDNN takes memory of its own for the weight's gradient, which comes next.
    with workspace.lease(y.device, workspace.size_of(y, [half]), keep=False) as scratch:
        for first in range(0, channels, half):
            of = slice(first, min(first + half, channels))
            vectors = {name: getattr(norm, name)[of] for name in ("mean", "rstd", "scale", "shift")}
            out = workspace.Lease(scratch.block).channels_last(y, of.stop - first)
            part = grad[:, of], where[:, of], y[:, of], norm._replace(**vectors)
            sums.append(_to_map(ops, settings, *part, out))
            y[:, of] = out
    sum_d, sum_dx = (torch.cat(parts) for parts in zip(*sums, strict=True))
    return sum_d, sum_dx


@torch.library.impl(library, "stem", "CompositeExplicitAutograd")
def _stem(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, settings = arguments[: FORWARD_TENSORS - 1], StemConfig(*arguments[FORWARD_TENSORS - 1 :])
    with torch.no_grad():
        return forward(operators(x), settings, x, *tensors)


@torch.library.impl(library, "stem_backward", "CompositeExplicitAutograd")
def _stem_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Without the gradients that are not needed: an operator cannot return None."""
    tensors, settings = arguments[: BACKWARD_TENSORS - 1], StemConfig(*arguments[BACKWARD_TENSORS - 1 :])
    with torch.no_grad():
        grads = backward(operators(grad), settings, grad, *tensors)
    return [g for g in grads if g is not None]


@torch.library.register_fake("effdense::stem")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, settings = arguments[0], StemConfig(*arguments[FORWARD_TENSORS - 1 :])
    sizes = zip(settings.spatial(x, weight), *settings.windows, strict=True)
    shape = x.shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes), weight.shape[0]
    out, where = (x.new_empty(shape, dtype=dtype).movedim(-1, 1) for dtype in (x.dtype, torch.uint8))
    mean, var = (x.new_empty(weight.shape[0], dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return out, where, mean, var


@torch.library.register_fake("effdense::stem_backward")
def _(grad: Tensor, where: Tensor, mean: Tensor, var: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *parameters, (need_x, *needs) = arguments[: BACKWARD_TENSORS - 5]
    of_x = empty_channels_last(x, x.shape[1]) if x.dim() > 3 else x.new_empty(x.shape)
    wanted = (p for p, need in zip(parameters, needs, strict=True) if need)
    return [of_x] * need_x + [
        torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted if p is not None
    ]


class StemNode(torch.autograd.Function):
    """The stem for autograd: gradients for the image and the parameters."""

    @staticmethod
    def forward(
        settings: StemConfig,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = torch.ops.effdense.stem(
            x, *parameters, running_mean, running_var, *settings
        )
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, _, _, x, *parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        needs, settings = ctx.needs_input_grad[3:], ctx.settings
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        where, mean, var, *tensors = ctx.saved_tensors

        def once(grad: Tensor) -> list[Tensor | None]:
            made = torch.ops.effdense.stem_backward(grad, where, mean, var, *tensors, needs, *settings)
            grads = iter(made)
            return [next(grads) if need else None for need in needs]

        plain = functools.partial(_plain, settings, (mean, var))
        return (None,) * 3 + gradients("stem", once, plain, grad, lambda: tensors, needs)


def _plain(settings: StemConfig, fixed: tuple[Tensor, Tensor], x: Tensor, *tensors: Any) -> Tensor:
    """The stem by PyTorch's own operators, which can be differentiated any number of times."""
    refuse_group("stem", [settings.group])
    own = Parameters(*tensors)
    y = _convolve(settings, x, own.conv_weight, own.conv_bias)
    statistics = None if settings.batch_statistics else fixed
    z = plain_bn_relu(y, statistics, settings.eps, own.norm_weight, own.norm_bias)
    return plain_max_pool(z, settings.windows).to(x.dtype)


def is_plain(conv: Any) -> bool:
    """Whether `run` knows what the convolution does."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def run(x: Tensor, conv: Any, norm: Norm, windows: Windows) -> tuple[Tensor, Tensor, Tensor, int]:
    """Runs a stem; `conv`: the module. Returns the pooled map, norm's statistics, and of how many values they are."""
    tensors: list[Any] = [x, conv.weight, conv.bias]
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in tensors
        ]
    x, weight, bias = tensors
    form = conv.stride, conv.padding, conv.dilation, conv.groups
    settings = StemConfig(*form, *windows, norm.eps, norm.batch_statistics, norm.group)
    running = (None, None) if norm.batch_statistics else (norm.running_mean, norm.running_var)
    with without_autocast(x):
        out, _, mean, var = StemNode.apply(settings, *running, x, weight, bias, norm.weight, norm.bias)
    count = x.shape[0]
    for size in settings.spatial(x, weight):
        count *= size
    return out, mean, var, count
