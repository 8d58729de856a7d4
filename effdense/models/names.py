"""Models by the names that every command line takes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effdense import extras
from effdense.models import densenet

_NAMED: dict[str, Any] = {name: getattr(densenet, name) for name in densenet.IMAGENET}
_NAMED |= {name: getattr(densenet, name) for name in ("densenet_d2l", "densenet169_tutorial")}
MOST_PARAMETERS, MOST_LAYERS = (
    10**9,
    1000,
)  # of a name's model; layers in a block. The paper's have 3e7 and 64
_LIBRARIES = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}


def build(name: str, **options: Any) -> nn.Module:
    """Builds a model by its name, with random weights.

    Args:
        name: densenet121, 161, 169, 201, 264; densenet_bc_<depth>_<growth>; densenet_<depth>_<growth> (plain layers,
            no compression); densenet_d2l; densenet169_tutorial; or torchvision:NAME, timm:NAME: theirs, not converted.
        options: what the constructor takes.

    Raises:
        TypeError: the name is no text, or the constructor has no such option.
        ValueError: there is no such model (the message has the nearest name), or its library is not installed.

    Examples:
        >>> model = effdense.models.build("densenet_bc_10_4", num_classes=3)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    if not isinstance(name, str):
        raise TypeError(f"build: name must be a str, got {type(name).__name__}")
    library, colon, other = name.partition(":")
    if colon and library in _LIBRARIES:
        module, function = _LIBRARIES[library]
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"model {name!r} {extras.needed(library)}")
        try:
            builders = importlib.import_module(module)
            if library == "torchvision":  # a detector's backbone would be downloaded otherwise
                options = {**_without_download(builders, other), **options}
            model: nn.Module = getattr(builders, function)(other, **options)
        except (RuntimeError, ValueError) as error:  # what they raise for a name that they do not know
            raise ValueError(f"model {name!r}: {library} says: {error}") from error
        return model
    if name in _NAMED:
        built: nn.Module = _NAMED[name](**options)
        return built
    if match := re.fullmatch(r"densenet_(bc_)?(\d+)_(\d+)", name):
        bottleneck = bool(match[1])
        _check_parameters(name, int(match[2]), int(match[3]), bottleneck)
        try:
            compression = 0.5 if bottleneck else 1.0
            return densenet.densenet_cifar(int(match[2]), int(match[3]), bottleneck, compression, **options)
        except ValueError as error:
            raise ValueError(f"model {name!r}: {error}") from error
    known = [*_NAMED, "densenet_bc_100_12", "densenet_40_12"]
    known += [f"torchvision:{n}" for n in densenet.IMAGENET if n != "densenet264"]
    nearest = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"unknown model {name!r}{f', did you mean {nearest[0]!r}?' if nearest else ''}; there are {', '.join(_NAMED)}, "
        "densenet_bc_<depth>_<growth>, densenet_<depth>_<growth> (plain layers), torchvision:NAME and timm:NAME"
    )


class _Unfilled(TorchFunctionMode):
    """Leaves the numbers of new parameters out, which tensors without memory do not have: to draw them takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _FILL:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **kwargs or {})


_FILL = {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_}


def without_memory(name: str) -> nn.Module:
    """The same on meta tensors, which have shapes and no numbers."""
    with torch.device("meta"), _Unfilled():
        return build(name)


def _without_download(builders: Any, name: str) -> dict[str, None]:
    """The options of a builder of torchvision's that keep it from fetching weights of a part."""
    try:
        parameters = inspect.signature(builders.get_model_builder(name)).parameters
    except (ValueError, AttributeError):  # there is no such model, which is said elsewhere
        return {}
    return {"weights_backbone": None} if "weights_backbone" in parameters else {}


def _check_parameters(name: str, depth: int, growth_rate: int, bottleneck: bool) -> None:
    """Refuses a slip of the finger that would be built for minutes. Three blocks, as densenet_cifar has them."""
    layers, channels = max(0, depth - 4) // (6 if bottleneck else 3), 2 * growth_rate if bottleneck else 16
    total = 0
    for _ in range(3):
        read = layers * channels + growth_rate * layers * (layers - 1) // 2  # by all layers together
        own = 4 * growth_rate * read + 36 * growth_rate**2 * layers if bottleneck else 9 * growth_rate * read
        total, channels = total + own, channels + layers * growth_rate
        channels = channels // 2 if bottleneck else channels
    if total > MOST_PARAMETERS or layers > MOST_LAYERS:
        raise ValueError(
            f"model {name!r} would have {3 * layers} layers with {total:.1e} parameters; a name stands for at most "
            f"{3 * MOST_LAYERS} layers with {MOST_PARAMETERS:.0e}"
        )
