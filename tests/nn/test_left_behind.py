"""Traces that tools leave on modules: one that cannot change a result leaves a block fused; one that can is named by report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import effdense
from benchmarks import densenet, structures
from tests._conversions import assert_same, kinds, library, randomised

NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5),
    "gpleiss": structures.StarNet,
    "tutorial": lambda: structures.tutorial_net(0.0),
    "growing": structures.growing_net,
    "one rate for all": lambda: structures.rate_net(0.0),
}


def counters(model: nn.Module) -> None:
    """thop's."""
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))


def backup(model: nn.Module) -> None:
    """SAM's."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.backup_momentum = module.momentum  # type: ignore[assignment]
            module.momentum = 0.0
            module.momentum = module.backup_momentum  # type: ignore[assignment]


def marks(model: nn.Module) -> None:
    for i, module in enumerate(model.modules()):
        vars(module).update(
            module_name=f"m{i}", handle=object(), macs=float(i), pruned=True, old_forward=None
        )


def hooks_gone(model: nn.Module) -> None:
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    for m in model.modules():
        vars(m)["flops_handle"] = handles[0]
    for handle in handles:
        handle.remove()


def pruned_for_good(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            torch.manual_seed(1)
            prune.random_unstructured(module, "weight", 0.3)
            prune.remove(module, "weight")


TOOLS = [counters, backup, marks, hooks_gone, pruned_for_good]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("net", NETS)
def test_what_a_tool_leaves_changes_nothing(net: str, tool: Callable[[nn.Module], None], when: str) -> None:
    naive = randomised(NETS[net]())
    expected = kinds(effdense.convert(copy.deepcopy(naive)))
    fused = copy.deepcopy(naive)
    if when == "after":
        effdense.convert(fused)
    tool(naive)
    tool(fused)
    effdense.convert(fused)
    assert kinds(fused) == expected, str(effdense.report(fused))
    size = (16,) if net == "one rate for all" else (32, 32)
    assert_same(naive, fused, torch.randn(2, 3, *size, dtype=torch.float64), 1)


@pytest.mark.parametrize("enable", [True, False])
def test_checkpointing_switched_later(enable: bool) -> None:
    naive = randomised(structures.StarNet(efficient=not enable))
    fused = effdense.convert(copy.deepcopy(naive))
    expected = kinds(fused)
    for module in fused.modules():
        if isinstance(module, structures.StarLayer):
            module.efficient = enable
    assert kinds(fused) == expected, str(effdense.report(fused))


@pytest.mark.parametrize("enable", [True, False])
def test_timms_checkpointing_switched_later(enable: bool) -> None:
    naive = randomised(
        library("timm").create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=3)
    )
    fused: Any = copy.deepcopy(naive)
    fused.set_grad_checkpointing(not enable)
    effdense.convert(fused)
    fused.set_grad_checkpointing(enable)
    assert kinds(fused)["DenseBlock"] == 2, str(effdense.report(fused))
    assert_same(naive, fused, torch.randn(2, 3, 64, 64, dtype=torch.float64), 1)


class Gated(structures.NetBlock):
    """Reads a buffer, and a truth value that matters."""

    def __init__(self) -> None:
        super().__init__(2, 6, 4)
        self.double_it = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if self.double_it else y


def test_what_the_code_reads_counts() -> None:
    naive = randomised(Gated())
    fused: Any = effdense.convert(copy.deepcopy(naive))
    for block in (naive, fused):
        block.double_it = True
    assert fused.obstacle() is not None and "double_it" in fused.obstacle()
    assert_same(naive, fused, torch.randn(2, 6, 5, 5, dtype=torch.float64), 1)


class Scaled(structures.NetBlock):
    def __init__(self) -> None:
        super().__init__(2, 6, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_a_buffer_that_the_code_reads_is_refused() -> None:
    (entry,) = [e for e in effdense.report(effdense.convert(Scaled())) if e.kind == "DenseBlock"]
    assert entry.reason == "it has parameters or buffers of its own: scale"


def test_what_can_change_the_computation_is_named() -> None:
    model: Any = effdense.convert(densenet.DenseNet(4, (2, 2), 6, num_classes=5))
    layer = model.features.denseblock1.denselayer1
    layer.norm2.register_forward_hook(lambda *_: None)
    torch.nn.utils.parametrizations.weight_norm(model.features.denseblock2.denselayer1.conv1)
    report = {e.name: str(e.reason) for e in effdense.report(model)}
    assert report["features.denseblock1"] == "denselayer1: norm2 has hooks"
    assert report["features.denseblock2"].startswith("denselayer1: conv1 ")
