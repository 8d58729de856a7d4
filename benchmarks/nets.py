"""Nets of other libraries than torchvision by name, LIBRARY:NET, and the classes that gpleiss's repository, d2l and tutorials teach."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from benchmarks import structures


class Net(NamedTuple):
    """What is measured of a library."""

    package: str | None  # what it needs; None: a structure that is written in this repository
    make: Callable[[Any], nn.Module]  # of that package
    batch: int
    image_size: int


def _d2l(_: Any) -> nn.Module:
    return structures.d2l_net(32, (4, 4, 4, 4), 64, in_channels=1, num_classes=10)


def _gpleiss(efficient: bool) -> Callable[[Any], nn.Module]:
    return lambda _: structures.StarNet(0.0, efficient, 12, (16, 16, 16), 24, 4, 10)


def _monai(dimensions: int) -> Callable[[Any], nn.Module]:
    return lambda monai: monai.networks.nets.DenseNet121(dimensions, 1, 10)


NETS = {
    "timm:densenet121": Net("timm", lambda lib: lib.create_model("densenet121"), 8, 224),
    "timm:densenetblur121d": Net("timm", lambda lib: lib.create_model("densenetblur121d"), 8, 224),
    "monai:densenet121-2d": Net("monai.networks.nets", _monai(2), 8, 224),
    "monai:densenet121-3d": Net("monai.networks.nets", _monai(3), 2, 64),
    "smp:unet-densenet121": Net(
        "segmentation_models_pytorch",
        lambda lib: lib.Unet("densenet121", encoder_weights=None, classes=10),
        4,
        224,
    ),
    "torchxrayvision:densenet121": Net(
        "torchxrayvision", lambda lib: lib.models.DenseNet(weights=None), 8, 224
    ),
    "gpleiss:densenet_bc_100_12": Net(None, _gpleiss(False), 32, 32),
    "gpleiss:densenet_bc_100_12-efficient": Net(None, _gpleiss(True), 32, 32),
    "d2l:densenet": Net(None, _d2l, 64, 96),
    "tutorial:densenet169": Net(
        None, lambda _: structures.tutorial_net(0.2, 32, (6, 12, 32, 32), 64, 1000), 4, 224
    ),
}


def label(name: str) -> str:
    """Return which code a net comes from."""
    package = NETS[name].package
    if package is None:
        return f"{name.partition(':')[0]}'s structure"
    distribution = package.partition(".")[0]
    return f"{distribution} {importlib.metadata.version(distribution)}"


def build(name: str) -> nn.Module:
    """Build the net `name`; RuntimeError where its library is not installed."""
    package = NETS[name].package
    if package is None:
        return NETS[name].make(None)
    library = package.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        from effdense import extras  # here: peers are measured beside an effdense that does not load

        raise RuntimeError(f"model {name!r} {extras.needed(library)}")
    importlib.import_module(package)
    return NETS[name].make(importlib.import_module(library))
