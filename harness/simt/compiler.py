"""Compiles CUDA sources: with g++ against the harness, so that they run on the CPU, or with nvcc.

The harness needs GCC's attributes noinit, naked and noipa: g++ 12 or later, no other compiler.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = [ROOT / "csrc" / "cuda", ROOT / "harness"]
SAMPLES = ROOT / "harness" / "simt" / "samples"
KERNELS = sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.cu"))
# -fno-strict-aliasing: kernels look at memory in pieces of 16 bytes, as nvcc lets them.
# -Wa,--no-warn: the assembler would have .noinit, where __shared__ arrays go, take no space in the file.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra"]
# -Wno-unknown-pragmas: unroll is nvcc's.
FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas", "-Wa,--no-warn"]


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
    # Errors name files as seen from the repository's root, whichever clone the compiled file is from.
    command = ["g++", *FLAGS, *flags, f"-ffile-prefix-map={ROOT}/=", "-isystem", cuda_include()]
    command += [f"-I{path}" for path in INCLUDES]
    _run([*command, "-x", "c++", *sources, "-o", output])
    return output


def compile_operators(architecture: int = 800) -> Path:
    """The library that registers torch.ops.effdense_simt: the CUDA operators on the CPU.

    With architecture 750 it is torch.ops.effdense_simt75: what runs on compute capability 7.5.
    """
    flags, link = _of_torch()
    name = "effdense_simt" if architecture == 800 else "effdense_simt75"
    flags += [f"-DEFFDENSE_SIMT={name}", "-O1", "-Wno-unused-parameter", f"-I{ROOT / 'csrc'}"]
    # The bindings first: they take longest.
    sources = {ROOT / "harness" / "simt" / "operators.cpp": flags}
    sources |= {kernel: _for_architecture(kernel, architecture) for kernel in KERNELS}
    return _linked(f"{name}.so", _objects(sources), *link)


def _for_architecture(kernel: Path, architecture: int) -> list[str]:
    """Flags. Kernels that the architecture does not change are compiled once."""
    if architecture == 800:
        return []
    command = ["g++", *FLAGS, "-isystem", cuda_include(), *(f"-I{path}" for path in INCLUDES), "-x", "c++"]
    included = subprocess.run([*map(str, command), "-MM", kernel], capture_output=True, text=True, check=True)
    changes = "kernels/architecture.cuh" in included.stdout
    return [f"-DEFFDENSE_SIMT_ARCHITECTURE={architecture}"] if changes else []


def compile_fake_device() -> Path:
    """The library that makes a device of privateuse1 (harness/fake_device.cpp)."""
    source = ROOT / "harness" / "fake_device.cpp"
    compile_, link = _of_torch()
    flags = [*FLAGS, "-O0", *compile_, *link]
    return _once("fake_device.so", [source], flags, lambda to: _run(["g++", source, *flags, "-o", to]))


def _of_torch() -> tuple[list[str], list[str]]:
    """What a source that includes torch's headers is compiled and linked with."""
    import torch
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    return [*(f"-isystem{path}" for path in include_paths()), f"-D_TORCH={torch.__version__}"], link


def compile_launchers(sanitizer: str) -> Path:
    """The executable that calls every launcher of the kernels, with "address" or "thread" sanitizer."""
    flags = ["-O1", "-g1", f"-fsanitize={sanitizer}"]
    sources = [*KERNELS, ROOT / "harness" / "simt" / "launchers.cpp"]
    return _linked(f"launchers-{sanitizer}", _objects(dict.fromkeys(sources, flags)), flags[-1])


def compile_samples(variant: str, *flags: str) -> Path:
    """The executable, or with -shared the library, that runs clean kernels and ones with planted bugs."""
    made_of = [*sorted(SAMPLES.glob("*.c*")), *_headers()]
    driver = SAMPLES / "driver.cpp"
    return _once(f"samples-{variant}", made_of, flags, lambda to: compile_for_cpu([driver], to, *flags))


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


# What was compiled is kept between runs, under names that tell what it was made of.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "effdense-simt"


def _headers() -> list[Path]:
    return sorted(path for folder in ("csrc", "harness/simt") for path in (ROOT / folder).rglob("*.*h"))


def _object(source: Path, *flags: str) -> Path:
    """Compiled again when any header has changed, or a .cpp file of csrc that operators.cpp includes."""
    included = (
        [*(ROOT / "csrc" / "cuda").glob("*.cpp"), *(ROOT / "csrc").glob("stage_*.cpp")]
        if source.suffix == ".cpp"
        else []
    )
    made_of = [source, *_headers(), *sorted(included)]
    return _once(f"{source.stem}.o", made_of, flags, lambda to: compile_for_cpu([source], to, *flags, "-c"))


def _objects(sources: Mapping[Path, Sequence[str]]) -> list[Path]:
    """Of sources, each with its flags; as many at a time as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda source: _object(source, *sources[source]), sources))


def _linked(name: str, objects: Sequence[Path], *flags: str) -> Path:
    return _once(name, objects, flags, lambda to: _run(["g++", *objects, *flags, "-o", to]))


def _once(name: str, made_of: Sequence[Path], flags: Sequence[str], make: Callable[[Path], object]) -> Path:
    digest = hashlib.sha256("\0".join([*FLAGS, *flags]).encode())
    for file in made_of:
        digest.update(file.read_bytes())
    output = CACHE / digest.hexdigest()[:16] / name
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever tests at the same time waits for it
        if not output.exists():
            # Made beside and moved: who is killed leaves all of it or nothing.
            with tempfile.TemporaryDirectory(dir=output.parent) as folder:
                made = Path(folder) / name
                make(made)
                made.replace(output)
    return output


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
