"""SyncBatchNorm: two gloo processes, each with a part of the batch, against one process with all of it and BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import effdense
from benchmarks import models as naive
from benchmarks.structures import growing_net
from effdense.models import DenseNet
from tests._processes import once
from tests._stages import FUSED, fused_under_compile

pytestmark = pytest.mark.core

PARTS = (3, 2)  # images of the two processes
WRAPPED = ("bottlenecks", "torchvision's")  # of MODELS, in DistributedDataParallel


def _small(**options: Any) -> nn.Module:
    return DenseNet(4, (2, 2), 6, 2, num_classes=3, **options)


def _one_norm_in_evaluation() -> nn.Module:
    model: Any = _small()
    model.features.denseblock1.denselayer1.norm2.eval()
    model.features.denseblock1.denselayer2.norm1.eval()
    return model


def _average_of_all_batches() -> nn.Module:
    model = _small()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    return model


def _frozen_below() -> nn.Module:
    model: Any = _small()
    model.features.conv0.requires_grad_(False)
    model.features.norm0.requires_grad_(False)
    model.features.denseblock1.denselayer1.requires_grad_(False)
    return model


def _hooked(*names: str) -> nn.Module:
    """Where a module cannot run with its neighbours."""
    model = _small()
    for name in names:
        model.get_submodule(f"features.{name}").register_forward_hook(lambda *_: None)
    return model


def _another_pool() -> nn.Module:
    model: Any = _small()
    model.features.transition1.pool = nn.MaxPool2d(2)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bottlenecks": _small,
    "minimal": lambda: _small(memory="minimal"),
    "plain layers": lambda: DenseNet(4, (2, 2), 6, None, num_classes=3, small_inputs=True),
    "1D": lambda: _small(spatial_dims=1),
    "3D": lambda: _small(spatial_dims=3, small_inputs=True),
    "biases": lambda: _small(bias=True),
    "one norm in evaluation": _one_norm_in_evaluation,
    "average of all batches": _average_of_all_batches,
    "frozen below": _frozen_below,
    "layers alone": lambda: _hooked("denseblock1.denselayer1", "denseblock1.denselayer2"),
    "transition alone": lambda: _hooked("transition1"),
    "another pool": _another_pool,
    "torchvision's": lambda: naive.DenseNet(4, (2, 2), 6, num_classes=3),
    "another library's": growing_net,
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def _batch(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Images, and the random weights by which outputs [N, …] are summed to a loss."""
    conv: Any = next(m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    generator = torch.Generator().manual_seed(2)
    sizes = (16,) * len(conv.kernel_size) if conv.kernel_size[0] == 7 else (4,) * len(conv.kernel_size)
    x = torch.randn(sum(PARTS), conv.in_channels, *sizes, generator=generator, dtype=torch.float64)

    def weights(out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(sum(PARTS), *out.shape[1:], generator=generator, dtype=torch.float64)

    return x, weights


def _step(model: nn.Module, run: Callable[[Tensor], Tensor], part: slice) -> dict[str, Tensor]:
    """Two steps of a process: outputs, the gradients of images and parameters, and buffers."""
    x, weights = _batch(model)
    x = x[part].requires_grad_()
    run(x)
    out = run(x)
    out.backward(weights(out)[part])
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"out": out.detach(), "x.grad": x.grad, **grads, **buffers}  # type: ignore[dict-item]


class _Counted:
    """Counts collectives."""

    def __init__(self) -> None:
        self.calls = {"all_gather": 0, "all_reduce": 0}
        for name in self.calls:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counting


def _everything() -> dict[str, Any]:
    """What every process does."""
    begin = sum(PARTS[: dist.get_rank()])
    part = slice(begin, begin + PARTS[dist.get_rank()])
    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    results: dict[str, Any] = {}
    for name in MODELS:
        modes = [m.training for m in _build(name).modules()]
        first = sync(effdense.convert(_build(name)))
        results[f"{name}, converted first"] = _step(first, first, part)
        second = effdense.convert(sync(_build(name)))
        assert [m.training for m in second.modules()] == modes
        results[f"{name}, synchronised first"] = _step(second, second, part)
        for model in (first, second):
            kinds = [e.kind for e in effdense.report(model) if e.converted and e.reason is None]
            assert kinds.count("DenseBlock") == (1 if name == "layers alone" else 2), (
                name,
                str(effdense.report(model)),
            )
    name = "bottlenecks"
    if FUSED:  # PyTorch's own SyncBatchNorm does not run on CPUs
        for group in (None, dist.new_group([0, 1])):
            model = sync(_build(name), group)
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            results[f"{name}, compiled, {'a group' if group else 'all'}"] = _step(model, run, part)

    everything = slice(0, None) if dist.get_rank() == 0 else slice(0, 0)
    model = sync(_build(name))
    results[f"{name}, all images here or there"] = _step(model, model, everything)

    results["wrapped"] = {name: _wrapped(name, part) for name in WRAPPED}
    counted = _Counted()
    model = sync(effdense.nn.DenseBlock(3, 4, 2, 4, 0.0))
    out = model(torch.randn(2, 4, 3, 3, requires_grad=True))
    results["forward"] = dict(counted.calls)
    out.sum().backward()
    results["both ways"] = dict(counted.calls)
    model.eval()(torch.randn(2, 4, 3, 3))
    results["evaluation"] = dict(counted.calls)

    alone = dist.new_group([0]), dist.new_group([1])
    model = sync(_build(name), alone[dist.get_rank()])
    results["by itself"] = _step(model, model, part)
    results["mixed"] = _mixed(alone[0])
    return results


def _one_step(model: nn.Module, run: Callable[[Tensor], Tensor], part: slice) -> dict[str, Tensor]:
    """Gradients and buffers of a process after a step."""
    x, weights = _batch(model)
    out = run(x[part])
    out.backward(weights(out)[part])
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, **{name: b.clone() for name, b in model.named_buffers()}}


def _wrapped(name: str, part: slice) -> dict[str, Tensor]:
    """docs/distributed.md's order: DistributedDataParallel, which refuses what is synchronised already, and then SyncBatchNorm."""
    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(sync(effdense.convert(_build(name))))
    run = DistributedDataParallel(effdense.convert(_build(name)))
    sync(run.module)
    return _one_step(run.module, run, part)


def _mixed(group: Any) -> list[str | None]:
    """What is said of a block with one norm of another group, and with one that is not synchronised."""
    reasons = []
    local = nn.SyncBatchNorm(6, track_running_stats=False).eval()  # of this process's batch alone
    for other in (nn.SyncBatchNorm(6, process_group=group), nn.BatchNorm2d(6), local):
        block: Any = nn.SyncBatchNorm.convert_sync_batchnorm(effdense.nn.DenseBlock(2, 4, 1, 6, 0.0))
        block.denselayer1.norm2 = other
        reasons.append(block.obstacle())
    return reasons


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once(tmp_path_factory, _everything, len(PARTS))


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    """One process with the whole batch, plain BatchNorm, nothing converted."""
    return {name: _whole(name, slice(None)) for name in MODELS}


def _whole(name: str, part: slice) -> dict[str, Tensor]:
    model = _build(name)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)  # nothing runs fused
    return _step(model, model, part)


ORDERS = [f"{name}, {order} first" for name in MODELS for order in ("converted", "synchronised")]


COMPILED = [f"bottlenecks, compiled, {group}" for group in ("all", "a group")]


@pytest.mark.parametrize(
    "case",
    [
        *ORDERS,
        *(pytest.param(case, marks=fused_under_compile) for case in COMPILED),
        "bottlenecks, all images here or there",
    ],
)
def test_two_processes_are_one_with_the_joint_batch(
    case: str, processes: list[dict[str, Any]], whole: dict[str, dict[str, Tensor]]
) -> None:
    expected = whole[case.split(", ")[0]]
    got = [p[case] for p in processes]
    assert got[0].keys() == got[1].keys() == expected.keys()
    for key, value in expected.items():
        one, other = got[0][key], got[1][key]
        if key in ("out", "x.grad"):
            joint = torch.cat([one, other])
        elif key.startswith("grad "):
            joint = one + other
        else:
            assert torch.equal(one, other), key  # to the bit, or the processes drift apart
            joint = one
        torch.testing.assert_close(joint, value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize("name", WRAPPED)
def test_synchronised_after_wrapping(processes: list[dict[str, Any]], name: str) -> None:
    """The gradients are the mean of the processes'; one process with the joint batch has their sum."""
    model = _build(name)
    expected = _one_step(model, model, slice(None))
    for p in processes:
        got = p["wrapped"][name]
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            one = got[key] * len(PARTS) if key.startswith("grad ") else got[key]
            torch.testing.assert_close(one, value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")  # type: ignore[misc]


def test_two_collectives_a_layer_each_way(processes: list[dict[str, Any]]) -> None:
    layers = 3
    for p in processes:
        # and one for the block's input; one for the running variances, which need the number of values
        assert p["forward"] == {"all_gather": 2 * layers + 1, "all_reduce": 1}
        assert p["both ways"] == {"all_gather": 2 * layers + 1, "all_reduce": 1 + 2 * layers + 1}
        assert p["evaluation"] == p["both ways"]


def test_a_group_of_one_process_is_batch_norm(processes: list[dict[str, Any]]) -> None:
    begin = 0
    for p, size in zip(processes, PARTS, strict=True):
        expected = _whole("bottlenecks", slice(begin, begin + size))
        begin += size
        for key, value in expected.items():
            torch.testing.assert_close(p["by itself"][key], value, rtol=1e-9, atol=1e-9)


def test_norms_of_different_processes_do_not_run_together(processes: list[dict[str, Any]]) -> None:
    for p in processes:
        assert all("synchronised over different processes" in reason for reason in p["mixed"])
