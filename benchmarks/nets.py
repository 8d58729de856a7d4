"""Nets by name, LIBRARY:NET: those of libraries beside torchvision, of repositories, of books and of benchmark suites."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks import cifar_structures, image_structures, structures
from benchmarks.gpu import kernelbench


class Parts(NamedTuple):
    """How many a net has, or how many of them run fused."""

    blocks: int
    transitions: int
    stems: int  # the norm, ReLU and max pool in front of the first block
    heads: int  # the norm, ReLU and average over all pixels behind the last block


class Net(NamedTuple):
    """What is measured of a library."""

    package: str | None  # what it needs; None: a structure that is written in this repository
    make: Callable[[Any], nn.Module]  # of that package
    batch: int
    image_size: int
    parts: Parts = Parts(4, 3, 1, 1)  # DenseNet-121's
    load: Callable[[Tensor], Tensor] | None = None  # gives images as the library's loader does


_IMAGENET = (6, 12, 24, 16)
_CIFAR = Parts(3, 2, 0, 1)


def _d2l(_: Any) -> nn.Module:
    return structures.d2l_net(32, (4, 4, 4, 4), 64, in_channels=1, num_classes=10)


def _gpleiss(efficient: bool) -> Callable[[Any], nn.Module]:
    return lambda _: structures.StarNet(0.0, efficient, 12, (16, 16, 16), 24, 4, 10)


def _monai(dimensions: int, classes: int = 10) -> Callable[[Any], nn.Module]:
    return lambda monai: monai.networks.nets.DenseNet121(dimensions, 1, classes)


def metatensor_batch(images: Tensor) -> Tensor:
    """Return the images as MONAI's tutorials get them: from its cached data set by its DataLoader, a MetaTensor."""
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import EnsureTyped

    volumes = [{"img": image} for image in images]
    dataset = CacheDataset(volumes, EnsureTyped("img", track_meta=True), progress=False)
    return next(iter(DataLoader(dataset, batch_size=len(volumes))))["img"]


def _timm_maps(timm: Any) -> nn.Module:
    backbone = timm.create_model("densenet121", features_only=True)
    return image_structures.OnMaps(backbone, backbone.feature_info.channels(), 10)


def _pytorchcv(name: str) -> Callable[[Any], nn.Module]:
    return lambda lib: lib.model_provider.get_model(name, pretrained=False)


NETS = {
    "timm:densenet121": Net("timm", lambda lib: lib.create_model("densenet121"), 8, 224),
    "timm:densenetblur121d": Net("timm", lambda lib: lib.create_model("densenetblur121d"), 8, 224),
    "timm:densenet121-features_only": Net("timm", _timm_maps, 8, 224, Parts(4, 3, 1, 0)),
    "monai:densenet121-2d": Net("monai.networks.nets", _monai(2), 8, 224),
    "monai:densenet121-3d": Net("monai.networks.nets", _monai(3), 2, 64),
    "monai:tutorial-3d": Net("monai.networks.nets", _monai(3, 2), 2, 96, load=metatensor_batch),
    "smp:unet-densenet121": Net(
        "segmentation_models_pytorch",
        lambda lib: lib.Unet("densenet121", encoder_weights=None, classes=10),
        4,
        224,
        Parts(4, 3, 1, 0),
    ),
    "torchxrayvision:densenet121": Net(
        "torchxrayvision", lambda lib: lib.models.DenseNet(weights=None), 8, 224
    ),
    "pytorchcv:densenet121": Net("pytorchcv.model_provider", _pytorchcv("densenet121"), 8, 224),
    "pytorchcv:densenet40_k12": Net(
        "pytorchcv.model_provider", _pytorchcv("densenet40_k12_cifar10"), 32, 32, _CIFAR
    ),
    "gpleiss:densenet_bc_100_12": Net(None, _gpleiss(False), 32, 32, _CIFAR),
    "gpleiss:densenet_bc_100_12-efficient": Net(None, _gpleiss(True), 32, 32, _CIFAR),
    "d2l:densenet": Net(None, _d2l, 64, 96),
    "tutorial:densenet169": Net(
        None,
        lambda _: structures.tutorial_net(0.2, 32, (6, 12, 32, 32), 64, 1000),
        4,
        224,
        Parts(4, 3, 0, 0),
    ),
    "kuangliu:densenet_cifar": Net(
        None, lambda _: cifar_structures.KuangliuNet(_IMAGENET, 12, 10), 32, 32, Parts(4, 3, 0, 1)
    ),
    "weiaicunzai:densenet121": Net(
        None, lambda _: cifar_structures.WeiaicunzaiNet(_IMAGENET, 32, 100), 32, 32, Parts(4, 3, 0, 1)
    ),
    "bamos:densenet_bc_100_12": Net(None, lambda _: cifar_structures.BamosNet(16, 12, 10), 32, 32, _CIFAR),
    "andreasveit:densenet_bc_100_12": Net(
        None, lambda _: cifar_structures.AndreasveitNet(16, 12, 10), 32, 32, _CIFAR
    ),
    "mmpretrain:densenet121": Net(
        None, lambda _: image_structures.MmpretrainNet(_IMAGENET, 32, 64, 4, 1000), 8, 224
    ),
    # DenseASPP's last five layers are a block, too.
    "denseaspp:densenet121": Net(
        None,
        lambda _: image_structures.DenseAspp(_IMAGENET, 32, 64, 4, (128, 64), 19),
        2,
        224,
        Parts(5, 4, 1, 0),
    ),
    "fcdensenet:fcdensenet57": Net(
        None, lambda _: image_structures.FcDenseNet(4, 5, 12, 48, 12), 2, 224, Parts(11, 5, 0, 0)
    ),
    # With the suite's layers and sizes, but training steps of smaller batches.
    "kernelbench:13-transition": Net(
        None, lambda _: kernelbench.TransitionLayer(32, 64), 8, 256, Parts(0, 1, 0, 0)
    ),
    "kernelbench:14-block": Net(None, lambda _: kernelbench.DenseBlock(6, 32, 32), 4, 224, Parts(1, 0, 0, 0)),
    "kernelbench:15-densenet121": Net(None, lambda _: kernelbench.Net(kernelbench.IMAGENET["121"]), 4, 224),
    "kernelbench:16-densenet201": Net(None, lambda _: kernelbench.Net(kernelbench.IMAGENET["201"]), 4, 224),
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


def load(name: str, images: Tensor) -> Tensor:
    """Return the images as the loader of the library that has the net `name` gives them; the same for every other model."""
    net = NETS.get(name)
    return images if net is None or net.load is None else net.load(images)
