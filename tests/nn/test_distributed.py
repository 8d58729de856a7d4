"""Converted models in two processes: DistributedDataParallel and fully_shard, gradients against one process with the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import effdense
from benchmarks import densenet
from effdense.engine import node
from tests._processes import once
from tests._stages import assert_close

pytestmark = pytest.mark.core

PROCESSES = 2


def make_net(training: bool = False) -> Any:
    """In evaluation statistics are the running ones, and the joined batch's gradients the processes' mean."""
    torch.manual_seed(0)
    return densenet.DenseNet(4, (1, 1), 6, num_classes=5).double().train(training)


def make_images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)


def with_an_unused_layer(model: nn.Module) -> nn.Module:
    model.unused = nn.Linear(2, 2)
    return model


def shard(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in (model.features.denseblock1, model.features.denseblock2):
        with suppress(ValueError):  # torch 2.8 takes no ModuleDict, forward or not: it goes with the model
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


convert = effdense.convert
WAYS: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: DistributedDataParallel(convert(make_net())),
    "ddp, unused parameters": lambda: DistributedDataParallel(
        with_an_unused_layer(convert(make_net())), find_unused_parameters=True
    ),
    "convert after ddp": lambda: convert(DistributedDataParallel(make_net())),
    "fully_shard": lambda: shard(convert(make_net())),
    "convert after fully_shard": lambda: convert(shard(make_net())),
    "ddp, training": lambda: DistributedDataParallel(convert(make_net(True))),
    "ddp, training, naive": lambda: DistributedDataParallel(make_net(True)),
}


class Run(NamedTuple):
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    stages: int  # dense blocks that ran fused in one step
    report: str


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def run_all() -> dict[str, Run]:
    runs, mine = {}, make_images().chunk(PROCESSES)[dist.get_rank()]
    for way, make in WAYS.items():
        model = make()
        with mock.patch.object(node, "run", wraps=node.run) as run:
            for _ in range(2):  # the second finds what the first has set up
                run.reset_mock()
                model.zero_grad()
                loss_of(model, mine).backward()
        grads = [p.grad for name, p in model.named_parameters() if "unused" not in name]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        runs[way] = Run(whole, list(model.buffers()), run.call_count, str(effdense.report(model)))
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    return once(tmp_path_factory, run_all, PROCESSES)


@pytest.mark.parametrize("way", [way for way in WAYS if "training" not in way])
def test_gradients_are_those_of_the_joined_batch(way: str, runs: list[dict[str, Run]]) -> None:
    single = make_net()
    loss_of(single, make_images()).backward()
    for run in runs:
        assert run[way].stages == (0 if way == "convert after fully_shard" else 2)
        assert_close(run[way].gradients, [p.grad for p in single.parameters()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_have_their_parameters_strides(layout: torch.memory_format) -> None:
    """Also those of dimensions with one element: DistributedDataParallel compares all, and warns."""
    model = convert(make_net(True)).to(memory_format=layout)
    loss_of(model, make_images().contiguous(memory_format=layout)).backward()
    assert {n: p.grad.stride() for n, p in model.named_parameters()} == {
        n: p.stride() for n, p in model.named_parameters()
    }


def test_a_sharded_model_is_left_as_it_is(runs: list[dict[str, Run]]) -> None:
    report = runs[0]["convert after fully_shard"].report
    reason = "norm1.weight is sharded; convert before fully_shard, in whose forward parameters are whole"
    assert f"features.denseblock1: not converted: denselayer1.{reason}" in report


def test_training_is_that_of_the_naive_model(runs: list[dict[str, Run]]) -> None:
    for run in runs:
        fused, naive = run["ddp, training"], run["ddp, training, naive"]
        assert (fused.stages, naive.stages) == (2, 0)
        assert_close(fused.gradients + fused.buffers, naive.gradients + naive.buffers)
