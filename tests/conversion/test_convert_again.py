"""convert on models that are converted in part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import structures
from tests._conversions import (
    assert_same,
    assert_same_step,
    images_for,
    kinds,
    library,
    make_batch,
    make_small,
    randomised,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize("part", ["features.denseblock2", "features.denseblock1.denselayer2", "features"])
def test_what_is_half_converted_becomes_whole(part: str) -> None:
    naive = make_small()
    fused = copy.deepcopy(naive)
    effdense.convert(fused.get_submodule(part), memory="minimal")
    first = [type(m) for m in fused.get_submodule(part).modules()]
    states = {e.converted for e in effdense.report(fused)}
    assert states == {True, False}
    effdense.convert(fused)
    assert [type(m) for m in fused.get_submodule(part).modules()] == first
    before, report = [type(m) for m in fused.modules()], str(effdense.report(fused))
    assert "not converted" not in report and "DenseNet: 1 of 1 run fused" in report
    effdense.convert(fused)
    assert [type(m) for m in fused.modules()] == before and str(effdense.report(fused)) == report
    assert_same_step(naive, fused, make_batch(), 1e-9)
    assert [type(m) for m in effdense.revert(fused).modules()] == [type(m) for m in naive.modules()]


def preactivated(channels: int, width: int, kernel: int) -> nn.Module:
    """pytorchcv's PreConvBlock."""

    class PreConvBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.activ = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.activ(self.bn(x)))

    return PreConvBlock()


class DenseUnit(nn.Module):
    """pytorchcv's: of one such block (densenet40_k12) or two (densenet121)."""

    def __init__(self, channels: int, plain: bool) -> None:
        super().__init__()
        if plain:
            self.conv = preactivated(channels, 4, 3)
        else:
            self.conv1, self.conv2 = preactivated(channels, 8, 1), preactivated(8, 4, 3)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(x) if self.plain else self.conv2(self.conv1(x))), dim=1)


class TransitionBlock(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv, self.pool = preactivated(channels, width, 1), nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class Activation(nn.Module):
    """A norm and ReLU in a module of their own, behind the stem's convolution and the last stage."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.activ = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activ(self.bn(x))


class Init(Activation):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(self.conv(x)))


class Pytorchcv(nn.Module):
    """Its DenseNets: a transition at the head of every stage but the first."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.features, channels = nn.Sequential(), 6
        self.features.add_module("init_block", nn.Conv2d(3, 6, 3, padding=1) if plain else Init(6))
        for i in range(3):
            stage = nn.Sequential()
            if i:
                stage.add_module(f"trans{i + 1}", TransitionBlock(channels, channels // 2))
                channels //= 2
            for j in range(3):
                stage.add_module(f"unit{j + 1}", DenseUnit(channels, plain))
                channels += 4
            self.features.add_module(f"stage{i + 1}", stage)
        self.features.add_module("post_activ", Activation(channels))
        self.features.add_module("final_pool", nn.AvgPool2d(2))
        self.output = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.output(x.view(x.size(0), -1))


def timm() -> Any:
    small = {"growth_rate": 4, "block_config": (2, 3), "num_classes": 5}
    return library("timm").create_model("densenet121", **small)


def torchvision() -> Any:
    return library("torchvision.models").DenseNet(4, (2, 3), 6, num_classes=5)


def monai() -> Any:
    nets = library("monai.networks.nets")
    return nets.DenseNet(2, 3, 5, init_features=6, growth_rate=4, block_config=(2, 3))


# Each with the size of its images and the blocks and transitions that one call must convert.
STRUCTURES: dict[str, tuple[Callable[[], Any], int, int, int]] = {
    "gpleiss": (structures.StarNet, 16, 2, 1),
    "d2l": (structures.d2l_net, 16, 2, 1),
    "tutorial": (structures.tutorial_net, 16, 2, 1),
    "one rate": (structures.rate_net, 16, 1, 0),
    "torchxrayvision": (structures.growing_net, 16, 2, 1),
    "pytorchcv's densenet121": (lambda: Pytorchcv(False), 16, 3, 2),
    "pytorchcv's densenet40_k12": (lambda: Pytorchcv(True), 8, 3, 2),
    "torchvision": (torchvision, 64, 2, 1),
    "timm": (timm, 64, 2, 1),
    "MONAI": (monai, 64, 2, 1),
}


def state_of(model: nn.Module) -> tuple[list[type], str, list[set[str]]]:
    return (
        [type(m) for m in model.modules()],
        str(effdense.report(model)),
        [set(vars(m)) for m in model.modules()],
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_once_is_enough(name: str) -> None:
    make, size, blocks, transitions = STRUCTURES[name]
    naive = randomised(make())
    fused = effdense.convert(copy.deepcopy(naive))
    once = state_of(fused)
    assert (kinds(fused)["DenseBlock"], kinds(fused).get("Transition", 0)) == (blocks, transitions), once[1]
    assert state_of(effdense.convert(fused)) == once
    assert state_of(effdense.convert(effdense.revert(fused))) == once
    assert_same(naive, fused, images_for(naive, size), 1)
