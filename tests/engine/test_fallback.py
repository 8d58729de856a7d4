"""Without compiled operators, and on devices that have none: plain PyTorch runs, and what is kept is the same."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from effdense import models
from effdense.ops import dispatch, reference
from harness.simt.compiler import ROOT, compile_fake_device
from tests._stages import MEMORY, kept_tensors

pytestmark = pytest.mark.core


@pytest.fixture
def twin() -> Iterator[Callable[[], None]]:
    with contextlib.ExitStack() as until_the_end:
        yield lambda: until_the_end.enter_context(dispatch.override("cpu", reference, ()))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plain", [False, True])
def test_the_same_is_kept_for_the_backward(memory: str, plain: bool, twin: Callable[[], None]) -> None:
    model = models.DenseNet(4, (2, 3, 2), 6, None if plain else 2, 0.2, 5, memory=memory)
    kept = []
    for _ in range(2):
        tensors, _ = kept_tensors(model, torch.randn(2, 3, 40, 37))
        kept.append([(t.shape, t.stride(), t.dtype) for t in tensors])
        twin()
        assert dispatch.operators(tensors[0]) is reference
    assert kept[0] == kept[1]


def train(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


@pytest.mark.parametrize("memory", MEMORY)
def test_the_peak_is_linear_in_depth(memory: str, twin: Callable[[], None]) -> None:
    """Every 12 layers take as much as the 12 before: the features, and a few times as much in passing."""
    twin()
    peaks = []
    for layers in (4, 8, 12):
        model = models.densenet_cifar(6 * layers + 4, 4, memory=memory)
        x = torch.randn(2, 3, 20, 20)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        step = functools.partial(train, model, x)
        step()
        peaks.append(peak_bytes(step))
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.1), peaks


@pytest.mark.parametrize("memory", MEMORY)
def test_on_the_meta_device(memory: str) -> None:
    with torch.device("meta"):
        model = models.DenseNet(4, (2, 2), 6, 2, 0.2, 5, memory=memory)
        x = torch.empty(2, 3, 37, 40, requires_grad=True)
        scores = model(x)
        scores.sum().backward()
    assert scores.shape == (2, 5) and scores.is_meta
    for t in (x, *model.parameters()):
        assert t.grad is not None and t.grad.is_meta and t.grad.shape == t.shape


def test_a_device_without_kernels() -> None:
    command = [sys.executable, "-m", "tests._fake_device", str(compile_fake_device())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("the same") == 2, done.stderr
