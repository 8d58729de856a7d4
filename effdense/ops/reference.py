"""The operators in plain PyTorch: the specification, the oracle of the tests, and the fallback.

Every function here has the name, the arguments and the results of the operator `torch.ops.effdense.<name>`
(schemas: csrc/schemas.h, schemas.py) and runs on any device and floating dtype. Vectors have the accumulation type:
float64 for float64, float32 for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> Tensor:
    """x in channels-last layout, copied only if it is not.

    The stride of a single channel says nothing, but PyTorch tells the layout by it: it is set as well.
    """
    y = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return y if y.stride(1) == 1 else y.as_strided(y.shape, (y.stride(0), 1, *y.stride()[2:]))


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


def fold(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd = 1 / sqrt(var + eps), scale = weight * rstd, shift = bias - mean * scale."""
    rstd = (var + eps).rsqrt()
    scale = rstd.clone() if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return rstd, scale.to(mean.dtype), shift.to(mean.dtype)


def accumulate_correction(
    sum_d: Tensor, sum_dx: Tensor, rstd: Tensor, scale: Tensor, count: int, a: Tensor, b: Tensor
) -> None:
    """a += scale * sum_d / count, b += scale * rstd^2 * sum_dx / count, on their first channels."""
    over = scale / max(count, 1)
    a[: sum_d.numel()] += over * sum_d
    b[: sum_d.numel()] += over * rstd.square() * sum_dx


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


def append_features(new_features: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """out = new_features, with their statistics."""
    out.copy_(new_features)
    return channel_statistics([new_features])


def bottleneck(
    features: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    statistics: bool,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """y = weight relu(scale * x + shift) + bias, then relu(out_scale * y + out_shift); y's mean and biased variance."""
    x = torch.cat(list(features), 1)
    result = _mix(_wide(weight), _affine(x, scale, shift).relu_())
    if bias is not None:
        result = result + _column(bias, result)
    if out_scale is not None and out_shift is not None:
        result = _affine(result, out_scale, out_shift).relu_()
    y.copy_(result)
    return channel_statistics([y]) if statistics else (scale.new_empty(0), scale.new_empty(0))


def bottleneck_backward(
    features: Sequence[Tensor],
    grad_y: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_features: Sequence[Tensor],
    accumulate: bool,
    need_features: bool,
    need_weight: bool,
    correction: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `bottleneck`: writes or adds scale * d to every grad_features[i] that is not empty.

    `correction`: nothing, or y, mean, a, b of what grad_y still misses (see `apply_correction`), or y, mean, a, b, scale, shift
    where the backward of relu(scale * y + shift) is missing too.
    """
    x, dy = torch.cat(list(features), 1), _wide(grad_y)
    if correction:
        y, y_mean, a, b, *norm = correction
        if norm:
            dy = dy.masked_fill(_affine(y, *norm) <= 0, 0) * _column(norm[0], y)
        grad_y, dy = dy, torch.empty_like(dy)
        apply_correction(y, y_mean, a, b, grad_y, dy)
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
            grad.copy_(_wide(grad) + part if accumulate else part)
    return grad_weight, sum_d, sum_dx


def _padded(x: Tensor) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Stride, padding, dilation, transposed, output padding and groups of a convolution 3 wide that keeps x's size."""
    ones = [1] * (x.dim() - 2)
    return ones, ones, ones, False, [0] * len(ones), 1


def bn_relu_conv3x3(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """out = weight * relu(scale * x + shift) + bias, 3, 3x3 or 3x3x3 with padding 1; out's mean and biased variance."""
    z = _affine(x, scale, shift).relu_()
    out.copy_(torch.convolution(z, _wide(weight), bias, *_padded(x)))
    return channel_statistics([out])


def bn_relu_conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    accumulate: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `bn_relu_conv3x3`: writes or adds scale * d to grad_x."""
    z = _affine(x, scale, shift).relu_()
    d, of_weight, _ = torch.ops.aten.convolution_backward(
        _wide(grad), z, _wide(weight), None, *_padded(x), [need_x, need_weight, False]
    )
    grad_weight = of_weight if need_weight else scale.new_empty(0, *weight.shape[1:])
    if not need_x:
        return grad_weight, torch.zeros_like(scale), torch.zeros_like(scale)
    d = d.masked_fill_(z <= 0, 0)
    sum_d, sum_dx = _masked_sums(d, x, mean)
    d *= _column(scale, d)
    grad_x.copy_(_wide(grad_x) + d if accumulate else d)
    return grad_weight, sum_d, sum_dx


def apply_correction(x: Tensor, mean: Tensor, a: Tensor, b: Tensor, grad: Tensor, out: Tensor) -> None:
    """out = grad - a - b * (x - mean)."""
    deviation = (_wide(x) - _column(mean, x)).masked_fill(_column(b == 0, x), 0)
    out.copy_(_wide(grad) - _column(a, x) - _column(b, x) * deviation)


def bn_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale * x + shift)."""
    out.copy_(_affine(x, scale, shift).relu_())


def bn_relu_backward_sums(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """out = relu(scale * x + shift), and the sums of its backward, where grad is out's gradient."""
    z = _affine(x, scale, shift)
    sums = _masked_sums(_wide(grad).masked_fill(z <= 0, 0), x, mean)
    out.copy_(z.relu_())
    return sums


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


def bn_relu_backward_accumulate(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_x += scale * d, where grad is the gradient of relu(bn(x))."""
    d = _wide(grad).masked_fill(_affine(x, scale, shift) <= 0, 0)
    sum_d, sum_dx = _masked_sums(d, x, mean)
    grad_x.copy_(_wide(grad_x) + d * _column(scale, x))
    return sum_d, sum_dx


def _as_3d(x: Tensor) -> Tensor:
    """[N, C, *spatial] with three spatial dimensions, the missing ones in front."""
    return x.reshape(*x.shape[:2], *[1] * (5 - x.dim()), *x.shape[2:])


def _three(sizes: Sequence[int], missing: int) -> list[int]:
    return [missing] * (3 - len(sizes)) + list(sizes)


def bn_relu_avg_pool(x: Tensor, scale: Tensor, shift: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The average of relu(scale * x + shift) over windows of kernel_size side by side."""
    pooled = F.avg_pool3d(_as_3d(_affine(x, scale, shift).relu_()), _three(kernel_size, 1))
    sizes = [n // k for n, k in zip(x.shape[2:], kernel_size, strict=True)]
    return channels_last(pooled.reshape(*x.shape[:2], *sizes).to(x.dtype))


def bn_relu_avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    kernel_size: Sequence[int],
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Backward of `bn_relu_avg_pool`: writes grad_x = scale * d, 0 where no window reaches."""
    d = _wide(grad) / math.prod(kernel_size)
    for dim, k in enumerate(kernel_size, 2):
        d = d.repeat_interleave(k, dim)
    missing = [(0, n - m) for n, m in zip(x.shape[2:], d.shape[2:], strict=True)]
    d = F.pad(d, [p for pair in reversed(missing) for p in pair])
    d = d.masked_fill(_affine(x, scale, shift) <= 0, 0)
    sum_d, sum_dx = _masked_sums(d, x, mean)
    grad_x.copy_(d * _column(scale, x))
    return sum_d, sum_dx


def bn_relu_max_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The maximum of relu(scale * x + shift) over windows, and which tap of the window it was, in bytes."""
    z = _as_3d(_affine(x, scale, shift).relu_())
    k, s, p = _three(kernel_size, 1), _three(stride, 1), _three(padding, 0)
    out, index = F.max_pool3d(z, k, s, p, return_indices=True)
    tap = torch.zeros_like(index)
    for dim in range(3):  # the position in the image less the window's first, as one digit of the tap
        inner = math.prod(z.shape[3 + dim :])
        first = torch.arange(out.shape[2 + dim], device=x.device) * s[dim] - p[dim]
        position = index // inner % z.shape[2 + dim]
        tap = tap * k[dim] + position - first.view(-1, *[1] * (2 - dim))
    sizes = out.shape[5 - (x.dim() - 2) :]
    flat = [t.reshape(*x.shape[:2], *sizes) for t in (out.to(x.dtype), tap.to(torch.uint8))]
    return channels_last(flat[0]), channels_last(flat[1])


def max_pool_backward(
    grad: Tensor,
    where: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    grad_z: Tensor,
) -> None:
    """The gradient of what `bn_relu_max_pool` took the maximum of."""
    k, s, p = _three(kernel_size, 1), _three(stride, 1), _three(padding, 0)
    tap, g = _as_3d(where).long(), _as_3d(_wide(grad))
    image = _as_3d(grad_z).shape[2:]
    index = torch.zeros_like(tap)
    for dim in range(3):
        first = torch.arange(tap.shape[2 + dim], device=grad.device) * s[dim] - p[dim]
        digit = tap // math.prod(k[dim + 1 :]) % k[dim]
        index = index * image[dim] + digit + first.view(-1, *[1] * (2 - dim))
    flat = torch.zeros(*grad_z.shape[:2], math.prod(image), dtype=g.dtype, device=g.device)
    flat.scatter_add_(2, index.flatten(2), g.flatten(2))
    grad_z.copy_(flat.view(grad_z.shape))


def has_repeated(buffers: Sequence[Tensor]) -> bool:
    """Whether layers share a norm: its updates come one after the other, not all at once."""
    return len({id(b) for b in buffers}) < len(buffers)


def update_running_statistics(
    running: list[Tensor], batch: list[Tensor], running_factors: list[float], batch_factors: list[float]
) -> None:
    """running <- running_factor * running + batch_factor * batch for every pair, of running statistics in any floating dtype.

    They move when everything is computed: Ctrl-C, or memory that runs out, must not leave them half moved.
    """
    with torch.no_grad():
        if has_repeated(running):
            for r, b, of_running, of_batch in zip(
                running, batch, running_factors, batch_factors, strict=True
            ):
                r.copy_(r.mul(of_running).add_(b.to(r.dtype), alpha=of_batch))
            return
        scaled = torch._foreach_mul(
            [b.to(r.dtype) for r, b in zip(running, batch, strict=True)], batch_factors
        )
        moved = torch._foreach_mul(running, running_factors)
        torch._foreach_add_(moved, scaled)
        torch._foreach_copy_(running, moved)
