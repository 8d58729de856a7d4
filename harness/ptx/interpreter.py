"""The interpreter as a namespace of operators."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from harness.ptx.compiler import compile_interpreter

# What a device may do one way or the other: copies and stores land late, and blocks and warps run in order; or
# copies land at once, and the last block and warp come first.
MODES = {"late": (True, False), "backwards": (False, True)}


@functools.cache
def architectures() -> tuple[int, ...]:
    """Those to run, of EFFDENSE_PTX_ARCH ("90,100,120"); 75 and 80 unless given."""
    return tuple(int(number) for number in os.environ.get("EFFDENSE_PTX_ARCH", "75,80").split(","))


@functools.cache
def _operators() -> Any:
    torch.ops.load_library(str(compile_interpreter(architectures())))
    return torch.ops.effdense_ptx


class Interpreter:
    """torch.ops.effdense_ptx on one architecture, in one mode."""

    def __init__(self, architecture: int, mode: str) -> None:
        self._use = (architecture, *MODES[mode])
        _operators()

    def __getattr__(self, name: str) -> Any:
        ops = _operators()
        ops.use(*self._use)
        return getattr(ops, name)

    def watch(self, name: str, x: Tensor) -> None:
        """Of the harness in harness/simt, which counts traffic."""

    def forget(self) -> None:
        """As above."""
