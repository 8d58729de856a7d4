"""Blocks that give back their new features only, as in FC-DenseNet's up path: on every backend, against the naive block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from tests._stages import MEMORY, assert_close, assert_same, in_dimensions

pytestmark = pytest.mark.usefixtures("runs_on")
CHANNELS, K, LAYERS = 5, 4, 3


def layer(channels: int, bottleneck: bool, drop: float) -> nn.Module:
    parts: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    if bottleneck:
        parts += [nn.Conv2d(channels, 2 * K, 1, bias=False), nn.BatchNorm2d(2 * K), nn.ReLU(inplace=True)]
        channels = 2 * K
    dropout = [nn.Dropout2d(drop)] if drop else []
    return nn.Sequential(*parts, nn.Conv2d(channels, K, 3, padding=1), *dropout)


class Block(nn.Module):
    """As in the PyTorch copies of FC-DenseNet (Jégou et al., arXiv 1611.09326): `upsample` leaves out what it was given."""

    def __init__(
        self, upsample: bool, bottleneck: bool = False, drop: float = 0.0, channels: int = CHANNELS
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList(layer(channels + K * i, bottleneck, drop) for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        if not self.upsample:
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x
        new = []
        for layer in self.layers:
            out = layer(x)
            x = torch.cat([x, out], 1)
            new.append(out)
        return torch.cat(new, 1)


class NewestFirst(Block):
    """Always without its input."""

    def forward(self, x: Tensor) -> Tensor:
        new: list[Tensor] = []
        for layer in self.layers:
            new.insert(0, layer(torch.cat([*new, x], 1)))
        return torch.cat(new, 1)


class NamedLayer(nn.Module):
    """torchvision's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 8, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2 = nn.Conv2d(8, K, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(y)))


class Named(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({f"denselayer{i + 1}": NamedLayer(CHANNELS + K * i) for i in range(LAYERS)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features[1:], 1)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Block(True),
    "bottleneck": lambda: Block(True, bottleneck=True),
    "dropout": lambda: Block(True, drop=0.3),
    "bottleneck, dropout": lambda: Block(True, bottleneck=True, drop=0.3),
    "newest first": lambda: NewestFirst(True),
    "newest first, bottleneck": lambda: NewestFirst(True, bottleneck=True),
    "torchvision's names": Named,
}


def randomised(model: nn.Module) -> Any:
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.copy_(torch.rand(t.shape, generator=generator, device="cpu"))
                t.add_(-0.5 if name.endswith(("bias", "running_mean")) else 0.5)
    return model.double()


def pair(model: nn.Module, memory: str = "balanced", blocks: int = 1) -> tuple[Any, Any]:
    naive = randomised(model)
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    report = effdense.report(fused)
    assert [(e.converted, e.reason) for e in report if e.kind == "DenseBlock"] == [(True, None)] * blocks
    return naive, fused


def images(*spatial: int, channels: int = CHANNELS) -> Tensor:
    return torch.randn(3, channels, *spatial, dtype=torch.float64)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_gives_back_new_features_only(form: str, memory: str) -> None:
    naive, fused = pair(FORMS[form](), memory)
    assert_same((naive, fused), images(6, 5))
    assert_same((naive.eval(), fused.eval()), images(6, 5), 1)
    with torch.no_grad():
        assert_close([fused(images(7, 4).fill_(0.3))], [naive(images(7, 4).fill_(0.3))])


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_in_one_and_three_dimensions(bottleneck: bool, dimensions: int) -> None:
    assert_same(pair(in_dimensions(Block(True, bottleneck), dimensions)), images(*(4, 5, 3)[:dimensions]))


def test_layout_and_what_is_kept() -> None:
    naive, fused = pair(Block(True))
    x = images(6, 5).contiguous(memory_format=torch.channels_last)
    assert_same((naive, fused), x)
    y = fused(x)
    assert y.shape == naive(x).shape == (3, LAYERS * K, 6, 5)
    assert y.stride(1) == 1 and y._base is not None and y._base.shape[1] == CHANNELS + LAYERS * K


@pytest.mark.parametrize("frozen", range(LAYERS + 1))
@pytest.mark.parametrize("need_x", [False, True])
def test_frozen_layers(need_x: bool, frozen: int) -> None:
    naive, fused = pair(Block(True))
    for model in (naive, fused):
        model.layers[:frozen].requires_grad_(False)
    assert_same((naive, fused), images(4, 5), need_x=need_x)


class Net(nn.Module):
    """Down, up, and what follows each: a transition of the block's width must not take the block's statistics."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.down = nn.Sequential(
            Block(False), nn.BatchNorm2d(17), nn.ReLU(), nn.Conv2d(17, 6, 1), nn.AvgPool2d(2)
        )
        self.up = nn.Sequential(Block(True, channels=6), behind)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


BEHIND: dict[str, Callable[[], nn.Module]] = {
    "a ReLU in place": lambda: nn.ReLU(inplace=True),
    "a transition": lambda: nn.Sequential(
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 7, 1), nn.AvgPool2d(2)
    ),
    "a head": lambda: nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "a block": lambda: Block(False, channels=12),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_both_forms_in_one_net_with_anything_behind(behind: str) -> None:
    naive, fused = pair(Net(BEHIND[behind]()), blocks=3 if behind == "a block" else 2)
    assert_same((naive, fused), images(8, 9))


def test_second_derivatives() -> None:
    naive, fused = pair(Block(True))
    x, results = images(4, 4), []
    for model in (naive, fused):
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), [at, *model.parameters()])])
    assert_close(*results, 1e-9)


def test_an_in_place_change_elsewhere_names_the_block() -> None:
    _, fused = pair(Block(True))
    y = fused(images(4, 4))
    y.relu_()
    with pytest.raises(RuntimeError, match=r"DenseBlock \(3 layers, from 5 to 17 channels\): its output"):
        y.sum().backward()


def test_a_switch_that_is_turned_later_counts() -> None:
    naive, fused = pair(Block(True))
    for model in (naive, fused):
        model.upsample = False
    assert "Block.upsample, which was changed" in fused.obstacle()
    assert_same((naive, fused), images(4, 4))
    assert effdense.convert(effdense.revert(fused)).obstacle() is None
    assert_same((naive, fused), images(4, 4))


def test_a_layer_alone_is_no_block() -> None:
    model = nn.Sequential(layer(CHANNELS, False, 0.0), nn.BatchNorm2d(K), nn.ReLU())
    effdense.convert(model)
    assert type(model[0]) is nn.Sequential
