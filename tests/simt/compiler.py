"""Compiles CUDA sources: with g++ against the harness, so that they run on the CPU, or with nvcc.

The harness needs GCC's attributes noinit, naked and noipa: g++ 12 or later, no other compiler.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = [ROOT / "csrc" / "cuda", ROOT / "tests"]
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


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
