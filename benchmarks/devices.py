"""The devices that benchmarks run on, CPU or GPU: how to time and to count memory there, and how to describe the machine.

`find(name)` returns the device of a name; everything that differs between the two is here. The GPU's side has been
tested against a stand-in for torch.cuda (tests/benchmarks/test_benchmark_devices.py), and not on a GPU yet.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils import collect_env

from benchmarks import measure

FLUSH_BYTES = 2**30  # written before a timed call on a GPU: beyond its cache, and longer than a launch takes


class Cpu:
    """The CPU. What its methods say holds for a GPU too."""

    name = type = "cpu"
    warm_up_steps = 2
    # Between implementations, relative; of every dtype that there is.
    loss_tolerance: ClassVar = {"float32": 1e-3, "bfloat16": 5e-2}

    def use(self) -> None:
        """Make this the device of the process, set up the same for every implementation."""

    def time_step(self, fn: Callable[[], Any]) -> float:
        """Return the milliseconds of a step."""
        start = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - start)

    def time_call(self, fn: Callable[[], Any]) -> float:
        """Return the milliseconds of one operator's call."""
        return self.time_step(fn)

    def count(self, fn: Callable[[], Any]) -> dict[str, int]:
        """Return `peak_bytes`, the allocator's peak above its level at the start while `fn()` runs."""
        return {"peak_bytes": measure.peak_bytes(fn)}

    def environment(self) -> dict[str, Any]:
        """Return what measure.environment does not know."""
        return {}

    def available_bytes(self) -> int:
        """Return how much memory a process may still take."""
        return measure.available_bytes()


class Cuda:
    """A GPU, with cudnn.benchmark on, and TF32 for GEMMs where convolutions have it (PyTorch's default: they do).

    A 1x1 convolution is a GEMM to some implementations and a convolution to others, so both get the same precision.
    """

    type = "cuda"
    # cuDNN tries its algorithms, the clocks rise, and float16's scaler finds a scale without overflow.
    warm_up_steps = 10
    # TF32 has float16's mantissa.
    loss_tolerance: ClassVar = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}

    def __init__(self, index: int = 0) -> None:
        self.name = f"cuda:{index}"

    def use(self) -> None:
        torch.cuda.set_device(self.name)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32

    def time_step(self, fn: Callable[[], Any]) -> float:
        """Begins with an idle GPU: where it waits for the CPU to launch kernels, that is part of the step."""
        torch.cuda.synchronize(self.name)
        return measure.cuda_milliseconds(fn)

    def time_call(self, fn: Callable[[], Any]) -> float:
        """Runs behind a long write, so that kernels are launched before it ends and find no tensor in a cache."""
        self._flushed.zero_()
        return measure.cuda_milliseconds(fn)

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.name)

    def count(self, fn: Callable[[], Any]) -> dict[str, int]:
        """Also returns `peak_reserved_bytes`: all that the process's allocator holds of the GPU, the model included."""
        return measure.cuda_peaks(fn, self.name)

    def environment(self) -> dict[str, Any]:
        """Return the GPU, its software, and what `use` sets in the processes that measure."""
        properties = torch.cuda.get_device_properties(self.name)
        return {
            "gpu": {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "driver": collect_env.get_nvidia_driver_version(collect_env.run),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "cudnn_benchmark": True,
                "tf32": torch.backends.cudnn.allow_tf32,
            }
        }

    def available_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.name)[0]


Device = Cpu | Cuda


def find(name: str) -> Device:
    """Return the device called cpu, cuda or cuda:N; a ValueError says what it lacks to be used here."""
    if not (match := re.fullmatch(r"cpu|cuda(?::(\d+))?", name)):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return Cpu()
    if not torch.backends.cuda.is_built():
        raise ValueError(
            f"{name} needs a torch that is built with CUDA, and this is torch {torch.__version__}"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"{name} cannot be used: {_why_unavailable()}")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f"{name} is not there: torch sees {count} CUDA device{'s' * (count > 1)}, from cuda:0 on"
        )
    return Cuda(index)


def _why_unavailable() -> str:
    """The driver or the device that torch misses, in its words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch.cuda.is_available() is false"


def argument(text: str) -> Device:
    """Return the device that an argument of a command line names."""
    try:
        return find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
