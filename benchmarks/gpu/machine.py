"""`make gpu`, stage machine: the GPU, its driver, the toolkit, the computer, and the packages and programs that other stages use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu import results

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "numpy",
    "setuptools",
    "ninja",
    "pytest",
    "pytest-xdist",
    "expecttest",
    "hypothesis",
    "rich",
)
TOOLS = ("nvcc", "g++", "ninja", "ncu", "compute-sanitizer", "nvidia-smi")
QUERY = (
    "driver_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "ecc.mode.current",
    "compute_mode",
)


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    """The version that a program tells, or where it is."""
    if not (path := results.program(name)):
        return None
    version = re.search(r"\d+\.\d+[.\d]*", _output([path, "--version"]))
    return version[0] if version else path


def _nvidia_smi(index: int) -> dict[str, str]:
    answer = _output(
        ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", f"--id={index}"]
    )
    values = [value.strip() for value in answer.split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {}


def card(device: str) -> dict[str, Any]:
    """What torch and nvidia-smi say of a card; RuntimeError or AssertionError where torch cannot use it."""
    import torch

    torch.empty(1, device=device)
    index = torch.device(device).index or 0
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_nvidia_smi(index),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    software = {
        "python": platform.python_version(),
        **{name: _package(name) for name in PACKAGES},
        **{f"{name} (program)": _tool(name) for name in TOOLS},
        "platform": platform.platform(),
        "processor": re.findall(
            r"model name\s*: (.*)", _output(["cat", "/proc/cpuinfo"]) + "\nmodel name : ?"
        )[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    result.save("no GPU", card=None, software=software)
    try:
        found = card(options.device)
    except ImportError as error:
        return results.fail(f"torch cannot be imported: {error}")
    except (RuntimeError, AssertionError) as error:
        return results.fail(f"{options.device} cannot be used: {(str(error).splitlines() or [''])[0]}")
    missing = [name for name in TOOLS if not software[f"{name} (program)"]]
    result.save(
        f"{found['name']}, compute capability {found['capability']}, {found['memory_bytes'] / 2**30:.0f} GiB, driver "
        f"{found.get('driver_version', 'unknown')}, torch {software['torch']}, {software['cores']} cores"
        + (f"; without {', '.join(missing)}" if missing else ""),
        card=found,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
