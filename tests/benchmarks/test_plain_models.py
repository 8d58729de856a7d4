"""The benchmarks' plain models against torchvision's and the papers' counts, and models and implementations by name."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import densenet, models
from benchmarks.worker import WorkerConfig, batch_for
from tests._papers import PARAMETERS

pytestmark = pytest.mark.tools


def build_seeded(name, impl, **kwargs):
    torch.manual_seed(0)
    return models.build(name, impl, **kwargs).model


def small_twin(**kwargs):
    torch.manual_seed(0)
    return densenet.DenseNet(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5, **kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = models.build(name, "naive").model
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("small_inputs", [False, True])
def test_twin_has_the_parameters_it_says(small_inputs):
    twin = small_twin(small_inputs=small_inputs, in_channels=1)
    assert twin.features.conv0.weight.shape == ((8, 1, 3, 3) if small_inputs else (8, 1, 7, 7))
    assert hasattr(twin.features, "pool0") != small_inputs
    assert twin(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_twin_is_torchvisions_densenet():
    torchvision = pytest.importorskip("torchvision", reason="the twin stands in where torchvision is missing")
    twin = small_twin(drop_rate=0.2)
    torch.manual_seed(0)
    original = torchvision.densenet.DenseNet(4, (2, 3), 8, drop_rate=0.2, num_classes=5)
    assert list(twin.state_dict()) == list(original.state_dict())
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in original.named_modules()]
    for key, value in original.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    x = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (twin, original):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, of_twin), theirs in zip(twin.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(of_twin.grad, theirs.grad), name


def test_plain_twin_is_d2ls_densenet():
    """Block outputs of "Dive into Deep Learning", section 8.7, at its 96 gray pixels."""
    with torch.device("meta"):
        model, x = models.build("densenet_d2l", "naive").model, torch.empty(2, 1, 96, 96)
        shapes = {name: tuple((x := module(x)).shape) for name, module in model.features.named_children()}
    assert list(shapes)[:4] == ["conv0", "norm0", "relu0", "pool0"] and list(shapes)[-1] == "norm5"
    blocks = [shape[1:3] for name, shape in shapes.items() if name.startswith(("dense", "transition"))]
    assert blocks == [(192, 24), (96, 12), (224, 12), (112, 6), (240, 6), (120, 3), (248, 3)]
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 4 + 3 and all(conv.bias is not None for conv in convolutions)
    assert model.classifier.out_features == 10
    assert models.default_sizes("densenet_d2l") == (64, 96)


def test_plain_layers_have_names_of_their_own_kind():
    with torch.device("meta"):
        built = models.build("densenet_40_12", "checkpoint")
    features = built.model.features
    assert built.label == "plain twin (torchvision has no plain layers), checkpointed"
    assert models.default_sizes("densenet_40_12") == (64, 32)
    assert list(dict(features.named_children())) == [
        *("conv0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "norm5")
    ]
    assert list(features.denseblock1) == [f"denselayer{i}" for i in range(1, 13)]
    layer = features.denseblock2.denselayer3
    assert list(dict(layer.named_children())) == ["norm1", "relu1", "conv1"] and layer.memory_efficient
    assert layer.conv1.weight.shape == (12, 16 + 14 * 12, 3, 3) and layer.conv1.bias is None
    assert features.transition1.conv.weight.shape == (160, 160, 1, 1)  # no compression


@pytest.mark.parametrize(("name", "channels"), [("densenet_d2l", 1), ("densenet_40_12", 3)])
def test_synthetic_images_have_the_models_channels(name, channels):
    with torch.device("meta"):
        model = models.build(name, "naive").model
    images, labels = batch_for(WorkerConfig(name, 3, 8), model)
    assert images.shape == (3, channels, 8, 8) and labels.max() < 10


@pytest.mark.parametrize("form", [{}, {"bn_size": None, "bias": True, "compression": 1.0}])
def test_checkpointed_twin_computes_the_same(form):
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for memory_efficient in (False, True):
        twin = small_twin(memory_efficient=memory_efficient, **form)
        twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "new_layer", [lambda: densenet._DenseLayer(6, 4, 2, 0.0), lambda: densenet._PlainLayer(6, 4, 0.0)]
)
def test_twin_layer_takes_a_tensor_or_a_list(new_layer):
    layer = new_layer().eval()
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(layer(x), layer([x[:, :2], x[:, 2:]]))


@pytest.mark.parametrize("impl", ["checkpoint", "naive+channels-last"])
@pytest.mark.parametrize("name", ["densenet_bc_22_4", "densenet_13_4"])
def test_every_implementation_starts_from_the_same_weights(name, impl):
    naive, other = build_seeded(name, "naive"), build_seeded(name, impl)
    assert all(torch.equal(a, b) for a, b in zip(naive.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densnet121", "unknown model 'densnet121', did you mean 'densenet121'"),
        ("vgg16", "unknown model 'vgg16'; there are densenet121"),
        ("densenet_bc_101_12", "the nearest depth is 100"),
        ("densenet_bc_4_12", "the nearest depth is 10"),
        (
            "densenet_41_12",
            "depth 3 n + 4 (three blocks of n layers of 1 convolution); the nearest depth is 40",
        ),
        ("densenet_3_12", "the nearest depth is 7"),
        ("densenet_d2", "did you mean 'densenet_d2l'"),
        ("densenet169_tutorial", "cannot be measured yet"),
        (
            "timm:densenet131",
            "did you mean 'timm:densenet121'?; of libraries there are torchvision:NAME, timm:densenet121, ",
        ),
        ("torchvision:densenet12", "did you mean 'torchvision:densenet121'"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build(name, "naive")


@pytest.mark.parametrize(
    ("name", "message"),
    [("naiv", "did you mean 'naive'"), ("effdense", "did you mean 'effdense-"), ("naive+fast", "unknown")],
)
def test_unknown_implementations(name, message):
    with pytest.raises(ValueError, match=message):
        models.parse_impl(name)


def test_names_of_groups():
    peers = ["naive", "naive+channels-last", "checkpoint", "checkpoint+channels-last"]
    peers += ["compile", "compile+channels-last"]
    assert models.expand(["peers"], "train") == peers
    assert models.expand(["all"], "train") == models.expand(["peers", "effdense"], "train")
    assert models.expand(["naive", "all"], "inference") == [p for p in peers if "checkpoint" not in p] + [
        "effdense-balanced"
    ]
    assert all(models.parse_impl(name).base != "effdense" for name in peers)
