"""A run's settings: the recipes of papers and tutorials, and every other option of the command line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

DATA = ("fashion-mnist", "cifar10", "cifar100", "folder")
IMPLS = ("naive", "checkpoint", "effdense")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTATIONS = ("none", "crop-flip", "resized-crop")
OPTIMIZERS = ("sgd", "adam")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a net is trained. A batch is what one step of the optimizer sees, over all processes and parts."""

    epochs: int
    batch_size: int
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0  # sgd's
    nesterov: bool = False
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()  # the parts of the epochs after which the learning rate falls
    drop_factor: float = 0.1
    augment: str = (
        "none"  # crop-flip: 4 pixels of border, a random crop, half mirrored; resized-crop: arXiv 1409.4842's
    )
    drop_rate: float = 0.0  # dropout
    resize: int | None = None  # images, to that height and width
    pad: int | None = None  # with zeros, to that height and width, before all else

    def lr_in(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: it falls between epochs, never before a part is over."""
        dropped = sum(epoch >= math.ceil(part * self.epochs - 1e-9) for part in self.drops)
        return self.lr * self.drop_factor**dropped


# Huang et al., arXiv 1608.06993, section 4.2. Without augmentation they drop out: DROP_RATE.
_CIFAR = Recipe(
    epochs=300,
    batch_size=64,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    drops=(0.5, 0.75),
    augment="crop-flip",
)
RECIPES = {
    "cifar": _CIFAR,
    # The same section: drops at epochs 30 and 60 of 90.
    "imagenet": dataclasses.replace(
        _CIFAR, epochs=90, batch_size=256, drops=(1 / 3, 2 / 3), augment="resized-crop", resize=224
    ),
    # Zhang et al., "Dive into Deep Learning", DenseNet's section, in the editions before lr 0.01 and batches of 128.
    "d2l": Recipe(epochs=10, batch_size=256, resize=96),
    # What tutorials do; their other form is --optimizer sgd --drops 0.5,0.75, drops at epochs 20 and 30.
    "tutorial": Recipe(epochs=40, batch_size=16, optimizer="adam", lr=0.001),
}
DROP_RATE = {"cifar": 0.2}  # with --augment none


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run: the recipe, what is trained on what, and how."""

    model: str
    data: str
    recipe_name: str
    recipe: Recipe
    out: Path
    impl: str = "effdense"
    memory: str = "balanced"
    data_root: Path | None = None
    channels: int | None = None  # with which a folder's images are read; None: 3
    weights: Path | None = None  # to begin with; the classifier is new, unless it is kept
    keep_classifier: bool = False
    freeze_features: bool = False
    limit_train: int | None = None
    accumulate: int = 1  # parts of a batch, one after the other
    amp: str = "off"
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    sync_bn: bool = False
    seed: int = 0
    device: str = "cpu"
    workers: int = 2  # threads that read a folder's images
    resume: bool = False
    epochs_given: bool = False  # not left to the recipe: a run that goes on may have others
    save_steps: int | None = None
    save_seconds: float = 600.0
    log_every: int = 50  # steps

    def fixed(self) -> dict[str, Any]:
        """What has to stay the same for `resume`, in plain types: all that decides about the losses, and who computes them."""
        names = (
            "model",
            "impl",
            "data",
            "keep_classifier",
            "freeze_features",
            "limit_train",
            "accumulate",
            "amp",
            "dtype",
            "sync_bn",
            "seed",
        )
        plain = {
            "drops": list(self.recipe.drops),
            "weights": self.weights and str(self.weights),
            "channels": self.channels or 3,
        }
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self.recipe) | plain
