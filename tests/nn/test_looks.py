"""nn/looks.py: what a look at modules has found is used again exactly as long as nothing has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import structures
from effdense.nn import DenseBlock
from effdense.nn.foreign import ForeignBlock
from effdense.nn.looks import KEPT, look
from effdense.ops.extension import extension
from tests._conversions import assert_same
from tests._stages import block_of, make_input, make_pair

pytestmark = pytest.mark.compiled  # without the compiled module nothing is kept


def net(own: bool) -> tuple[nn.Module, nn.Module]:
    """A naive net and the same converted: torchvision's structure, or gpleiss's."""
    torch.manual_seed(0)
    if own:
        return make_pair("balanced")
    naive = structures.StarNet().double()
    return naive, effdense.convert(copy.deepcopy(naive))


def layers_of(model: Any) -> Any:
    return next(m for m in model.modules() if any(n.startswith("denselayer") for n in m._modules)).denselayer2


def images(own: bool) -> Tensor:
    return make_input((8, 8)) if own else torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("own", [True, False])
def test_one_look_for_many_steps(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = net(own)
    cls = DenseBlock if own else ForeignBlock
    looks: list[Any] = []
    look = cls._chains
    monkeypatch.setattr(cls, "_chains", lambda self: looks.append(self) or look(self))
    blocks = sum(isinstance(m, cls) for m in fused.modules())
    for _ in range(3):
        fused(images(own)).sum().backward()
    assert len(looks) == blocks == len(set(looks))
    fused.eval()
    fused(images(own)), fused(images(own))
    assert len(looks) == 2 * blocks


def double_eps(layer: Any) -> None:
    layer.norm1.eps *= 100


def other_momentum(layer: Any) -> None:
    layer.norm2.momentum = 0.5


def average_of_all(layer: Any) -> None:
    layer.norm2.momentum = None


def norm_in_evaluation(layer: Any) -> None:
    layer.norm1.eval()


def other_buffer(layer: Any) -> None:
    layer.norm1.running_mean = torch.full_like(layer.norm1.running_mean, 0.5)


def other_weight(layer: Any) -> None:
    layer.conv1.weight = nn.Parameter(-2 * layer.conv1.weight.detach())


def weight_moved_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.conv2.weight.mul_(-2)


def data_exchanged(layer: Any) -> None:
    layer.conv2.weight.data = -2 * layer.conv2.weight.data


def frozen(layer: Any) -> None:
    layer.conv1.weight.requires_grad_(False)
    layer.norm1.requires_grad_(False)


def hook_on_a_relu(layer: Any) -> None:
    layer.relu2.register_forward_hook(lambda module, inputs, y: y * 2)


def pre_hook(layer: Any) -> None:
    layer.conv2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def other_activation(layer: Any) -> None:
    layer.relu1 = nn.ELU()


def other_forward(layer: Any) -> None:
    layer.conv1.forward = lambda x: nn.functional.conv2d(x, layer.conv1.weight) * 3


def weight_norm(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.conv2)


def dilated(layer: Any) -> None:
    layer.conv2.padding, layer.conv2.dilation = (2, 2), (2, 2)


CHANGES = [
    double_eps,
    other_momentum,
    average_of_all,
    norm_in_evaluation,
    other_buffer,
    other_weight,
    weight_moved_in_place,
    data_exchanged,
    frozen,
    hook_on_a_relu,
    pre_hook,
    other_activation,
    other_forward,
    weight_norm,
    dilated,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("own", [True, False])
def test_a_change_between_steps_counts(own: bool, change: Callable[[Any], None]) -> None:
    pair, x = net(own), images(own)
    for model in pair:
        model(x).sum().backward()
    for model in pair:
        change(layers_of(model))
    assert_same(*pair, x)


def test_a_patched_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(structures.StarLayer(4 + 3 * i, 3, 2, 0.0, False) for i in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x

    naive = Layers().double()
    fused = effdense.convert(copy.deepcopy(naive))
    assert isinstance(fused, ForeignBlock)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_same(naive, fused, x)
    forward = Layers.forward
    monkeypatch.setattr(Layers, "forward", lambda self, x: 2 * forward(self, x))
    assert_same(naive, fused, x)


def test_dtypes_and_image_sizes_in_turn() -> None:
    naive, fused = pair = net(True)
    for dtype in (torch.float64, torch.float32, torch.float64):
        for model in pair:
            model.to(dtype)
        for size in (8, 6):
            x = make_input((size, size)).to(dtype)
            got, expected = fused(x), naive(x)
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected)


def test_a_look_that_is_cut_short_is_not_kept() -> None:
    """By Ctrl-C in a first forward, say; later looks failed."""

    def cut_short() -> int:
        raise KeyboardInterrupt

    for module in (nn.Linear(2, 2), nn.Linear(2, 2)):
        with pytest.raises(KeyboardInterrupt):
            look(module, cut_short)
        assert look(module, lambda: 1) == 1 and look(module, lambda: 2) == 1
        module.extra = nn.ReLU()
        with pytest.raises(KeyboardInterrupt):
            look(module, cut_short)
        assert look(module, lambda: 3) == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_looks_for_itself(copied: Callable[[Any], Any]) -> None:
    _, fused = net(True)
    x = make_input((8, 8))
    expected = fused.eval()(x)
    block = block_of(fused)
    assert block.__dict__[KEPT].entry is not None
    other = copied(block)
    other.forward(block_input := torch.randn(2, *_input_shape(block), dtype=torch.float64))
    assert other.__dict__[KEPT] is not block.__dict__[KEPT] or other.__dict__[KEPT].entry[0]() is other
    torch.testing.assert_close(other(block_input), block(block_input))
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)


def _input_shape(block: Any) -> tuple[int, int, int]:
    return next(iter(block.values())).norm1.num_features, 5, 5


def test_a_model_that_has_run_is_freed() -> None:
    _, fused = net(True)
    fused(make_input((8, 8))).sum().backward()
    block = weakref.ref(block_of(fused))
    del fused
    gc.collect()
    assert block() is None


def test_without_the_compiled_module_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension is not None
    monkeypatch.setattr("effdense.nn.looks.extension", None)
    _, fused = net(True)
    fused(make_input((8, 8)))
    assert KEPT not in block_of(fused).__dict__
