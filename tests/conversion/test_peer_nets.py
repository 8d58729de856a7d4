"""Whole nets of other repositories, small: converted, they compute what they did, and these of their parts run fused.

`FUSED` changes when convert learns more; what a net has (`nets.NETS`) does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import cifar_structures, image_structures, parts
from benchmarks.gpu import kernelbench
from benchmarks.nets import Parts
from tests._conversions import assert_same_classes, images_for, library, randomised, step, unchanged
from tests._stages import MEMORY, assert_close


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    size: int  # of the images
    fused: Parts  # what of it runs fused at the moment


BLOCKS = (2, 3, 2, 2)


def timm_maps() -> nn.Module:
    backbone = library("timm").create_model(
        "densenet121", features_only=True, growth_rate=4, block_config=BLOCKS
    )
    return image_structures.OnMaps(backbone, backbone.feature_info.channels(), 5)


def pytorchcv_large() -> nn.Module:
    widths = [[8 + 4 * j for j in (1, 2)], [8 + 4 * j for j in (1, 2, 3)], [10 + 4 * j for j in (1, 2)]]
    return library("pytorchcv.models.densenet").DenseNet(widths, 8, in_size=(112, 112), num_classes=5)


def pytorchcv_small() -> nn.Module:
    widths = [[12, 16], [12, 16, 20], [14, 18]]
    net = library("pytorchcv.models.densenet_cifar").CIFARDenseNet
    return net(widths, 8, bottleneck=False, num_classes=5)


FUSED = {
    "kuangliu": Case(cifar_structures.KuangliuNet, 32, Parts(4, 3, 0, 0)),
    "weiaicunzai": Case(cifar_structures.WeiaicunzaiNet, 32, Parts(4, 0, 0, 0)),
    "bamos": Case(cifar_structures.BamosNet, 32, Parts(3, 2, 0, 0)),
    "andreasveit": Case(cifar_structures.AndreasveitNet, 32, Parts(3, 2, 0, 0)),
    "andreasveit, dropout": Case(
        lambda: cifar_structures.AndreasveitNet(drop_rate=0.3), 32, Parts(3, 2, 0, 0)
    ),
    "pytorchcv": Case(pytorchcv_large, 112, Parts(3, 2, 0, 0)),
    "pytorchcv, plain": Case(pytorchcv_small, 32, Parts(3, 2, 0, 0)),
    "mmpretrain": Case(image_structures.MmpretrainNet, 64, Parts(3, 2, 1, 0)),
    "KernelBench 13": Case(lambda: kernelbench.TransitionLayer(8, 16), 16, Parts(0, 1, 0, 0)),
    "KernelBench 14": Case(lambda: kernelbench.DenseBlock(3, 8, 4), 16, Parts(1, 0, 0, 0)),
    "KernelBench 15 and 16": Case(lambda: kernelbench.Net((2, 3, 2)), 64, Parts(3, 2, 1, 0)),
    "DenseASPP": Case(image_structures.DenseAspp, 32, Parts(4, 4, 1, 0)),
    "FC-DenseNet": Case(image_structures.FcDenseNet, 24, Parts(5, 2, 0, 0)),
    "timm, features_only": Case(timm_maps, 64, Parts(4, 3, 0, 0)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    naive = randomised(FUSED[name].make())
    conv = next(m for m in naive.modules() if isinstance(m, nn.Conv2d))
    return naive, images_for(naive, FUSED[name].size, conv.in_channels)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", FUSED)
def test_a_converted_net_computes_the_same(name: str, memory: str) -> None:
    """Output, gradients of the images and of all parameters, and buffers, of two steps and in evaluation."""
    naive, x = make(name)
    fused = copy.deepcopy(naive)
    with unchanged(fused):
        effdense.convert(fused, memory=memory)
    for training in (True, True, False):
        naive.train(training), fused.train(training)
        assert_close(step(fused, x), step(naive, x), 1e-10)
    assert_same_classes(effdense.revert(fused), naive)


@pytest.mark.parametrize("name", FUSED)
def test_what_of_a_net_runs_fused(name: str) -> None:
    naive, x = make(name)
    expected, found = FUSED[name].fused, parts.fused(effdense.convert(naive), x)
    assert found == expected, str(effdense.report(naive))


def test_a_head_is_seen() -> None:
    """One that runs fused, and one that a hook on the block keeps apart."""
    torch.manual_seed(0)
    block, x = kernelbench.DenseBlock(3, 8, 4), torch.randn(2, 8, 6, 5)
    head = nn.BatchNorm2d(20), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 3)
    model = effdense.convert(nn.Sequential(block, *head))
    assert parts.fused(model, x) == Parts(1, 0, 0, 1)
    model[0].register_forward_hook(lambda *_: None)
    assert parts.fused(model, x) == Parts(1, 0, 0, 0)
