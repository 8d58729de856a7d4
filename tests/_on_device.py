"""Runs the operators of another device for tests that make CPU tensors: copies arguments there, and results back.

Whole storages travel, so that every tensor lies there as it did here: in slices, with its neighbours around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """`ops.name(...)` as the operators' namespace has it, run on `device`."""

    def __init__(self, ops: Any, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            there = _Storages(self._device)
            result = operator(*there.send(args), **there.send(kwargs))
            there.fetch_storages()
            return there.fetch(result)

        return call


class _Storages:
    """Every storage that has been sent, here and there."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pairs: dict[int, tuple[Any, Any]] = {}

    def send(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._send_tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.send(v) for v in value)
        if isinstance(value, dict):
            return {k: self.send(v) for k, v in value.items()}
        return value

    def _send_tensor(self, x: Tensor) -> Tensor:
        here = x.untyped_storage()
        if here._cdata not in self._pairs:
            there = torch.UntypedStorage(here.nbytes(), device=self._device)
            there.copy_(here)
            self._pairs[here._cdata] = here, there
        _, there = self._pairs[here._cdata]
        empty = torch.empty(0, dtype=x.dtype, device=self._device)
        return empty.set_(there, x.storage_offset(), x.shape, x.stride())

    def fetch_storages(self) -> None:
        for here, there in self._pairs.values():
            here.copy_(there)

    def fetch(self, value: Any) -> Any:
        """Results; a device's own are made anew on the CPU, with their strides."""
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu").copy_(
                value
            )
        if isinstance(value, (list, tuple)):
            return type(value)(self.fetch(v) for v in value)
        return value
