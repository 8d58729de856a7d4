"""Checks of what a user passes to the public functions.

A message names the function, the argument, what was expected and what came; wrong types raise TypeError, wrong values
ValueError. Nothing has been changed when one is raised. (csrc/checks.h guards the compiled operators themselves.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from effdense.engine.norm import Norm

Memory = Literal["balanced", "minimal"]


def check_features(op: str, features: Sequence[Tensor]) -> int:
    """Checks a list of [N, C_i, *spatial] and returns the sum of C_i."""
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"{op}: features must be a list or tuple of tensors, got {type(features).__name__}")
    if not features:
        raise ValueError(f"{op}: features must hold at least one tensor, got an empty list")
    first = features[0]
    for i, x in enumerate(features):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: features[{i}] must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: features[{i}] must have a floating dtype, got {x.dtype}")
        check_strided(op, f"features[{i}]", x)
        if not 3 <= x.dim() <= 5:
            raise ValueError(
                f"{op}: features[{i}] must be [N, C, *spatial] with 1 to 3 spatial dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        if x.shape[1] == 0:
            raise ValueError(
                f"{op}: features[{i}] must have at least one channel, got shape {tuple(x.shape)}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: features[{i}] must be on {first.device} like features[0], got {x.device}"
            )
        if x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"{op}: features[{i}] must have the batch and spatial sizes of features[0] "
                f"({tuple(first.shape)}), got shape {tuple(x.shape)}"
            )
    return sum(x.shape[1] for x in features)


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor is no sparse one, nor in a layout of oneDNN's."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor (to_dense), got layout {tensor.layout}")


def check_same_dtype(op: str, features: Sequence[Tensor]) -> None:
    """Checks that the features, checked otherwise, can be read together; autocast may mix dtypes, nothing else."""
    for i, x in enumerate(features):
        if x.dtype != features[0].dtype:
            raise TypeError(
                f"{op}: features[{i}] must be {features[0].dtype} like features[0], got {x.dtype}"
            )


def check_vector(op: str, name: str, vector: Tensor | None, size: int, like: Tensor, what: str) -> None:
    """Checks an optional vector with one floating number per channel on the device of `like`."""
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(vector).__name__}")
    if not vector.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {vector.dtype}")
    check_strided(op, name, vector)
    if vector.shape != (size,):
        raise ValueError(f"{op}: {name} must have {size} elements ({what}), got shape {tuple(vector.shape)}")
    if vector.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the features, got {vector.device}")


def check_conv_weight(
    op: str, name: str, weight: Tensor | None, channels: int, kernel: int, like: Tensor
) -> None:
    """Checks a convolution's weight [O, channels, kernel, ...] against the features it will meet."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} like the features, got {weight.dtype}")
    check_strided(op, name, weight)
    if weight.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the features, got {weight.device}")
    spatial = (kernel,) * (like.dim() - 2)
    if weight.dim() > 0 and weight.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least one output channel, got {tuple(weight.shape)}")
    if weight.dim() != like.dim() or weight.shape[1] != channels or weight.shape[2:] != spatial:
        wanted = ", ".join(str(n) for n in ("out_channels", channels, *spatial))
        raise ValueError(f"{op}: {name} must be [{wanted}] for the features given, got {tuple(weight.shape)}")


def check_norm(op: str, names: Sequence[str], norm: Norm, channels: int, like: Tensor) -> None:
    """Checks the parameters and buffers of a batch normalisation of `channels` channels; `names` is what they are called."""
    for name, vector in zip(names, norm[:4], strict=True):
        check_vector(op, name, vector, channels, like, "the features' channels")
    if not (norm.eps > 0 or (norm.eps == 0 and not norm.batch_statistics)):
        place = names[0].removesuffix("weight").rstrip("._")
        raise ValueError(
            f"{op}: {place + ': ' if place else ''}eps must be above 0 where the batch's statistics are used (training) and "
            f"at least 0 elsewhere, as for PyTorch's batch norm, got {norm.eps!r}"
        )
    if norm.batch_statistics and not norm.group and like.shape[0] * like.shape[2:].numel() == 1:
        raise ValueError(
            f"{op}: normalising with the batch's statistics (training) needs more than one value per channel, "
            f"got features of shape {tuple(like.shape)}"
        )
    if not norm.batch_statistics and (norm.running_mean is None or norm.running_var is None):
        missing = names[2] if norm.running_mean is None else names[3]
        raise ValueError(
            f"{op}: normalising without the batch's statistics (evaluation) needs {missing}, got None"
        )


def shown(value: Any) -> str:
    """A wrong value as a message has it: in one line, of a tensor or another large thing what it is."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"a {type(value).__name__}"


def check_number(op: str, name: str, value: float) -> None:
    """Checks that a setting is a number."""
    if not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_count(op: str, name: str, value: Any) -> None:
    """Checks a number of channels, layers or classes."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {name} must be a positive whole number, got {shown(value)}")


def check_probability(op: str, name: str, value: float) -> None:
    """Checks a rate of dropout."""
    check_number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value!r}")


def check_flag(op: str, name: str, value: Any) -> None:
    """Checks what is yes or no: a text such as "no" would be yes."""
    of_numpy = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if of_numpy or (isinstance(value, Integral) and value in (0, 1)):  # bools are Integral
        return
    raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_path(op: str, name: str, value: Any) -> None:
    """Checks that an argument names a file."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{op}: {name} must be a str or os.PathLike, got {type(value).__name__}")


def check_module(op: str, name: str, value: Any) -> None:
    """Checks that an argument is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{op}: {name} must be a torch.nn.Module, got {type(value).__name__}")


def check_memory(op: str, memory: str) -> Memory:
    """Checks and returns the name of a memory mode."""
    if not isinstance(memory, str) or memory not in get_args(Memory):
        raise ValueError(f'{op}: memory must be "balanced" or "minimal", got {shown(memory)}')
    return cast(Memory, memory)


def check_spatial_dims(op: str, spatial_dims: int) -> int:
    """Checks a number of spatial dimensions and returns its place in a tuple of 1D, 2D and 3D classes."""
    if type(spatial_dims) is not int or spatial_dims not in (1, 2, 3):
        raise ValueError(f"{op}: spatial_dims must be 1, 2 or 3, got {shown(spatial_dims)}")
    return spatial_dims - 1
