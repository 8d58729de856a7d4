"""convert on whole models: they train as the naive ones do, and stay the same objects."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import densenet, models
from effdense.nn import DenseBlock, DenseLayer, Transition
from effdense.ops import reference
from tests._conversions import COPIES, assert_same_step, copied, loss_of, make_batch, make_small

MEMORY = ["balanced", "minimal"]


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_a_converted_model_trains_like_the_naive_one(memory: str, drop_rate: float) -> None:
    naive = make_small(drop_rate)
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    batch = make_batch()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (naive, fused)]
    for _ in range(20):
        assert_same_step(naive, fused, batch, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    assert fused.features.denseblock2.denselayer3.norm2.num_batches_tracked == 20
    for model in (naive.eval(), fused.eval()):
        model.zero_grad()
    torch.testing.assert_close(loss_of(fused, batch), loss_of(naive, batch), rtol=1e-9, atol=1e-9)


# Images of which the last block still has 2x2 pixels: a batch norm of two values alone is nearly their sign.
ARCHITECTURES = {
    "densenet121": 64,
    "densenet161": 64,
    "densenet169": 64,
    "densenet201": 64,
    "densenet_bc_100_12": 8,
    "densenet_bc_190_40": 8,
    "densenet_d2l": 64,
}
LONG = ("densenet121", "densenet_bc_100_12", "densenet_d2l")  # one of each kind


@pytest.mark.compiled
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_like_the_naive_ones(name: str, memory: str) -> None:
    """In float64. The learning rate is small: training itself makes a rounding larger from step to step."""
    naive = models.build(name, "naive", num_classes=10).model.double()
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    assert all(e.converted and e.reason is None for e in effdense.report(fused))
    images, labels = make_batch(2, ARCHITECTURES[name], 10)
    batch = images[:, : naive.features.conv0.in_channels], labels
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (naive, fused)]
    for _ in range(20 if name in LONG and memory == "balanced" else 3):
        assert_same_step(naive, fused, batch, 1e-9)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_every_part_of_torchvisions_models_is_converted(name: str) -> None:
    model = models.build(name, "naive").model
    keys = list(model.state_dict())
    effdense.convert(model)
    report = effdense.report(model)
    layers = sum(models.IMAGENET_CONFIGS[name][1])
    kinds = {"DenseBlock": 4, "DenseFeatures": 1, "DenseLayer": layers, "DenseNet": 1, "Transition": 3}
    assert collections.Counter(e.kind for e in report) == kinds
    assert all(e.converted and e.reason is None for e in report)
    assert list(model.state_dict()) == keys
    assert f"DenseLayer: {layers} of {layers} run fused" in str(report)


@pytest.mark.core
def test_state_dict_goes_both_ways() -> None:
    naive, other = make_small(), make_small()
    fused = effdense.convert(make_small())
    x, _ = make_batch()
    fused.load_state_dict(naive.state_dict())
    torch.testing.assert_close(fused.eval()(x), naive.eval()(x))
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other.eval()(x), naive(x))


def test_everything_stays_the_same_object() -> None:
    model = make_small()
    before = [*model.modules(), *model.parameters(), *model.buffers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert effdense.convert(model) is model
    after = [*model.modules(), *model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    weight = model.features.denseblock1.denselayer1.conv1.weight
    old = weight.detach().clone()
    loss_of(model, make_batch()).backward()
    optimizer.step()
    assert not torch.equal(weight, old)


def test_convert_leaves_no_trace_but_the_class() -> None:
    model = make_small()
    model.features.denseblock1.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    calls: list[Any] = []
    model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *_: calls.append(1))
    model.features.denseblock1.register_forward_hook(lambda *_: calls.append(1))
    effdense.convert(model)
    assert not calls
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(p.grad is None for p in model.parameters())


def test_converting_again_changes_the_memory_mode_only() -> None:
    model = effdense.convert(make_small())
    before = list(model.modules())
    effdense.convert(model, memory="minimal")
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert {m._memory for m in model.modules() if isinstance(m, DenseLayer)} == {"minimal"}


@pytest.mark.core
@pytest.mark.parametrize("how", COPIES)
def test_copies_work(how: str) -> None:
    model = effdense.convert(make_small(), memory="minimal")
    other = copied(model, how)
    assert str(effdense.report(other)) == str(effdense.report(model))
    assert_same_step(model, other, make_batch(), 0.0)


def test_a_single_layer_inside_another_module() -> None:
    layer = make_small().features.denseblock1.denselayer1
    net = nn.Sequential(nn.Conv2d(3, 6, 1).double(), layer, nn.Flatten())
    naive = copy.deepcopy(net)
    effdense.convert(net)
    assert [(e.name, e.kind, e.reason) for e in effdense.report(net)] == [("1", "DenseLayer", None)]
    x, _ = make_batch()
    torch.testing.assert_close(net(x), naive(x))
    assert isinstance(effdense.convert(make_small().features.denseblock1.denselayer1), DenseLayer)


HOOKED = [
    "denseblock1",
    "denseblock1.denselayer2",
    "denseblock2.denselayer1.norm1",
    "transition1.relu",
    "transition1",
]


@pytest.mark.core
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_see_in_the_naive_model(when: str) -> None:
    naive = make_small()
    fused = copy.deepcopy(naive)
    seen: dict[str, list[tuple[str, Tensor]]] = {"naive": [], "fused": []}

    def put_hooks(model: nn.Module, who: str) -> None:
        for name in HOOKED:
            model.features.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: seen[who].append((name, out.detach().clone()))
            )

    if when == "before":
        put_hooks(fused, "fused")
    effdense.convert(fused)
    if when == "after":
        put_hooks(fused, "fused")
    put_hooks(naive, "naive")
    assert_same_step(naive, fused, make_batch(), 1e-9)
    assert [name for name, _ in seen["fused"]] == [name for name, _ in seen["naive"]]
    for (_, a), (_, b) in zip(seen["fused"], seen["naive"], strict=True):
        torch.testing.assert_close(a, b)
    report = {e.name: e for e in effdense.report(fused)}
    entry = report["features.denseblock2.denselayer1"]
    assert (entry.converted, entry.reason) == (True, "norm1 has hooks")
    assert "converted, but runs one by one: norm1 has hooks" in str(effdense.report(fused))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r'convert: memory must be "balanced" or "minimal", got \'least\''):
        effdense.convert(make_small(), memory="least")
    with pytest.raises(TypeError, match=r"convert: model must be a torch.nn.Module, got str"):
        effdense.convert("densenet121")
    with pytest.raises(ValueError, match=r'DenseLayer: memory must be "balanced" or "minimal", got \'tiny\''):
        DenseLayer(4, 2, 2, 0.0).memory = "tiny"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"report: model must be a torch.nn.Module, got type"):
        effdense.report(nn.Module)


@pytest.mark.compiled
@pytest.mark.parametrize("memory", MEMORY)
def test_the_twin_alone_trains_like_the_naive_model(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without compiled operators."""
    monkeypatch.setattr(effdense.engine.node, "operators", lambda _: reference)
    monkeypatch.setattr(torch.ops.effdense, "bottleneck", None)
    naive = make_small()
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    assert_same_step(naive, fused, make_batch(), 1e-9)


@pytest.mark.core
def test_checkpointed_layers_are_converted() -> None:
    naive = make_small()
    fused = densenet.DenseNet(4, (2, 3, 2), 6, num_classes=5, memory_efficient=True).double()
    fused.load_state_dict(naive.state_dict())
    effdense.convert(fused)
    assert all(e.converted and e.reason is None for e in effdense.report(fused))
    assert_same_step(naive, fused, make_batch(), 1e-9)


class OwnLayer(nn.Module):
    """A user's own class of the same structure, without dropout and written for one tensor."""

    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 2 * growth_rate, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth_rate), nn.ReLU()
        self.conv2 = nn.Conv2d(2 * growth_rate, growth_rate, 3, padding=1)

    def forward(self, features: Any) -> Tensor:
        x = features if isinstance(features, Tensor) else torch.cat(features, 1)
        y = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(y)))


def test_a_users_own_class_is_recognised_by_its_structure() -> None:
    naive = OwnLayer(6, 4)
    fused = copy.deepcopy(naive)
    effdense.convert(fused)
    assert (
        isinstance(fused, DenseLayer) and isinstance(fused, OwnLayer) and type(fused).__name__ == "OwnLayer"
    )
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(fused(x), naive(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_convert_does_not_care_what_is_switched_on_around_it(mode: Any) -> None:
    model = make_small()
    with mode():
        effdense.convert(model)
    assert all(e.converted for e in effdense.report(model))
    loss_of(model, make_batch()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_under_autocast_takes_float32(dtype: torch.dtype) -> None:
    naive = densenet._DenseBlock(3, 6, 4, 4, 0.0)
    fused = effdense.convert(copy.deepcopy(naive))
    x = torch.randn(4, 6, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = fused(x), naive(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


@pytest.mark.core
def test_a_model_on_the_meta_device_is_converted() -> None:
    with torch.device("meta"):
        model = densenet.DenseNet(4, (2, 2), 6)
    effdense.convert(model)
    assert all(e.converted for e in effdense.report(model))


@pytest.fixture
def patched_torchvision() -> Iterator[Any]:
    densenet = pytest.importorskip(
        "torchvision.models.densenet", reason="torchvision needs its own torch build"
    )
    original = densenet._DenseLayer
    densenet._DenseLayer = DenseLayer
    yield densenet
    densenet._DenseLayer = original


def test_torchvisions_layer_class_can_be_replaced(patched_torchvision: Any) -> None:
    arguments = {"memory_efficient": True, "num_classes": 5, "drop_rate": 0.1}
    fused = patched_torchvision.DenseNet(4, (2, 3, 2), 6, **arguments).double()
    assert type(fused.features.denseblock1.denselayer1) is DenseLayer
    naive = make_small(drop_rate=0.1)
    naive.load_state_dict(fused.state_dict())
    assert_same_step(naive, fused, make_batch(), 1e-9)


def test_the_classes_are_drop_in_for_the_twins() -> None:
    naive_block, naive_transition = densenet._DenseBlock(3, 6, 4, 4, 0.1, True), densenet._Transition(18, 9)
    block, transition = DenseBlock(3, 6, 4, 4, 0.1, True), Transition(18, 9)
    assert list(block.state_dict()) == list(naive_block.state_dict())
    assert list(transition.state_dict()) == list(naive_transition.state_dict())
    assert [p.shape for p in block.parameters()] == [p.shape for p in naive_block.parameters()]
