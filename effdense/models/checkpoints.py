"""Models from the files that `effdense train` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from effdense import tensor_files
from effdense.models.names import build
from effdense.models.preparation import SIZES, Preparation, for_test
from effdense.models.weights import load_weights


def _sizes(name: str, state: Mapping[str, Any]) -> dict[str, int]:
    """The number of classes and of the images' channels, as options of the model's constructor."""
    weights = [t for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 1]
    if not weights:
        return {}
    sizes = {} if weights[-1].dim() > 2 else {"num_classes": weights[-1].shape[0]}
    library = name.partition(":")[0] if ":" in name else ""
    if not library and (spatial := weights[0].dim() - 2) in (1, 3):
        sizes["spatial_dims"] = spatial
    channels = {"": "in_channels", "timm": "in_chans"}.get(library)
    return {**sizes, channels: weights[0].shape[1]} if channels else sizes


def load_checkpoint(path: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Builds the model that a checkpoint of `effdense train` holds, with its weights.

    Of such a file the model has the attributes `class_names`, of its outputs, and `prepare`, a `Preparation`:
    `model.eval()(model.prepare("image.png"))` are the scores of an image, prepared as those of the run's test were;
    `image_size` is the height and width that they then have, or None, `model_name` what `build` calls the model.

    Args:
        path: such a file, or one with a state_dict alone.
        name: of the model (see `build`), where the file does not say it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or does not say which model it holds, or that is another one.
    """
    content = tensor_files.load_tensors(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} must hold a checkpoint or a state_dict, it holds a {type(content).__name__}"
        )
    said = content.get("model")
    said = said if isinstance(said, str) else None
    if name is None and said is None:
        raise ValueError(f"{path} does not say which model it holds: name it (--model)")
    if name and said and name != said:
        raise ValueError(f"{path} holds model {said!r}, not {name!r}")
    name = name or said or ""
    state = content.get("state_dict", content)
    options = content.get("options") if said else None
    try:
        model = build(name, **{**_sizes(name, state), **(options or {})})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model {name!r} cannot be built: {error}") from error
    dtypes = [t.dtype for t in state.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    try:
        load_weights(model.to(dtypes[0]) if dtypes else model, state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the weights of {name!r}: {error}") from error
    if said:
        _add_what_is_known(model, content)
    return model


def _add_what_is_known(model: nn.Module, content: Mapping[str, Any]) -> None:
    """The attributes that `load_checkpoint` names, where the file says it: those of earlier versions in other words."""
    known, recipe = content.get("preparation"), content.get("recipe")
    settings = content.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    if isinstance(known, Mapping):
        vars(model)["prepare"] = Preparation(**known)
    elif isinstance(recipe, Mapping) and "in_channels" in content:
        given = (content["settings"]["data"], content["in_channels"])
        vars(model)["prepare"] = for_test(*given, recipe["augment"], recipe["resize"], recipe["pad"])
    if (prepare := vars(model).get("prepare")) is not None:
        size = prepare.resize or prepare.pad or SIZES.get(str(data))
        vars(model)["image_size"] = size
    vars(model)["model_name"] = content["model"]
    if "class_names" in content:
        vars(model)["class_names"] = list(content["class_names"])
