"""Measures steps: the allocator's peak in counted bytes, and times.

For `effdense bench`, and for benchmarks/, which read this file without importing effdense: nothing of it may be imported here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_marks():
        profiler.start()
    try:
        fn()
    finally:
        with _without_marks():
            profiler.stop()
    results: Any = profiler.profiler
    tree = results.kineto_results.experimental_event_tree()
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


@contextlib.contextmanager
def _without_marks() -> Iterator[None]:
    """Keeps from stderr the lines for other programs (USDT:…) that the profiler writes there where it starts and stops.

    All others are passed on. PyTorch has no way of its own: KINETO_LOG_LEVEL would hide errors first.
    """
    with contextlib.ExitStack() as stack:
        try:
            own = os.dup(2)
            stack.callback(os.close, own)
            caught = stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # stderr is closed, or there is no room
            yield
            return
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def _allocations(tree: Sequence[Any]) -> Iterator[Any]:
    pending = list(reversed(tree))
    while pending:
        event = pending.pop()
        if event.tag.name == "Allocation":
            yield event
        pending.extend(reversed(event.children))


def cuda_milliseconds(fn: Callable[[], Any]) -> float:
    """Return the milliseconds between two events of the present GPU, before and behind what `fn()` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cuda_peaks(fn: Callable[[], Any], device: str | torch.device) -> dict[str, int]:
    """Return `peak_bytes`, as the function of that name, and `peak_reserved_bytes`, all that the allocator holds of the GPU.

    Tensors count as blocks of the caching allocator, which are up to 1 MiB larger. What libraries keep from
    earlier steps (cuBLAS's workspace) existed before.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what is reserved is then this step's, not that of cuDNN's trials
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def time_statistics(times_ms: Sequence[float]) -> dict[str, float]:
    """Return `median_ms`, `p20_ms` and `p80_ms` (linear interpolation between the sorted times)."""
    if not times_ms:
        raise ValueError("time_statistics: no times given")
    fifths = (
        statistics.quantiles(times_ms, n=5, method="inclusive") if len(times_ms) > 1 else [times_ms[0]] * 4
    )
    return {"median_ms": statistics.median(times_ms), "p20_ms": fifths[0], "p80_ms": fifths[3]}
