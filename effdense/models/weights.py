"""Weights of other libraries' DenseNets, read into models with torchvision's keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from effdense import tensor_files
from effdense.engine.validation import check_flag, check_module, check_path

Model = TypeVar("Model", bound=nn.Module)

# What differs from torchvision's keys, and what it becomes.
_KEYS = (
    # what torch.compile, Lightning, FSDP and checkpointing put in between
    (
        re.compile(
            r"(^|\.)(?:_(?:orig_mod|forward_module|fsdp_wrapped_module|checkpoint_wrapped_module)\.)+"
        ),
        r"\1",
    ),
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),  # MONAI
    (re.compile(r"(^|\.)class_layers\.out\."), r"\1classifier."),  # MONAI
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2."),  # torchvision's published files
    (re.compile(r"(^|\.)features\.norm_final\."), r"\1features.norm5."),  # gpleiss
)
# In front of a DenseNet's keys: what wraps it, or the name that it has in a larger model.
_FRONT = re.compile(r"((?:\w+\.)*?)(?:features|classifier)\.")
_WRAPPERS = re.compile(r"((?:module|model|net)\.)+")  # in front of others'
_COUNTERS = re.compile(r"(.*\.)?(?:num_batches_tracked|n_averaged)")  # the second is torch's AveragedModel's
_HOLDERS = ("state_dict", "model")  # where checkpoints keep the weights, if not at the top
_CLASSIFIER = ("classifier.weight", "classifier.bias")
_PUBLISHED = "https://download.pytorch.org/models/"
_FILES = {
    "densenet121": "densenet121-a639ec97.pth",
    "densenet161": "densenet161-8d451a50.pth",
    "densenet169": "densenet169-b2777c0a.pth",
    "densenet201": "densenet201-c1103571.pth",
}


class _Names(NamedTuple):
    by_key: dict[str, str]  # what a key is called here
    fronts: list[str]  # that have been in front of them


def our_names(keys: Iterable[str]) -> _Names:
    """What each key is in torchvision's layout, without what is in front of all of them."""
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, replacement in _KEYS:
            name = pattern.sub(replacement, name)
        names[key] = name
    fronts = {m[1] for name in names.values() if (m := _FRONT.match(name))}
    if not fronts:
        counted = [name for name in names.values() if name != "n_averaged"]
        if counted and all(_WRAPPERS.match(name) for name in counted):
            names = {key: _WRAPPERS.sub("", name, count=1) for key, name in names.items()}
    elif len(fronts) == 1:
        names = {key: name.removeprefix(*fronts) for key, name in names.items()}
    return _Names(names, sorted(fronts))


def _held(weights: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state_dict in a checkpoint: under a usual name, or the only one in it."""
    for holder in _HOLDERS:
        if isinstance(weights.get(holder), Mapping):
            weights = weights[holder]
    held = [v for v in weights.values() if _is_state(v)]
    return held[0] if len(held) == 1 and not any(isinstance(v, Tensor) for v in weights.values()) else weights


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _read(weights: Any) -> dict[str, Tensor]:
    """A state_dict."""
    what, expected = "weights", "be a path or"
    wrong: type[Exception] = TypeError
    if isinstance(weights, (str, os.PathLike)):
        what, wrong, expected = os.fspath(weights), ValueError, "hold"
        if re.match(r"https?://", str(what)):
            raise ValueError(
                f"load_weights: weights must be a file, got the address {what}; torch.hub.load_state_dict_from_url loads it"
            )
        weights = tensor_files.load_tensors(weights)
    if not isinstance(weights, Mapping):
        hint = "; its state_dict() is one" if isinstance(weights, nn.Module) else ""
        raise wrong(f"load_weights: {what} must {expected} a state_dict, got {type(weights).__name__}{hint}")
    state = _held(weights)
    for key, tensor in state.items():
        if isinstance(key, str) and isinstance(tensor, Tensor):
            continue
        held = [k for k, v in state.items() if _is_state(v)]
        many = f"there are state_dicts as {' and '.join(map(repr, held))}, one of which can be given"
        is_ = f"{key!r} is {type(tensor).__name__}" if isinstance(key, str) else f"{key!r} is no name"
        raise ValueError(
            f"load_weights: {what} must map names to tensors, but {is_}; "
            + (many if len(held) > 1 else "a checkpoint may hold them as 'state_dict' or 'model'")
        )
    return dict(state)


def _listed(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what} {', '.join(names[:5])}{more}"] if names else []


def _by_name(names: _Names, what: str) -> dict[str, str]:
    """The keys by their names."""
    keys: dict[str, str] = {}
    for key, name in names.by_key.items():
        if name in keys:
            raise ValueError(f"load_weights: two of the {what}' keys mean {name}: {keys[name]} and {key}")
        keys[name] = key
    return keys


def load_weights(
    model: Model,
    weights: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strip_classifier: bool = False,
) -> Model:
    """Loads a DenseNet's weights from the layout of torchvision (new and old keys), timm, gpleiss or MONAI.

    Everything has to fit: nothing is loaded otherwise, nor where Ctrl-C comes in between. Only counters
    (`num_batches_tracked`, which old files do not have, and `n_averaged` of torch's AveragedModel) may be missing or too
    many. What is in front of all keys counts on neither side: `module.`, `_orig_mod.`, or the name in a larger model, such
    as `model.` or `backbone.`. A file may hold the state_dict itself or a checkpoint with it, under "state_dict" or
    "model", or under any name if it is the only one.

    Args:
        model: a model with torchvision's keys: one of effdense.models, or torchvision's own.
        weights: a file that torch.save wrote, or one of safetensors, or a state_dict.
        strip_classifier: leave the model's classifier as it is, for another number of classes.

    Returns:
        The same model.

    Raises:
        ImportError: the file is one of safetensors, which is not installed.
        OSError: the file cannot be opened.
        TypeError: model is no module, or weights are neither a path nor a mapping.
        ValueError: the file is damaged, or the weights do not fit; the message says which keys are missing, which are too many and which have other
            shapes.

    Examples:
        >>> trained = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10)
        >>> model = effdense.models.DenseNet(8, (2, 2), 8, num_classes=3)
        >>> model = effdense.models.load_weights(model, trained.state_dict(), strip_classifier=True)
    """
    check_module("load_weights", "model", model)
    check_flag("load_weights", "strip_classifier", strip_classifier)
    given, own = _read(weights), model.state_dict()
    names, own_names = our_names(given), our_names(own)
    if len(names.fronts) > 1 and len(own_names.fronts) < 2:
        raise ValueError(
            f"load_weights: the weights are of several models, whose names begin with {', '.join(map(repr, names.fronts))}; "
            "give those of one"
        )
    state = {name: given[key] for name, key in _by_name(names, "weights").items()}
    keys = _by_name(own_names, "model")
    wanted = {name: own[key] for name, key in keys.items()}
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("load_weights: the model is on the meta device; give it memory with to_empty first")
    if strip_classifier:
        state = {name: tensor for name, tensor in state.items() if name not in _CLASSIFIER}
    if problems := _misfits(state, wanted, _CLASSIFIER if strip_classifier else ()):
        source = f" in {os.fspath(weights)}" if isinstance(weights, (str, os.PathLike)) else ""
        raise ValueError(f"load_weights: the weights{source} do not fit {type(model).__name__}: {problems}")
    before = {key: tensor.clone() for key, tensor in own.items()}
    try:
        model.load_state_dict(
            {keys[name]: tensor for name, tensor in state.items() if name in keys}, strict=False
        )
    except BaseException:  # Ctrl-C, or a module's own hook
        model.load_state_dict(before, strict=False)
        raise
    return model


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kept: Sequence[str]) -> str:
    """What of a state_dict does not fit another one, in words; `kept`: what may be missing."""
    both = [(name, state[name], tensor) for name, tensor in wanted.items() if name in state]
    missing = [n for n in wanted if n not in state and n not in kept and not _COUNTERS.fullmatch(n)]
    unexpected = [name for name in state if name not in wanted and name != "n_averaged"]
    shapes = [f"{n} {tuple(a.shape)} for {tuple(b.shape)}" for n, a, b in both if a.shape != b.shape]
    kinds = [n for n, a, b in both if a.is_floating_point() != b.is_floating_point()]
    strange = [
        f"{n} ({'meta' if a.is_meta else a.layout})"
        for n, a, _ in both
        if a.is_meta or a.layout != torch.strided
    ]
    problems = [
        *_listed("missing:", missing),
        *_listed("unknown:", unexpected),
        *_listed("other kinds of numbers:", kinds),
        *_listed("no plain tensors:", strange),
        *_listed("other shapes:", shapes),
    ]
    fits = not (missing or unexpected or kinds or strange)
    only_classes = fits and all(shape.startswith("classifier.") for shape in shapes)
    hint = "; strip_classifier=True keeps the model's own classifier" if problems and only_classes else ""
    return "; ".join(problems) + hint


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's state_dict, for `load_weights`: in safetensors' form if the name ends in .safetensors, else by torch.save.

    Raises:
        OSError: it cannot be written; the message says what is there instead.

    Examples:
        >>> model = effdense.models.densenet_cifar(10, growth_rate=4)
        >>> effdense.models.save_weights(model, "model.pt")
        >>> model = effdense.models.load_weights(model, "model.pt")
    """
    check_module("save_weights", "model", model)
    check_path("save_weights", "path", path)
    state = model.state_dict()
    if meta := [name for name, t in state.items() if isinstance(t, Tensor) and t.is_meta]:
        raise ValueError(f"save_weights: {meta[0]} is on the meta device and has no numbers")
    tensor_files.save_tensors(state, path)


def load_published(model: nn.Module, name: str, weights: Any, progress: bool) -> None:
    """Downloads what torchvision published for this model; `weights` is a name for them or torchvision's enum member."""
    file = _FILES.get(name)
    if file is None:
        raise ValueError(f"{name}: no weights have been published for it, weights must be None")
    asked = getattr(weights, "url", None)
    named = isinstance(weights, str) and weights in ("DEFAULT", "IMAGENET1K_V1")
    if not named and asked != _PUBLISHED + file:
        raise ValueError(f'{name}: weights must be None, "DEFAULT" or "IMAGENET1K_V1", got {weights!r}')
    state = torch.hub.load_state_dict_from_url(
        _PUBLISHED + file, map_location="cpu", progress=progress, check_hash=True, weights_only=True
    )
    load_weights(model, state)
