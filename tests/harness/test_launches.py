"""Launches of a layer and of a step, counted on the harness beside PyTorch's operators; and what a captured step must not call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import launches
from tests._stages import MEMORY

ROOT = Path(__file__).resolve().parents[2]
GOAL = 4, 7  # forward, backward, beside convolutions


def test_what_a_layer_launches(simt: Any) -> None:
    """Few pixels: forward the bottleneck, bn_relu, append_features; backward apply_correction, bn_relu_backward_sums, bottleneck_backward
    and the sum of its blocks' parts of the weight's gradient."""
    forward, backward = launches.per_layer(simt, "balanced")
    assert (forward.own, forward.others) == (3, 0)
    assert (backward.own, backward.others) == (4, 1)  # the 3x3 weight's gradient in its parameter's layout
    assert (forward.convolutions, backward.convolutions) == (1, 2)


def test_minimal_makes_y_again(simt: Any) -> None:
    forward, backward = launches.per_layer(simt, "minimal")
    assert (forward.own, forward.others) == (3, 0)
    assert (backward.own, backward.others) == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth_rate", [12, 32])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_layer_stays_below_its_goal(simt: Any, memory: str, growth_rate: int, dtype: torch.dtype) -> None:
    """So many pixels that sums are merged by kernels of their own; under autocast gradients get their parameters' type."""
    counts = launches.per_layer(simt, memory, 96, 1, dtype, growth_rate)
    for counted, goal in zip(counts, GOAL, strict=True):
        assert counted.beside_convolutions <= goal, counted


def test_naive_launches_more_the_deeper_the_block_is(simt: Any) -> None:
    """Forward: concatenation, two norms with a counter each, two ReLUs. Backward: those, and a sum for every earlier feature."""
    counted = [launches.per_layer(simt, "naive", layers=layers) for layers in (2, 5)]
    for forward, backward in counted:
        assert (forward.own, backward.own) == (0, 0)
        assert forward.others == 7 and forward.convolutions == 2
    assert counted[1][1].others == counted[0][1].others + 3


# ---- CUDA graphs


def allowed(text: str) -> set[str]:
    """The CUDA runtime's functions and types in a source."""
    code = re.sub(r"//[^\n]*", "", text)
    return set(re.findall(r"\b(?:cuda[A-Z]\w*|at::cuda::\w+|c10::cuda::\w+)", code))


# Launch and ask only: nothing waits for the device, and nothing takes memory from elsewhere than PyTorch's allocator.
RUNTIME = {
    *(
        "cudaLaunchKernelEx",
        "cudaLaunchConfig_t",
        "cudaFuncSetAttribute",
        "cudaFuncGetName",
        "cudaGetLastError",
    ),
    *("cudaFuncAttributeMaxDynamicSharedMemorySize", "cudaGetErrorString", "cudaError_t", "cudaSuccess"),
    *(
        "cudaGetDevice",
        "cudaDeviceGetAttribute",
        "cudaDeviceAttr",
        "cudaStream_t",
        "cudaDevAttrMultiProcessorCount",
        "cudaDevAttrMaxSharedMemoryPerMultiprocessor",
    ),
    *("cudaDevAttrComputeCapabilityMajor", "c10::cuda::CUDAGuard", "c10::cuda::getCurrentCUDAStream"),
}
# Of tensors: what brings a value to the host, or has a size that depends on values.
WAITS = re.compile(
    r"\bitem\b|\bnonzero\b|\bmasked_select\b|\bunique|\bcpu\(\)|kCPU|\bis_nonzero\b|at::equal|\bmalloc\b"
)
SOURCES = [
    path
    for folder in ("csrc/cuda", "csrc/cuda/kernels")
    for path in sorted((ROOT / folder).iterdir())
    if path.is_file()
] + [*sorted((ROOT / "csrc").glob("stage*")), ROOT / "csrc" / "maps.h", ROOT / "csrc" / "checks.h"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_call_waits_or_allocates(source: Path) -> None:
    text = source.read_text()
    assert allowed(text) <= RUNTIME, allowed(text) - RUNTIME
    assert not WAITS.search(re.sub(r"//[^\n]*", "", text))


@pytest.mark.parametrize(
    "call", ["cudaDeviceSynchronize()", "cudaMalloc(&x, 4)", "cudaMemcpy(a, b, 4, kind)"]
)
def test_a_call_that_waits_or_allocates_would_be_found(call: str) -> None:
    assert not allowed(f"  {call};  // as it must not be") <= RUNTIME


@pytest.mark.parametrize("memory", MEMORY)
def test_a_step_asks_no_value_of_the_device(simt: Any, memory: str) -> None:
    """Not one operator of a step brings a number to the host, the norms' running statistics included."""
    block = launches.make_block(memory, 2)
    x = torch.randn(2, 24, 4, 4, requires_grad=True)
    with launches.on_harness(simt), torch.profiler.profile() as profile:
        block(x).sum().backward()
    names = {event.name.removeprefix("aten::") for event in profile.events()}
    assert "convolution_backward" in names
    assert not names & {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose", "to_cpu"}
