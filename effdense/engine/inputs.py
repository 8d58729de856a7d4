"""Decides which inputs run fused, and how subclasses of Tensor do.

A subclass whose `__torch_function__` only carries something along (MONAI's MetaTensor, torchvision's tv_tensors, one that
has PyTorch's own) goes through it, with the fused forward as the function; any other runs through PyTorch's own operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from effdense.engine.autograd import in_its_layout

_PLAIN = (Tensor, nn.Parameter)
# By who has written the function, so that a subclass with one of its own is not meant.
_CARRIERS = {
    ("monai.data.meta_tensor", "MetaTensor.__torch_function__"),
    ("torchvision.tv_tensors._tv_tensor", "TVTensor.__torch_function__"),
}


@functools.cache
def _carries(kind: type[Tensor]) -> bool:
    """Whether a subclass computes what Tensor does."""
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False  # FakeTensor, DTensor, quantised ones
    function: Any = kind.__torch_function__
    if function is torch._C._disabled_torch_function_impl:  # of parameters and buffers
        return True
    function = getattr(function, "__func__", function)
    if function is Tensor.__torch_function__.__func__:  # type: ignore[attr-defined]
        return True
    return (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) in _CARRIERS


def accepts(x: Any, dimensions: int) -> bool:
    """Whether a fused forward takes x: a tensor of so many dimensions, batch and channels included, whose class fits.

    What it does not take, PyTorch's own modules get: an image without a batch, torch.fx's proxies.
    """
    return isinstance(x, Tensor) and (type(x) in _PLAIN or _carries(type(x))) and x.dim() == dimensions


def through(x: Any, fused: Callable[[Any], Tensor]) -> Tensor:
    """fused(x), x a tensor or a list of some; subclasses by their `__torch_function__`, as if `fused` were PyTorch's.

    It gets them as plain tensors. What does more than carry something along is handed over as it is.
    """
    several = isinstance(x, (list, tuple))
    tensors = x if several else [x]

    def run(tensors: Any) -> Tensor:
        inputs = [in_its_layout(t) for t in tensors]
        return fused(inputs if several else inputs[0])

    if all(type(t) in _PLAIN or not isinstance(t, Tensor) or not _carries(type(t)) for t in tensors):
        return run(tensors)

    def on_plain(x: Any) -> Tensor:
        return run([t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in (x if several else [x])])

    if not has_torch_function(tensors):
        return on_plain(x)
    result: Tensor = handle_torch_function(on_plain, tensors, x)
    return result
