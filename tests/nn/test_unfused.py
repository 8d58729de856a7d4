"""The nets without effdense: nothing runs fused, and checkpointing changes neither results nor gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from effdense import models
from effdense.engine import node
from effdense.nn.plain import run_plain
from tests._stages import assert_close

NETS: dict[str, dict[str, Any]] = {
    "bottlenecks": {"depth": 10},
    "bottlenecks, dropout": {"depth": 10, "drop_rate": 0.5},
    "plain layers": {"depth": 10, "bottleneck": False},
    "plain layers, dropout": {"depth": 10, "bottleneck": False, "drop_rate": 0.5},
}


def step(name: str, checkpointed: bool | None) -> tuple[list[Tensor], int]:
    """Output and gradients of a step, and how many blocks ran fused; None: as it was built."""
    torch.manual_seed(0)
    model = models.densenet_cifar(growth_rate=4, in_channels=1, **NETS[name]).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    if checkpointed is not None:
        run_plain(model, checkpointed)
    with mock.patch.object(node, "run", wraps=node.run) as run:
        out = model(x)
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], run.call_count


@pytest.mark.parametrize("name", NETS)
def test_plain_is_the_same(name: str) -> None:
    unfused, fused = step(name, None)
    naive, none = step(name, False)
    checkpointed, none_either = step(name, True)
    assert (fused, none, none_either) == (3, 0, 0)
    assert_close(naive, unfused)
    for a, b in zip(naive, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_keeps_less() -> None:
    """Bytes that a forward leaves for the backward."""
    kept = {}
    for checkpointed in (False, True):
        model = models.densenet_cifar(22, 4)
        run_plain(model, checkpointed)
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(torch.randn(2, 3, 32, 32))
        kept[checkpointed] = sum(sizes.values())
        assert out.requires_grad
    assert kept[True] < kept[False]
