"""Builds torch.ops.effdense_ptx: bindings and interpreter by g++, the kernels by nvcc, as PTX and host code alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.simt import compiler
from harness.simt.compiler import INCLUDES, KERNELS, ROOT, cuda_include

FOLDER = ROOT / "harness" / "ptx"
BINDINGS = FOLDER / "operators.cpp"
# As setup.py compiles them; the PTX uncompressed, so that it can be read.
NVCC_FLAGS = ["-O3", "-std=c++20", "--no-compress", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def _bindings(output: Path) -> None:
    flags, _ = compiler._of_torch()
    flags += ["-DEFFDENSE_SIMT=effdense_ptx", "-O0", "-Wno-unused-parameter", f"-I{ROOT / 'csrc'}", "-c"]
    compiler.compile_for_cpu([BINDINGS], output, *flags)


def _interpreter(source: Path, output: Path) -> None:
    compiler.compile_for_cpu([source], output, "-c")


def _kernels(source: Path, architectures: Sequence[int], output: Path) -> None:
    targets = [f"-gencode=arch=compute_{number},code=compute_{number}" for number in architectures]
    includes = [f"-I{path}" for path in INCLUDES]
    compiler._run(["nvcc", *NVCC_FLAGS, *targets, *includes, "-c", source, "-o", output])


def compile_interpreter(architectures: Sequence[int]) -> Path:
    """The library, whose kernels are compiled for these architectures, as 75 and 80. Minutes, unless it is kept."""
    flags, link = compiler._of_torch()
    headers, own = compiler._headers(), sorted(FOLDER.glob("*.h"))
    bound = [
        BINDINGS,
        *sorted([*(ROOT / "csrc").glob("stage_*.cpp"), *(ROOT / "csrc" / "cuda").glob("*.cpp")]),
    ]

    def once(
        source: Path, made_of: Sequence[Path], flags: Sequence[str], make: Callable[[Path], None]
    ) -> Path:
        return compiler._once(f"ptx-{source.stem}.o", made_of, flags, make)

    # The longest first.
    jobs = [functools.partial(once, BINDINGS, [*bound, *headers, *own], flags, _bindings)]
    for kernel in KERNELS:
        make = functools.partial(_kernels, kernel, architectures)
        made_with = [*NVCC_FLAGS, *(str(number) for number in architectures)]
        jobs.append(functools.partial(once, kernel, [kernel, *headers], made_with, make))
    for source in sorted(FOLDER.glob("*.cpp")):
        if source != BINDINGS:
            make = functools.partial(_interpreter, source)
            jobs.append(functools.partial(once, source, [source, *own], [], make))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: job(), jobs))
    return compiler._linked("effdense_ptx.so", objects, *link, "-Wl,--no-undefined", "-lstdc++")


def can_compile() -> bool:
    """Whether there is a toolkit of CUDA."""
    return cuda_include() is not None
