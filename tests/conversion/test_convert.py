"""convert and report: whole models against the naive ones, what stays the same object, what is left alone and why."""

from __future__ import annotations

import collections
import copy
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import effdense
from benchmarks import densenet, models
from effdense.nn import DenseBlock, DenseLayer, Transition
from effdense.ops import reference
from tests._conversions import COPIES, copied

MEMORY = ["balanced", "minimal"]
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def make_small(drop_rate: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A naive DenseNet of seven layers: torchvision's where it is installed, else its twin."""
    if HAS_TORCHVISION:
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


@pytest.mark.compiled
@pytest.mark.parametrize("memory, steps", [("balanced", 20), ("minimal", 3)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_train_like_the_naive_ones(name: str, memory: str, steps: int) -> None:
    """In float64. The learning rate is small: training itself makes a rounding larger from step to step."""
    naive = models.build(name, "naive", num_classes=10).model.double()
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    assert all(e.converted and e.reason is None for e in effdense.report(fused))
    images, labels = make_batch(2, ARCHITECTURES[name], 10)
    batch = images[:, : naive.features.conv0.in_channels], labels
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (naive, fused)]
    for _ in range(steps):
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


class ReversedLayer(densenet._DenseLayer):
    """Concatenates in another order: the same submodules, another function."""

    def forward(self, features: Any) -> Tensor:
        features = [features] if isinstance(features, Tensor) else list(features)
        return super().forward([x.flip(1) for x in features])


class ReversedBlock(densenet._DenseBlock):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.insert(0, layer(features[::-1]))
        return torch.cat(features, 1)


def replace_norm(layer: Any) -> None:
    layer.norm1 = nn.GroupNorm(1, 6).double()


def replace_activation(layer: Any) -> None:
    layer.relu2 = nn.GELU()


def dilate(layer: Any) -> None:
    layer.conv2.dilation, layer.conv2.padding = (2, 2), (2, 2)


def group(layer: Any) -> None:
    layer.conv2 = nn.Conv2d(16, 4, 3, padding=1, groups=2).double()


def add_attention(layer: Any) -> None:
    layer.attention = nn.Conv2d(4, 4, 1).double()


def replace_class(layer: Any) -> None:
    layer.__class__ = ReversedLayer


def parametrize(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.conv1)


def replace_forward(layer: Any) -> None:
    layer.forward = lambda features: type(layer).forward(layer, features) * 2


def add_gate(layer: Any) -> None:
    layer.gate = nn.Parameter(torch.ones(1).double())


def prune_old(layer: Any) -> None:
    prune.l1_unstructured(layer.conv1, "weight", 0.5)


def spectral_norm_old(layer: Any) -> None:
    nn.utils.spectral_norm(layer.conv2)


def quantise(layer: Any) -> None:
    class Quantised(torch.Tensor):
        pass

    weight = layer.conv1.weight.detach().as_subclass(Quantised)
    layer.conv1.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.core
@pytest.mark.parametrize(
    "change, reason",
    [
        (add_gate, "it has parameters or buffers of its own: gate"),
        (prune_old, "conv1.weight is not a plain parameter"),
        (spectral_norm_old, "conv2.weight is not a plain parameter"),
        (quantise, "conv1.weight is not a plain parameter"),
        (replace_norm, "norm1 is GroupNorm, not BatchNorm1d or BatchNorm2d or BatchNorm3d or SyncBatchNorm"),
        (replace_activation, "relu2 is GELU, not ReLU"),
        (dilate, "conv2.padding is (2, 2), not (1, 1)"),
        (group, "conv2.groups is 2, not 1"),
        (add_attention, "it has further submodules: attention"),
        (replace_class, "its forward computes something else (training, on a probe)"),
        (parametrize, "conv1 is ParametrizedConv2d, not Conv1d or Conv2d or Conv3d"),
        (replace_forward, "its forward was replaced"),
    ],
)
def test_what_is_not_recognised_stays_and_the_report_says_why(change: Any, reason: str) -> None:
    naive, fused = make_small(), make_small()
    fused.load_state_dict(naive.state_dict())
    for model in (naive, fused):
        torch.manual_seed(1)
        change(model.features.denseblock1.denselayer1)
    left = type(fused.features.denseblock1.denselayer1)
    effdense.convert(fused)
    assert type(fused.features.denseblock1.denselayer1) is left
    assert isinstance(fused.features.denseblock1.denselayer2, DenseLayer)
    (entry,) = [e for e in effdense.report(fused) if not e.converted]
    assert entry.name == "features.denseblock1.denselayer1"
    assert entry.reason == reason
    batch = make_batch()
    assert loss_of(fused, batch).item() == pytest.approx(loss_of(naive, batch).item(), rel=1e-9)


def test_a_block_that_does_something_else_stays_but_its_layers_do_not() -> None:
    block = ReversedBlock(3, 6, 4, 4, 0.0)
    naive = copy.deepcopy(block)
    effdense.convert(block)
    assert type(block) is ReversedBlock
    assert all(isinstance(layer, DenseLayer) for layer in block.values())
    (entry,) = [e for e in effdense.report(block) if not e.converted]
    assert (entry.kind, entry.reason) == (
        "DenseBlock",
        "its forward computes something else (training, on a probe)",
    )
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(block(x), naive(x))


def test_a_model_that_is_not_converted_says_so() -> None:
    report = effdense.report(make_small())
    assert {e.converted for e in report} == {False}
    assert {e.reason for e in report} == {"effdense.convert has not been called since it was built"}
    line = "effdense: nothing runs fused, as effdense.convert has not been called: it finds "
    assert str(report).startswith(line) and "\n" not in str(report) and "DenseBlock" in str(report)
    assert str(effdense.report(nn.Linear(2, 2))) == "effdense: the model has no dense layers"


def test_a_model_without_dense_layers_is_warned_about() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(
        UserWarning, match=r"^convert: Sequential has no dense layers and stays as it is; looked for "
    ):
        assert effdense.convert(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effdense.convert(make_small())
        effdense.convert(effdense.models.DenseNet(4, (1,), 6))


def test_a_report_says_when_plain_pytorch_runs() -> None:
    """In a build without the extension, and of what it has no operators for."""
    model = effdense.convert(make_small())
    info = effdense.build_info()
    if info["compiled"]:
        assert "plain PyTorch" not in str(effdense.report(model))
        info["reason"] = "there are no compiled ones for float16 on cpu"
        model = model.half()
    text = str(effdense.report(model))
    assert text.startswith(f"effdense: plain PyTorch's operators run, because {info['reason']}\n")
    assert " run in plain PyTorch" in text and "run fused" not in text


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


class GatedLayer(densenet._DenseLayer):
    """Does the usual thing, or something else, depending on a registered parameter that may be None."""

    def __init__(self, gate: nn.Parameter | None) -> None:
        super().__init__(6, 4, 2, 0.0)
        self.register_parameter("gate", gate)

    def forward(self, features: Any) -> Tensor:
        y = super().forward(features)
        return y if self.gate is None else y * self.gate


class LayerWithMethod(densenet._DenseLayer):
    def flops(self) -> int:
        return 0


def test_one_layer_does_not_vouch_for_another() -> None:
    layers = nn.ModuleList(
        [GatedLayer(None), GatedLayer(nn.Parameter(torch.zeros(1))), LayerWithMethod(6, 4, 2, 0.0)]
    )
    effdense.convert(layers)
    assert [type(layer) for layer in layers[:2]] == [GatedLayer, GatedLayer]
    assert (
        isinstance(layers[2], LayerWithMethod)
        and isinstance(layers[2], DenseLayer)
        and layers[2].flops() == 0
    )
    reasons = [e.reason for e in effdense.report(layers)]
    assert reasons[2] is None
    assert set(reasons[:2]) == {"it has parameters or buffers of its own: gate"}


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
