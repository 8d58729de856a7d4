"""Blocks that put new features first, and layers with other kernels and dilation: on every backend, against the naive block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from tests._stages import MEMORY, assert_close, assert_same

pytestmark = pytest.mark.usefixtures("runs_on")
CHANNELS = 5


class Layer(nn.Module):
    """As in kuangliu's pytorch-cifar, with a kernel and a dilation; `old_first`: as in torchvision."""

    def __init__(
        self, channels: int, k: int, plain: bool, drop: float, kernel: int, dilation: int, old_first: bool
    ) -> None:
        super().__init__()
        self.old_first, self.plain = old_first, plain
        self.bn1 = nn.BatchNorm2d(channels)
        width = channels if plain else 3 * k
        if not plain:
            self.conv1, self.bn2 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, k, kernel, padding="same", dilation=dilation)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        if not self.plain:
            y = F.relu(self.bn2(self.conv1(y)))
        new = self.drop(self.conv2(y))
        return torch.cat([x, new] if self.old_first else [new, x], 1)


class Transition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


def make_net(
    k: int = 4,
    plain: bool = False,
    drop: float = 0.0,
    kernel: int = 3,
    dilation: int = 1,
    old_first: bool = False,
    transition: bool = False,
) -> Any:
    layers = [Layer(CHANNELS + k * i, k, plain, drop, kernel, dilation, old_first) for i in range(3)]
    net = nn.Sequential(nn.Sequential(*layers), *[Transition(CHANNELS + 3 * k)] * transition)
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        for name, t in (*net.named_parameters(), *net.named_buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.copy_(
                    torch.rand(t.shape, generator=generator, device="cpu")
                    + (-0.5 if name.endswith("bias") else 0.5)
                )
    return net.double()


def check(naive: Any, memory: str, blocks: int = 1) -> Any:
    """Converts a copy; all of it must run fused and give what the naive one does, step after step, and in evaluation."""
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    report = effdense.report(fused)
    assert sum(e.kind == "DenseBlock" and e.converted and e.reason is None for e in report) == blocks, report
    for spatial in ((6, 4), (7, 5)):
        assert_same((naive, fused), torch.randn(3, CHANNELS, *spatial, dtype=torch.float64))
    assert_same((naive.eval(), fused.eval()), torch.randn(3, CHANNELS, 6, 4, dtype=torch.float64))
    return fused


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("k", [4, 3])  # 3: the block's parts begin at no whole vector
@pytest.mark.parametrize("transition", [False, True])
def test_new_features_first(memory: str, plain: bool, k: int, transition: bool) -> None:
    check(make_net(k, plain, transition=transition), memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_new_features_first_with_dropout(memory: str) -> None:
    check(make_net(drop=0.3), memory)


@pytest.mark.parametrize("old_first", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kernel, dilation", [(3, 2), (5, 1), (7, 2), (1, 1)])
def test_kernels_and_dilation(old_first: bool, plain: bool, kernel: int, dilation: int) -> None:
    check(make_net(3, plain, kernel=kernel, dilation=dilation, old_first=old_first), "minimal")


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_layers_of_a_block_with_new_features_first(need_x: bool, frozen: int) -> None:
    naive = make_net()
    naive[0][:frozen].requires_grad_(False)
    fused = effdense.convert(copy.deepcopy(naive))
    assert_same((naive, fused), torch.randn(2, CHANNELS, 4, 5, dtype=torch.float64), need_x=need_x)


def test_second_derivatives_with_new_features_first() -> None:
    naive = make_net(transition=True)
    fused = effdense.convert(copy.deepcopy(naive))
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
    results = []
    for model in (naive, fused):
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), [at, *model.parameters()])])
    assert_close(*results, 1e-9)
