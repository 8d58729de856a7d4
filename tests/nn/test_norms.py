"""Every option of a batch norm, wherever the norm is in a whole model: stem, layers, transitions, head, foreign structures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests import _stages as stages
from tests._conversions import images_for, kinds, randomised, step
from tests._stages import assert_close


class InDimensions(nn.Module):
    """A twin for 1D or 3D images, whose own head is for 2D."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        net = densenet.DenseNet(4, (2, 2), 6, num_classes=5, bn_size=2, small_inputs=True)
        self.net = stages.in_dimensions(net, dimensions).features

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: densenet.DenseNet(4, (2, 3), 6, num_classes=5, bn_size=2),
    "plain": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5, bn_size=None, bias=True),
    "1D": lambda: InDimensions(1),
    "3D": lambda: InDimensions(3),
    "gpleiss": structures.StarNet,
    "d2l": structures.d2l_net,
    "tutorial": lambda: structures.tutorial_net(0.0),
    "one rate": lambda: structures.rate_net(0.0),
    "growing": structures.growing_net,
}


def norms_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def cumulative(i: int, norm: Any) -> None:
    norm.momentum = None


def momenta(i: int, norm: Any) -> None:
    norm.momentum = (None, 0.0, 1.0, 0.3)[i % 4]


def no_affine(i: int, norm: Any) -> None:
    norm.__init__(norm.num_features, affine=False, dtype=torch.float64)


def no_statistics(i: int, norm: Any) -> None:
    norm.__init__(norm.num_features, track_running_stats=False, dtype=torch.float64)


def some_without(i: int, norm: Any) -> None:
    (no_affine, no_statistics, lambda *_: None)[i % 3](i, norm)


def different_eps(i: int, norm: Any) -> None:
    norm.eps = 10.0 ** -(i % 5)


def every_third_in_evaluation(i: int, norm: Any) -> None:
    norm.train(i % 3 != 0)


def all_but_every_third_in_evaluation(i: int, norm: Any) -> None:
    norm.train(i % 3 == 0)


CHANGES = [
    cumulative,
    momenta,
    no_affine,
    no_statistics,
    some_without,
    different_eps,
    every_third_in_evaluation,
    all_but_every_third_in_evaluation,
]


def changed(model: nn.Module, change: Callable[..., None]) -> nn.Module:
    for i, norm in enumerate(norms_of(model)):
        change(i, norm)
    return model


WHOLE = ("bottleneck", "d2l", "tutorial")
CASES = [(net, change) for net in NETS for change in (CHANGES if net in WHOLE else (momenta, some_without))]


@pytest.mark.parametrize("net, change", CASES)
def test_a_norms_options_keep_their_meaning(net: str, change: Callable[..., None]) -> None:
    """Set before convert looks, and after it: training, then evaluation; outputs, all gradients, all buffers."""
    plain = randomised(NETS[net]())
    naive = changed(copy.deepcopy(plain), change)
    before = effdense.convert(copy.deepcopy(naive))
    after = changed(effdense.convert(plain), change)
    assert kinds(before) == kinds(after) and kinds(before)["DenseBlock"] >= 1, str(effdense.report(before))
    x = images_for(naive, 17 if net in WHOLE else 9)
    for _ in range(2):
        expected = step(naive, x)
        assert_close(step(before, x), expected)
        assert_close(step(after, x), expected)
    for model in (naive, before, after):
        model.eval()
    expected = step(naive, x)
    assert_close(step(before, x), expected)
    assert_close(step(after, x), expected)


@pytest.mark.parametrize("net", NETS)
def test_norms_whose_statistics_are_used_but_do_not_move(net: str) -> None:
    """Frozen batch norm: parameters that do not train, running statistics."""

    def freeze(_: int, norm: Any) -> None:
        norm.eval().requires_grad_(False)

    naive = changed(randomised(NETS[net]()), freeze)
    fused = effdense.convert(copy.deepcopy(naive))
    x, before = images_for(naive, 9 if net == "3D" else 17), copy.deepcopy(naive.state_dict())
    assert_close(step_trained(fused, x), step_trained(naive, x))
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


def step_trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, lambda channels: nn.GroupNorm(1, channels)])
@pytest.mark.parametrize("name", ["norm0", "denseblock1.denselayer2.norm2", "transition1.norm", "norm5"])
def test_other_norms_are_refused_with_the_reason(name: str, kind: Callable[[int], nn.Module]) -> None:
    """Where they are; the rest runs fused, and the whole is the naive model."""
    naive = randomised(NETS["bottleneck"]())
    parent, _, child = f"features.{name}".rpartition(".")
    other = kind(naive.get_submodule(f"features.{name}").num_features).double()
    setattr(naive.get_submodule(parent), child, other)
    fused = effdense.convert(copy.deepcopy(naive))
    reasons = [e.reason for e in effdense.report(fused) if e.reason is not None]
    word = "norm" if name in ("norm0", "norm5") else f"{child} is {type(other).__name__}"
    assert (name == "norm0" and not reasons) or any(word in reason for reason in reasons)
    assert kinds(fused)["DenseBlock"] == (1 if "block" in name else 2)
    x = images_for(naive, 32)
    assert_close(step(fused, x), step(naive, x))
