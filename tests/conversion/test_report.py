"""What convert leaves alone, and what the report says of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import effdense
from benchmarks import densenet
from effdense.nn import DenseLayer
from tests._conversions import loss_of, make_batch, make_small


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
