"""Distributed tensors as inputs and parameters of a converted model: one process, PyTorch's own result or refusal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

import effdense
from benchmarks import structures
from tests._conversions import randomised

pytestmark = pytest.mark.core
PLACEMENTS = [Replicate(), Shard(0)]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make() -> Any:
    return randomised(nn.Sequential(structures.NetBlock(2, 6, 4), nn.Conv2d(14, 3, 1)))


def images() -> torch.Tensor:
    return torch.randn(2, 6, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_distributed_input_of_a_plain_model_is_refused_as_by_pytorch(
    mesh: DeviceMesh, placement: Any
) -> None:
    naive = make()
    fused = effdense.convert(copy.deepcopy(naive))
    x = distribute_tensor(images(), mesh, [placement])
    messages = []
    for model in (naive, fused):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor") as error:
            model(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), naive.buffers(), strict=True))


@pytest.mark.parametrize("first", ["convert", "distribute"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_distributed_model_computes_what_pytorch_does(mesh: DeviceMesh, placement: Any, first: str) -> None:
    naive = make()
    fused = copy.deepcopy(naive)
    if first == "convert":
        effdense.convert(fused)
    naive, fused = (distribute_module(model, mesh) for model in (naive, fused))
    effdense.convert(fused)
    assert all("is sharded" in str(e.reason) for e in effdense.report(fused) if e.kind == "DenseBlock")
    image, results, refusals = images(), [], []
    for model in (naive, fused):
        x = distribute_tensor(image, mesh, [placement]).requires_grad_()
        try:
            y = model(x)
        except NotImplementedError as error:  # torch 2.8: distributed tensors have no batch norm
            refusals.append(str(error))
            continue
        y.square().sum().backward()
        assert isinstance(y, DTensor)
        results.append([t.full_tensor() for t in (y, x.grad, *(p.grad for p in model.parameters()))])
    if refusals:
        assert refusals == refusals[:1] * 2
        return
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
