"""The model of a run: built by name for the data, and run fused, unfused or checkpointed, as --impl says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effdense import models
from effdense.conversion import convert
from effdense.conversion.class_swap import is_fused_kind
from effdense.nn.kinds import CONVS
from effdense.nn.plain import run_plain
from effdense.train.settings import RunConfig


def build(settings: RunConfig, classes: int, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights from the global random state, and the options that `effdense.models.build` had.

    Args:
        settings: the run's.
        classes: how many the data have.
        channels: of the data's images. torchvision's models have three whatever comes.

    Raises:
        OSError: the file with the weights cannot be opened.
        ValueError: there is no such model, or not with these options; the weights do not fit.
    """
    library = settings.model.partition(":")[0] if ":" in settings.model else ""
    options: dict[str, Any] = {"num_classes": classes}
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
        models.load_weights(model, settings.weights, strip_classifier=True)
    if settings.freeze_features:
        if not isinstance(features := getattr(model, "features", None), nn.Module):
            raise ValueError(f"--freeze-features: model {settings.model!r} has no part called features")
        features.requires_grad_(False)
    if settings.impl == "effdense":
        convert(model, memory=settings.memory)
        if not any(is_fused_kind(module) for module in model.modules()):
            raise ValueError(
                f"--impl effdense: nothing in model {settings.model!r} can be converted; --impl naive trains it as it is"
            )
    elif not library:
        run_plain(model, checkpointed=settings.impl == "checkpoint")
    return model, options


def input_channels(model: nn.Module) -> int:
    """Of the images that a model takes."""
    channels: int = next(m for m in model.modules() if isinstance(m, CONVS)).in_channels
    return channels
