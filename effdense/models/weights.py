"""Weights of other libraries' DenseNets, read into models with torchvision's keys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effdense import tensor_files

Model = TypeVar("Model", bound=nn.Module)

# What differs from torchvision's keys, and what it becomes.
_KEYS = (
    # nn.DataParallel, DistributedDataParallel; torch.compile; Lightning's modules
    (re.compile(r"^(module\.|_orig_mod\.|_forward_module\.|model\.|net\.)+"), ""),
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),  # MONAI
    (re.compile(r"^class_layers\.out\."), "classifier."),  # MONAI
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),  # torchvision's published files
    (re.compile(r"^features\.norm_final\."), "features.norm5."),  # gpleiss
)
_HOLDERS = ("state_dict", "model")  # where checkpoints keep the weights, if not at the top
_CLASSIFIER = ("classifier.weight", "classifier.bias")
_PUBLISHED = "https://download.pytorch.org/models/"
_FILES = {
    "densenet121": "densenet121-a639ec97.pth",
    "densenet161": "densenet161-8d451a50.pth",
    "densenet169": "densenet169-b2777c0a.pth",
    "densenet201": "densenet201-c1103571.pth",
}


def _our_key(key: str) -> str:
    for pattern, replacement in _KEYS:
        key = pattern.sub(replacement, key)
    return key


def _read(weights: Any) -> dict[str, Tensor]:
    """A state_dict with our keys."""
    what = "weights"
    wrong: type[Exception] = TypeError
    if isinstance(weights, (str, os.PathLike)):
        what, wrong = os.fspath(weights), ValueError
        weights = tensor_files.load_tensors(weights)
    for holder in _HOLDERS:
        if isinstance(weights, Mapping) and isinstance(weights.get(holder), Mapping):
            weights = weights[holder]
    if not isinstance(weights, Mapping):
        expected = "hold" if wrong is ValueError else "be a path or"
        raise wrong(f"load_weights: {what} must {expected} a state_dict, got {type(weights).__name__}")
    state: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"load_weights: {what} must map names to tensors, but {key!r} is {type(tensor).__name__}; a checkpoint "
                f"may hold them as {' or '.join(map(repr, _HOLDERS))}"
            )
        own_key = _our_key(key)
        if own_key in state:
            raise ValueError(f"load_weights: two of the weights' keys mean {own_key}, one is {key}")
        state[own_key] = tensor
    return state


def _listed(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what} {', '.join(names[:5])}{more}"] if names else []


def load_weights(
    model: Model,
    weights: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strip_classifier: bool = False,
) -> Model:
    """Loads a DenseNet's weights from the layout of torchvision (new and old keys), timm, gpleiss or MONAI.

    Everything has to fit: nothing is loaded otherwise, nor where Ctrl-C comes in between. Only the counters `num_batches_tracked`, which old files do not
    have, may be missing. A file may hold the state_dict itself or a checkpoint with it under "state_dict" or "model".

    Args:
        model: a model with torchvision's keys: one of effdense.models, or torchvision's own.
        weights: a file that torch.save wrote, or one of safetensors, or a state_dict.
        strip_classifier: leave the model's classifier as it is, for another number of classes.

    Returns:
        The same model.

    Raises:
        OSError: the file cannot be opened.
        TypeError: weights are neither a path nor a mapping.
        ValueError: the file is damaged, or the weights do not fit; the message says which keys are missing, which are too many and which have other
            shapes.

    Examples:
        >>> trained = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10)
        >>> model = effdense.models.DenseNet(8, (2, 2), 8, num_classes=3)
        >>> model = effdense.models.load_weights(model, trained.state_dict(), strip_classifier=True)
    """
    state, wanted = _read(weights), model.state_dict()
    if strip_classifier:
        state = {key: tensor for key, tensor in state.items() if key not in _CLASSIFIER}
    kept = _CLASSIFIER if strip_classifier else ()
    missing = [
        k for k in wanted if k not in state and k not in kept and not k.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    quantised = [
        k for k, t in wanted.items() if k in state and state[k].is_floating_point() != t.is_floating_point()
    ]
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("load_weights: the model is on the meta device; give it memory with to_empty first")
    problems = [
        *_listed("missing:", missing),
        *_listed("unknown:", unexpected),
        *_listed("other kinds of numbers:", quantised),
        *_listed("other shapes:", shapes),
    ]
    if problems:
        only_classes = not (missing or unexpected or quantised) and all(
            s.startswith("classifier.") for s in shapes
        )
        hint = "; strip_classifier=True keeps the model's own classifier" if only_classes else ""
        source = f" in {os.fspath(weights)}" if isinstance(weights, (str, os.PathLike)) else ""
        raise ValueError(
            f"load_weights: the weights{source} do not fit {type(model).__name__}: {'; '.join(problems)}{hint}"
        )
    before = {key: tensor.clone() for key, tensor in wanted.items()}
    try:
        model.load_state_dict(state, strict=False)
    except BaseException:  # Ctrl-C, or a module's own hook
        model.load_state_dict(before, strict=False)
        raise
    return model


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's state_dict, for `load_weights`: in safetensors' form if the name ends in .safetensors, else by torch.save.

    Raises:
        OSError: it cannot be written; the message says what is there instead.

    Examples:
        >>> model = effdense.models.densenet_cifar(10, growth_rate=4)
        >>> effdense.models.save_weights(model, "model.pt")
        >>> model = effdense.models.load_weights(model, "model.pt")
    """
    tensor_files.save_tensors(model.state_dict(), path)


def load_published(model: nn.Module, name: str, weights: Any, progress: bool) -> None:
    """Downloads what torchvision published for this model; `weights` is a name for them or torchvision's enum member."""
    file = _FILES.get(name)
    if file is None:
        raise ValueError(f"{name}: no weights have been published for it, weights must be None")
    asked = getattr(weights, "url", None)
    if weights not in ("DEFAULT", "IMAGENET1K_V1") and asked != _PUBLISHED + file:
        raise ValueError(f'{name}: weights must be None, "DEFAULT" or "IMAGENET1K_V1", got {weights!r}')
    state = torch.hub.load_state_dict_from_url(
        _PUBLISHED + file, map_location="cpu", progress=progress, check_hash=True, weights_only=True
    )
    load_weights(model, state)
