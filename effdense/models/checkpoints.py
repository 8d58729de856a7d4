"""Models from the files that `effdense train` writes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from effdense import tensor_files
from effdense.engine.validation import check_path
from effdense.models.names import build
from effdense.models.preparation import SIZES, STATISTICS, Preparation, for_test
from effdense.models.weights import load_weights, our_names

if TYPE_CHECKING:

    class Trained(nn.Module):
        """What `load_checkpoint` gives, to type checkers: a module of any class with these attributes."""

        class_names: list[str]
        prepare: Preparation
        image_size: tuple[int, int] | None
        model_name: str


def _sizes(name: str, state: Mapping[str, Any]) -> dict[str, int]:
    """The number of classes and of the images' channels, as options of the model's constructor."""
    weights = {
        k: t for k, t in state.items() if isinstance(k, str) and isinstance(t, torch.Tensor) and t.dim() > 1
    }
    if not weights:
        return {}
    named = {name: weights[key] for key, name in our_names(weights).by_key.items()}
    in_order = list(
        weights.values()
    )  # of nets with other names; a file of safetensors need not keep their order
    first, last = (
        named.get("features.conv0.weight", in_order[0]),
        named.get("classifier.weight", in_order[-1]),
    )
    sizes = {} if last.dim() > 2 else {"num_classes": last.shape[0]}
    library = name.partition(":")[0] if ":" in name else ""
    if not library and (spatial := first.dim() - 2) in (1, 3):
        sizes["spatial_dims"] = spatial
    channels = {"": "in_channels", "timm": "in_chans"}.get(library)
    return {**sizes, channels: first.shape[1]} if channels else sizes


def load_checkpoint(path: str | os.PathLike[str], name: str | None = None) -> Trained:
    """Builds the model that a checkpoint of `effdense train` holds, with its weights.

    Of a run's file the model has the attributes `class_names`, of its outputs, and `prepare`, a `Preparation` (a file with weights alone has neither):
    `model.eval()(model.prepare("image.png"))` are the scores of an image, prepared as those of the run's test were;
    `image_size` is the height and width that they then have, or None, `model_name` what `build` calls the model.

    Args:
        path: such a file, or one with a state_dict alone.
        name: of the model (see `build`), where the file does not say it.

    Raises:
        ImportError: the file is one of safetensors, which is not installed.
        OSError: the file cannot be opened.
        TypeError: path is no path, or name no text.
        ValueError: it is damaged, or does not say which model it holds, or that is another one.

    Examples:
        >>> model = effdense.models.densenet_cifar(10, growth_rate=4)
        >>> effdense.models.save_weights(model, "weights.pt")
        >>> model = effdense.models.load_checkpoint("weights.pt", "densenet_bc_10_4")
    """
    check_path("load_checkpoint", "path", path)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"load_checkpoint: name must be a str, got {type(name).__name__}")
    return restore(tensor_files.load_tensors(path), path, name)


def restore(content: Any, path: str | os.PathLike[str], name: str | None = None) -> Trained:
    """Builds the model of what a file holds; `path` is for messages, the rest as in `load_checkpoint`."""
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
    options = content.get("options", {}) if said else {}
    if not isinstance(state, Mapping) or not isinstance(options, Mapping):
        raise ValueError(f"{path} is damaged: its weights ('state_dict') and options must be dicts")
    try:
        model = build(name, **{**_sizes(name, state), **options})
    except Exception as error:  # whatever a constructor makes of options that are none
        told = f" with the entry 'options', {tensor_files.shortly(options)}" if options else ""
        raise ValueError(
            f"{path}: model {name!r} cannot be built{told}: {' '.join(str(error).split())}"
        ) from error
    dtypes = [t.dtype for t in state.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    try:
        load_weights(model.to(dtypes[0]) if dtypes else model, state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the weights of {name!r}: {error}") from error
    if said:
        _add_what_is_known(model, content, path)
        count, names = _sizes(name, state).get("num_classes"), vars(model).get("class_names")
        if count is not None and names is not None and len(names) != count:
            raise ValueError(
                f"{path} is damaged: its entry 'class_names' has {len(names)} names, and the model {count} classes"
            )
    return cast("Trained", model)


def _add_what_is_known(model: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """The attributes that `load_checkpoint` names, where the file says it: those of earlier versions in other words."""
    recipe, settings = content.get("recipe"), content.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    prepare: Preparation | None = None
    if "preparation" in content:
        with _reading(path, "preparation"):
            prepare = Preparation.checked(content["preparation"])
    elif "in_channels" in content:
        with _reading(path, "settings"):
            STATISTICS[data]  # type: ignore[index]
        with _reading(path, "recipe"):
            given = content["in_channels"], recipe["augment"], recipe["resize"], recipe["pad"]  # type: ignore[index]
        with _reading(path, "in_channels"):
            prepare = Preparation.checked(dataclasses.asdict(for_test(str(data), *given)))
    if prepare is not None:
        vars(model)["prepare"] = prepare
        vars(model)["image_size"] = prepare.resize or prepare.pad or SIZES.get(str(data))
    vars(model)["model_name"] = content["model"]
    if "class_names" in content:
        names = content["class_names"]
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, (str, int)) for n in names):
            raise ValueError(f"{path} is damaged: its entry 'class_names' must be a list of names")
        vars(model)["class_names"] = list(names)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Names the file and the entry that something cannot be read from."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{error} is missing or not known" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is damaged: its entry {name!r}, which says how images are prepared, cannot be read: {reason}"
        ) from error
