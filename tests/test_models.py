"""effdense.models: parameter counts and shapes of every net, the same results as the naive twins, what is refused."""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import models as twins
from effdense import models
from effdense.models import weights as weights_file
from tests import stages
from tests.stages import MEMORY, assert_close, step

PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
    "densenet_40_12": 1_019_722,
    "densenet_100_12": 6_979_642,
    "densenet_100_24": 27_249_082,
    "densenet_d2l": 758_226,
    "densenet169_tutorial": 14_160_238,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    report = effdense.report(model)
    assert {e.kind for e in report} >= {"DenseNet", "DenseFeatures", "DenseBlock", "Transition"}
    assert all(e.converted and e.reason is None for e in report), str(report)


# Model, image: channels and size behind the stem, then behind every block and transition.
SHAPES = {
    ("densenet121", 224): [
        (64, 56),
        (256, 56),
        (128, 28),
        (512, 28),
        (256, 14),
        (1024, 14),
        (512, 7),
        (1024, 7),
    ],
    ("densenet161", 224): [
        (96, 56),
        (384, 56),
        (192, 28),
        (768, 28),
        (384, 14),
        (2112, 14),
        (1056, 7),
        (2208, 7),
    ],
    ("densenet169", 224): [
        (64, 56),
        (256, 56),
        (128, 28),
        (512, 28),
        (256, 14),
        (1280, 14),
        (640, 7),
        (1664, 7),
    ],
    ("densenet201", 224): [
        (64, 56),
        (256, 56),
        (128, 28),
        (512, 28),
        (256, 14),
        (1792, 14),
        (896, 7),
        (1920, 7),
    ],
    ("densenet264", 224): [
        (64, 56),
        (256, 56),
        (128, 28),
        (512, 28),
        (256, 14),
        (2304, 14),
        (1152, 7),
        (2688, 7),
    ],
    ("densenet121", 29): [(64, 8), (256, 8), (128, 4), (512, 4), (256, 2), (1024, 2), (512, 1), (1024, 1)],
    ("densenet_bc_100_12", 32): [(24, 32), (216, 32), (108, 16), (300, 16), (150, 8), (342, 8)],
    ("densenet_bc_250_24", 32): [(48, 32), (1032, 32), (516, 16), (1500, 16), (750, 8), (1734, 8)],
    ("densenet_bc_190_40", 32): [(80, 32), (1320, 32), (660, 16), (1900, 16), (950, 8), (2190, 8)],
    ("densenet_40_12", 32): [(16, 32), (160, 32), (160, 16), (304, 16), (304, 8), (448, 8)],
    ("densenet_100_12", 32): [(16, 32), (400, 32), (400, 16), (784, 16), (784, 8), (1168, 8)],
    ("densenet_100_24", 32): [(16, 32), (784, 32), (784, 16), (1552, 16), (1552, 8), (2320, 8)],
    ("densenet_bc_100_12", 4): [(24, 4), (216, 4), (108, 2), (300, 2), (150, 1), (342, 1)],
    ("densenet_d2l", 96): [(64, 24), (192, 24), (96, 12), (224, 12), (112, 6), (240, 6), (120, 3), (248, 3)],
    ("densenet169_tutorial", 224): [
        *((64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1280, 14), (640, 7), (1664, 7))
    ],
}


@pytest.mark.parametrize("name, size", SHAPES)
def test_the_shape_behind_every_stage(name: str, size: int) -> None:
    with torch.device("meta"):
        model: Any = models.build(name).eval()
        x = torch.empty(2, model.features.get_submodule("conv0").in_channels, size, size)
        shapes = []
        for part, module in model.features.named_children():
            if part.startswith(("denseblock", "transition")):
                shapes += [] if shapes else [(x.shape[1], x.shape[2])]
                shapes.append(((y := module(x)).shape[1], y.shape[2]))
            x = module(x)
            assert x.shape[2] == x.shape[3]
    assert shapes == SHAPES[name, size]
    classes = model.classifier.out_features
    assert classes == (1000 if size in (29, 224) else 10)
    with torch.device("meta"):
        assert model(torch.empty(2, 1 if "d2l" in name else 3, size, size)).shape == (2, classes)


# ---- the same results


def random_(model: nn.Module) -> nn.Module:
    """In float64, with parameters and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.double().named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                if name.endswith(("bias", "running_mean")):
                    tensor.sub_(1)
    return model


def assert_like(ours: nn.Module, naive: nn.Module, x: Tensor) -> None:
    """With the naive model's weights: training, then evaluation."""
    ours.double().load_state_dict(naive.state_dict())
    for training in (True, False):
        for model in (ours, naive):
            model.train(training)
        for _ in range(2):
            assert_close(step(ours, x), step(naive, x))


FORMS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "dropout": {"drop_rate": 0.3},
    "plain": {"bn_size": None, "bias": True},
    "compression": {"compression": 0.8, "small_inputs": True, "in_channels": 2},
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_the_naive_twin(form: str, memory: str) -> None:
    options = {"num_classes": 5, "bn_size": 2, **FORMS[form]}
    naive = random_(twins.DenseNet(4, (2, 3, 2), 6, **options))
    ours = models.DenseNet(4, (2, 3, 2), 6, memory=memory, **options)
    channels = options.get("in_channels", 3)
    assert_like(ours, naive, torch.randn(3, channels, 21, 17, dtype=torch.float64))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dims, size", [(1, (9,)), (3, (5, 4, 6))])
def test_one_and_three_dimensions(dims: int, size: tuple[int, ...], plain: bool) -> None:
    options = {"num_classes": 5, "small_inputs": True, "bn_size": None if plain else 2}
    naive = random_(stages.in_dimensions(twins.DenseNet(4, (2, 2), 6, **options), dims))
    naive.forward = lambda x: naive.classifier(F.relu(naive.features(x)).flatten(2).mean(2))
    ours = models.DenseNet(4, (2, 2), 6, spatial_dims=dims, **options)
    assert_like(ours, naive, torch.randn(3, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("dims, size", [(1, (29,)), (2, (29, 30)), (3, (13, 14, 15))])
def test_the_large_stem_in_every_dimension(dims: int, size: tuple[int, ...]) -> None:
    blocks = (2, 1, 1) if dims == 3 else (2, 1, 1, 1)
    ours = random_(models.DenseNet(4, blocks, 6, spatial_dims=dims, in_channels=1, num_classes=5))
    assert ours.least_size == (13 if dims == 3 else 29)
    one_by_one(ours, torch.randn(3, 1, *size, dtype=torch.float64))


def one_by_one(model: nn.Module, x: Tensor) -> None:
    """The model fused, against itself with a hook that makes every module call its submodules."""
    naive = copy.deepcopy(model)
    for _ in range(2):
        got = step(model, x)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            expected = step(naive, x)
        finally:
            handle.remove()
        assert_close(got, expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("small_inputs", [False, True])
def test_dropout_after_the_bottleneck_too(memory: str, small_inputs: bool) -> None:
    form = {"drop_rate": 0.4, "dropout_after_bottleneck": True, "small_inputs": small_inputs}
    model = random_(models.DenseNet(4, (2, 3), 6, num_classes=5, memory=memory, **form))
    one_by_one(model, torch.randn(3, 3, 12, 10, dtype=torch.float64))
    without = random_(
        models.DenseNet(4, (2, 3), 6, num_classes=5, **(form | {"dropout_after_bottleneck": False}))
    )
    x = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    assert not torch.allclose(step(without, x)[0], step(model, x)[0])
    without.load_state_dict(model.state_dict())
    assert_close([model.eval()(x)], [without.eval()(x)])


def test_dropout_after_the_bottleneck_of_a_layer_by_itself() -> None:
    layer = effdense.nn.DenseLayer(5, 4, 2, 0.5, dropout_after_bottleneck=True).double()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    y = F.dropout(layer.conv1(F.relu(F.batch_norm(x, None, None, training=True))), 0.5)
    expected = F.dropout(layer.conv2(F.relu(F.batch_norm(y, None, None, training=True))), 0.5)
    torch.testing.assert_close(got, expected)


# ---- the tutorial's net, as a tutorial would write it


class BnReluConv(nn.Sequential):
    def __init__(self, channels: int, filters: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2)
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.Dropout(0.2))


class Tutorial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, width = BnReluConv(3, 64, 7, 2), 64
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, layers in enumerate((6, 12, 32, 32)):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(nn.Sequential(BnReluConv(width, 128), BnReluConv(128, 32, 3)))
                width += 32
            self.blocks.append(block)
            if i < 3:
                self.transitions.append(BnReluConv(width, width // 2))
                width //= 2
        self.classifier = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        for i, block in enumerate(self.blocks):
            for layer in block:
                x = torch.cat([x, layer(x)], 1)
            if i < 3:
                x = F.avg_pool2d(self.transitions[i](x), 2)
        return self.classifier(x.mean((2, 3)))

    def with_our_names(self) -> OrderedDict[str, Tensor]:
        """Its state_dict with the keys of ours."""
        keys = {"stem.0": "features.norm0", "stem.2": "features.conv0"}
        for i, block in enumerate(self.blocks):
            for j in range(len(block)):
                for k in (0, 1):
                    ours = f"features.denseblock{i + 1}.denselayer{j + 1}"
                    keys[f"blocks.{i}.{j}.{k}.0"] = f"{ours}.norm{k + 1}"
                    keys[f"blocks.{i}.{j}.{k}.2"] = f"{ours}.conv{k + 1}"
            keys[f"transitions.{i}.0"] = f"features.transition{i + 1}.norm"
            keys[f"transitions.{i}.2"] = f"features.transition{i + 1}.conv"
        state = OrderedDict()
        for key, tensor in self.state_dict().items():
            module, _, part = key.rpartition(".")
            state[f"{keys.get(module, module)}.{part}"] = tensor
        return state


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dropped", ["in blocks", "nowhere"])
def test_the_tutorials_net(memory: str, dropped: str) -> None:
    """Outside of the blocks dropout draws in its tensor's layout, which is not the naive net's: it is not compared."""
    naive = random_(Tutorial())
    ours = models.densenet169_tutorial(num_classes=5, memory=memory).double()
    ours.load_state_dict(naive.with_our_names())
    outside = {n: m for n, m in ours.named_modules() if isinstance(m, nn.Dropout)}
    assert list(outside) == ["features.drop0", *(f"features.transition{i}.pool.0" for i in (1, 2, 3))]
    assert all(m.p == 0.2 for m in outside.values())
    layers = [m for m in ours.modules() if isinstance(m, effdense.nn.DenseLayer)]
    assert all(m.drop_rate == 0.2 and m.dropout_after_bottleneck for m in layers)
    for m in (*outside.values(), naive.stem[3], *(t[3] for t in naive.transitions)):
        m.p = 0.0
    if dropped == "nowhere":
        for layer in layers:
            layer.drop_rate = 0.0
        for m in naive.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    named = dict(zip(naive.with_our_names(), naive.state_dict(), strict=True))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        for model in (ours.train(training), naive.train(training)):
            model.zero_grad()
            torch.manual_seed(1)
            F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        theirs = dict(naive.named_parameters())
        for name, p in ours.named_parameters():
            expected = theirs[named[name]].grad
            scale = 1e-9 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(p.grad, expected, rtol=0, atol=scale, msg=name)
        with torch.no_grad():
            torch.manual_seed(1)
            got = ours(x)
            torch.manual_seed(1)
            torch.testing.assert_close(got, naive(x), rtol=1e-9, atol=1e-9)


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
    ours = getattr(models, name)(num_classes=3, drop_rate=0.1, memory="minimal")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert ours.features.denseblock2.denselayer1.memory == "minimal"


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
        ours = models.densenet121(weights=weights)
        assert torch.equal(
            ours.features.denseblock1.denselayer1.conv2.weight,
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
        ({"block_config": ()}, r"block_config must be the blocks' numbers of layers, got \(\)"),
        ({"block_config": 4}, "block_config must be the blocks' numbers of layers, got 4"),
        ({"block_config": (2, 0)}, r"block_config\[1\] must be a positive whole number, got 0"),
        ({"bn_size": 0}, "bn_size must be a positive"),
        ({"num_classes": -1}, "num_classes must be a positive"),
        ({"in_channels": 0}, "in_channels must be a positive"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3, got 4"),
        ({"compression": 0.0}, "compression must be above 0 and at most 1, got 0.0"),
        ({"compression": 0.001, "block_config": (1, 1)}, "leaves transition1 too few channels"),
        ({"drop_rate": 1.5}, "drop_rate must be between 0 and 1, got 1.5"),
        ({"memory": "least"}, 'memory must be "balanced" or "minimal"'),
        ({"bn_size": None, "dropout_after_bottleneck": True}, "dropout_after_bottleneck needs bottlenecks"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.DenseNet(**options)


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


def test_a_replaced_stem_says_which_images_there_are() -> None:
    model = models.DenseNet(4, (1, 1), 6, num_classes=5)
    model.features.conv0 = nn.Conv2d(1, 6, 7, 2, 3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_convert_changes_memory_only() -> None:
    model = models.DenseNet(4, (1, 1), 6)
    assert effdense.convert(model, memory="minimal") is model and type(model) is models.DenseNet
    assert model.features.denseblock1.denselayer1.memory == "minimal"


def test_a_whole_model_is_traced_and_compiled() -> None:
    model = models.DenseNet(4, (1, 1), 6, num_classes=5).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model.eval())(x), model(x))
    graphs: list[int] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph

    torch.testing.assert_close(torch.compile(model, backend=note, fullgraph=True)(x), model(x))
    assert graphs == [1]
