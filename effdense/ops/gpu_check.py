"""Decides whether the CUDA kernels may run on a GPU: they must be built for it, and compute the right results on it.

They were written without a GPU and proved on a CPU (docs/cuda.md). So before the first use of a card, each process checks
them there against plain PyTorch; a card that fails gets plain PyTorch, and its user a loud message.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from effdense.ops.extension import REINSTALL, build_info
from effdense.ops.self_test import Shape, check

LEAST_CAPABILITY = (7, 5)  # of a card, for any kernels to be built for it
SELF_CHECK = "EFFDENSE_SELF_CHECK"  # environment variable: 0 switches the check off
# images, spatial sizes, channels of each feature, output channels: several blocks and tiles of everything, each width of
# the products' tiles, ragged edges
_SHAPES: list[Shape] = [(3, (20, 21), (24, 13, 11), 72), (2, (24, 25), (64,), 200), (1, (4, 5), (12,), 48)]

_usable: dict[int, bool] = {}
_lock = threading.Lock()


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures`, as TORCH_CUDA_ARCH_LIST names them, runs on a card.

    Machine code runs on cards of the same major version and the same or a later minor one; PTX (`8.0+PTX`) on every
    later card (CUDA C++ Programming Guide, "Application Compatibility"); that of `9.0a` on 9.0 alone.
    """
    for name in architectures:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        assert found, name
        built = int(found[1]), int(found[2])
        if found[3]:
            if built == capability:
                return True
        elif built <= capability and (found[4] or built[0] == capability[0]):
            return True
    return False


def why_unsupported(index: int) -> str | None:
    """Why there are no kernels for a card, in words that follow "because"; None where there are."""
    info = build_info()
    if info["cuda"] is None:
        version = torch.version.cuda
        fix = (
            f"; to build them, install CUDA {version.split('.')[0]}'s toolkit and run `{REINSTALL} .` in effdense's source directory"
            if version
            else ", and this torch is not built for CUDA"
        )
        return f"effdense was built without its CUDA kernels{fix}"
    capability = torch.cuda.get_device_capability(index)
    if runs_on(info["arch_list"], capability):
        return None
    found = f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and effdense's"
    if capability < LEAST_CAPABILITY:
        return f"{found} kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} at least"
    return f"{found} kernels were built for {', '.join(info['arch_list'])} (set TORCH_CUDA_ARCH_LIST when you build them)"


def _why_wrong(index: int) -> str | None:
    """Runs every operator on a few small shapes against plain PyTorch on the CPU."""
    torch.cuda.synchronize(index)  # an earlier failure, of other code, raises here
    try:
        # Not to be seen by whoever traces, fakes or counts what the caller does.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            results = check(f"cuda:{index}", torch.ops.effdense, shapes=_SHAPES)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"its kernels fail on {torch.cuda.get_device_name(index)}: {error}"
    wrong = ", ".join(f"{r.operator} in {r.number}" for r in results if not r.passed)
    if not wrong:
        return None
    return f"its kernels are wrong on {torch.cuda.get_device_name(index)}: {wrong}"


def usable(index: int) -> bool:
    """Whether the kernels run on card `index`; where not, says why at the first call. Milliseconds, once."""
    if index in _usable:
        return _usable[index]
    with _lock:
        return _usable[index] if index in _usable else _find_out(index)


# torch.compiler.assume_constant_result, without the two seconds that importing torch._dynamo takes
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_out(index: int) -> bool:
    reason = why_unsupported(index)
    if reason is None and os.environ.get(SELF_CHECK, "1") != "0":
        if torch.cuda.is_current_stream_capturing():
            return True  # what waits for a result must not be captured: next time
        reason = _why_wrong(index)
        if reason is not None:
            reason += (
                f". Please open an issue with what `python -m effdense check --device cuda:{index}` prints; {SELF_CHECK}=0 "
                "switches this check off"
            )
    _usable[index] = reason is None
    if reason is not None:
        warnings.warn(
            f"effdense runs on plain PyTorch on cuda:{index} (same results, slower, more memory), because {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return reason is None
