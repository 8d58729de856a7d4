"""Decides whether the build compiles the CUDA kernels, and for which GPUs: finds the toolkit, reads TORCH_CUDA_ARCH_LIST."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

# What the kernels need (mma m16n8k8, ldmatrix) is there from 7.5 on. PTX: for cards that come later.
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
TOO_OLD = {3: "Kepler", 5: "Maxwell", 6: "Pascal", 7: "Volta"}  # by major version


def architectures() -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, as far as the kernels run there; else every one that there is."""
    asked = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES)
    for name in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(
                "effdense: TORCH_CUDA_ARCH_LIST must be a list of compute capabilities such as 8.0;9.0+PTX, "
                f"got {os.environ['TORCH_CUDA_ARCH_LIST']!r}"
            )
    able = [name for name in asked if float(re.sub(r"[af]?(\+PTX)?$", "", name)) >= 7.5]
    if able != asked:
        old = [f"{name} ({TOO_OLD.get(int(name[0]), 'unknown')})" for name in asked if name not in able]
        print(
            f"effdense: no CUDA kernels are built for {', '.join(old)}, where plain PyTorch will run: "
            "they need compute capability 7.5 (Turing) at least.",
            file=sys.stderr,
        )
    if "7.5+PTX" in able:
        print("effdense: code for 7.5 runs on 7.5 alone: 7.5+PTX is built as 7.5.", file=sys.stderr)
    return [name.replace("7.5+PTX", "7.5") for name in able]


def cuda_toolkit(version: str | None) -> str | None:
    """The folder of the CUDA toolkit to compile with, or None: torch is without CUDA, or there is no nvcc for it."""
    if version is None or os.environ.get("FORCE_CUDA") == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes) or None)
    wanted, reason = os.environ.get("FORCE_CUDA", "0") != "0", "nvcc was not found"
    major = version.split(".")[0]
    fix = f"install CUDA {major}'s toolkit with its nvcc on the PATH, or name its folder in CUDA_HOME"
    if nvcc:
        # What is on the PATH may be a script outside of the toolkit: nvcc itself knows where it is.
        told = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
        found = re.search(r"^#\$ TOP=(.+)$", told, re.M)
        release = re.search(
            r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        if found and release and release[1] == major:  # other minor versions go together, as for torch itself
            return os.path.realpath(found[1].strip())
        reason = f"{nvcc} is of {f'CUDA {release[1]}' if release else 'an unknown version'}"
        if release and release[1] != major:
            fix += f", or install a torch that is built for CUDA {release[1]}"
    message = f"effdense: torch is built for CUDA {version}, but {reason}"
    if wanted:
        sys.exit(f"{message}; FORCE_CUDA is set, so nothing was built: {fix}")
    print(
        f"{message}: CUDA kernels are left out, on a GPU plain PyTorch will run; to have them, {fix}.",
        file=sys.stderr,
    )
    return None
