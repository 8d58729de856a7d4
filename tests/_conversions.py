"""Models that are converted and compared with what they were, step by step."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from tests._stages import assert_close

ALLOWED = "not one of a dense layer's norms, ReLUs, convolutions or dropouts"


def library(name: str) -> Any:
    """A library of the extra "peers"; where it is missing, the test is skipped."""
    return pytest.importorskip(name, reason=f"needs {name.partition('.')[0]}: make test EXTRAS=test,peers")


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with norms that are not the initial ones."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor in (m.weight, m.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (m.bias, m.running_mean):
                    tensor.uniform_(-0.5, 0.5)
    return model.double()


def images_for(model: nn.Module, size: int = 16, channels: int = 3) -> Tensor:
    conv = next(m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return torch.randn(2, channels, *(size,) * len(conv.kernel_size), dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> list[Any]:
    """Outputs, gradients (of the input and the parameters) and buffers of one step with fixed random numbers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    outputs = model(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
    loss.backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(naive: nn.Module, fused: nn.Module, x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        assert_close(step(fused, x), step(naive, x))
    naive.eval(), fused.eval()
    assert_close(step(fused, x), step(naive, x))


def kinds(model: nn.Module) -> dict[str, int]:
    """How many of each kind run fused."""
    report = effdense.report(model)
    fused = [e.kind for e in report if e.converted and e.reason is None]
    return {kind: fused.count(kind) for kind in dict.fromkeys(fused)}


COPIES = ("deepcopy", "pickle", "torch.save")


def copied(model: nn.Module, how: str) -> nn.Module:
    """A copy, made in one of these ways."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that what is done with a model leaves its state, modes, gradients and the random numbers as they were."""
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    modes, grads = [m.training for m in model.modules()], [p.grad for p in model.parameters()]
    yield
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    now = [*model.modules(), *model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, objects, strict=True))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def assert_same_classes(model: nn.Module, expected: nn.Module) -> None:
    """And the same attributes' names."""
    for a, b in zip(model.modules(), expected.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()


def convert_and_compare(
    naive: nn.Module, x: Tensor, blocks: int, memory: str = "balanced", steps: int = 2
) -> nn.Module:
    """Converts a copy and compares it; the copy given back is the naive model again. Returns a converted one."""
    fused = copy.deepcopy(naive)
    with unchanged(fused):
        assert effdense.convert(fused, memory=memory) is fused
    assert kinds(fused)["DenseBlock"] == blocks, str(effdense.report(fused))
    assert_same(naive, fused, x, steps)
    reverted = effdense.revert(copy.deepcopy(fused))
    assert_same_classes(reverted, naive)
    return fused


def make_small(drop_rate: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A naive DenseNet of seven layers: torchvision's where it is installed, else its twin."""
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision.models import DenseNet
    else:
        from benchmarks.densenet import DenseNet
    return DenseNet(4, (2, 3, 2), 6, drop_rate=drop_rate, num_classes=5).to(dtype)


def make_batch(images: int = 4, size: int = 32, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, size, size, dtype=torch.float64), torch.arange(images) % classes


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    torch.manual_seed(1)
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_same_step(
    naive: nn.Module, fused: nn.Module, batch: tuple[Tensor, Tensor], tolerance: float
) -> None:
    outputs = []
    for model in (naive, fused):
        model.zero_grad()
        torch.manual_seed(1)
        outputs.append(model(batch[0]))
        F.cross_entropy(outputs[-1], batch[1]).backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    for (name, a), b in zip(naive.named_parameters(), fused.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        assert (a.grad - b.grad).abs().max() <= tolerance * max(scale, 1.0), name
    for (name, a), b in zip(naive.named_buffers(), fused.buffers(), strict=True):  # type: ignore[assignment]
        assert torch.allclose(b, a, rtol=tolerance, atol=tolerance), name
