"""Batch normalisation as the operators want it: folded into one scale and shift per channel.

Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), algorithm 1. Why its backward is collected in two numbers
per channel: docs/design.md, "The mathematics".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.operators import operators
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
        a, b = torch.zeros_like(sum_d), torch.zeros_like(sum_d)
        operators(sum_d).defer(sum_d, sum_dx, self.rstd, self.scale, count, a, b)
        return a, b


def fold(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, batch_statistics: bool
) -> Folded:
    """Folds statistics and affine parameters (of any dtype; None: 1 and 0) into scale and shift."""
    rstd, scale, shift = operators(mean).fold(mean, var, weight, bias, eps)
    return Folded(mean, rstd, scale, shift, batch_statistics)


def recomputing() -> bool:
    """True where a forward runs inside a backward: a checkpoint's second run, whose first has updated the statistics."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def read_module(module: Any) -> Norm:
    """An nn.BatchNorm, as it would run now."""
    batch_statistics = module.training or (module.running_mean is None and module.running_var is None)
    return Norm(
        module.weight, module.bias, module.running_mean, module.running_var, module.eps, batch_statistics
    )


class Update(NamedTuple):
    """One norm's running statistics (None as in torch's) and what the batch says, [C] each."""

    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor
    var: Tensor
    momentum: float


def update_running_statistics(updates: Sequence[Update], count: int) -> None:
    """running <- (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` values.

    Nothing for an empty batch. All at once: torch.compile takes tens of seconds over hundreds of small updates.
    """
    unbiased = count / max(count - 1, 1)
    pairs = [
        (running, batch, 1 - u.momentum, u.momentum * factor)
        for u in updates
        for running, batch, factor in ((u.running_mean, u.mean, 1.0), (u.running_var, u.var, unbiased))
        if running is not None
    ]
    if pairs and count > 0:
        torch.ops.effdense.update_running_statistics(*map(list, zip(*pairs, strict=True)))


def update_modules(norms: Sequence[tuple[Any, Tensor, Tensor]], count: int) -> None:
    """What nn.BatchNorms do to their buffers in a forward; (module, mean, var) with the batch's statistics of `count` values."""
    if recomputing():
        return
    updates: list[Update] = []
    counters: list[Tensor] = []
    for module, mean, var in norms:
        if not module.training or not module.track_running_stats:
            continue
        momentum = module.momentum
        if module.num_batches_tracked is not None:
            counters.append(module.num_batches_tracked)
            if momentum is None:  # the average over all batches so far
                momentum = 1.0 / (float(module.num_batches_tracked) + 1)
        updates.append(Update(module.running_mean, module.running_var, mean, var, momentum or 0.0))
    if counters:
        torch.ops.effdense.count_batches(counters)
    update_running_statistics(updates, count)


_library = torch.library.Library("effdense", "FRAGMENT")
_library.define(
    "update_running_statistics(Tensor(a!)[] running, Tensor[] batch, float[] keep, float[] take) -> ()"
)
_library.define("count_batches(Tensor(a!)[] counters) -> ()")


def _repeated(buffers: list[Tensor]) -> bool:
    """Whether layers share a norm: its updates come one after the other, not all at once."""
    return len({id(b) for b in buffers}) < len(buffers)


@torch.library.impl(_library, "update_running_statistics", "CompositeExplicitAutograd")
def _update(running: list[Tensor], batch: list[Tensor], keep: list[float], take: list[float]) -> None:
    with torch.no_grad():
        if _repeated(running):
            for r, b, k, t in zip(running, batch, keep, take, strict=True):
                r.mul_(k).add_(b.to(r.dtype), alpha=t)
            return
        torch._foreach_mul_(running, keep)
        scaled = torch._foreach_mul([b.to(r.dtype) for r, b in zip(running, batch, strict=True)], take)
        torch._foreach_add_(running, scaled)


@torch.library.impl(_library, "count_batches", "CompositeExplicitAutograd")
def _count(counters: list[Tensor]) -> None:
    if _repeated(counters):
        for counter in counters:
            counter.add_(1)
    else:
        torch._foreach_add_(counters, 1)


@torch.library.register_fake("effdense::update_running_statistics")
def _(running: list[Tensor], batch: list[Tensor], keep: list[float], take: list[float]) -> None:
    return None


@torch.library.register_fake("effdense::count_batches")
def _(counters: list[Tensor]) -> None:
    return None
