"""Reads a built library's CUDA kernels with cuobjdump: resource usage, PTX and machine code, as `Kernel`s.

No library says how much dynamic shared memory a kernel is launched with. A program that g++ compiles computes it from the headers
that the launches take it from.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.simt.compiler import compile_for_cpu, cuda_include

# Kernels with dynamic shared memory, and whose kBytes it is. Both have the same template arguments.
TILES = {"bottleneck_kernel": "BottleneckTile", "bottleneck_backward_kernel": "BackwardTile"}


class LibraryError(Exception):
    """Something is missing to read the library with; the message says what."""


class Code(NamedTuple):
    """What is to be known of a kernel's SASS: its size, the opcodes in it, those in each loop (and loops around it)."""

    bytes: int
    opcodes: frozenset[str]
    loops: tuple[frozenset[str], ...]


class Bounds(NamedTuple):
    """A kernel's launch bounds, and whether it has dynamic shared memory."""

    threads: int
    blocks: int  # that a multiprocessor is to hold at least
    dynamic: bool


class Kernel(NamedTuple):
    """One kernel for one architecture. Sizes are in bytes."""

    name: str  # rows_kernel<__half, 8, BnRelu<float>>
    architecture: str  # 8.0
    registers: int
    stack: int
    local: int
    static_shared: int
    dynamic_shared: int
    bounds: Bounds
    code: Code

    @property
    def shared(self) -> int:
        return self.static_shared + self.dynamic_shared

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]


def find_library() -> Path:
    """The installed module, which is not imported: that would need torch."""
    spec = importlib.util.find_spec("_effdense")
    if spec is None or spec.origin is None:
        raise LibraryError("no module _effdense is installed; build one, or name a file with --library")
    return Path(spec.origin)


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: on the PATH, in a CUDA toolkit, in the Triton of this Python."""
    folders = [f"{os.environ[home]}/bin" for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if triton := importlib.util.find_spec("triton"):
        folders += [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations or ()]
    if found := shutil.which(name, path=os.pathsep.join(folders)):
        return found
    raise LibraryError(
        f"{name} was found neither on the PATH, nor in a CUDA toolkit (CUDA_HOME), nor in Triton's package; "
        "one way to get it: pip install triton"
    )


def architectures_in(library: Path) -> list[str]:
    """Those that the library has machine code for, in order: 8.0, 10.0."""
    found = set(re.findall(r"\.sm_(\d+)(\d)[a-z]?\.cubin", "".join(_cuobjdump(library, "-lelf"))))
    return [f"{major}.{minor}" for major, minor in sorted(found, key=lambda pair: [int(n) for n in pair])]


def kind_of(architecture: str) -> str:
    """The kernels' name for it: csrc/cuda/kernels/architecture.cuh."""
    return "turing" if architecture == "7.5" else "ampere"


def read(library: Path, architectures: Sequence[str]) -> Iterator[Kernel]:
    """Every kernel of each of the architectures. A kernel that several source files have comes as often."""
    bounds = parse_ptx(_cuobjdump(library, "-ptx"))
    if not bounds:
        raise LibraryError(
            f"{library} has no PTX, which is where launch bounds are read; build it for an architecture with +PTX"
        )
    with_dynamic = [name for name, bound in bounds.items() if bound.dynamic]
    of_kind = {on: dynamic_shared(with_dynamic, on) for on in set(map(kind_of, architectures))}
    for architecture in architectures:
        dynamic = of_kind[kind_of(architecture)]
        select = ("-arch", f"sm_{architecture.replace('.', '')}")
        codes = dict(parse_sass(_cuobjdump(library, *select, "-sass")))
        for place, numbers in parse_resources(_cuobjdump(library, *select, "-res-usage")):
            name = short_name(place[1])
            shared = numbers["SHARED"]
            if (
                float(architecture) >= 9
            ):  # from here on the driver's 1 KB of every block that has some is counted
                shared = max(0, shared - 1024)
            yield Kernel(
                name,
                architecture,
                numbers["REG"],
                numbers["STACK"],
                numbers["LOCAL"],
                shared,
                dynamic.get(name, 0),
                bounds[name],
                codes[place],
            )


def _cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """The lines that it prints. nvdisasm, which it calls, may lie beside it alone."""
    tool = find_tool("cuobjdump")
    path = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [tool, *options, str(library)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PATH": path},
        ) as process,
    ):
        assert process.stdout is not None
        yield from process.stdout
        if process.wait() != 0:
            errors.seek(0)
            raise LibraryError(f"cuobjdump {' '.join(options)} {library}: {errors.read().strip()}")


# A kernel's place: the number of its cubin in the library, and its symbol.
Place = tuple[int, str]


def parse_resources(lines: Iterable[str]) -> Iterator[tuple[Place, dict[str, int]]]:
    """Of `cuobjdump -res-usage`: REG, STACK, SHARED and LOCAL of every kernel."""
    cubin, symbol = 0, ""
    for line in lines:
        if line.startswith("Fatbin elf code"):
            cubin += 1
        elif found := re.match(r"\s*Function (\S+):$", line):
            symbol = found[1]
        elif "REG:" in line:
            yield (cubin, symbol), {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}


def parse_ptx(lines: Iterable[str]) -> dict[str, Bounds]:
    """Of `cuobjdump -ptx`: every kernel's launch bounds, which the machine code does not keep."""
    bounds: dict[str, Bounds] = {}
    name = ""
    for line in lines:
        if found := re.search(r"\.entry (\w+)", line):
            name = short_name(found[1])
            bounds[name] = Bounds(0, 1, False)
        elif found := re.match(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", line):
            threads = int(found[1]) * int(found[2] or 1) * int(found[3] or 1)
            bounds[name] = bounds[name]._replace(threads=threads)
        elif found := re.match(r"\.minnctapersm (\d+)", line):
            bounds[name] = bounds[name]._replace(blocks=int(found[1]))
        elif "effdense_dynamic_shared" in line and ".extern" not in line:
            bounds[name] = bounds[name]._replace(dynamic=True)
    return bounds


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[Place, Code]]:
    """Of `cuobjdump -sass`: every kernel's code."""
    cubin, symbol, body = 0, "", []
    for line in lines:
        if found := INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2], found[3]))
        elif line.startswith("Fatbin elf code") or "Function : " in line:
            if body:
                yield (cubin, symbol), _code(body)
            body = []
            if line.startswith("Fatbin"):
                cubin += 1
            else:
                symbol = line.partition("Function : ")[2].strip()
    if body:
        yield (cubin, symbol), _code(body)


def _code(body: list[tuple[int, str, str]]) -> Code:
    loops = set()
    for address, opcode, operands in body:
        if not opcode.startswith("BRA"):
            continue
        target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
        if target < address:  # the trap behind the end branches to itself
            loops.add((target, address))
    return Code(
        body[-1][0] + 16,
        frozenset(opcode for _, opcode, _ in body),
        tuple(
            frozenset(opcode for address, opcode, _ in body if first <= address <= last)
            for first, last in sorted(loops)
        ),
    )


@functools.cache
def short_name(symbol: str) -> str:
    """A kernel's C++ name as it is seen from within effdense::kernels, without its parameters."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    text = demangle(symbol.encode(), None, None, None)  # never freed: the names of one library
    name = ctypes.string_at(text).decode() if text else symbol
    for noise in ("effdense::kernels::", "(anonymous namespace)::"):
        name = name.replace(noise, "")
    while "> >" in name:
        name = name.replace("> >", ">>")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def dynamic_shared(names: Sequence[str], on: str) -> dict[str, int]:
    """The most dynamic shared memory that each of these kernels is launched with, as the headers of this tree have it.

    on: as `kind_of` has it.
    """
    if not names:
        return {}
    if cuda_include() is None:
        raise LibraryError("no nvcc was found, whose headers it takes to compute dynamic shared memory")
    prints = []
    for name in names:
        family, _, arguments = name.partition("<")
        if family not in TILES:
            raise LibraryError(f"{name} has dynamic shared memory, but TILES does not say how much")
        prints.append(f'std::printf("%d\\n", {TILES[family]}<{arguments[:-1]}, Architecture::{on}>::kBytes);')
    source = "\n".join(
        [
            '#include "kernels/bottleneck.cuh"',
            '#include "kernels/bottleneck_backward.cuh"',
            "#include <cstdio>",
            "using namespace effdense::kernels;",
            "int main() {",
            *prints,
            "}",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dynamic_shared.cpp"
        file.write_text(source)
        program = compile_for_cpu([file], Path(folder) / "dynamic_shared", "-O0")
        told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, map(int, told), strict=True))
