"""DenseNets by constructor or by name, built from effdense.nn: they run fused without `convert`."""

from effdense.models.checkpoints import load_checkpoint
from effdense.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet169_tutorial,
    densenet201,
    densenet264,
    densenet_cifar,
    densenet_d2l,
)
from effdense.models.names import build
from effdense.models.preparation import Preparation
from effdense.models.timm_registry import register_timm
from effdense.models.weights import load_weights, save_weights

__all__ = [
    "DenseNet",
    "Preparation",
    "build",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet169_tutorial",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "densenet_d2l",
    "load_checkpoint",
    "load_weights",
    "register_timm",
    "save_weights",
]
