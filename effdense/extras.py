"""Optional packages: imports them where they are needed, else names the extra of `pip install 'effdense[EXTRA]'` that brings them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Package(NamedTuple):
    """What pip calls a package, and the extras in pyproject.toml that have it."""

    name: str
    extras: tuple[str, ...]


# By the name that is imported.
PACKAGES = {
    "matplotlib": Package("matplotlib", ("bench", "train")),
    "numpy": Package("numpy", ("bench",)),
    "rich": Package("rich", ("bench", "train")),
    "PIL": Package("pillow", ("train",)),
    "tensorboard": Package("tensorboard", ("train",)),
    "onnx": Package("onnx", ("export",)),
    "onnxruntime": Package("onnxruntime", ("export",)),
    "onnxscript": Package("onnxscript", ("export",)),
    "safetensors": Package("safetensors", ("safetensors", "export", "train")),
    "tomli": Package("tomli", ("train",)),  # Python 3.10's
    "torchvision": Package("torchvision", ("vision", "peers")),
    "ignite": Package("pytorch-ignite", ("peers",)),
    "jsonargparse": Package("jsonargparse[signatures]", ("peers",)),
    "lightning": Package("lightning", ("peers",)),
    "monai": Package("monai", ("peers",)),
    "pytorchcv": Package("pytorchcv", ("peers",)),
    "segmentation_models_pytorch": Package("segmentation-models-pytorch", ("peers",)),
    "sklearn": Package("scikit-learn", ("train", "peers")),
    "timm": Package("timm", ("peers",)),
    "torchinfo": Package("torchinfo", ("peers",)),
    "torchxrayvision": Package("torchxrayvision", ("peers",)),
}


def has(module: str | None) -> bool:
    """Whether an extra brings the module."""
    return (module or "").partition(".")[0] in PACKAGES


def pip_install(module: str, prefer: str = "") -> str:
    """Return the command that installs the package of a module: that of extra `prefer`, if it has it, else of its first."""
    extras = PACKAGES[module.partition(".")[0]].extras
    return f"pip install 'effdense[{prefer if prefer in extras else extras[0]}]'"


def needed(module: str, prefer: str = "") -> str:
    """Return the end of a sentence that begins with what needs the module."""
    name = PACKAGES[module.partition(".")[0]].name
    return f"needs {name}, which is not installed: {pip_install(module, prefer)}"


def load(module: str, what: str, prefer: str = "") -> Any:
    """Import a module of one of the packages, or one that needs them.

    Raises:
        ImportError: it is not there, or is there and fails; the message says what needs it, why it fails and what to do.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter: torchvision beside another torch
        if isinstance(error, ModuleNotFoundError) and has(error.name):
            raise ImportError(f"{what} {needed(error.name or module, prefer)}") from error
        if not has(module):
            raise
        package = PACKAGES[module.partition(".")[0]].name
        raise ImportError(
            f"{what} needs {package}, which cannot be imported ({error}): {pip_install(module, prefer)}"
        ) from error
