"""convert on other libraries' own models: of all their layers, narrower than published."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from tests._conversions import (
    ALLOWED,
    assert_same_classes,
    convert_and_compare,
    images_for,
    kinds,
    library,
    randomised,
    step,
)
from tests._stages import assert_close

BLOCKS = (6, 12, 24, 16)


def timm(name: str, **options: Any) -> nn.Module:
    return library("timm").create_model(name, **{"growth_rate": 8, "num_classes": 5, **options})


def blurred() -> nn.Module:
    blur = library("timm.layers").BlurPool2d
    return timm("densenetblur121d", aa_layer=blur, aa_stem_only=False)


def monai(dimensions: int, **options: Any) -> nn.Module:
    nets = library("monai.networks.nets")
    small = {"init_features": 8, "growth_rate": 4, "block_config": BLOCKS}
    return nets.DenseNet(dimensions, 1, 3, **{**small, **options})


def torchvision(**options: Any) -> nn.Module:
    models = library("torchvision.models")
    return models.DenseNet(8, BLOCKS, 16, num_classes=5, **options)


def torchxrayvision() -> nn.Module:
    return library("torchxrayvision").models.DenseNet(8, BLOCKS, 16, drop_rate=0.2)


FUSED = {"DenseFeatures": 1, "DenseBlock": 4, "Transition": 3}
WITH_HEAD = {"DenseNet": 1, **FUSED}
NETS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "torchvision": (torchvision, 64, {**WITH_HEAD, "DenseLayer": 58}),
    "timm": (lambda: timm("densenet121"), 64, WITH_HEAD),
    "timm, dropout": (lambda: timm("densenet121", proj_drop_rate=0.2), 64, WITH_HEAD),
    "timm, blur": (lambda: timm("densenetblur121d"), 64, WITH_HEAD),
    "timm, blurred transitions": (blurred, 64, WITH_HEAD),
    "MONAI, 1D": (lambda: monai(1), 64, WITH_HEAD),
    "MONAI, 2D": (lambda: monai(2, dropout_prob=0.2), 64, WITH_HEAD),
    "MONAI, 3D": (lambda: monai(3, dropout_prob=0.2), 32, WITH_HEAD),
    "torchxrayvision": (torchxrayvision, 64, FUSED),
}


@pytest.mark.parametrize("name", NETS)
def test_a_librarys_net_computes_the_same(name: str) -> None:
    make, size, expected = NETS[name]
    naive = randomised(make())
    channels = next(
        m for m in naive.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ).in_channels
    x = images_for(naive, size, channels)
    fused = convert_and_compare(naive, x, 4, steps=1)
    assert kinds(fused) == expected
    other = pickle.loads(pickle.dumps(fused))
    assert str(effdense.report(other)) == str(effdense.report(fused))
    assert_close(step(other, x), step(fused, x))
    assert_same_classes(effdense.revert(other), naive)


@pytest.mark.parametrize("name", ["densenet161", "densenet169", "densenet201", "densenet264d"])
def test_timms_other_nets_are_converted(name: str) -> None:
    with torch.device("meta"):
        model = timm(name)
    assert kinds(effdense.convert(model)) == WITH_HEAD


def test_timms_methods_stay() -> None:
    naive = timm("densenet121", block_config=(2, 2))
    fused = effdense.convert(copy.deepcopy(naive))
    fused.set_grad_checkpointing(True)
    assert isinstance(fused.features.denseblock1, type(naive.features.denseblock1))


def test_an_encoder() -> None:
    smp = library("segmentation_models_pytorch")
    naive = randomised(smp.Unet("densenet121", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8)))
    fused = convert_and_compare(naive, images_for(naive, 64), 4, steps=1)
    assert kinds(fused)["DenseLayer"] == 58


LAYER = "denselayer1"
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm, activation": (
        lambda: timm("densenet121", act_layer="gelu"),
        f"{LAYER}.norm1.act is GELU, {ALLOWED}",
    ),
    "timm, norm": (
        lambda: timm("densenet121", norm_layer="groupnorm1"),
        f"{LAYER}.norm1, GroupNorm1Act, has parameters or buffers of its own: weight, bias",
    ),
    "MONAI, 1D, norm": (
        lambda: monai(1, norm="instance"),
        f"{LAYER}.layers.norm1 is InstanceNorm1d, {ALLOWED}",
    ),
    "MONAI, 3D, norm": (
        lambda: monai(3, norm=("group", {"num_groups": 2})),
        f"{LAYER}.layers.norm1 is GroupNorm, {ALLOWED}",
    ),
    "MONAI, activation": (lambda: monai(2, act="prelu"), f"{LAYER}.layers.relu1 is PReLU, {ALLOWED}"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_norm_or_activation_is_refused(name: str) -> None:
    make, reason = OTHERS[name]
    with torch.device("meta"):
        model = make()
    classes = {n: type(m) for n, m in model.named_modules()}
    report = effdense.report(effdense.convert(model))
    refused = [e for e in report if not e.converted]
    assert [e.kind for e in refused].count("DenseBlock") == 4
    assert [e.kind for e in refused].count("Transition") == 3
    assert {e.reason for e in refused if e.kind == "DenseBlock"} == {reason}
    changed = [n for n, m in model.named_modules() if type(m) is not classes[n]]
    assert changed == ["features"]
