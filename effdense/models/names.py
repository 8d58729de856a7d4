"""Models by the names that every command line takes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from typing import Any

from torch import nn

from effdense import extras
from effdense.models import densenet

_NAMED: dict[str, Any] = {name: getattr(densenet, name) for name in densenet.IMAGENET}
_NAMED |= {name: getattr(densenet, name) for name in ("densenet_d2l", "densenet169_tutorial")}
_LIBRARIES = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}


def build(name: str, **options: Any) -> nn.Module:
    """Builds a model by its name, with random weights.

    Args:
        name: densenet121, 161, 169, 201, 264; densenet_bc_<depth>_<growth>; densenet_<depth>_<growth> (plain layers,
            no compression); densenet_d2l; densenet169_tutorial; or torchvision:NAME, timm:NAME: theirs, not converted.
        options: what the constructor takes.

    Raises:
        TypeError: the name is no text.
        ValueError: there is no such model (the message has the nearest name), or its library is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"build: name must be a str, got {type(name).__name__}")
    library, colon, other = name.partition(":")
    if colon and library in _LIBRARIES:
        module, function = _LIBRARIES[library]
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"model {name!r} {extras.needed(library)}")
        try:
            model: nn.Module = getattr(importlib.import_module(module), function)(other, **options)
        except (RuntimeError, ValueError) as error:  # what they raise for a name that they do not know
            raise ValueError(f"model {name!r}: {library} says: {error}") from error
        return model
    if name in _NAMED:
        built: nn.Module = _NAMED[name](**options)
        return built
    if match := re.fullmatch(r"densenet_(bc_)?(\d+)_(\d+)", name):
        bottleneck = bool(match[1])
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
