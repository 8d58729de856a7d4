"""Batch normalisation as the operators want it: folded into one scale and shift per channel.

Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), algorithm 1. Why its backward is collected in two numbers
per channel: docs/design.md, "The mathematics".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.reference import accumulate_dtype


class Norm(NamedTuple):
    """The parameters, buffers and settings of one batch normalisation, [C] each; None as in torch's."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_statistics: bool  # normalise with the batch's statistics, else with the running ones

    def running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running mean and variance, as copies: an update in place must not reach what a backward has saved."""
        # check_norm has seen to it.
        assert self.running_mean is not None and self.running_var is not None
        wide = accumulate_dtype(dtype)
        return self.running_mean.detach().to(wide, copy=True), self.running_var.detach().to(wide, copy=True)


class Folded(NamedTuple):
    """relu(bn(x)) = relu(scale * x + shift); all vectors [C], in the accumulation dtype."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    batch_statistics: bool

    def deferred(self, sum_d: Tensor, sum_dx: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The coefficients a, b of the part of the gradient that needs the whole batch: -(a + b * (x - mean))."""
        over = self.scale / max(count, 1)
        return over * sum_d, over * self.rstd.square() * sum_dx


def fold(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, batch_statistics: bool
) -> Folded:
    """Folds statistics and affine parameters (of any dtype; None: 1 and 0) into scale and shift."""
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return Folded(mean, rstd, scale.to(mean.dtype), shift.to(mean.dtype), batch_statistics)


def recomputing() -> bool:
    """True where a forward runs inside a backward: a checkpoint's second run, whose first has updated the statistics."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """running <- (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` values.

    Nothing for an empty batch.
    """
    if count == 0:
        return
    with torch.no_grad():
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))


def read_module(module: Any) -> Norm:
    """An nn.BatchNorm, as it would run now."""
    batch_statistics = module.training or (module.running_mean is None and module.running_var is None)
    return Norm(
        module.weight, module.bias, module.running_mean, module.running_var, module.eps, batch_statistics
    )


def update_module(module: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """What nn.BatchNorm does to its buffers in a forward; `mean` and `var` are the batch's."""
    if not module.training or not module.track_running_stats or recomputing():
        return
    momentum = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:  # the average over all batches so far
            momentum = 1.0 / float(module.num_batches_tracked)
    update_running_statistics(module.running_mean, module.running_var, mean, var, count, momentum or 0.0)
