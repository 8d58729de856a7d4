"""Measures steps: the allocator's peak in counted bytes, the process's peak, times; and describes the machine."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Return the CPU allocator's peak, in bytes above its level at the start, while `fn()` runs.

    Every allocation that passes PyTorch's CPU allocator on the calling thread is counted, also those made in
    C++ and in backward (which runs on the calling thread). Not counted: what other threads allocate, what
    libraries take from malloc by themselves (`peak_rss_bytes` sees both), and the release of memory that
    existed before: free nothing old in `fn` (`zero_grad(set_to_none=False)`) or the result is too high.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    live: dict[int, int] = {}
    level = peak = 0
    for event in sorted(_allocations(tree), key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.device.type != "cpu":
            continue
        if fields.alloc_size > 0:
            live[fields.ptr] = fields.alloc_size
            level += fields.alloc_size
            peak = max(peak, level)
        else:
            level -= live.pop(fields.ptr, 0)
    return peak


def _allocations(tree: Sequence[Any]) -> Iterator[Any]:
    pending = list(reversed(tree))
    while pending:
        event = pending.pop()
        if event.tag.name == "Allocation":
            yield event
        pending.extend(reversed(event.children))


def peak_rss_bytes() -> int:
    """Return this process's largest resident size so far, in bytes."""
    try:
        with open("/proc/self/status") as status:  # ru_maxrss would inherit the parent's through exec
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


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


def time_statistics(times_ms: Sequence[float]) -> dict[str, float]:
    """Return `median_ms`, `p20_ms` and `p80_ms` (linear interpolation between the sorted times)."""
    if not times_ms:
        raise ValueError("time_statistics: no times given")
    fifths = (
        statistics.quantiles(times_ms, n=5, method="inclusive") if len(times_ms) > 1 else [times_ms[0]] * 4
    )
    return {"median_ms": statistics.median(times_ms), "p20_ms": fifths[0], "p80_ms": fifths[3]}


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return what a reader needs to judge the numbers: versions, machine, load, effdense's build."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "effdense": _effdense_build_info(),
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


def _effdense_build_info() -> dict[str, Any] | None:
    try:
        import effdense

        return effdense.build_info()
    except ModuleNotFoundError:
        return None
    except Exception as error:  # peers can be measured beside an effdense that does not load
        return {"error": str(error)}


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
