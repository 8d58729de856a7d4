"""Unusual inputs: subclasses of Tensor, an image without a batch dimension; and in-place operations after a block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import effdense
from benchmarks import densenet, structures
from effdense.engine import node
from effdense.functional import cat_bn_relu_conv1x1
from effdense.nn import DenseLayer
from tests._stages import (
    CHANNELS,
    TAILS,
    assert_close,
    converted,
    make_input,
    make_naive,
    make_pair,
    step,
    weights_of,
)

pytestmark = pytest.mark.core


class Bare(Tensor):
    """Nothing of its own."""


class Named(Tensor):
    """Carries a name along, and PyTorch's own function does the rest."""

    name = "x"


class Scaled(Tensor):
    """Means something else by a convolution: naive PyTorch runs that, and so must we."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func in (torch.conv2d, torch.nn.functional.conv2d) else result


class Refuses(Tensor):
    """Accepts a few functions only."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in getattr(func, "__name__", ""):
            raise NotImplementedError("no batch norm")
        return super().__torch_function__(func, types, args, kwargs or {})


def image_of_torchvision(x: Tensor) -> Tensor:
    return pytest.importorskip("torchvision.tv_tensors").Image(x)


def with_meta(x: Tensor) -> Tensor:
    return pytest.importorskip("monai.data").MetaTensor(x, meta={"spacing": 1.5})


def batch_with_meta(x: Tensor) -> Tensor:
    data = pytest.importorskip("monai.data")
    return data.utils.list_data_collate([data.MetaTensor(i, meta={"number": n}) for n, i in enumerate(x)])


MAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": nn.Parameter,
    "buffer": lambda x: nn.Buffer(x),
    "bare subclass": lambda x: x.as_subclass(Bare),
    "subclass with an attribute": lambda x: x.as_subclass(Named),
    "one that convolves in its own way": lambda x: x.as_subclass(Scaled),
    "torchvision's image": image_of_torchvision,
    "MONAI's MetaTensor": with_meta,
    "a batch of MetaTensors": batch_with_meta,
}
FUSED = {"parameter", "buffer", "bare subclass", "subclass with an attribute", "torchvision's image"}
FUSED |= {"MONAI's MetaTensor", "a batch of MetaTensors"}


def plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().as_subclass(Tensor)


def assert_same_of(make: Callable[[Tensor], Tensor], pair: tuple[nn.Module, nn.Module], x: Tensor) -> None:
    """Values, the result's type and metadata, gradients, buffers; training and evaluation."""
    for training in (True, False):
        results = []
        for model in pair:
            model.train(training).zero_grad()
            given = make(x.clone())
            y = model(given)
            (y * weights_of(plain(y))).sum().backward()
            results.append((y, [y, *(p.grad for p in model.parameters()), *model.buffers(), given.grad]))
        (theirs, expected), (mine, got) = results
        assert type(mine) is type(theirs)
        assert repr(getattr(mine, "meta", None)) == repr(getattr(theirs, "meta", None))  # it holds tensors
        assert getattr(mine, "is_batch", None) == getattr(theirs, "is_batch", None)
        assert_close([plain(t) for t in got], [plain(t) for t in expected])


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("tail", TAILS)
def test_subclasses_in_stages(make: str, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = node.run
    monkeypatch.setattr(node, "run", lambda *a: calls.append(1) or run(*a))
    assert_same_of(MAKES[make], make_pair("balanced", tail=tail), make_input())
    assert bool(calls) == (make in FUSED)  # and fused, where nothing speaks against it


@pytest.mark.parametrize("make", MAKES)
def test_subclasses_in_layers(make: str) -> None:
    naive = densenet._DenseLayer(CHANNELS, 4, 3, 0.0).double()
    fused = DenseLayer(CHANNELS, 4, 3, 0.0).double()
    fused.load_state_dict(naive.state_dict())
    assert_same_of(MAKES[make], (naive, fused), make_input())
    x = make_input()
    y = fused([MAKES[make](x[:, :2].clone()), x[:, 2:]])  # one of several
    assert_close([plain(y)], [plain(naive([MAKES[make](x[:, :2].clone()), x[:, 2:]]))])


NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5),
    "gpleiss's": structures.StarNet,
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("net", NETS)
def test_subclasses_in_whole_nets(make: str, net: str) -> None:
    naive = NETS[net]().double()
    assert_same_of(
        MAKES[make], (naive, effdense.convert(copy.deepcopy(naive))), torch.randn(3, 3, 32, 32).double()
    )


def test_our_own_net_takes_them() -> None:
    fused = effdense.models.densenet_cifar(10, 4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = fused(x.as_subclass(Bare))
    assert type(y) is Bare
    assert_close([plain(y)], [fused(x)])


def test_the_function_takes_them() -> None:
    norm, conv = nn.BatchNorm2d(CHANNELS).double(), nn.Conv2d(CHANNELS, 4, 1).double()
    parameters = norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight, conv.bias
    x = make_input()
    y = cat_bn_relu_conv1x1([x[:, :2].as_subclass(Named), x[:, 2:]], *parameters, training=False)
    assert type(y) is Named
    assert_close([plain(y)], [plain(conv(norm.eval()(x).relu()))])


def test_what_a_subclass_refuses_stays_refused() -> None:
    for model in make_pair("balanced"):
        with pytest.raises(NotImplementedError, match="no batch norm"):
            model(make_input().as_subclass(Refuses))


@pytest.mark.parametrize("tail", TAILS)
def test_fake_tensors(tail: str) -> None:
    naive, fused = make_pair("balanced", tail=tail)
    shapes = []
    for model in (naive.eval(), fused.eval()):  # in training statistics that are not fake would have to move
        x = make_input()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = model(mode.from_tensor(x))
            shapes.append((y.shape, y.dtype, type(y)))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("tail", TAILS)
def test_an_image_without_a_batch_is_pytorchs_matter(tail: str) -> None:
    for model in make_pair("balanced", tail=tail):
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            model(make_input()[0])


def test_an_image_without_a_batch_where_it_runs() -> None:
    """PyTorch's convolution takes it, and so does what follows if no norm is in the way."""
    naive = densenet._Transition(CHANNELS, 4).double()
    naive.norm = nn.Identity()  # type: ignore[assignment]
    fused = effdense.convert(copy.deepcopy(naive))
    x = make_input()[0]
    assert_close([fused(x)], [naive(x)])


# ---- in place, right behind a block


def in_place(kind: Callable[[], nn.Module], nested: bool = False) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1), make_naive(), kind()]
    if nested:
        parts = [*parts[:1], nn.Sequential(parts[1]), nn.Sequential(parts[2], nn.Conv2d(17, 2, 1))]
    return nn.Sequential(*parts).double()


BEHIND: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "ReLU6": lambda: nn.ReLU6(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "Dropout": lambda: nn.Dropout(0.4, inplace=True),
}


@pytest.mark.parametrize("kind", BEHIND)
@pytest.mark.parametrize("nested", [False, True])
def test_behind_a_block_in_a_sequence_it_runs_out_of_place(kind: str, nested: bool) -> None:
    naive = in_place(BEHIND[kind], nested)
    fused = effdense.convert(copy.deepcopy(naive))
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    for _ in range(2):
        assert_close(step(fused, x), step(naive, x))


def test_elsewhere_the_message_says_what_to_write() -> None:
    for change in (lambda y: y.relu_(), lambda y: y.add_(1), lambda y: nn.functional.relu(y, inplace=True)):
        y = change(converted(make_naive(), "balanced")(make_input()))
        with pytest.raises(
            RuntimeError,
            match=r"DenseBlock \(3 layers, from 5 to 17 channels\): its output, .* changed in place.* write "
            r"nn.ReLU\(\), y.relu\(\) or y = y \+ z there \(one of the variables .* inplace",
        ):
            y.sum().backward()


def test_without_a_backward_it_may_be_in_place() -> None:
    naive = in_place(BEHIND["ReLU"]).eval()
    fused = effdense.convert(copy.deepcopy(naive))
    with torch.no_grad():
        x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
        assert_close([fused(x)], [naive(x)])
