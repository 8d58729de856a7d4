"""Describes the machine: its processor, the memory that is free, and the versions of what decides about times.

benchmarks/ reads this file without importing effdense: nothing of it may be imported here.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def available_bytes() -> int:
    """Return how much memory processes may still take here: the machine's, or a container's limit if lower."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = [1024 * int(re.findall(r"^MemAvailable: +(\d+)", meminfo, re.MULTILINE)[0])]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max" is no limit
            group = Path("/sys/fs/cgroup")
            free.append(int((group / limit).read_text()) - int((group / used).read_text()))
    return max(0, min(free))


def environment(threads: int | None = None, effdense: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a reader needs to judge the numbers: versions, machine, load, and `effdense`, its build."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "effdense": effdense,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
