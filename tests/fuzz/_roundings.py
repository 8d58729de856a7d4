"""How far rounding may move a net's results: plain PyTorch in float64, run again with roundings at random in it.

Every value that a low precision would store is moved by as much as storing and summing it may: the input, parameters, what
modules give back, and gradients there. The largest change of a result over a few such runs is how sensitive the result is to
rounding (Monte Carlo arithmetic: Parker, Pierce and Eggert 2000). What operators round inside of themselves, plain PyTorch in the
same precision shows, which is one more such run. No tolerance is chosen by looking at what passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 3
# A result is a sum of many roundings, so nearly normal: beyond 8 times the largest of three samples is a mistake.
FACTOR = 8


def rounding(dtype: torch.dtype, autocast: torch.dtype | None, terms: int) -> float:
    """The relative size of an error: of storing in `dtype` or in autocast's, and of float32 sums of so many terms."""
    if dtype == torch.float64:
        return 0.0
    stored = max(torch.finfo(d).eps for d in (dtype, autocast) if d is not None)
    return stored + math.sqrt(terms) * torch.finfo(torch.float32).eps


class _Rounded(torch.autograd.Function):
    """A value's gradient with errors, and unless it was stored before the value too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, errors: Errors, stored: bool) -> Tensor:
        ctx.errors = errors
        return x.clone() if stored else errors.moved(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.errors.moved(grads[0], ctx.errors.readers), None, None


class Errors:
    """Roundings at random: of `size` relative to a value, or to the smallest that a dtype has with all of its digits.

    `readers`: how many layers' gradients are added up to a value's, with a rounding each, of sums of up to as many of them.
    """

    def __init__(self, size: float, readers: int, dtype: torch.dtype, seed: int) -> None:
        self.size, self.readers, self.least = size, readers, torch.finfo(dtype).tiny
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, x: Tensor, times: int = 1) -> Tensor:
        """The values with an error each."""
        r = self.size * times * (2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1)
        return x * (1 + r) + self.least * r


@contextlib.contextmanager
def rounded(model: nn.Module, errors: Errors) -> Iterator[None]:
    """Runs a net with such errors in its parameters and around its modules (ReLUs aside, which are exact)."""

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return _Rounded.apply(inputs[0], errors, True)

    def after(module: nn.Module, inputs: Any, y: Tensor) -> Any:
        return _Rounded.apply(y, errors, False)

    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.ReLU)]
    leaves = [m for m in leaves if not isinstance(m, nn.Identity)]
    handles: list[Any] = [m.register_forward_pre_hook(before) for m in leaves]
    handles += [m.register_forward_hook(after) for m in leaves]
    try:
        for p in model.parameters():
            p.data.copy_(errors.moved(p.data))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def before_relus(norms: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what norms give to ReLUs, call by call."""
    every: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, x, y: every.append(y.detach().clone())) for m in norms]
    try:
        yield every
    finally:
        for handle in handles:
            handle.remove()


def are_sure(exact: list[Tensor], samples: list[list[Tensor]], size: float) -> bool:
    """Whether all values are further from 0 than rounding moves them: else it decides about gradients."""
    for i, values in enumerate(exact):
        if not values.numel():
            continue
        error = 1e-9
        if samples:
            moved = max((other[i] - values).abs().max().item() for other in samples)
            error = FACTOR * (moved + size * values.abs().max().item())
        if values.abs().min().item() <= error:
            return False
    return True


def allowed(exact: Tensor, samples: list[Tensor], size: float, dtype: torch.dtype) -> float:
    """The largest error of a result in a low precision; in float64 (without samples) a wrong value shows by 1e-8."""
    largest = exact.abs().max().item()
    if not samples:
        return 1e-8 * max(1.0, largest)
    moved = max((other - exact).abs().max().item() for other in samples)
    return FACTOR * (moved + size * largest + torch.finfo(dtype).tiny)
