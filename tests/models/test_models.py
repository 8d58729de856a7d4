"""effdense.models: parameter counts and shapes of every net, torchvision's weights, what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effdense
from effdense import models
from effdense.models import weights as weights_file
from tests import _papers as papers

PARAMETERS = papers.PARAMETERS | {"densenet_d2l": 758_226, "densenet169_tutorial": 14_160_238}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    report = effdense.report(model)
    assert {e.kind for e in report} >= {"DenseNet", "DenseFeatures", "DenseBlock", "Transition"}
    assert all(e.converted and e.reason is None for e in report), str(report)


# Model, image: channels@size behind the stem, then behind every block and transition.
SHAPES = {
    ("densenet121", 224): "64@56 256@56 128@28 512@28 256@14 1024@14 512@7 1024@7",
    ("densenet161", 224): "96@56 384@56 192@28 768@28 384@14 2112@14 1056@7 2208@7",
    ("densenet169", 224): "64@56 256@56 128@28 512@28 256@14 1280@14 640@7 1664@7",
    ("densenet201", 224): "64@56 256@56 128@28 512@28 256@14 1792@14 896@7 1920@7",
    ("densenet264", 224): "64@56 256@56 128@28 512@28 256@14 2304@14 1152@7 2688@7",
    ("densenet121", 29): "64@8 256@8 128@4 512@4 256@2 1024@2 512@1 1024@1",
    ("densenet_bc_100_12", 32): "24@32 216@32 108@16 300@16 150@8 342@8",
    ("densenet_bc_250_24", 32): "48@32 1032@32 516@16 1500@16 750@8 1734@8",
    ("densenet_bc_190_40", 32): "80@32 1320@32 660@16 1900@16 950@8 2190@8",
    ("densenet_40_12", 32): "16@32 160@32 160@16 304@16 304@8 448@8",
    ("densenet_100_12", 32): "16@32 400@32 400@16 784@16 784@8 1168@8",
    ("densenet_100_24", 32): "16@32 784@32 784@16 1552@16 1552@8 2320@8",
    ("densenet_bc_100_12", 4): "24@4 216@4 108@2 300@2 150@1 342@1",
    ("densenet_d2l", 96): "64@24 192@24 96@12 224@12 112@6 240@6 120@3 248@3",
    ("densenet169_tutorial", 224): "64@56 256@56 128@28 512@28 256@14 1280@14 640@7 1664@7",
}


def shapes_behind_stages(model: Any, x: Tensor) -> str:
    """As in SHAPES."""
    shapes = []  # type: ignore[var-annotated]
    for part, module in model.features.named_children():
        if part.startswith(("denseblock", "transition")):
            shapes += [] if shapes else [x.shape]
            shapes.append(module(x).shape)
        x = module(x)
        assert len(set(x.shape[2:])) == 1
    return " ".join(f"{shape[1]}@{shape[2]}" for shape in shapes)


@pytest.mark.parametrize("name, size", SHAPES)
def test_the_shape_behind_every_stage(name: str, size: int) -> None:
    with torch.device("meta"):
        model: Any = models.build(name).eval()
        x = torch.empty(2, 1 if "d2l" in name else 3, size, size)
        assert shapes_behind_stages(model, x) == SHAPES[name, size]
        classes = 1000 if size in (29, 224) else 10
        assert model(x).shape == (2, classes)


@pytest.mark.parametrize("spatial_dims", [1, 3])
def test_the_shape_behind_every_stage_in_other_dimensions(spatial_dims: int) -> None:
    with torch.device("meta"):
        model = models.densenet121(spatial_dims=spatial_dims).eval()
        x = torch.empty(2, 3, *(224,) * spatial_dims)
        assert shapes_behind_stages(model, x) == SHAPES["densenet121", 224]
        small = models.DenseNet(12, (2, 2, 2), 24, small_inputs=True, spatial_dims=spatial_dims).eval()
        x = torch.empty(2, 3, *(33,) * spatial_dims)
        assert shapes_behind_stages(small, x) == "24@33 48@33 24@16 48@16 24@8 48@8"


# ---- torchvision

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
TORCHVISIONS = ["densenet121", "densenet161", "densenet169", "densenet201"]


@needs_torchvision
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_the_same_seed_gives_torchvisions_weights(name: str) -> None:
    import torchvision

    torch.manual_seed(4)
    theirs = getattr(torchvision.models, name)(num_classes=3, drop_rate=0.1)
    torch.manual_seed(4)
    fused = getattr(models, name)(num_classes=3, drop_rate=0.1, memory="minimal")
    assert list(fused.state_dict()) == list(theirs.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(fused.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert fused.features.denseblock2.denselayer1.memory == "minimal"


@needs_torchvision
def test_torchvisions_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    theirs = torchvision.models.densenet121()
    published = {
        k.replace(".norm1", ".norm.1").replace(".norm2", ".norm.2"): v
        for k, v in theirs.state_dict().items()
        if "batches" not in k
    }
    asked = []
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **_: asked.append(url) or published
    )
    enum = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    for weights in ("DEFAULT", "IMAGENET1K_V1", enum):
        fused = models.densenet121(weights=weights)
        assert torch.equal(
            fused.features.denseblock1.denselayer1.conv2.weight,
            theirs.features.denseblock1.denselayer1.conv2.weight,
        )
    assert asked == [enum.url] * 3
    with pytest.raises(ValueError, match="densenet169: weights must be None"):
        models.densenet169(weights=enum)
    files = {n: getattr(torchvision.models, f"DenseNet{n[8:]}_Weights").DEFAULT.url for n in TORCHVISIONS}
    assert {n: weights_file._PUBLISHED + f for n, f in weights_file._FILES.items()} == files


def test_published_weights_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="densenet264: no weights have been published"), torch.device("meta"):
        models.densenet264(weights="DEFAULT")
    with pytest.raises(ValueError, match=r"1000 classes, num_classes is 10; .*strip_classifier=True"):
        models.densenet121(weights="DEFAULT", num_classes=10)


# ---- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"growth_rate": 0}, "growth_rate must be a positive whole number, got 0"),
        ({"growth_rate": 1.5}, "growth_rate must be a positive whole number, got 1.5"),
        ({"growth_rate": -1}, "growth_rate must be a positive whole number, got -1"),
        ({"growth_rate": "12"}, "growth_rate must be a positive whole number, got '12'"),
        ({"growth_rate": True}, "growth_rate must be a positive whole number, got True"),
        ({"growth_rate": torch.zeros(2, 3)}, "growth_rate must be a positive whole number, got a Tensor"),
        ({"block_config": torch.zeros(2, 3)}, "block_config must be a sequence .*, got a Tensor"),
        ({"block_config": ()}, r"block_config must be a sequence of the blocks' numbers of layers, got \(\)"),
        ({"block_config": 4}, "block_config must be a sequence of the blocks' numbers of layers, got 4"),
        ({"block_config": "66"}, "block_config must be a sequence .*, got '66'"),
        ({"block_config": (2, 1.0)}, r"block_config\[1\] must be a positive whole number, got 1.0"),
        ({"block_config": (-2, 1)}, r"block_config\[0\] must be a positive whole number, got -2"),
        ({"block_config": (2, 0)}, r"block_config\[1\] must be a positive whole number, got 0"),
        ({"bn_size": 0}, "bn_size must be a positive"),
        ({"num_classes": -1}, "num_classes must be a positive"),
        ({"in_channels": 0}, "in_channels must be a positive"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3, got 4"),
        ({"compression": 0.0}, "compression must be above 0 and at most 1, got 0.0"),
        (
            {"compression": 0.001, "block_config": (1, 1)},
            "compression = 0.001 leaves transition1 too few channels",
        ),
        ({"drop_rate": 1.5}, "drop_rate must be between 0 and 1, got 1.5"),
        ({"drop_rate": "half"}, "drop_rate must be a number, got str"),
        ({"compression": None}, "compression must be a number, got NoneType"),
        ({"memory": "least"}, 'memory must be "balanced" or "minimal"'),
        ({"bn_size": None, "dropout_after_bottleneck": True}, "dropout_after_bottleneck needs bottlenecks"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    error = TypeError if "must be a number" in message else ValueError
    with torch.device("meta"), pytest.raises(error, match=f"^DenseNet: {message}"):
        models.DenseNet(**options)


def test_numpys_whole_numbers_are_whole_numbers() -> None:
    three = np.int64(3)
    model = models.DenseNet(three, (three, np.int32(2)), three, num_classes=three, drop_rate=np.float32(0.5))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("dims", [0, 4, 2.0])
def test_modules_of_dimensions_that_there_are_not(dims: Any) -> None:
    for kind, arguments in (
        ("DenseLayer", (5, 4, 2, 0.0)),
        ("PlainDenseLayer", (5, 4)),
        ("Transition", (5, 4)),
    ):
        with pytest.raises(ValueError, match=f"{kind}: spatial_dims must be 1, 2 or 3, got {dims}"):
            getattr(effdense.nn, kind)(*arguments, spatial_dims=dims)


@pytest.mark.parametrize("depth, bottleneck, nearest", [(99, True, 100), (3, True, 10), (41, False, 40)])
def test_a_depth_that_cannot_be(depth: int, bottleneck: bool, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"n \+ 4 .*got {depth}; the nearest is {nearest}"):
        models.densenet_cifar(depth, 12, bottleneck)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "densenet212",
            r"unknown model 'densenet212', did you mean 'densenet[12]\d1'\?; there are densenet121",
        ),
        ("densenet_bc_41_12", "model 'densenet_bc_41_12': .*the nearest is 40"),
        ("densenet_bc_40_0", "growth_rate must be a positive whole number, got 0"),
        ("resnet50", "unknown model 'resnet50'"),
        ("keras:densenet121", "unknown model"),
    ],
)
def test_names_that_there_are_not(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.build(name)


def test_a_name_that_is_no_text() -> None:
    with pytest.raises(TypeError, match="build: name must be a str, got NoneType"):
        models.build(None)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_models_of_other_libraries(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        with pytest.raises(ValueError, match=f"needs {library}, which is not installed"):
            models.build(f"{library}:densenet121")
        return
    with torch.device("meta"):
        assert type(models.build(f"{library}:densenet121")).__module__.startswith(library)
        with pytest.raises(ValueError, match=f"model '{library}:densenet0': {library} says: "):
            models.build(f"{library}:densenet0")


@pytest.mark.parametrize("small_inputs, least", [(False, 13), (True, 4)])
def test_images_that_do_not_fit(small_inputs: bool, least: int) -> None:
    model = models.DenseNet(4, (1, 1, 1), 6, num_classes=5, small_inputs=small_inputs).eval()
    assert model(torch.randn(1, 3, least, least)).shape == (1, 5)
    with pytest.raises(ValueError, match=f"at least {least} pixels each way .*, got shape "):
        model(torch.randn(1, 3, least + 5, least - 1))
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\], got shape \(1, 1, 32, 32\)"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\], got shape \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))


@pytest.mark.parametrize("name", ["densenet121", "densenet_d2l", "densenet169_tutorial", "densenet_40_12"])
def test_the_least_size_is_the_least(name: str) -> None:
    with torch.device("meta"):
        model: Any = models.build(name).eval()
        channels, least = model.features.get_submodule("conv0").in_channels, model.least_size
        assert least == (4 if name == "densenet_40_12" else 29)
        assert model(torch.empty(1, channels, least, least)).shape[0] == 1
        model.least_size = 0  # not asked any more: what the poolings say
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(torch.empty(1, channels, least, least - 1))


def test_a_replaced_stem_says_which_images_there_are() -> None:
    model = models.DenseNet(4, (1, 1), 6, num_classes=5)
    model.features.conv0 = nn.Conv2d(1, 6, 7, 2, 3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_convert_changes_memory_only() -> None:
    model = models.DenseNet(4, (1, 1), 6)
    assert effdense.convert(model, memory="minimal") is model and type(model) is models.DenseNet
    assert model.features.denseblock1.denselayer1.memory == "minimal"
