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
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("drops", "cosine")


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
    schedule: str = "drops"  # or cosine: half a period, down to 0 at the end
    warmup_epochs: float = 0.0  # in which the learning rate rises in a line
    label_smoothing: float = 0.0
    clip_norm: float | None = None  # of all gradients together
    ema_decay: float = 0.0  # of the average of the weights, which is tested and kept; 0: none
    class_weights: str | tuple[float, ...] | None = None  # balanced, or one for each class
    mixup: float = 0.0  # both parameters of its Beta distribution; 0: none
    val_split: float = 0.0  # the part of the training images, of every class, that picks the best epoch
    early_stop: int | None = None  # epochs in a row that were not the best

    def lr_in(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0: it falls between epochs, never before a part is over."""
        dropped = sum(epoch >= math.ceil(part * self.epochs - 1e-9) for part in self.drops)
        return self.lr * self.drop_factor**dropped

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0; `steps`: in an epoch.

        It comes from the step alone, so that a run that goes on has nothing to remember. `cosine` has the values of PyTorch's
        SequentialLR with LinearLR and CosineAnnealingLR.
        """
        warmup = round(self.warmup_epochs * steps)
        if step < warmup:
            rising = (step + 1) / (warmup + 1)
            return rising * (self.lr if self.schedule == "cosine" else self.lr_in(step // steps))
        if self.schedule == "drops":
            return self.lr_in(step // steps)
        part = (step - warmup) / (self.epochs * steps - warmup)
        return self.lr * (1 + math.cos(math.pi * part)) / 2


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
    # For few labelled images, from weights that have seen others (Fine-tune in docs/train.md).
    "finetune": Recipe(
        epochs=20,
        batch_size=32,
        optimizer="adamw",
        lr=0.001,
        weight_decay=0.05,
        augment="crop-flip",
        schedule="cosine",
        warmup_epochs=1.0,
        label_smoothing=0.1,
        clip_norm=1.0,
        ema_decay=0.99,
        val_split=0.2,
        early_stop=5,
    ),
}
DROP_RATE = {"cifar": 0.2}  # with --augment none
# What checkpoints of earlier versions do not say about their runs.
UNSAID: dict[str, Any] = {"pretrained": False} | {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.default is not dataclasses.MISSING
}


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
    pretrained: bool = False  # the same with what its library has published
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
            "pretrained",
            "limit_train",
            "accumulate",
            "amp",
            "dtype",
            "sync_bn",
            "seed",
        )
        weights = self.recipe.class_weights
        plain = {
            "drops": list(self.recipe.drops),
            "class_weights": list(weights) if isinstance(weights, tuple) else weights,
            "weights": self.weights and str(self.weights),
            "channels": self.channels or 3,
        }
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self.recipe) | plain
