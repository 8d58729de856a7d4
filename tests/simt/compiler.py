"""Compiles CUDA sources: with g++ against the harness, so that they run on the CPU, or with nvcc.

The harness needs GCC's attributes noinit, naked and noipa: g++ 12 or later, no other compiler.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = [ROOT / "csrc" / "cuda", ROOT / "tests"]
KERNELS = sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.cu"))
# -fno-strict-aliasing: kernels look at memory in pieces of 16 bytes, as nvcc lets them.
# -Wa,--no-warn: the assembler would have .noinit, where __shared__ arrays go, take no space in the file.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra"]
FLAGS += ["-Wno-psabi", "-Wa,--no-warn"]


@functools.cache
def cuda_include() -> Path | None:
    """The toolkit's headers. nvcc is asked, since what is on the PATH may be a script outside of the toolkit."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-c", "none.cu"]
    found = re.search(
        r'^#\$ INCLUDES="-I([^"]+)"', subprocess.run(command, capture_output=True, text=True).stderr, re.M
    )
    return Path(found[1]) if found else None


def compile_for_cpu(sources: Sequence[Path], output: Path, *flags: str) -> Path:
    """An executable, or with -shared a library, in which the kernels run on the CPU.

    For AddressSanitizer or ThreadSanitizer (executables only): flags "-fsanitize=address" or "-fsanitize=thread".
    """
    command = ["g++", *FLAGS, *flags, "-isystem", cuda_include()]
    command += [f"-I{path}" for path in INCLUDES]
    _run([*command, "-x", "c++", *sources, "-o", output])
    return output


def compile_operators() -> Path:
    """The library that registers torch.ops.effdense_simt: the CUDA operators on the CPU.

    Its objects are kept between runs, under names that tell what they were made of.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effdense-simt"
    cache.mkdir(parents=True, exist_ok=True)
    headers = [p for folder in ("csrc", "tests/simt") for p in sorted((ROOT / folder).rglob("*.*h"))]
    binding = ROOT / "tests" / "simt" / "operators.cpp"
    with_torch = ["-DEFFDENSE_SIMT", "-O1", "-Wno-unused-parameter", f"-I{ROOT / 'csrc'}"]
    with_torch += [f"-isystem{path}" for path in include_paths()]
    builds: list[tuple[Path, Sequence[Path], Sequence[str]]] = [(source, headers, []) for source in KERNELS]
    included = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    builds.append((binding, [*headers, *included], [*with_torch, f"-D_TORCH_VERSION={torch.__version__}"]))
    objects = []
    for source, made_of, flags in builds:
        objects.append(cache / f"{source.stem}-{_digest([source, *made_of], flags)}.o")
        _once(objects[-1], lambda to, s=source, f=flags: compile_for_cpu([s], to, *f, "-c"))
    torch_library = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{torch_library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_library}"]
    library = cache / f"operators-{_digest(objects, link)}.so"
    _once(library, lambda to: _run(["g++", *objects, *link, "-o", to]))
    return library


def compile_for_gpu(source: Path, output: Path, architecture: str) -> Path:
    """An object file."""
    _run(
        [
            "nvcc",
            "-std=c++20",
            f"-arch={architecture}",
            *[f"-I{path}" for path in INCLUDES],
            "-c",
            source,
            "-o",
            output,
        ]
    )
    return output


def _compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join([*_compiler(), *words]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _into(output: Path, make: Callable[[Path], object]) -> None:
    """Made beside and moved: whoever else tests at the same time sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        make(made)
        made.replace(output)


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join([*FLAGS, *words]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _once(output: Path, make: Callable[[Path], object]) -> None:
    """Made beside and moved: whoever tests at the same time sees all of it or nothing."""
    if output.exists():
        return
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        make(made)
        made.replace(output)


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
