"""Why a module cannot run fused at the moment: what stands between its submodules and one call for all of them.

Every function returns the reason in words, or None.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
ACTIVATIONS = (nn.ReLU,)
TRANSITION = {"norm": None, "relu": None, "conv": 1}


def module_obstacle(
    name: str, module: Any, kinds: tuple[type, ...], ignore_hooks: bool = False
) -> str | None:
    """Why calling `module` could do something else than its class says."""
    if type(module) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        return f"{name} is {type(module).__name__}, not {wanted}"
    return changed(name, module, kinds in (NORMS, CONVS), ignore_hooks)


def changed(name: str, module: nn.Module, weighted: bool, ignore_hooks: bool = False) -> str | None:
    """Why calling `module` could do something else than its class, whichever that is. `weighted`: it has a weight and a bias."""
    state = module.__dict__
    if not ignore_hooks and (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has hooks"
    if "forward" in state:
        return f"{name}.forward was replaced"
    for parameter in ("weight", "bias") if weighted else ():
        # Weight norm, pruning and the like put a tensor in its place; quantisation a subclass.
        tensor = state["_parameters"].get(parameter, module)
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"{name}.{parameter} is not a plain parameter"
    return None


@functools.cache
def _plain_conv(kernel: int, spatial: int) -> dict[str, Any]:
    return {
        "kernel_size": (kernel,) * spatial,
        "stride": (1,) * spatial,
        "padding": (kernel // 2,) * spatial,
        "dilation": (1,) * spatial,
        "groups": 1,
        "padding_mode": "zeros",
    }


def conv_obstacle(name: str, conv: Any, kernel: int) -> str | None:
    """Why a convolution is not the plain one of this kernel size with padding that keeps the image's size."""
    state = conv.__dict__
    for attribute, value in _plain_conv(kernel, len(state["kernel_size"])).items():
        if (got := state[attribute]) != value:
            return f"{name}.{attribute} is {got}, not {value}"
    return None


def global_hooks() -> str | None:
    """Whether hooks are registered that every module would call."""
    return "a global module hook is registered" if nn.modules.module._has_any_global_hook() else None


def chain_obstacle(
    children: Mapping[str, nn.Module | None], parts: Mapping[str, int | None], ignore_hooks: bool = False
) -> str | None:
    """Why a chain of submodules must be called one by one.

    `parts` names the chain: each norm, relu (None) and convolution (its kernel size), by the name's beginning.
    """
    if not ignore_hooks and (reason := global_hooks()) is not None:
        return reason
    spatial = {}
    for name, kernel in parts.items():
        kinds = CONVS if kernel else NORMS if name.startswith("norm") else ACTIVATIONS
        module = children.get(name)
        reason = module_obstacle(name, module, kinds, ignore_hooks)
        if reason is None and kernel:
            reason = conv_obstacle(name, module, kernel)
        if reason is not None:
            return reason
        if kinds is not ACTIVATIONS:
            spatial[name] = kinds.index(type(module)) + 1
    if len(set(spatial.values())) > 1:
        return f"its submodules have different numbers of spatial dimensions: {spatial}"
    return None


def transition_obstacle(children: Mapping[str, nn.Module | None], ignore_hooks: bool = False) -> str | None:
    """Why norm, relu, conv, pool must be called one by one; the pool may be any."""
    order = [*TRANSITION, "pool"]
    if list(children) != order:
        return f"the submodules are {list(children)}, not {order}"
    return chain_obstacle(children, TRANSITION, ignore_hooks)


def each(value: int | Iterable[int], spatial: int) -> tuple[int, ...]:
    """A size as pools take it, one number or one per dimension, as one per dimension."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def dimensions(norm: Any) -> int:
    """How many spatial dimensions a batch norm is for."""
    return next(i for i, kind in enumerate(NORMS, start=1) if isinstance(norm, kind))


def plain_avg_pool(pool: Any, norm: Any, ignore_hooks: bool = False) -> tuple[int, ...] | None:
    """The kernel size of an average pool over windows side by side, of norm's dimensions; None if it is not one."""
    spatial = dimensions(norm)
    if module_obstacle("pool", pool, (AVG_POOLS[spatial - 1],), ignore_hooks) is not None or pool.ceil_mode:
        return None
    kernel, stride, padding = (each(v, spatial) for v in (pool.kernel_size, pool.stride, pool.padding))
    plain = kernel == stride and not any(padding) and getattr(pool, "divisor_override", None) is None
    return kernel if plain else None


def plain_max_pool(pool: Any, norm: Any) -> tuple[tuple[int, ...], ...] | None:
    """Kernel size, stride and padding of a max pool of norm's dimensions; None if it does more."""
    spatial = NORMS.index(type(norm)) + 1
    kind = MAX_POOLS[spatial - 1]
    if module_obstacle("pool", pool, (kind,)) is not None or pool.ceil_mode or pool.return_indices:
        return None
    if any(d != 1 for d in each(pool.dilation, spatial)):
        return None
    kernel, stride, padding = (each(v, spatial) for v in (pool.kernel_size, pool.stride, pool.padding))
    return (kernel, stride, padding) if torch.Size(kernel).numel() <= 256 else None
