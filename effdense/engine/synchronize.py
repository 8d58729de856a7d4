"""SyncBatchNorm: the statistics of all processes' batches together, and the sums of its backward.

Two collectives for a layer each way: forward, the statistics of a bottleneck's output and of the layer's new channels;
backward, the coefficients (a, b) of both (batch_norm.py). And one for a stage's running statistics, which need the number
of values. Under a process group's name, because operators take no process groups. Nothing is done under the name "".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effdense.ops.schemas import library


# Not of the norm: in torch 2.8 such a function takes no modules.
def _name_of(processes: Any) -> str:
    group: Any = processes or dist.group.WORLD
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


# torch.compiler.assume_constant_result, without the two seconds that importing torch._dynamo takes
_name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def group_of(norm: nn.Module) -> str:
    """The name of the process group over which a norm would take its batch's statistics now; "" where it would not."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return ""
    return _name_of(norm.process_group) if dist.is_available() and dist.is_initialized() else ""


def _processes(group: str) -> Any:
    from torch.distributed import distributed_c10d as c10d  # which not every build of torch has

    return c10d._resolve_process_group(group)  # type: ignore


def processes_of(norm: nn.Module) -> Any:
    """Whose batches a norm's statistics are of, for comparison with another norm's."""
    if not isinstance(norm, nn.SyncBatchNorm) or (not norm.training and norm.running_mean is None):
        return False, None
    return True, norm.process_group


def join_statistics(group: str, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over all processes; mean and var are those of `count` values here."""
    if not group:
        return mean, var
    joint: tuple[Tensor, Tensor] = torch.ops.effdense.join_statistics(mean, var, count, group)
    return joint


def join_coefficients(group: str, a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sums over all processes of a and b [C], divided by the number of all values, of which `count` are here."""
    if not group:
        return a, b
    joint: tuple[Tensor, Tensor] = torch.ops.effdense.join_coefficients(a, b, count, group)
    return joint


def joint_count(group: str, count: int, like: Tensor) -> Tensor:
    """The number of values of all processes, of which `count` are here, in float64 on the device of `like`."""
    joint = torch.full((), count, dtype=torch.float64, device=like.device)
    dist.all_reduce(joint, group=_processes(group))
    return joint


@torch.library.impl(library, "join_statistics", "CompositeExplicitAutograd")
def _join_statistics(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    mine = torch.cat([mean, var, mean.new_full((1,), count)])
    processes = _processes(group)
    parts = [torch.empty_like(mine) for _ in range(processes.size())]
    dist.all_gather(parts, mine, processes)
    means, variances, counts = torch.stack(parts).split([len(mean), len(var), 1], 1)
    weights = counts / counts.sum()
    joint = (weights * means).sum(0)
    return joint, (weights * (variances + (means - joint) ** 2)).sum(0)


@torch.library.impl(library, "join_coefficients", "CompositeExplicitAutograd")
def _join_coefficients(a: Tensor, b: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    joint = torch.cat([a, b, a.new_full((1,), count)])
    dist.all_reduce(joint, group=_processes(group))
    a, b, total = joint.split([len(a), len(b), 1])
    return a / total, b / total


@torch.library.register_fake("effdense::join_statistics")
@torch.library.register_fake("effdense::join_coefficients")
def _(one: Tensor, other: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(one), torch.empty_like(other)
