"""effdense.models: the same results as naive nets in every form and dimension, and as a tutorial's own code."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet
from effdense import models
from tests import _stages as stages
from tests._stages import MEMORY, assert_close, fused_under_compile, step


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


def assert_like(fused: nn.Module, naive: nn.Module, x: Tensor) -> None:
    """With the naive model's weights: training, then evaluation."""
    fused.double().load_state_dict(naive.state_dict())
    for training in (True, False):
        for model in (fused, naive):
            model.train(training)
        for _ in range(2):
            assert_close(step(fused, x), step(naive, x))


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
    naive = random_(densenet.DenseNet(4, (2, 3, 2), 6, **options))
    fused = models.DenseNet(4, (2, 3, 2), 6, memory=memory, **options)
    channels = options.get("in_channels", 3)
    assert_like(fused, naive, torch.randn(3, channels, 21, 17, dtype=torch.float64))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dims, size", [(1, (9,)), (3, (5, 4, 6))])
def test_one_and_three_dimensions(dims: int, size: tuple[int, ...], plain: bool) -> None:
    options = {"num_classes": 5, "small_inputs": True, "bn_size": None if plain else 2}
    naive = random_(stages.in_dimensions(densenet.DenseNet(4, (2, 2), 6, **options), dims))
    naive.forward = lambda x: naive.classifier(F.relu(naive.features(x)).flatten(2).mean(2))
    fused = models.DenseNet(4, (2, 2), 6, spatial_dims=dims, **options)
    assert_like(fused, naive, torch.randn(3, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("dims, size", [(1, (29,)), (2, (29, 30)), (3, (13, 14, 15))])
def test_the_large_stem_in_every_dimension(dims: int, size: tuple[int, ...]) -> None:
    blocks = (2, 1, 1) if dims == 3 else (2, 1, 1, 1)
    fused = random_(models.DenseNet(4, blocks, 6, spatial_dims=dims, in_channels=1, num_classes=5))
    assert fused.least_size == (13 if dims == 3 else 29)
    one_by_one(fused, torch.randn(3, 1, *size, dtype=torch.float64))


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
            for layer in block:  # type: ignore[attr-defined]
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
                    layer = f"features.denseblock{i + 1}.denselayer{j + 1}"
                    keys[f"blocks.{i}.{j}.{k}.0"] = f"{layer}.norm{k + 1}"
                    keys[f"blocks.{i}.{j}.{k}.2"] = f"{layer}.conv{k + 1}"
            keys[f"transitions.{i}.0"] = f"features.transition{i + 1}.norm"
            keys[f"transitions.{i}.2"] = f"features.transition{i + 1}.conv"
        state = OrderedDict()
        for key, tensor in self.state_dict().items():
            module, _, part = key.rpartition(".")
            state[f"{keys.get(module, module)}.{part}"] = tensor
        return state


@pytest.mark.parametrize("memory, dropped", [("minimal", "in blocks"), ("balanced", "nowhere")])
def test_the_tutorials_net(memory: str, dropped: str) -> None:
    """Outside of the blocks dropout draws in its tensor's layout, which is not the naive net's: it is not compared."""
    naive = random_(Tutorial())
    fused = models.densenet169_tutorial(num_classes=5, memory=memory).double()
    fused.load_state_dict(naive.with_our_names())
    outside = {n: m for n, m in fused.named_modules() if isinstance(m, nn.Dropout)}
    assert list(outside) == ["features.drop0", *(f"features.transition{i}.pool.0" for i in (1, 2, 3))]
    assert all(m.p == 0.2 for m in outside.values())
    layers = [m for m in fused.modules() if isinstance(m, effdense.nn.DenseLayer)]
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
        for model in (fused.train(training), naive.train(training)):
            model.zero_grad()
            torch.manual_seed(1)
            F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        theirs = dict(naive.named_parameters())
        for name, p in fused.named_parameters():
            expected = theirs[named[name]].grad
            scale = 1e-9 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(p.grad, expected, rtol=0, atol=scale, msg=name)
        with torch.no_grad():
            torch.manual_seed(1)
            got = fused(x)
            torch.manual_seed(1)
            torch.testing.assert_close(got, naive(x), rtol=1e-9, atol=1e-9)


# ---- traced


@fused_under_compile
@pytest.mark.compiled
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
