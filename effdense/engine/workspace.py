"""Scratch memory that all layers, blocks and steps share: `lease` it, carve tensors out of it, and it goes back.

On the CPU a lease takes a free block from a pool, or makes one: fresh memory costs page faults every time. Leases that
overlap (nested, or of two threads) get blocks of their own. Elsewhere PyTorch's caching allocator does all that, stream
by stream. Nothing in a lease may outlive it.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effdense.ops.extension import extension

_ALIGNMENT = 64  # bytes: a cache line
_LARGE = 4 * 2**20  # bytes: two of Linux's large pages


class Lease:
    """One block of memory, handed out front to back."""

    def __init__(self, block: Tensor) -> None:
        self.block, self._used = block, 0

    def channels_last(self, like: Tensor, channels: int) -> Tensor:
        """An uninitialised [N, channels, *spatial] in channels-last layout, of the batch and spatial sizes of `like`."""
        shape = (like.shape[0], *like.shape[2:], channels)
        size = math.prod(shape) * like.element_size()
        start, self._used = self._used, self._used + padded(size)
        return self.block[start : start + size].view(like.dtype).view(shape).movedim(-1, 1)


class _Pool:
    """Free blocks of CPU memory. A block that is out when the pool is emptied does not come back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._emptied = 0

    def empty(self) -> None:
        with self._lock:
            self._free.clear()
            self._emptied += 1

    def take(self, size: int) -> tuple[Tensor, int]:
        with self._lock:
            emptied = self._emptied
            # By number: a name for a block would keep it beside the new one.
            for i in range(len(self._free)):
                if size <= self._free[i].numel() <= 2 * size:
                    return self._free.pop(i), emptied
            # Neither the small scratch of a large stage's other way nor the large one of another stage is kept: what
            # is held beside the features counts.
            if self._free:
                self._free.pop()
        # An inference tensor could not be written outside of inference mode.
        with torch.inference_mode(False):
            return on_large_pages(torch.empty(size, dtype=torch.uint8)), emptied

    def give_back(self, block: Tensor, emptied: int) -> None:
        with self._lock:
            if emptied == self._emptied:
                self._free.append(block)


_pool = _Pool()


def _after_fork() -> None:
    """A forked child may have been given the lock in a locked state."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def on_large_pages(x: Tensor) -> Tensor:
    """x, just made; where it is large, the system is advised to use large pages, which saves thousands of page faults."""
    if extension is not None and x.device.type == "cpu" and x.numel() * x.element_size() >= _LARGE:
        extension.use_large_pages(x)
    return x


def padded(size: int) -> int:
    """The bytes that a tensor of `size` bytes takes of a lease."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def size_of(like: Tensor, channels: Sequence[int]) -> int:
    """The bytes of a lease that holds a map like `like` for each number of channels."""
    pixels = like.shape[0] * math.prod(like.shape[2:])
    return sum(padded(pixels * c * like.element_size()) for c in channels)


@contextlib.contextmanager
def lease(device: torch.device, size: int, *, keep: bool = True) -> Iterator[Lease]:
    """Lends `size` bytes for the length of the `with` block; `keep`: whether they stay for the next lease, or are freed."""
    if device.type != "cpu":
        yield Lease(torch.empty(size, dtype=torch.uint8, device=device))
        return
    pool = _pool
    block, emptied = pool.take(size)
    try:
        yield Lease(block)
    finally:
        if keep:
            pool.give_back(block, emptied)


def empty_cache() -> None:
    """Gives the scratch memory that no call is using back to the system (on CUDA: to PyTorch, which always has it).

    Examples:
        >>> effdense.empty_cache()
    """
    _pool.empty()
