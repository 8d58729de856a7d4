"""What learns: the model with its optimizer, the average of its weights, and the loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effdense import extras
from effdense.train import checkpoint, net
from effdense.train.settings import AMP, Recipe, RunConfig


class Learner:
    """A model that is trained by a recipe.

    Args:
        settings: the run's.
        model: on its device.
        labels: int64 [N] of the training images, by which classes are weighted.
        classes: how many there are.

    Raises:
        ImportError: mixup needs torchvision, which is missing.
        ValueError: the weights of the classes are not one for each.
    """

    def __init__(self, settings: RunConfig, model: nn.Module, labels: Tensor, classes: int) -> None:
        self._recipe, self.model = settings.recipe, model
        self._amp = AMP[settings.amp]
        like = next(model.parameters())
        self.optimizer = net.optimizer(self._recipe, model)
        self._scaler = torch.amp.GradScaler(like.device.type, enabled=settings.amp == "fp16")
        self._average: AveragedModel | None = None
        if self._recipe.ema_decay:
            average = get_ema_multi_avg_fn(self._recipe.ema_decay)
            self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        weights = class_weights(self._recipe, labels, classes)
        self._weights = None if weights is None else weights.to(like)
        self._mix: Any = None
        if self._recipe.mixup:
            v2 = extras.load("torchvision.transforms.v2", "--mixup")
            self._mix = v2.MixUp(alpha=self._recipe.mixup, num_classes=classes)

    @property
    def tested(self) -> nn.Module:
        """What is tested and kept: the average of the weights, if there is one."""
        return self.model if self._average is None else self._average.module

    @property
    def lr(self) -> float:
        """The learning rate of the step."""
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def loss(self, model: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and how many scores are highest where they should be.

        In training (`model.training`) it is what the recipe makes of it; of mixed images the larger part is what should be.
        """
        recipe, training = self._recipe, model.training
        targets = labels
        if training and self._mix is not None:
            x, targets = self._mix(x, labels)
            labels = targets.argmax(1)
        with torch.autocast(x.device.type, self._amp, enabled=self._amp is not None):
            scores = model(x)
            if targets.is_floating_point():
                targets = targets.to(scores.dtype)
            smoothing = recipe.label_smoothing if training else 0.0
            if training and self._weights is not None:  # a sum, which is the same of a batch and of its parts
                weights = self._weights.to(scores.dtype)
                total = F.cross_entropy(scores, targets, weights, reduction="sum", label_smoothing=smoothing)
                loss = total / len(labels)
            else:
                loss = F.cross_entropy(scores, targets, label_smoothing=smoothing)
        return loss, (scores.argmax(1) == labels).sum()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a part of the batch."""
        self._scaler.scale(loss).backward()

    def step(self) -> None:
        """Moves the weights by the gradients, and their average."""
        if self._recipe.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self._recipe.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.model)

    def is_finite(self) -> bool:
        """Whether all weights and running statistics are."""
        models = {id(model): model for model in (self.model, self.tested)}
        tensors = [t for model in models.values() for t in model.state_dict().values()]
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    def state(self) -> dict[str, Any]:
        """For a checkpoint: `state_dict` is what is tested, `ema` has the weights that it is the average of, if it is one."""
        average = self._average
        return {
            "state_dict": self.tested.state_dict(),
            "ema": None
            if average is None
            else {"steps": int(average.n_averaged), "trained": self.model.state_dict()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Goes on from `state`, which `path` holds.

        Raises:
            ValueError: something of it is missing or of another kind; the message names it.
        """
        said = f"--ema-decay is {self._recipe.ema_decay:g}"
        wanted = f"None, since {said}" if self._average is None else f"a dict, since {said}"
        fits = (saved["ema"] is None) == (self._average is None)
        checkpoint.check_entry(path, saved, "ema", fits, wanted)
        with checkpoint.reading(path, "state_dict"):
            checkpoint.check_tensors(saved["state_dict"], self.tested.state_dict())
            self.tested.load_state_dict(saved["state_dict"])
        if self._average is not None:
            with checkpoint.reading(path, "ema"):
                checkpoint.check_tensors(saved["ema"]["trained"], self.model.state_dict())
                self._average.n_averaged.fill_(saved["ema"]["steps"])
                self.model.load_state_dict(saved["ema"]["trained"])
        with checkpoint.reading(path, "optimizer"):
            self._restore_optimizer(saved["optimizer"])
        with checkpoint.reading(path, "scaler"):
            if self._scaler.is_enabled() and not all(
                isinstance(v, (int, float)) for v in saved["scaler"].values()
            ):
                raise ValueError("numbers were expected")
            self._scaler.load_state_dict(saved["scaler"])

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Its state of every parameter, and where the learning rate was. Other settings are the recipe's, which are the same (checkpoint.py)."""
        groups, state = self.optimizer.state_dict()["param_groups"], saved["state"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not isinstance(saved["param_groups"], list):
            raise ValueError("param_groups must be a list")
        count = sum(len(group["params"]) for group in saved["param_groups"])
        rates = [group["lr"] for group in saved["param_groups"]]
        if len(rates) != len(groups) or not all(
            isinstance(r, (int, float)) and 0 <= r < math.inf for r in rates
        ):
            raise ValueError(f"{len(groups)} param_groups, each with a learning rate lr, were expected")
        if count != len(parameters):
            raise ValueError(f"it is of {count} parameters, and {len(parameters)} are trained")
        for number, own in state.items():
            like = parameters[number]
            if own.keys() != set(_STATE[self._recipe.optimizer]):
                raise ValueError(
                    f"parameter {number} must have {', '.join(_STATE[self._recipe.optimizer])}, it has {', '.join(map(str, own))}"
                )
            for name, value in own.items():
                shape = torch.Size() if name == "step" else like.shape
                plain = value is None and name == "momentum_buffer"
                if not plain and not (
                    isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
                ):
                    raise ValueError(
                        f"{name} of parameter {number} must be a tensor {list(shape)} of floating point"
                    )
        groups = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


# What the optimizers keep of a parameter.
_STATE = {
    "sgd": ("momentum_buffer",),
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
}


def class_weights(recipe: Recipe, labels: Tensor, classes: int) -> Tensor | None:
    """float64 [classes], whose mean over the training images is 1, so that the learning rate keeps its meaning.

    Raises:
        ValueError: there are more or fewer of them than classes, or all images' are 0.
    """
    given = recipe.class_weights
    if given is None:
        return None
    counts = labels.bincount(minlength=classes).double()
    if given == "balanced":
        weights = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    else:
        weights = torch.tensor(given, dtype=torch.float64)
        if len(weights) != classes:
            raise ValueError(
                f"--class-weights: balanced, or one for each of the {classes} classes was expected, got {len(weights)}"
            )
    mean = (weights * counts).sum() / counts.sum()
    if not mean > 0:
        raise ValueError("--class-weights: one above 0 was expected for a class with training images")
    return weights / mean
