"""Whole models, converted, under autocast, in other dtypes and in channels-last: PyTorch's own policy, and no larger errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import images_for, randomised
from tests._stages import assert_as_exact, assert_close, step, weights_of

NETS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: densenet.DenseNet(4, (2, 3), 6, num_classes=5, bn_size=2),
    "plain": lambda: densenet.DenseNet(
        4, (2, 3), 6, num_classes=5, bn_size=None, small_inputs=True, bias=True
    ),
    "gpleiss": structures.StarNet,
    "d2l": structures.d2l_net,
    "tutorial": lambda: structures.tutorial_net(0.0),
    "1D": lambda: structures.rate_net(0.0),
    "growing": structures.growing_net,
}
LOW = torch.bfloat16


def make_pair(net: str) -> tuple[nn.Module, nn.Module]:
    naive = randomised(NETS[net]()).float()
    return naive, effdense.convert(copy.deepcopy(naive))


# ---- autocast


def outer(model: nn.Module) -> list[str]:
    """Itself, and what is called in it around dense layers: stem, blocks, transitions, head."""
    inside = ("denselayer", "net", "layers")
    names = [name for name, m in model.named_modules() if type(m).forward is not nn.Module.forward]
    return [name for name in names if not any(part.startswith(inside) for part in name.split("."))]


def dtypes_at(model: nn.Module, name: str, x: Tensor) -> Any:
    """What goes into a module under autocast, what comes out, and what the model gives."""
    seen: list[torch.dtype] = []

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.extend([inputs[0].dtype, output.dtype])

    handle = model.get_submodule(name).register_forward_hook(note)
    with torch.autocast("cpu", dtype=LOW):
        y = model(x)
    handle.remove()
    return [*seen, y.dtype]


@pytest.mark.core
@pytest.mark.parametrize("parameters", [torch.float32, LOW])
@pytest.mark.parametrize("net", NETS)
def test_autocasts_dtypes_are_those_of_the_naive_model(net: str, parameters: torch.dtype) -> None:
    """At every place that there still is, one hook at a time: so all the rest runs fused."""
    naive, fused = (model.to(parameters) for model in make_pair(net))
    names = outer(naive)
    assert len(names) > 4
    for images in (parameters, LOW):
        x = images_for(naive, 32).to(images)
        for name in names:
            expected = dtypes_at(naive, name, x)
            assert dtypes_at(fused, name, x) == expected and LOW in expected, name


def results(
    model: nn.Module, x: Tensor, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Output, all gradients and all running statistics of one step of a copy in `dtype`."""
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=autocast or LOW, enabled=autocast is not None):
        y = model(x)
    grads = torch.autograd.grad(y, list(model.parameters()), weights_of(y))
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return [y.detach(), *(torch.cat([t.flatten() for t in every]) for every in (grads, statistics))]


RUNS = 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [LOW, torch.float16])
@pytest.mark.parametrize("net", ["bottleneck", "plain", "tutorial", "1D"])
def test_under_autocast_as_exact_as_the_naive_model(net: str, low: torch.dtype, training: bool) -> None:
    naive, fused = (model.train(training) for model in make_pair(net))
    runs = []
    for _ in range(RUNS):
        x = images_for(naive, 32).float()
        mine, theirs = (results(model, x, torch.float32, low) for model in (fused, naive))
        runs.append((mine, theirs, results(naive, x, torch.float64)))
    assert_as_exact(runs, low)


# ---- other dtypes


@pytest.mark.parametrize("dtype", [LOW, torch.float16, torch.float32])
@pytest.mark.parametrize("net", ["bottleneck", "d2l"])
def test_in_another_dtype_as_exact_as_the_naive_model(net: str, dtype: torch.dtype) -> None:
    """float16 has no kernels on the CPU: there plain PyTorch runs."""
    naive, fused = (model.to(dtype) for model in make_pair(net))
    runs = []
    for _ in range(RUNS):
        x = images_for(naive, 32).to(dtype)
        mine, theirs = (results(model, x, dtype) for model in (fused, naive))
        runs.append((mine, theirs, results(naive, x, torch.float64)))
    assert_as_exact(runs, dtype)


@pytest.mark.core
def test_back_to_float64() -> None:
    naive, fused = make_pair("bottleneck")
    x = images_for(naive, 32)
    for model in (naive, fused):
        model.bfloat16().half().double()
    assert_close(step(fused, x), step(naive, x))


# ---- layouts: of images and of models


@pytest.mark.parametrize("net", ["d2l", "gpleiss", "tutorial", "growing"])
def test_layouts_are_no_matter(net: str) -> None:
    """What other libraries' structures make of every layout; torchvision's is in test_model.py."""
    naive, fused = (model.double() for model in make_pair(net))
    x = images_for(naive, 32)
    for of_model in (torch.contiguous_format, torch.channels_last):
        naive, fused = (model.to(memory_format=of_model) for model in (naive, fused))
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.expand(4, 2, 3, 32, 32)[1]):
            assert_close(step(fused, image), step(naive, image))


# ---- GradScaler


def train(model: nn.Module, images: Tensor, labels: Tensor, overflow: int) -> list[Any]:
    """Three steps, of which one overflows; the loss scale and the gradients' norm behind every one, and the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen: list[Any] = []
    for i in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss * (float("inf") if i == overflow else 1.0)).backward()
        scaler.unscale_(optimizer)
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        scaler.step(optimizer)
        scaler.update()
        seen.append(torch.tensor(scaler.get_scale()))
    return [*seen, *(p.detach().clone() for p in model.parameters()), *model.buffers()]


@pytest.mark.core
@pytest.mark.parametrize("overflow", [0, 1])
def test_grad_scaler(overflow: int) -> None:
    naive, fused = (model.double() for model in make_pair("bottleneck"))
    x, labels = images_for(naive, 32), torch.tensor([1, 3])
    expected, got = (train(model, x, labels, overflow) for model in (naive, fused))
    assert not expected[2 * overflow].isfinite() and expected[5] == 2.0**9
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, equal_nan=True)
