"""Says why a module cannot run fused at the moment: what stands between its submodules and one call for all of them.

Every function returns the reason in words, or None.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from effdense._torch_range import FUSED_UNDER_COMPILE, minor_version
from effdense.engine.synchronize import processes_of
from effdense.nn.code_reader import is_librarys
from effdense.nn.kinds import ACTIVATIONS, AVG_POOLS, CONVS, MAX_POOLS, NORMS
from effdense.nn.modules import kind_of
from effdense.nn.outside import replaced

PROCESSES = "its norms are synchronised over different processes, or some only"
TRANSITION = {"norm": None, "relu": None, "conv": 1}


def module_obstacle(
    name: str, module: Any, kinds: tuple[type, ...], ignore_hooks: bool = False
) -> str | None:
    """Why calling `module` could do something else than its class says."""
    if kind_of(module) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        return f"{name} is {type(module).__name__}, not {wanted}"
    return changed(name, module, kinds in (NORMS, CONVS), ignore_hooks)


def changed(name: str, module: nn.Module, weighted: bool, ignore_hooks: bool = False) -> str | None:
    """Why calling `module` could do something else than its class, whichever that is. `weighted`: it has a weight and a bias."""
    state = module.__dict__
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"]
    if (hooked or state["_backward_hooks"] or state["_backward_pre_hooks"]) and not ignore_hooks:
        return f"{name} has hooks"
    if "forward" in state or "_conv_forward" in state or "_check_input_dim" in state:
        return f"{name}.{next(m for m in _METHODS if m in state)} was replaced"
    if hidden := shadowed(module):
        return f"{name} has attributes that hide effdense's: {', '.join(hidden)}"
    if ignore_hooks and type(module).__call__ is not nn.Module.__call__:  # in convert; later it is noted
        return f"{name}'s class {type(module).__name__} has a __call__ of its own"
    for parameter in ("weight", "bias") if weighted else ():
        # Weight norm, pruning and the like put a tensor in its place; quantisation a subclass.
        # nn.DataParallel's replicas and torch.func.functional_call have plain tensors where their parameters were.
        former = state.get("_former_parameters", {})
        tensor = state["_parameters"].get(parameter, former.get(parameter, module))
        if tensor is None or type(tensor) in (nn.Parameter, torch.Tensor):
            continue
        if type(tensor).__name__ == "DTensor":
            return f"{name}.{parameter} is sharded; convert before fully_shard, in whose forward parameters are whole"
        return f"{name}.{parameter} is not a plain parameter"
    return None


def shadowed(module: nn.Module) -> list[str]:
    """What a converted module's fused forward would look up and find a user's, set since convert."""
    names: frozenset[str] | None = type(module).__dict__.get("_effdense_names")
    if names is None or (names.isdisjoint(module.__dict__) and names.isdisjoint(module._modules)):
        return []
    values = {**module._modules, **module.__dict__}
    may_fuse = (n for n, v in values.items() if getattr(v, "effdense_may_fuse", False) is True)
    return sorted((names & values.keys()).difference(may_fuse))


_METHODS = ("forward", "_conv_forward", "_check_input_dim")  # that a module could have of its own
_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def conv_obstacle(name: str, conv: Any, kernel: int | None) -> str | None:
    """Why a convolution is not the plain one of this kernel size (None: an odd one, and dilation) that keeps the image's size."""
    spatial = len(conv.kernel_size)
    size, spread = (kernel, 1) if kernel is not None else (conv.kernel_size[0], conv.dilation[0])
    if size % 2 == 0:
        return f"{name}.kernel_size is {conv.kernel_size}, not odd"
    ones, same = (1,) * spatial, (spread * (size // 2),) * spatial
    plain = (size,) * spatial, ones, same, (spread,) * spatial, 1, "zeros"
    got = conv.kernel_size, conv.stride, padding_of(conv), conv.dilation, conv.groups, conv.padding_mode
    if got == plain:
        return None
    attribute, is_, wanted = next(t for t in zip(_CONV, got, plain, strict=True) if t[1] != t[2])
    return f"{name}.{attribute} is {is_}, not {wanted}"


def padding_of(conv: Any) -> tuple[int, ...]:
    """A convolution's padding in numbers, of an odd kernel's."""
    if conv.padding == "same":
        return tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding


def _fused_under_compile() -> bool:
    if replaced() is not None:
        return False
    if minor_version(torch.__version__) >= FUSED_UNDER_COMPILE:
        return True
    warnings.warn(
        f"effdense runs on PyTorch's own operators under torch.compile (same results, memory as without effdense), because "
        f"this is torch {torch.__version__}; use torch {'.'.join(map(str, FUSED_UNDER_COMPILE))} or newer, or do not compile",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


# torch.compiler.assume_constant_result, without the two seconds that importing torch._dynamo takes: called, not traced
_fused_under_compile._dynamo_marked_constant = True  # type: ignore[attr-defined]


_probe = threading.local()


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """In it, global module hooks are no obstacle: they do not run on a probe."""
    _probe.running = True
    try:
        yield
    finally:
        _probe.running = False


def on_probe() -> bool:
    """Whether this thread compares a forward at the moment."""
    return getattr(_probe, "running", False)


def global_obstacle() -> str | None:
    """Why nothing can run fused at the moment: hooks that every module would call, and what can take PyTorch's own operators only."""
    # The compiler cannot trace the second question.
    if nn.modules.module._has_any_global_hook() and (torch.compiler.is_compiling() or not on_probe()):
        return "a global module hook is registered"
    if torch.compiler.is_compiling():
        # What torch.compiler.is_exporting() returns; but in torch 2.11 and before it is true under torch.compile too.
        if torch.compiler._is_exporting_flag:
            return "torch.export wants PyTorch's own operators"
        return None if _fused_under_compile() else "this torch's compiler wants PyTorch's own operators"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace wants PyTorch's own operators"
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "forward-mode derivatives and torch.func's transforms want PyTorch's own operators"
    if (mode := _mode()) is not None:
        return f"{mode} is active, which would see other operators than PyTorch's own"
    return None if (name := replaced()) is None else f"{name} was replaced since effdense was imported"


# Modes that change no result, and PyTorch's own that fused operators are made for.
_KNOWN_MODES = {
    ("torch.utils._device", "DeviceContext"),  # torch.set_default_device
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
}


def _mode() -> str | None:
    """The class of a torch function or dispatch mode that may do anything with the operators that it sees, or None.

    One made for fused operators says so by an attribute `effdense_may_fuse`.
    """
    if not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack():
        return None
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        kind = type(mode)
        known = (kind.__module__, kind.__qualname__) in _KNOWN_MODES
        if not known and not getattr(kind, "effdense_may_fuse", False):
            return kind.__qualname__
    return None


def refuse_scripting(module: nn.Module) -> None:
    """What torch.jit.script calls first (`__prepare_scriptable__`)."""
    raise TypeError(
        f"torch.jit.script: {type(module).__name__} cannot be scripted; script what effdense.revert(model) gives back, or "
        "use torch.jit.trace"
    )


def chain_obstacle(
    children: Mapping[str, nn.Module | None], parts: Mapping[str, int | None], ignore_hooks: bool = False
) -> str | None:
    """Why a chain of submodules must be called one by one.

    `parts` names the chain: each norm, relu (None) and convolution (its kernel size), by the name's beginning.
    """
    if not ignore_hooks and (reason := global_obstacle()) is not None:
        return reason
    spatial: dict[str, int] = {}
    norms: list[Any] = []
    for name, kernel in parts.items():
        kinds = CONVS if kernel else NORMS if name.startswith("norm") else ACTIVATIONS
        module = children.get(name)
        reason = module_obstacle(name, module, kinds, ignore_hooks)
        if reason is None and kernel:
            reason = conv_obstacle(name, module, kernel)
        if reason is not None:
            return reason
        norms += [module] if kinds is NORMS else []
        if kinds is not ACTIVATIONS and type(module) is not nn.SyncBatchNorm:
            spatial[name] = kinds.index(type(module)) + 1
    if len(set(spatial.values())) > 1:
        return f"its submodules have different numbers of spatial dimensions: {spatial}"
    return None if same_processes(norms) else PROCESSES


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


# Of other libraries: subclasses of batch norms that compute a batch norm, and what their submodules do behind it.
_LISTED_NORMS = {("timm.layers.norm_act", "BatchNormAct2d")}
# Their modules that call their submodules one after the other.
_LISTED_SEQUENCES = {("timm.layers.adaptive_avgmax_pool", "SelectAdaptivePool2d")}


def _is_listed(kind: type, listed: set[tuple[str, str]]) -> bool:
    """Whether it is one of the classes named, the library's own."""
    name = kind.__module__, kind.__name__
    found = name in listed and getattr(sys.modules.get(name[0]), name[1], None) is kind
    return found and is_librarys(kind.forward)  # type: ignore[attr-defined]


def is_sequence(module: nn.Module) -> bool:
    """Whether a call does no more than call its submodules one after the other: nn.Sequential's very class, or a listed one."""
    kind = type(module)
    known = kind is nn.Sequential or _is_listed(kind, _LISTED_SEQUENCES)
    return known and changed("", module, False) is None


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm itself: PyTorch's very class, or a listed library's."""
    return type(module) in NORMS or _is_listed(type(module), _LISTED_NORMS)


def dimensions(norm: Any) -> int | None:
    """How many spatial dimensions a batch norm is for; None: any."""
    for i, kind in enumerate(NORMS[:3], start=1):
        if isinstance(norm, kind):
            return i
    return None


def same_processes(norms: Iterable[nn.Module]) -> bool:
    """Whether the batches of which norms take statistics are of the same processes (nn.SyncBatchNorm)."""
    processes = [processes_of(norm) for norm in norms]
    return all(p == processes[0] for p in processes)


def plain_avg_pool(pool: Any, norm: Any, ignore_hooks: bool = False) -> tuple[int, ...] | None:
    """The kernel size of an average pool over windows side by side, of norm's dimensions; None if it is not one."""
    if module_obstacle("pool", pool, AVG_POOLS, ignore_hooks) is not None or pool.ceil_mode:
        return None
    spatial = AVG_POOLS.index(type(pool)) + 1
    if dimensions(norm) not in (None, spatial):
        return None
    kernel, stride, padding = (each(v, spatial) for v in (pool.kernel_size, pool.stride, pool.padding))
    plain = kernel == stride and not any(padding) and getattr(pool, "divisor_override", None) is None
    return kernel if plain else None


def plain_max_pool(pool: Any, norm: Any) -> tuple[tuple[int, ...], ...] | None:
    """Kernel size, stride and padding of a max pool of norm's dimensions; None if it does more."""
    if module_obstacle("pool", pool, MAX_POOLS) is not None or pool.ceil_mode or pool.return_indices:
        return None
    spatial = MAX_POOLS.index(type(pool)) + 1
    if dimensions(norm) not in (None, spatial) or any(d != 1 for d in each(pool.dilation, spatial)):
        return None
    kernel, stride, padding = (each(v, spatial) for v in (pool.kernel_size, pool.stride, pool.padding))
    return (kernel, stride, padding) if torch.Size(kernel).numel() <= 256 else None
