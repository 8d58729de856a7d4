"""Compiles csrc for the CPU with a sanitizer into a program that calls every operator, and runs it.

The program has threads and products of its own (threads.h, products.cpp) where the sanitizers cannot see into ATen's.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.simt import compiler
from harness.simt.compiler import ROOT

FOLDER = ROOT / "harness" / "sanitizers"
CSRC = ROOT / "csrc"
# The longest first.
SOURCES = [
    FOLDER / "operators.cpp",
    CSRC / "stage_backward.cpp",
    CSRC / "stage_forward.cpp",
    CSRC / "cpu" / "conv3x3.cpp",
    *sorted(file for file in (CSRC / "cpu").glob("*.cpp") if file.name != "conv3x3.cpp"),
    FOLDER / "products.cpp",
]
# vptr asks for the types of classes in libraries that were not compiled for it.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # libtorch keeps what it made
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",  # libtorch's own threads
}


def compile_program(sanitizer: str, instead: Mapping[Path, Path] | None = None) -> Path:
    """The executable for "address" (and undefined behaviour) or "thread".

    Args:
        sanitizer: of SANITIZERS.
        instead: other files to be compiled in the place of some of SOURCES.
    """
    include, link = compiler._of_torch()
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    flags += [*SANITIZERS[sanitizer], "-include", str(FOLDER / "threads.h"), *include]
    flags += [f"-I{CSRC}", f"-I{ROOT / 'harness'}"]
    headers = [*compiler._headers(), *sorted(CSRC.rglob("*.inc")), *sorted(FOLDER.glob("*.h"))]

    def compiled(source: Path) -> Path:
        file = (instead or {}).get(source, source)
        make = functools.partial(_compile, file, flags)
        return compiler._once(f"{source.stem}-{sanitizer}.o", [file, *headers], flags, make)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, SOURCES))
    link = [word for word in link if word != "-shared"]
    return compiler._linked(f"operators-{sanitizer}", objects, *SANITIZERS[sanitizer], *link, "-lpthread")


def _compile(source: Path, flags: list[str], output: Path) -> None:
    compiler._run(["g++", *flags, f"-ffile-prefix-map={ROOT}/=", "-c", source, "-o", output])


def run(program: Path, threads: int, capability: str) -> subprocess.CompletedProcess[str]:
    """Runs the program with so many threads, on an instruction set as ATEN_CPU_CAPABILITY names it."""
    environment = {**os.environ, **OPTIONS, "ATEN_CPU_CAPABILITY": capability}
    return subprocess.run([program, str(threads)], capture_output=True, text=True, env=environment)
