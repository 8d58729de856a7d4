"""Chooses the implementation of the operators for a tensor: compiled, or plain PyTorch.

Both have the same functions (csrc/schemas.h has their schemas). So the engine takes the namespace of operators as a value, and
does not ask which one it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effdense.ops import reference
from effdense.ops.extension import extension

# device -> the compiled operators, and the dtypes of maps that they take
_COMPILED: dict[str, tuple[Any, tuple[torch.dtype, ...]]] = {}
if extension is not None:
    _on_every_device = (torch.float32, torch.float64, torch.bfloat16)
    _COMPILED["cpu"] = torch.ops.effdense, _on_every_device
    _COMPILED["cuda"] = torch.ops.effdense, (*_on_every_device, torch.float16)


def _no_card(index: int) -> bool:
    return False


# Whether the kernels may run on the card of a number. ops/__init__.py hands in gpu_check.py's answer: that file runs the
# self-test, which this one need not know.
_card_is_usable: Callable[[int], bool] = _no_card


def ask_about_cards(is_usable: Callable[[int], bool]) -> None:
    """Hands in who knows whether the kernels may run on the card of a number; before, no card gets them."""
    global _card_is_usable
    _card_is_usable = is_usable


def implementation(device: str) -> tuple[Any, tuple[torch.dtype, ...]]:
    """The operators for tensors on a kind of device ("cpu"), and the dtypes of maps that they take; the twins take the rest."""
    return _COMPILED.get(device, (reference, ()))


@contextlib.contextmanager
def override(device: str, ops: Any, dtypes: Sequence[torch.dtype]) -> Iterator[None]:
    """Within it, tensors on a kind of device get these operators, in every thread: for plans, measurements and tests."""
    before = _COMPILED.get(device)
    _COMPILED[device] = ops, tuple(dtypes)
    try:
        yield
    finally:
        if before is None:
            del _COMPILED[device]
        else:
            _COMPILED[device] = before


# Elsewhere cuDNN's convolutions are hard to beat (csrc/schemas.h, define_cpu_operators).
_CPU_ALONE = ("bn_relu_conv3x3", "bn_relu_conv3x3_backward")


def has_kernel(ops: Any, name: str, device: str) -> bool:
    """Whether there is an operator for tensors on a kind of device. Plans on the meta device are of the CPU."""
    return hasattr(ops, name) and (name not in _CPU_ALONE or device in ("cpu", "meta"))


def operators(x: Tensor) -> Any:
    """The namespace whose operators take tensors like `x` (a map; the vectors that go with it have the device alone)."""
    compiled, dtypes = implementation(x.device.type)
    if x.dtype not in dtypes or (x.device.type == "cuda" and not _card_is_usable(x.device.index)):
        return reference
    return compiled


def _vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=reference.accumulate_dtype(x.dtype))


def _two_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


def _nothing(*_: Any) -> None:
    return None


def _sums(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _two_vectors(x)


def _map(x: Tensor, spatial: Sequence[int], dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], *spatial, x.shape[1], dtype=dtype).movedim(-1, 1)


def _register_fakes() -> None:
    """Shapes, dtypes and strides of what the operators return, for torch.compile and export."""
    fake = torch.library.register_fake
    for name in ("accumulate_correction", "apply_correction", "bn_relu", "max_pool_backward"):
        fake(f"effdense::{name}", _nothing)
    for name in (
        "bn_relu_backward",
        "bn_relu_backward_sums",
        "bn_relu_backward_accumulate",
        "bn_relu_avg_pool_backward",
    ):
        fake(f"effdense::{name}", _sums)

    @fake("effdense::fold")
    def _(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)

    @fake("effdense::channel_statistics")
    def _(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        channels = sum(f.shape[1] for f in features)
        return _vector(features[0], channels), _vector(features[0], channels)

    @fake("effdense::append_features")
    def _(new_features: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return _two_vectors(out)

    @fake("effdense::bottleneck")
    def _(
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
        size = weight.shape[0] if statistics else 0
        return _vector(y, size), _vector(y, size)

    @fake("effdense::bottleneck_backward")
    def _(
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
        grad_weight = scale.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1])
        return grad_weight, torch.empty_like(scale), torch.empty_like(scale)

    @fake("effdense::bn_relu_conv3x3")
    def _(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Any:
        return _two_vectors(out)

    @fake("effdense::bn_relu_conv3x3_backward")
    def _(
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
        grad_weight = scale.new_empty(weight.shape[0] if need_weight else 0, *weight.shape[1:])
        return grad_weight, torch.empty_like(scale), torch.empty_like(scale)

    @fake("effdense::bn_relu_avg_pool")
    def _(x: Tensor, scale: Tensor, shift: Tensor, kernel_size: Sequence[int]) -> Tensor:
        return _map(x, [n // k for n, k in zip(x.shape[2:], kernel_size, strict=True)], x.dtype)

    @fake("effdense::bn_relu_max_pool")
    def _(
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        windows = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        spatial = [(n + 2 * p - k) // s + 1 for n, k, s, p in windows]
        return _map(x, spatial, x.dtype), _map(x, spatial, torch.uint8)


if extension is not None:
    _register_fakes()
