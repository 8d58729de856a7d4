"""The processes of a run, as torchrun starts them: the rank of this one, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effdense import values


class Processes:
    """The run's processes; one where nothing else was started.

    Args:
        device: cpu, cuda or cuda:N. Of several processes each takes the GPU of its number on this machine.

    Raises:
        ValueError: the device cannot be used.
    """

    def __init__(self, device: str) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        several = self.count > 1
        self.rank = int(os.environ.get("RANK", "0")) if several else 0
        self._here = int(os.environ.get("LOCAL_RANK", "0")) if several else 0
        if several and device.startswith("cuda"):
            device = f"cuda:{self._here}"
        self.device = values.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is its machine's first."""
        return self._here == 0

    def wrap(self, model: nn.Module, sync_bn: bool) -> nn.Module:
        """The model, whose gradients are then the processes' mean, and with `sync_bn` whose statistics are of all their images.

        The norms are exchanged afterwards, because DistributedDataParallel refuses synchronised ones on the CPU, where
        effdense has them; parameters and buffers stay the same tensors.
        """
        if self.count == 1:
            return model
        wrapped = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        if sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return wrapped

    def share(self, numbers: Tensor) -> Tensor:
        """This process's part of some images."""
        return numbers.tensor_split(self.count)[self.rank]

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """The sums over all processes, which are then at the same place."""
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.count > 1:
            dist.all_reduce(mine)
        sums: list[float] = mine.tolist()
        return sums

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives."""
        if self.count == 1:
            return [mine]
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, mine)
        return every

    def from_first(self, given: Any) -> Any:
        """What the first process gives."""
        every = [given]
        if self.count > 1:
            dist.broadcast_object_list(every)
        return every[0]

    def same_buffers(self, model: nn.Module) -> None:
        """Gives all processes the first one's running statistics."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self) -> None:
        """Ends what the constructor began."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
