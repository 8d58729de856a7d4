"""Chooses the implementation of the operators for a tensor: compiled, or plain PyTorch.

Both have the same functions (csrc/ops.cpp holds the schemas), so that everything above takes the namespace as a
value and does not care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdense import reference
from effdense._extension import extension

_COMPILED_DTYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16)}


def operators(x: Tensor) -> Any:
    """The namespace whose operators take tensors like `x`."""
    if extension is not None and x.dtype in _COMPILED_DTYPES.get(x.device.type, ()):
        return torch.ops.effdense
    return reference


def _vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=reference.accumulate_dtype(x.dtype))


def _register_fakes() -> None:
    """Shapes and dtypes of what the operators return, for torch.compile and export."""
    fake = torch.library.register_fake

    @fake("effdense::channel_statistics")
    def _(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        channels = sum(f.shape[1] for f in features)
        return _vector(features[0], channels), _vector(features[0], channels)

    @fake("effdense::bottleneck")
    def _(
        features: Sequence[Tensor],
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, channels = features[0], weight.shape[0]
        size = channels if statistics else 0
        return x.new_empty(x.shape[0], channels, *x.shape[2:]), _vector(x, size), _vector(x, size)

    @fake("effdense::bottleneck_backward")
    def _(
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
        grad_weight = scale.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1])
        return grad_weight, torch.empty_like(scale), torch.empty_like(scale)

    @fake("effdense::take_gradient")
    def _(
        features: Sequence[Tensor], mean: Tensor, a: Tensor, b: Tensor, grad_features: Sequence[Tensor]
    ) -> None:
        return None

    @fake("effdense::bn_relu")
    def _(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        return None

    @fake("effdense::bn_relu_backward")
    def _(
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        batch_statistics: bool,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(scale), torch.empty_like(scale)


if extension is not None:
    _register_fakes()
