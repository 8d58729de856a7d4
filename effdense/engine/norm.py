"""One batch normalisation's parameters, running statistics and settings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effdense.ops.reference import accumulate_dtype


class Norm(NamedTuple):
    """The parameters, buffers and settings of one batch normalisation, [C] each; None as in torch's."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_statistics: bool  # normalise with the batch's statistics, else with the running ones
    group: str = ""  # of processes whose batches are one batch; see synchronize.py

    def running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running mean and variance, as copies: an update in place must not reach what a backward has saved."""
        # check_norm has seen to it.
        assert self.running_mean is not None and self.running_var is not None
        wide = accumulate_dtype(dtype)
        return self.running_mean.detach().to(wide, copy=True), self.running_var.detach().to(wide, copy=True)
