"""Shared by the tests of blocks and models: dense stages, naive and converted, and how they are compared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import densenet
from effdense._torch_range import FUSED_UNDER_COMPILE, minor_version
from tests._cases import rms

FUSED = minor_version(torch.__version__) >= FUSED_UNDER_COMPILE
fused_under_compile = pytest.mark.skipif(
    not FUSED, reason="this torch compiles PyTorch's own operators instead"
)
MEMORY = ["balanced", "minimal"]
TAILS = ["block", "transition", "head"]
GROWTH, CHANNELS, LAYERS = 4, 5, 3
WIDTH = 3 * GROWTH
ALL = CHANNELS + LAYERS * GROWTH


class Head(nn.Module):
    """What torchvision's DenseNet does around its features."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.features(x)).flatten(2).mean(2))


def in_dimensions(model: nn.Module, dimensions: int) -> nn.Module:
    """The same model for 1D or 3D images."""
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.Conv2d):
                kind, form = getattr(nn, f"Conv{dimensions}d"), (m.kernel_size[0], 1, m.padding[0])
                setattr(parent, name, kind(m.in_channels, m.out_channels, *form, bias=m.bias is not None))
            elif isinstance(m, nn.BatchNorm2d):
                setattr(parent, name, getattr(nn, f"BatchNorm{dimensions}d")(m.num_features))
            elif isinstance(m, nn.AvgPool2d):
                setattr(parent, name, getattr(nn, f"AvgPool{dimensions}d")(2))
    return model


def make_naive(plain: bool = False, tail: str = "block", **options: Any) -> nn.Module:
    """A naive stage in float64, with parameters and statistics that are not the initial ones."""
    dimensions, drop_rate = options.pop("dimensions", 2), options.pop("drop_rate", 0.0)
    block = densenet._DenseBlock(LAYERS, CHANNELS, None if plain else 3, GROWTH, drop_rate, **options)
    model: nn.Module = block
    if tail == "transition":
        parts = [
            ("denseblock1", block),
            ("transition1", densenet._Transition(ALL, 6, options.get("bias", False))),
        ]
        model = nn.Sequential(OrderedDict(parts))
    elif tail == "head":
        model = Head(nn.Sequential(OrderedDict([("denseblock1", block), ("norm5", nn.BatchNorm2d(ALL))])))
    model = in_dimensions(model, dimensions) if dimensions != 2 else model
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)
                if name.endswith(("bias", "running_mean")):
                    tensor.sub_(1)
    return model.double()


_converted: dict[
    Any, list[tuple[type, Any]]
] = {}  # the classes that convert gave a model like this, and what it noted


def converted(naive: nn.Module, memory: str) -> Any:
    """A converted copy, all of which runs fused. `convert` looks closely at the first of its kind only: that takes long."""
    fused, like = copy.deepcopy(naive), tuple((name, type(m)) for name, m in naive.named_modules())
    for module, (kind, noted) in zip(fused.modules(), _converted.get(like, ()), strict=False):
        module.__class__ = kind
        vars(module).update({} if noted is None else {"_effdense": noted})
    effdense.convert(fused, memory=memory)
    _converted[like] = [(type(m), vars(m).get("_effdense")) for m in fused.modules()]
    assert all(e.converted and e.reason is None for e in effdense.report(fused)), str(effdense.report(fused))
    return fused


def make_pair(
    memory: str, *arguments: Any, change: Any = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    naive = make_naive(*arguments, **options)
    if change is not None:
        change(naive)
    return naive, converted(naive, memory)


def block_of(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleDict))


def make_input(spatial: tuple[int, ...] = (6, 5), images: int = 3, channels: int = CHANNELS) -> Tensor:
    return torch.randn(images, channels, *spatial, dtype=torch.float64)


def weights_of(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def step(model: nn.Module, x: Tensor, need_x: bool = True) -> list[Tensor | None]:
    """Output, gradients of the input and of every parameter (None where there is none), and buffers."""
    x = x.detach().clone().requires_grad_(need_x)
    model.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    if y.requires_grad:
        (y * weights_of(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


def assert_as_exact(runs: list[tuple[list[Tensor], list[Tensor], list[Tensor]]], dtype: torch.dtype) -> None:
    """Ours, naive, exact, several times: the root of the mean square over all runs, result by result.

    One run says little: a relu that rounding switches outweighs everything else in a vector of few elements.
    """
    for i, every in enumerate(zip(*(zip(*run, strict=True) for run in runs), strict=True)):
        for a, b, _ in every:
            assert a.dtype == b.dtype, i
        fused, naive, size = (
            rms(torch.cat([v.flatten() for v in values]))
            for values in (
                [a.double() - c for a, _, c in every],
                [b.double() - c for _, b, c in every],
                [c for _, _, c in every],
            )
        )
        assert fused <= 2 * naive + torch.finfo(dtype).eps * size, f"{i}: {fused:.3g}, naive {naive:.3g}"


def assert_same(
    pair: tuple[nn.Module, nn.Module], x: Tensor | None = None, steps: int = 2, **how: Any
) -> None:
    naive, fused = pair
    x = make_input() if x is None else x
    for _ in range(steps):
        assert_close(step(fused, x, **how), step(naive, x, **how))


def kept_tensors(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    return kept, y


def named_norms(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
