"""What timm's users expect of a net: its methods on ours, ours by name in timm, and timm's own methods on converted nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from effdense.models import DenseNet, densenet, register_timm
from effdense.models.timm_methods import HeadDropout


def make(**options: Any) -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(4, (2, 2), 6, num_classes=5, **options)


def tutorial() -> DenseNet:
    """densenet169_tutorial's class, small."""
    before = densenet.IMAGENET["densenet169"]
    densenet.IMAGENET["densenet169"] = (4, (2, 2), 6)  # type: ignore[assignment]
    try:
        return effdense.models.densenet169_tutorial(5, drop_rate=0.0)
    finally:
        densenet.IMAGENET["densenet169"] = before


@pytest.mark.parametrize("build", [make, tutorial, lambda: make(spatial_dims=3)])
@pytest.mark.parametrize("training", [False, True])
def test_features_and_head_are_the_forward(build: Callable[[], DenseNet], training: bool) -> None:
    model: Any = build().double().train(training)
    spatial = 3 if model.features.conv0.weight.dim() == 5 else 2
    x = torch.randn(2, 3, *(16,) * spatial, dtype=torch.float64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[:2] == pooled.shape == (2, model.num_features)
    torch.testing.assert_close(pooled, features.flatten(2).mean(2))
    torch.testing.assert_close(model.forward_head(features), model(x))


@pytest.mark.parametrize("x", [None, torch.rand(2, 5, 3, 3), torch.rand(2, 15)])
def test_a_head_wants_the_features(x: Any) -> None:
    model = make()
    with pytest.raises(
        ValueError, match=rf"forward_head: x must be .*, \[N, {model.num_features}, \*spatial\], got "
    ):
        model.forward_head(x)


def test_checkpointing_is_minimal_memory() -> None:
    model = make()
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        memories = {m.memory for m in model.modules() if isinstance(m, effdense.nn.DenseLayer)}
        assert memories == {"minimal" if enable else "balanced"}


def test_layer_decay_by_blocks() -> None:
    group = pytest.importorskip("timm.models").group_parameters
    model = make()
    groups = list(group(model, model.group_matcher()).values())
    kinds = [sorted({".".join(n.split(".")[:2]) for n in names}) for names in groups]
    stem, first, second, rest = kinds
    assert stem == ["features.conv0", "features.norm0"]
    assert first == ["features.denseblock1", "features.transition1"] and second == ["features.denseblock2"]
    assert rest == ["classifier.bias", "classifier.weight", "features.norm5"]


def test_another_classifier_stays_fused_and_keeps_the_keys() -> None:
    model = make().double().eval()
    keys = list(model.state_dict())
    model.reset_classifier(7)
    assert list(model.state_dict()) == keys and model.num_classes == 7
    classifier: Any = model.get_classifier()
    assert classifier is model.classifier and not classifier.training
    assert classifier.weight.shape == (7, model.num_features) and classifier.weight.dtype == torch.float64
    assert all(e.reason is None for e in effdense.report(model))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), classifier(pooled))
    model.reset_classifier(0)
    assert isinstance(model.classifier, nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [((-1,), "num_classes must be 0 or more, got -1"), ((3, "max"), 'global_pool must be "avg"')],
)
def test_refused_classifiers(arguments: tuple[Any, ...], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=f"^reset_classifier: {message}"):
        model.reset_classifier(*arguments)
    assert model.num_classes == 5


def test_head_dropout() -> None:
    linear = HeadDropout(2000, 1, 0.25)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    kept = linear(torch.ones(1, 2000)).item() * 0.75 / 2000
    assert 0.7 < kept < 0.8  # 0.75, by five standard deviations
    assert linear.eval()(torch.ones(1, 2000)).item() == 2000
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_timm_knows_them_by_name() -> None:
    timm = pytest.importorskip("timm")
    names = register_timm()
    assert names == register_timm() and "effdense_densenet121" in names
    assert all(timm.is_model(name) for name in names)
    small = {"depth": 10, "growth_rate": 4}
    model = timm.create_model("effdense_densenet_cifar", num_classes=7, in_chans=1, drop_rate=0.5, **small)
    assert isinstance(model, DenseNet) and isinstance(model.classifier, HeadDropout)
    assert model.classifier.drop_rate == 0.5 and model.num_classes == 7
    same = effdense.models.densenet_cifar(10, 4, num_classes=7, in_channels=1)
    assert list(model.state_dict()) == list(same.state_dict())
    assert model.default_cfg["input_size"] == (1, 32, 32)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (1, 32, 32)
    assert all(e.reason is None for e in effdense.report(model))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    model.reset_classifier(3)
    assert isinstance(model.classifier, HeadDropout)
    layers = timm.create_model("effdense_densenet_cifar", proj_drop_rate=0.2, num_classes=0, **small)
    assert isinstance(layers.classifier, nn.Identity)
    assert next(m.drop_rate for m in layers.modules() if type(m) is effdense.nn.DenseLayer) == 0.2
    with pytest.raises(ValueError, match="global_pool must be"):
        timm.create_model("effdense_densenet_cifar", global_pool="max", **small)
    with pytest.raises(ValueError, match="there are no weights by pretrained_cfg"):
        timm.create_model("effdense_densenet_cifar", pretrained_cfg_overlay={"file": "x.pt"}, **small)


def test_timms_own_methods_of_a_converted_net() -> None:
    timm = pytest.importorskip("timm")
    options = {"num_classes": 5, "block_config": (2, 2), "growth_rate": 4}
    torch.manual_seed(0)
    theirs = timm.create_model("densenet121", **options).eval()
    ours = timm.create_model("densenet121", **options).eval()
    ours.load_state_dict(theirs.state_dict())
    effdense.convert(ours)
    x = torch.randn(2, 3, 64, 64)
    for name in ("forward_features", "forward_intermediates"):
        torch.testing.assert_close(getattr(ours, name)(x), getattr(theirs, name)(x), rtol=1e-4, atol=1e-5)
    features = ours.forward_features(x)
    for pre_logits in (False, True):
        head = ours.forward_head(features, pre_logits=pre_logits)
        torch.testing.assert_close(
            head, theirs.forward_head(features, pre_logits=pre_logits), rtol=1e-4, atol=1e-5
        )
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3) and ours.get_classifier() is ours.classifier
    assert all(e.reason is None for e in effdense.report(ours))
    assert (
        ours.num_features == theirs.num_features
        and ours.group_matcher().keys() == theirs.group_matcher().keys()
    )
