"""How far rounding may move a net's results: plain PyTorch in float64, run again with roundings at random in it.

Every value that a low precision would store is moved by as much as storing and summing it may: the input, parameters, what
modules give back, and gradients there. The largest change of a result over a few such runs is how sensitive the result is to
rounding (Monte Carlo arithmetic: Parker, Pierce and Eggert 2000). No tolerance is chosen by looking at what passes.
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
    """A value, and its gradient, moved by factors close to 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


def factors(like: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Numbers between 1 - size and 1 + size, as many as in a tensor."""
    return 1 + size * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1)


@contextlib.contextmanager
def rounded(model: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Runs a net with such errors in its parameters and behind its modules (ReLUs aside, which are exact)."""
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        result: Tensor = _Rounded.apply(y, factors(y, size, generator), factors(y, size, generator))
        return result

    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.ReLU)]
    handles = [m.register_forward_hook(move) for m in leaves if not isinstance(m, nn.Identity)]
    try:
        for p in model.parameters():
            p.data.mul_(factors(p, size, generator))
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
