"""The same nets unfused: every submodule is called by itself, and its output is kept for the backward or checkpointed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effdense.nn.layers import DenseLayer, PlainDenseLayer


class _CheckpointedLayer(DenseLayer):
    """torchvision's memory_efficient=True: everything before the second norm is computed again."""

    def _bottleneck(self, *features: Tensor) -> Tensor:
        y: Tensor = checkpoint(super()._bottleneck, *features, use_reentrant=False, preserve_rng_state=False)
        return y


class _CheckpointedPlainLayer(PlainDenseLayer):
    """The same of a layer without a bottleneck: all of it."""

    def forward(self, *inputs: Any) -> Tensor:
        """See PlainDenseLayer."""
        features = inputs[0] if isinstance(inputs[0], (list, tuple)) else inputs
        drops = self.training and self.drop_rate > 0
        new: Tensor = checkpoint(super().forward, *features, use_reentrant=False, preserve_rng_state=drops)
        return new


CHECKPOINTED: dict[type, type] = {DenseLayer: _CheckpointedLayer, PlainDenseLayer: _CheckpointedPlainLayer}


def _asked_for() -> str:
    return "plain PyTorch was asked for"


def run_plain(model: nn.Module, checkpointed: bool = False) -> None:
    """Makes a model of effdense.nn's modules run PyTorch's own operators, in place: what effdense is compared with.

    Args:
        model: of our own modules; other libraries' are plain before `convert`.
        checkpointed: compute again in the backward what torchvision's memory_efficient=True does, running statistics included.
    """
    every: list[Any] = list(model.modules())
    for module in every:
        if hasattr(module, "obstacle"):
            module.obstacle = _asked_for
        if checkpointed:
            module.__class__ = CHECKPOINTED.get(type(module), type(module))
