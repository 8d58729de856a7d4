"""convert on nets whose head is made of modules: norm, ReLU and global average run with the last block, in a user's own forward too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import assert_same, convert_and_compare, images_for, kinds, library, randomised
from tests._stages import kept_tensors


def features(*ending: nn.Module) -> Any:
    parts = nn.Conv2d(3, 6, 3, padding=1), structures.NetBlock(3, 6, 4)
    return nn.Sequential(*parts, nn.BatchNorm2d(18), *ending)


class Two(nn.Module):
    """MONAI's way: everything behind the features is one sequence."""

    def __init__(self, *head: nn.Module, ending: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.features, self.class_layers = features(*ending), nn.Sequential(*head, nn.Linear(18, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.class_layers(self.features(x))


class Many(nn.Module):
    """timm's way: methods, and a module for each."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.features, self.fc = features(nn.ReLU()), nn.Linear(18, 5)
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(rate)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.features(x))


class Classifier(nn.Module):
    """The ReLU in the features, the pool by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classifier = features(nn.ReLU()), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class AnyOrder(Many):
    def __init__(self) -> None:
        super().__init__(0.0)
        modules = self._modules
        self._modules = {n: modules[n] for n in ("features", "pool", "drop", "fc")}


def two(*ending: nn.Module, inplace: bool = False) -> nn.Module:
    relu = () if ending else (nn.ReLU(inplace=inplace),)
    return Two(*relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), ending=ending)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "one sequence": two,
    "one sequence, in place": lambda: two(inplace=True),
    "one sequence, ReLU in the features": lambda: two(nn.ReLU(inplace=True)),
    "ReLU in both": lambda: Two(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), ending=(nn.ReLU(),)),
    "modules": AnyOrder,
    "a function": Classifier,
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_runs_with_the_last_block(head: str) -> None:
    naive = randomised(HEADS[head]())
    x = images_for(naive, 12)
    fused = convert_and_compare(naive, x, 1)
    assert kinds(fused) == {"DenseNet": 1, "DenseFeatures": 1, "DenseBlock": 1}
    maps = 2 * 18 * 12 * 12
    sizes = {m: [t.numel() for t in kept_tensors(m.train(), x)[0]].count(maps) for m in (naive, fused)}
    assert sizes[fused] == 1 < sizes[naive]  # the block's features


def test_dropout_behind_the_pool() -> None:
    class Dropping(AnyOrder):
        def __init__(self) -> None:
            super().__init__()
            self.drop.p = 0.5

    naive = randomised(Dropping())
    fused = convert_and_compare(naive, images_for(naive, 12), 1)
    assert kinds(fused)["DenseNet"] == 1


def net(after: Callable[[Tensor], Tensor]) -> nn.Module:
    """torchvision's, but for what comes behind the average."""

    class Net(densenet.DenseNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(after(F.relu(self.features(x)).flatten(2).mean(2)))

    return Net(4, (2, 2), 6, num_classes=5)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "twice the average": lambda: net(lambda y: y * 2),
    "a ReLU more": lambda: net(lambda y: F.relu(y - 0.1)),
    "no ReLU": lambda: Two(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_computes_something_else_is_refused(name: str) -> None:
    naive = randomised(REFUSED[name]())
    fused = effdense.convert(copy.deepcopy(naive))
    (entry,) = (e for e in effdense.report(fused) if e.kind == "DenseNet")
    assert not entry.converted and "its forward" in str(entry.reason)
    assert_same(naive, fused, images_for(naive, 32), 1)


def max_pool(model: Any) -> None:
    model.class_layers[1] = nn.AdaptiveMaxPool2d(1)


def hook_relu(model: Any) -> None:
    model.class_layers[0].register_forward_hook(lambda *_: None)


def hook_head(model: Any) -> None:
    model.class_layers.register_forward_hook(lambda _, __, y: y * 2)


def other_head(model: Any) -> None:
    model.class_layers = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1), nn.Linear(18, 5)).double()
    torch.nn.init.constant_(model.class_layers[2].weight, 0.1)
    torch.nn.init.constant_(model.class_layers[2].bias, 0.1)


def no_relu(model: Any) -> None:
    model.features[3] = nn.Identity()


def idle_relu(model: Any) -> None:
    model.class_layers[0] = nn.Identity()


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "another pool": (two, max_pool),
    "a hook on the ReLU": (two, hook_relu),
    "a hook on the head": (two, hook_head),
    "another head": (two, other_head),
    "no ReLU in the head any more": (two, idle_relu),
    "no ReLU any more": (lambda: two(nn.ReLU()), no_relu),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_head_that_changes_later_runs_as_it_is(name: str) -> None:
    make, change = CHANGES[name]
    naive = randomised(make())
    fused = effdense.convert(copy.deepcopy(naive))
    assert kinds(fused)["DenseNet"] == 1
    change(naive), change(fused)
    assert "DenseNet" not in kinds(fused)
    assert_same(naive, fused, images_for(naive, 12), 1)


def timm(**options: Any) -> Any:
    small = {"growth_rate": 4, "block_config": (2, 2), "num_classes": 5}
    return library("timm").create_model("densenet121", **small, **options)


def test_timms_head() -> None:
    naive = randomised(timm(drop_rate=0.3))
    x = images_for(naive, 64)
    fused = convert_and_compare(naive, x, 2, steps=1)
    assert kinds(fused)["DenseNet"] == 1
    for model in (naive, fused):
        model.reset_classifier(5, "max")
        model.double().load_state_dict(naive.state_dict())
    assert "DenseNet" not in kinds(fused)
    assert_same(naive, fused, x, 1)
    pooled = convert_and_compare(randomised(timm(global_pool="max")), x, 2, steps=1)
    assert "DenseNet" not in kinds(pooled)


def test_timms_methods_run_by_themselves() -> None:
    naive = randomised(timm()).eval()
    fused, x = effdense.convert(copy.deepcopy(naive)), images_for(naive, 64)
    torch.testing.assert_close(fused.forward_head(fused.forward_features(x)), fused(x))
    torch.testing.assert_close(fused.forward_features(x), naive.forward_features(x))
    torch.testing.assert_close(
        fused.forward_head(naive.forward_features(x), pre_logits=True),
        naive.forward_head(naive.forward_features(x), pre_logits=True),
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_monais_head(dimensions: int) -> None:
    nets = library("monai.networks.nets")
    naive = randomised(nets.DenseNet(dimensions, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)))
    x = images_for(naive, 32, 1)
    fused = convert_and_compare(naive, x, 2, steps=1)
    assert kinds(fused)["DenseNet"] == 1
    assert type(effdense.revert(fused)) is nets.DenseNet
