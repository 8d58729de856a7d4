"""The model of a run: built by name for the data, and run fused, unfused or checkpointed, as --impl says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effdense import models, tensor_files
from effdense.conversion import convert_parts
from effdense.conversion.class_swap import is_fused_kind
from effdense.engine.validation import check_memory
from effdense.nn.kinds import CONVS
from effdense.nn.plain import run_plain
from effdense.train.settings import Recipe, RunConfig


def build(
    settings: RunConfig, class_names: list[str], channels: int, published: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights from the global random state, and the options that `effdense.models.build` had.

    Args:
        settings: the run's.
        class_names: the data's.
        channels: of the data's images. torchvision's models have three whatever comes.
        published: the weights to begin with, of `fetch`; the classifier is new.

    Raises:
        OSError: the file with the weights cannot be opened.
        ValueError: there is no such model, or not with these options; the weights do not fit.
    """
    library = _library(settings.model)
    options: dict[str, Any] = {"num_classes": len(class_names)}
    if library != "torchvision":
        options["in_chans" if library == "timm" else "in_channels"] = channels
    if settings.recipe.drop_rate:
        options["proj_drop_rate" if library == "timm" else "drop_rate"] = settings.recipe.drop_rate
    if library and settings.impl == "checkpoint":
        options["memory_efficient"] = True
    dtype = getattr(torch, settings.dtype)
    try:
        model = models.build(settings.model, **options).to(dtype)
    except TypeError as error:
        raise ValueError(f"model {settings.model!r} cannot be built with {options}: {error}") from error
    if settings.weights is not None and not settings.resume:
        _begin_with(model, settings.weights, class_names if settings.keep_classifier else None)
    if published is not None:
        _begin_with_published(model, settings.model, published)
    if settings.freeze_features:
        if not isinstance(features := getattr(model, "features", None), nn.Module):
            raise ValueError(f"--freeze-features: model {settings.model!r} has no part called features")
        features.requires_grad_(False)
    if settings.impl == "effdense":
        convert_parts(model, check_memory("--memory", settings.memory))
        if not any(is_fused_kind(module) for module in model.modules()):
            raise ValueError(
                f"--impl effdense: nothing in model {settings.model!r} can be converted; --impl naive trains it as it is"
            )
    elif not library:
        run_plain(model, checkpointed=settings.impl == "checkpoint")
    return model, options


def _library(name: str) -> str:
    return name.partition(":")[0] if ":" in name else ""


def fetch(settings: RunConfig, channels: int) -> dict[str, Any] | None:
    """The weights that the model's library has published, for `--pretrained`; None: they are not asked for.

    Raises:
        ValueError: there are none, or they cannot be fetched.
    """
    if not settings.pretrained or settings.resume:
        return None
    library, name = _library(settings.model), settings.model
    try:
        if library == "timm":
            return models.build(name, pretrained=True, in_chans=channels).state_dict()
        return models.build(name, weights="DEFAULT").state_dict()
    except TypeError as error:
        raise ValueError(
            f"--pretrained: nothing has been published for model {name!r}; --weights takes a file"
        ) from error
    except Exception as error:  # whatever a library makes of a network that is not there
        raise ValueError(
            f"--pretrained: the published weights of {name!r} cannot be had: {error}. Without a network, fetch them elsewhere "
            "(torch.save of that model's state_dict()) and name the file with --weights"
        ) from error


def _begin_with_published(model: nn.Module, name: str, weights: Mapping[str, Any]) -> None:
    try:
        models.load_weights(model, weights, strip_classifier=True)
    except ValueError as error:
        reason = str(error).partition("; strip_classifier")[0]
        raise ValueError(
            f"--pretrained: the published weights of {name!r} are for images of 3 channels or have no part called classifier: "
            f"{reason}"
        ) from error


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's, of the parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(trained, recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        trained,
        recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _begin_with(model: nn.Module, path: Path, class_names: list[str] | None) -> None:
    """Loads the weights, with `class_names` those of the classifier, too, if they are those of these classes."""
    weights = tensor_files.load_tensors(path)
    theirs = weights.get("class_names") if isinstance(weights, Mapping) else None
    if class_names is not None and theirs is not None and theirs != class_names:
        raise ValueError(
            f"--keep-classifier: {path} is for other classes, or for these in another order: {_shortly(theirs)}, and the "
            f"data have {_shortly(class_names)}"
        )
    try:
        models.load_weights(model, weights, strip_classifier=class_names is None)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("; strip_classifier")[0]
        hint = "" if class_names is None else "; without --keep-classifier the classifier is new"
        raise ValueError(f"--weights {path}: {reason}{hint}") from error


def _shortly(names: list[str]) -> str:
    return ", ".join(map(str, names[:10])) + (f" … ({len(names)})" if len(names) > 10 else "")


def input_channels(model: nn.Module) -> int:
    """Of the images that a model takes."""
    channels: int = next(m for m in model.modules() if isinstance(m, CONVS)).in_channels
    return channels
