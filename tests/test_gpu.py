"""Tests that need a GPU: its check, whole models in mixed precision, streams, captured graphs, memory.

`pytest -m gpu` runs these, and the operators' and the engine's tests on the card; without a GPU they are not collected.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import models
from effdense import cli
from effdense.ops import gpu_check
from tests._stages import MEMORY

pytestmark = pytest.mark.gpu


CARD = "cuda"


def make_models(memory: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    naive: Any = models.build("densenet_bc_40_12", "naive").model.to(CARD)
    return naive, effdense.convert(copy.deepcopy(naive), memory=memory)


def step(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The output and the parameters' gradients."""
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = model(x)
    y.float().square().sum().backward()
    return [y.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))


def test_the_card_passes_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", CARD]) == 0
    assert "compiled operators on cuda:0" in capsys.readouterr().out
    assert gpu_check.usable(0)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_as_exact_as_the_naive_one(memory: str, dtype: torch.dtype) -> None:
    naive, fused = make_models(memory)
    x = torch.randn(16, 3, 32, 32, device=CARD)
    exact = [t.float() for t in step(copy.deepcopy(naive).double(), x.double())]
    assert error(step(fused, x, dtype), exact) <= 2 * error(step(naive, x, dtype), exact) + 1e-5


@pytest.mark.parametrize("memory", MEMORY)
def test_every_step_gives_the_same_bits(memory: str) -> None:
    _, fused = make_models(memory)
    features = next(m for m in fused.modules() if isinstance(m, effdense.nn.DenseBlock))
    x = torch.randn(8, 24, 32, 32, device=CARD).contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.deterministic = True
    try:
        first = step(features, x)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(step(features, x), first, strict=True))
    finally:
        torch.backends.cudnn.deterministic = False


def test_two_streams_do_not_disturb_each_other() -> None:
    _, fused = make_models("minimal")
    fused.eval().requires_grad_(False)
    inputs = [torch.randn(32, 3, 32, 32, device=CARD) for _ in range(2)]
    expected = [fused(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(fused(x))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_training_step_can_be_captured_in_a_graph(memory: str) -> None:
    """As a whole, and its replays give the bits of a step that is not captured, on images that came later."""
    _, fused = make_models(memory)
    static = torch.randn(8, 3, 32, 32, device=CARD)
    torch.backends.cudnn.deterministic = True
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(fused, static)
        torch.cuda.current_stream().wait_stream(side)
        reference = copy.deepcopy(fused)
        fused.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(static)
            y.square().sum().backward()
        for _ in range(2):
            x = torch.randn_like(static)
            static.copy_(x)
            for _ in range(2):  # the counters are zeros again
                graph.replay()
                got = [y, *(p.grad for p in fused.parameters() if p.grad is not None)]
                expected = step(reference, x)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.backends.cudnn.deterministic = False


def test_memory_is_a_fraction_of_the_naive_models() -> None:
    peaks = []
    for model in make_models("minimal"):
        x = torch.randn(64, 3, 32, 32, device=CARD)
        step(model, x)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 4, peaks


def test_tensors_of_two_devices_are_refused() -> None:
    x, vector = torch.randn(2, 4, 3, 3, device=CARD), torch.ones(4)
    out = torch.empty(2, 3, 3, 4, device=CARD).movedim(-1, 1)
    with pytest.raises(ValueError, match="bn_relu: scale must be on cuda:0 like the features, got cpu"):
        torch.ops.effdense.bn_relu(x, vector, vector.to(CARD), out)
