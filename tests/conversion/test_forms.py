"""convert on transitions, stems and heads of other forms: pools by a function, wrappers, at the head of the next stage, alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import structures
from effdense.nn.network import stem_of
from tests._conversions import assert_same, convert_and_compare, images_for, kinds, library, randomised


class Layer(nn.Module):
    def __init__(self, channels: int, k: int = 4) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, k, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))], 1)


class PooledByFunction(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class ActInList(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn, self.acts, self.conv = (
            nn.BatchNorm2d(channels),
            nn.ModuleList([nn.ReLU()]),
            nn.Conv2d(channels, out, 1),
        )
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.acts[0](self.bn(x))))


class OwnNames(nn.Module):
    """torchvision's names but `act`, and a forward."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv, self.pool = nn.Conv2d(channels, out, 1), nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.act(self.norm(x))))


class Wrapped(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, out, 1), nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(x)


class MaxPooled(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn, self.conv, self.pool = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.bn(x))))


FORMS = [PooledByFunction, ActInList, OwnNames, Wrapped, MaxPooled]


class Walking(nn.Module):
    """Blocks and transitions in two lists that the net's own forward walks."""

    def __init__(self, transition: Any, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = 6
        for i in range(blocks):
            self.blocks.append(nn.Sequential(*(Layer(channels + 4 * j) for j in range(3))))
            channels += 12
            if i < blocks - 1:
                self.transitions.append(transition(channels, channels // 2))
                channels //= 2
        self.norm, self.classifier = nn.BatchNorm2d(channels), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


def at_head(transition: Any) -> nn.Module:
    """pytorchcv's: a transition opens the next stage."""
    stages, channels = list[nn.Module](), 6
    for i in range(3):
        parts = [transition(channels, channels // 2)] if i else []
        channels = channels // 2 if i else channels
        stages.append(nn.Sequential(*parts, *(Layer(channels + 4 * j) for j in range(3))))
        channels += 12
    head = nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *stages, *head)


NETS: dict[str, Callable[[Any], nn.Module]] = {"in lists": Walking, "at the head of a stage": at_head}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("form", FORMS)
def test_transitions_of_other_forms_are_converted(form: Any, net: str) -> None:
    naive = randomised(NETS[net](form))
    fused = convert_and_compare(naive, images_for(naive, 20), 3, steps=1)
    assert kinds(fused)["Transition"] == 2, str(effdense.report(fused))


@pytest.mark.parametrize("form", FORMS)
def test_a_transition_alone_is_converted(form: Any) -> None:
    naive = randomised(form(18, 9))
    fused = effdense.convert(form(18, 9).double())
    fused.load_state_dict(naive.state_dict())
    assert kinds(fused) == {"Transition": 1}
    assert_same(naive, fused, torch.randn(2, 18, 8, 9, dtype=torch.float64))


def test_what_only_looks_like_a_transition_stays() -> None:
    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.bn(x)))

    model = nn.Sequential(Narrowing(), nn.Conv2d(3, 6, 1), structures.NetBlock(2, 6, 4))
    effdense.convert(model)
    assert type(model[0]) is Narrowing and kinds(model) == {"DenseFeatures": 1, "DenseBlock": 1}


def test_a_transition_without_a_relu_stays_and_the_report_says_why() -> None:
    class Narrowing(nn.Module):
        """weiaicunzai's pytorch-cifar100."""

        def __init__(self) -> None:
            super().__init__()
            parts = nn.BatchNorm2d(14), nn.Conv2d(14, 7, 1, bias=False), nn.AvgPool2d(2, stride=2)
            self.down_sample = nn.Sequential(*parts)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_sample(x)

    naive = randomised(nn.Sequential(structures.NetBlock(2, 6, 4), Narrowing(), structures.NetBlock(2, 7, 4)))
    fused = effdense.convert(copy.deepcopy(naive))
    (entry,) = (e for e in effdense.report(fused) if not e.converted)
    assert (entry.name, entry.kind) == ("1", "Transition")
    assert str(entry.reason).startswith("it has no ReLU between its norm and its convolution")
    assert_same(naive, fused, torch.randn(2, 6, 8, 9, dtype=torch.float64))


def saved(model: nn.Module, x: Tensor) -> list[int]:
    """How many numbers each tensor has that is kept for the backward."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(x)
    return sizes


def test_a_stem_inside_a_sequence_runs_fused() -> None:
    naive = randomised(structures.d2l_net(channels=11))
    fused = convert_and_compare(naive, images_for(naive, 33), 2, steps=1)
    maps = 2 * 11 * 17 * 17  # what the stem's convolution gives
    x = images_for(naive, 33)
    assert saved(naive.train(), x).count(maps) >= 2
    assert saved(fused.train(), x).count(maps) == 1


def test_a_head_at_the_end_of_a_sequence_runs_with_the_last_block() -> None:
    naive = randomised(structures.d2l_net(channels=11))
    fused = convert_and_compare(naive, images_for(naive, 33), 2, steps=1)
    x = images_for(naive, 33)
    (last,) = {m.in_features for m in naive.modules() if isinstance(m, nn.Linear)}
    maps = 2 * last * 4 * 4
    assert saved(naive.train(), x).count(maps) >= 2
    assert saved(fused.train(), x).count(maps) == 1  # the block's features


def test_a_stem_of_a_net_with_its_own_forward_runs_fused() -> None:
    naive = randomised(Walking(Wrapped))
    fused = convert_and_compare(naive, images_for(naive, 20), 3, steps=1)
    assert kinds(fused)["DenseFeatures"] == 1
    fused.stem[1].register_forward_hook(lambda *_: None)
    assert_same(naive.train(), fused.train(), images_for(naive, 20), 1)


def test_timms_stem_runs_fused() -> None:
    naive = randomised(
        library("timm").create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=3)
    )
    fused = convert_and_compare(naive, images_for(naive, 40), 2, steps=1)
    stem = stem_of(fused.features.parts()[1:])
    assert stem is not None and stem.modules == 2  # the ReLU is inside of the norm


def test_timms_features_only() -> None:
    naive = randomised(
        library("timm").create_model(
            "densenet121", features_only=True, out_indices=(0, 1, 2), growth_rate=4, block_config=(2, 2, 2)
        )
    )
    fused = convert_and_compare(naive, images_for(naive, 40), 2, steps=1)
    assert kinds(fused)["Transition"] == 1, str(effdense.report(fused))
