"""Batch normalisation for the operators: folded into one scale and shift per channel; and running statistics.

Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167), algorithm 1. Why its backward is collected in two numbers
per channel: docs/mathematics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.engine.norm import Norm
from effdense.engine.synchronize import group_of, join_coefficients, joint_count
from effdense.ops import reference
from effdense.ops.dispatch import operators
from effdense.ops.reference import accumulate_dtype
from effdense.ops.schemas import library


class Folded(NamedTuple):
    """relu(bn(x)) = relu(scale * x + shift); all vectors [C], in the accumulation dtype."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    batch_statistics: bool
    group: str

    def correction(self, sum_d: Tensor, sum_dx: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The coefficients a, b of the part of the gradient that needs the whole batch: -(a + b * (x - mean))."""
        a, b = torch.zeros_like(sum_d), torch.zeros_like(sum_d)
        self.accumulate_correction(sum_d, sum_dx, count, a, b)
        return join_coefficients(self.group, a, b, count)

    def accumulate_correction(self, sum_d: Tensor, sum_dx: Tensor, count: int, a: Tensor, b: Tensor) -> None:
        """Adds to a and b what one reader of `count` values leaves; with a group, what `join_coefficients` takes."""
        count = 1 if self.group else count
        operators(sum_d).accumulate_correction(sum_d, sum_dx, self.rstd, self.scale, count, a, b)


def fold(
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    group: str = "",
) -> Folded:
    """Folds statistics and affine parameters (of any dtype; None: 1 and 0) into scale and shift."""
    rstd, scale, shift = operators(mean).fold(mean, var, weight, bias, eps)
    return Folded(mean, rstd, scale, shift, batch_statistics, group)


def bn_relu_backward(grad: Tensor, x: Tensor, norm: Folded) -> tuple[Tensor, Tensor]:
    """Turns grad, the gradient of relu(norm(x)), into the gradient of x, in place; sum d, sum d (x - mean)."""
    ops, alone = operators(x), norm.batch_statistics and not norm.group
    sum_d, sum_dx = ops.bn_relu_backward(grad, x, norm.scale, norm.shift, norm.mean, norm.rstd, alone)
    if norm.group:
        correction = norm.correction(sum_d, sum_dx, x.numel() // x.shape[1])
        ops.apply_correction(x, norm.mean, *correction, grad, grad)
    return sum_d, sum_dx


def plain_bn_relu(
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """relu(bn(x)) by PyTorch's own operators, of all dtypes wide; `statistics`: mean and variance, None for the batch's."""
    wide = accumulate_dtype(x.dtype)
    mean, var, weight, bias = (
        None if t is None else t.to(wide) for t in (*(statistics or (None, None)), weight, bias)
    )
    batch = statistics is None
    x = x.to(wide).contiguous()  # as which PyTorch's sums are more exact than channels-last
    return torch.batch_norm(x, weight, bias, mean, var, batch, 0.0, eps, torch.backends.cudnn.enabled).relu()


def refuse_group(op: str, groups: Sequence[str]) -> None:
    """Raises where norms are synchronised: what other processes' values mean for a second derivative, no backward knows."""
    if any(groups):
        raise RuntimeError(
            f"{op}: second derivatives are not supported while norms are synchronised over several processes "
            "(nn.SyncBatchNorm in training); use nn.BatchNorm there, or model.eval()"
        )


# Whose code runs a forward again in the backward.
_CHECKPOINTS = {
    "torch.utils.checkpoint",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "fairscale.nn.checkpoint.checkpoint_activations",
}


def recomputing() -> bool:
    """True where a forward is a checkpoint's second run, inside a backward: the first one has updated the statistics.

    A new forward inside a backward, in a hook or a user's own autograd.Function, is no second run.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in _CHECKPOINTS:
            return True
        frame = frame.f_back
    return False


def read_module(module: Any) -> Norm:
    """An nn.BatchNorm or nn.SyncBatchNorm, as it would run now."""
    batch_statistics = module.training or (module.running_mean is None and module.running_var is None)
    return Norm(
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.eps,
        batch_statistics,
        group_of(module),
    )


class Update(NamedTuple):
    """One norm's running statistics (None as in torch's) and what the batch says, [C] each."""

    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor
    var: Tensor
    momentum: float


def update_running_statistics(updates: Sequence[Update], count: int, group: str = "") -> None:
    """running <- (1 - momentum) * running + momentum * batch, with the unbiased variance of `count` values, or of a group's.

    Nothing for an empty batch. All at once: torch.compile takes tens of seconds over hundreds of small updates. What follows from
    `count` is computed inside, so that torch.compile makes one graph for every batch size.
    """
    parts = [
        (running, batch, u.momentum, unbiased)
        for u in updates
        for running, batch, unbiased in ((u.running_mean, u.mean, False), (u.running_var, u.var, True))
        if running is not None
    ]
    if parts:
        torch.ops.effdense.move_running_statistics(*map(list, zip(*parts, strict=True)), count, group)


def update_modules(norms: Sequence[tuple[Any, Tensor, Tensor]], count: int) -> None:
    """What nn.BatchNorms do to their buffers in a forward; (module, mean, var) with the batch's statistics of `count` values."""
    if recomputing():
        return
    updates: list[Update] = []
    counters: list[Tensor] = []
    group = ""
    for module, mean, var in norms:
        if not module.training or not module.track_running_stats:
            continue
        momentum, group = module.momentum, group_of(module)
        if module.num_batches_tracked is not None:
            counters.append(module.num_batches_tracked)
            if momentum is None:  # the average over all batches so far
                uses = sum(c is module.num_batches_tracked for c in counters)  # layers may share a norm
                momentum = 1.0 / (float(module.num_batches_tracked) + uses)
        updates.append(Update(module.running_mean, module.running_var, mean, var, momentum or 0.0))
    if counters:
        torch.ops.effdense.count_batches(counters)
    update_running_statistics(updates, count, group)


class StageUpdate:
    """What a stage's norms do to their buffers in a forward, from its flat vectors; gathered once.

    With the batch's statistics of `count` values, as `update_modules` does it, which is the way under torch.compile, over
    several processes, and of norms that average over all batches.
    """

    def __init__(self, stage: Any, norms: Sequence[Any]) -> None:
        self._norms, self._places = norms, stage.vector_places()
        self._running: list[Tensor] = []
        self._starts: list[int] = []
        self._momentum: list[float] = []
        self._unbiased: list[bool] = []
        self._counters: list[Tensor] = []
        moved = [
            (m, at) for m, at in zip(norms, self._places, strict=True) if m.training and m.track_running_stats
        ]
        self._is_plain = not torch.compiler.is_compiling() and not any(
            m.momentum is None or group_of(m) for m, _ in moved
        )
        for m, (mean, var, _) in moved if self._is_plain else ():
            if m.num_batches_tracked is not None:
                self._counters.append(m.num_batches_tracked)
            for buffer, start, unbiased in ((m.running_mean, mean, False), (m.running_var, var, True)):
                if buffer is not None:
                    self._running.append(buffer)
                    self._starts.append(start)
                    self._momentum.append(m.momentum)
                    self._unbiased.append(unbiased)

    def __call__(self, vectors: Tensor, count: int) -> None:
        """Updates; `vectors`: the stage's."""
        if not self._is_plain:
            norms = (
                (m, vectors[mean : mean + n], vectors[var : var + n])
                for m, (mean, var, n) in zip(self._norms, self._places, strict=True)
            )
            update_modules(list(norms), count)
        elif (self._running or self._counters) and not recomputing():
            running_factors, batch_factors = _factors(self._momentum, self._unbiased, count)
            torch.ops.effdense.update_from_vectors(
                vectors,
                self._starts,
                self._running,
                running_factors,
                batch_factors,
                self._counters,
                count > 0,
            )


def _factors(
    momentum: Sequence[float], unbiased: Sequence[bool], count: int
) -> tuple[list[float], list[float]]:
    """What a running statistic and the batch's of `count` values are multiplied with."""
    factor = count / max(count - 1, 1)
    return [1 - m for m in momentum], [
        m * factor if u else m for m, u in zip(momentum, unbiased, strict=True)
    ]


@torch.library.impl(library, "move_running_statistics", "CompositeExplicitAutograd")
def _move(
    running: list[Tensor],
    batch: list[Tensor],
    momentum: list[float],
    unbiased: list[bool],
    count: int,
    group: str,
) -> None:
    batch_factors = momentum
    if group:  # the number of values is known to the device only
        joint = joint_count(group, count, batch[0])
        scale = joint / (joint - 1).clamp(min=1)
        batch = [b * scale if u else b for b, u in zip(batch, unbiased, strict=True)]
    elif count == 0:
        return
    else:
        batch_factors = _factors(momentum, unbiased, count)[1]
    torch.ops.effdense.update_running_statistics(running, batch, [1 - m for m in momentum], batch_factors)


torch.library.impl(library, "update_running_statistics", "CompositeExplicitAutograd")(
    reference.update_running_statistics
)


@torch.library.impl(library, "count_batches", "CompositeExplicitAutograd")
def _count(counters: list[Tensor]) -> None:
    if reference.has_repeated(counters):
        for counter in counters:
            counter.add_(1)
    else:
        torch._foreach_add_(counters, 1)


@torch.library.impl(library, "update_from_vectors", "CompositeExplicitAutograd")
def _update_from_vectors(
    vectors: Tensor,
    starts: list[int],
    running: list[Tensor],
    running_factors: list[float],
    batch_factors: list[float],
    counters: list[Tensor],
    any: bool,
) -> None:
    if counters:
        _count(counters)
    if any and running:
        batch = [vectors[start : start + r.numel()] for start, r in zip(starts, running, strict=True)]
        torch.ops.effdense.update_running_statistics(running, batch, running_factors, batch_factors)


for _name in ("move_running_statistics", "update_running_statistics", "count_batches", "update_from_vectors"):

    @torch.library.register_fake(f"effdense::{_name}")
    def _(*_: Any) -> None:
        return None
