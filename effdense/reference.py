"""The operators in plain PyTorch: the specification, the oracle of the tests, and the fallback.

Every function here has the name, the arguments and the results of the operator `torch.ops.effdense.<name>`
(schemas: csrc/ops.cpp) and runs on any device and floating dtype. Vectors have the accumulation type:
float64 for float64, float32 for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _column(vector: Tensor, like: Tensor) -> Tensor:
    """[C] shaped so that it broadcasts over [N, C, *spatial]."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def _over_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _wide(x) * _column(scale, x) + _column(shift, x)


def _masked_sums(d: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    dims = _over_channels(x)
    return d.sum(dims), (d * (_wide(x) - _column(mean, x))).sum(dims)


def _mix(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution: weight [O, C], x [N, C, *spatial] -> [N, O, *spatial]."""
    return torch.matmul(weight, x.flatten(2)).view(x.shape[0], weight.shape[0], *x.shape[2:])


def channel_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of the list, [C] each (0 and 1 where there is no value)."""
    means, variances = [], []
    for x in features:
        wide, dims = _wide(x), _over_channels(x)
        if x.numel() == 0:
            means.append(wide.new_zeros(x.shape[1]))
            variances.append(wide.new_ones(x.shape[1]))
            continue
        means.append(wide.mean(dims))
        variances.append((wide - _column(means[-1], x)).square().mean(dims))
    return torch.cat(means), torch.cat(variances)


def bottleneck(
    features: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight relu(scale * x + shift) + bias, with y's mean and biased variance if `statistics`."""
    x = torch.cat(list(features), 1)
    y = _mix(_wide(weight), _affine(x, scale, shift).relu_())
    if bias is not None:
        y = y + _column(bias, y)
    y = y.to(x.dtype)
    return (y, *(channel_statistics([y]) if statistics else (scale.new_empty(0), scale.new_empty(0))))


def bottleneck_backward(
    features: Sequence[Tensor],
    grad_y: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_features: Sequence[Tensor],
    need_features: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `bottleneck`: writes scale * d into every grad_features[i] that is not empty."""
    x, dy = torch.cat(list(features), 1), _wide(grad_y)
    z = _affine(x, scale, shift).relu_()
    grad_weight = scale.new_zeros(weight.shape[0] if need_weight else 0, weight.shape[1])
    if need_weight:
        grad_weight += torch.einsum("nos,ncs->oc", dy.flatten(2), z.flatten(2))
    if not need_features:
        return grad_weight, torch.zeros_like(scale), torch.zeros_like(scale)
    d = _mix(_wide(weight).t(), dy).masked_fill_(z <= 0, 0)
    sum_d, sum_dx = _masked_sums(d, x, mean)
    d *= _column(scale, d)
    for part, grad in zip(d.split([f.shape[1] for f in features], 1), grad_features, strict=True):
        if grad.numel():
            grad.copy_(part)
    return grad_weight, sum_d, sum_dx


def take_gradient(
    features: Sequence[Tensor], mean: Tensor, a: Tensor, b: Tensor, grad_features: Sequence[Tensor]
) -> None:
    """grad_features -= a + b * (features - mean), in place."""
    channels = [f.shape[1] for f in features]
    parts = (vector.split(channels) for vector in (mean, a, b))
    for x, grad, m, a_, b_ in zip(features, grad_features, *parts, strict=True):
        if grad.numel():
            grad.copy_(_wide(grad) - _column(a_, x) - _column(b_, x) * (_wide(x) - _column(m, x)))


def bn_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale * x + shift)."""
    out.copy_(_affine(x, scale, shift).relu_())


def bn_relu_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Turns grad, the gradient of relu(bn(x)), into the gradient of x, in place."""
    d = _wide(grad).masked_fill(_affine(x, scale, shift) <= 0, 0)
    sum_d, sum_dx = _masked_sums(d, x, mean)
    d *= _column(scale, x)
    if batch_statistics and x.numel():
        over = scale / (x.numel() // x.shape[1])
        d -= _column(over * sum_d, x) + _column(over * sum_dx * rstd.square(), x) * (
            _wide(x) - _column(mean, x)
        )
    grad.copy_(d)
    return sum_d, sum_dx
