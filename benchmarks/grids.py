"""Records the kernels and grids that the CUDA operators launch, on the CPU, under the harness of harness/simt.

Nothing is computed and no memory is touched: a step with 64 images of 224x224 takes seconds. Needs g++ and the CUDA toolkit's headers.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cuda_library
from benchmarks.traced import Call, Like


class Launch(NamedTuple):
    """One launch."""

    kernel: str  # bottleneck_kernel<TensorCore<__half>, 128, 128>
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def family(self) -> str:
        return self.kernel.partition("<")[0]


class Harness(NamedTuple):
    """The operators for one kind of architecture, and where their library is."""

    ops: Any
    library: Path


@functools.cache
def harness(architecture: str) -> Harness:
    """Compiled where it is not yet. architecture: 7.5, or any later one."""
    from harness.simt.compiler import compile_operators

    number = 750 if cuda_library.kind_of(architecture) == "turing" else 800
    library = compile_operators(number)
    torch.ops.load_library(str(library))
    return Harness(getattr(torch.ops, "effdense_simt" if number == 800 else "effdense_simt75"), library)


def with_dtype(call: Call, dtype: torch.dtype) -> Call:
    """The call with maps and weights of another type than float16."""

    def change(value: Any) -> Any:
        if isinstance(value, Like):
            return value._replace(dtype=dtype) if value.dtype == torch.half else value
        return tuple(map(change, value)) if isinstance(value, tuple) else value

    return call._replace(arguments=change(call.arguments), results=change(call.results))


def plan(
    call: Call, architecture: str = "9.0", multiprocessors: int = 132, shared_kb: int = 228, tf32: bool = True
) -> list[Launch]:
    """The launches of an operator's call on a card with so many multiprocessors of so much shared memory."""
    ops, library = harness(architecture)
    made: dict[int, Tensor] = {}

    def make(value: Any) -> Any:
        if isinstance(value, Like):
            if value.number not in made:
                made[value.number] = value.make(torch.empty)
            return made[value.number]
        return [make(part) for part in value] if isinstance(value, tuple) else value

    arguments = [make(value) for value in call.arguments]
    ops.card(multiprocessors, shared_kb * 1024)
    ops.override_tf32(tf32)
    ops.plan()
    try:
        getattr(ops, call.op)(*arguments)
    finally:
        numbers = ops.take_plan()
        ops.card()
        ops.override_tf32(None)
    rows = zip(*[iter(numbers)] * 6, strict=True)
    names = _names(library)
    return [Launch(names[address], (x, y, z), threads, shared) for address, x, y, z, threads, shared in rows]


@functools.cache
def _names(library: Path) -> dict[int, str]:
    """The functions of a library by where they are."""
    told = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    words = (line.split() for line in told.splitlines())
    kernels = {int(w[0], 16): w[2] for w in words if len(w) == 3 and w[1] in "tTwW" and "_kernel" in w[2]}
    return {address: cuda_library.short_name(symbol) for address, symbol in kernels.items()}
