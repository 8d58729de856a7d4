"""Stems with memory="minimal": their convolution is computed again in the backward, and nothing else is different."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet
from benchmarks.measure import peak_bytes
from effdense.engine import stem
from effdense.models import DenseNet
from tests._stages import assert_close, fused_under_compile, step
from tests.engine._second_order import by_grad

MAP_CHANNELS, IMAGES = 34, 3  # more than two vectors of every type, and a rest


def net(memory: str, dims: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    form = {"num_classes": 5, "spatial_dims": dims, "memory": memory, "num_init_features": MAP_CHANNELS}
    return DenseNet(4, (1, 2), **form, **options)


def images(dims: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    sizes = {1: (65,), 2: (35, 33), 3: (17, 19, 33)}[dims]
    return torch.randn(IMAGES, 3, *sizes).to(dtype)


def everything_of(model: nn.Module, x: Tensor) -> list[Any]:
    """Output, gradients, buffers."""
    y = model(x)
    (y.float().square().sum() + y.float().sum()).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def freeze(*names: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(not any(n in name for n in names))

    return change


def evaluate_norm(model: nn.Module) -> None:
    model.features.norm0.eval()


def without_affine(model: nn.Module) -> None:
    model.features.norm0 = nn.BatchNorm2d(MAP_CHANNELS, affine=False)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda _: None,
    "evaluation": nn.Module.eval,
    "norm in evaluation": evaluate_norm,
    "norm without parameters": without_affine,
    "frozen convolution": freeze("conv0"),
    "frozen norm": freeze("norm0"),
    "frozen stem": freeze("conv0", "norm0"),
    "only the classifier": freeze("features"),
}


def assert_same_bits(build: Callable[[str], nn.Module], x: Tensor, **autocast: Any) -> None:
    results = []
    for memory in ("balanced", "minimal"):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            results.append(everything_of(build(memory), x.detach().clone().requires_grad_(x.requires_grad)))
    for kept, again in zip(*results, strict=True):
        assert (kept is None) == (again is None)
        assert kept is None or (torch.equal(kept, again) and kept.stride() == again.stride())


@pytest.mark.parametrize("image_gradient", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_bits_are_those_of_a_map_that_is_kept(change: str, image_gradient: bool) -> None:
    def build(memory: str) -> nn.Module:
        model = net(memory)
        CHANGES[change](model)
        return model

    assert_same_bits(build, images(2, torch.float32).requires_grad_(image_gradient))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_in_every_dimension_and_dtype(dims: int, dtype: Any) -> None:
    half = dtype == "autocast"
    x = images(dims, torch.float32 if half else dtype)
    build = lambda memory: net(memory, dims, bias=True).to(x.dtype)  # noqa: E731
    assert_same_bits(build, x, **({"dtype": torch.bfloat16} if half else {}))


def test_a_stem_of_two_convolutions() -> None:
    """Of the second one the input needs a gradient."""

    torch.manual_seed(0)
    naive = densenet.DenseNet(4, (1, 2), 6, num_classes=5)
    naive.features.conv0 = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3))
    fused = effdense.convert(naive)
    assert_same_bits(
        lambda memory: effdense.convert(copy.deepcopy(fused), memory=memory), images(2, torch.float32)
    )


def naive_and_minimal(training: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    naive = densenet.DenseNet(4, (1, 2), 6, num_classes=5).double().train(training)
    return naive, effdense.convert(copy.deepcopy(naive), memory="minimal")


@pytest.mark.core
@pytest.mark.parametrize("training", [True, False])
def test_values_and_second_derivatives_against_the_naive_net(training: bool) -> None:
    naive, fused = naive_and_minimal(training)
    x = images(2, torch.float64)
    assert_close(step(fused, x, False), step(naive, x, False), 1e-9)
    results = [by_grad(m, x.clone().requires_grad_()) for m in (fused, naive)]
    assert_close(*results, 1e-9)
    assert_close(list(fused.buffers()), list(naive.buffers()), 1e-9)
    counts = [b for name, b in fused.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(int(b) == 2 * training for b in counts)


def saved_sizes(model: nn.Module, x: Tensor) -> list[int]:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sizes


def test_the_map_is_kept_in_balanced_mode_and_where_the_convolution_is_called_by_itself() -> None:
    x = images(2, torch.float32)
    size = IMAGES * MAP_CHANNELS * 18 * 17
    assert size in saved_sizes(net("balanced"), x) and size not in saved_sizes(net("minimal"), x)
    converted = effdense.convert(densenet.DenseNet(4, (1,), MAP_CHANNELS), memory="minimal")
    assert size not in saved_sizes(converted, x)
    assert size in saved_sizes(effdense.convert(converted, memory="balanced"), x)
    hooked = net("minimal")
    hooked.features.conv0.register_forward_hook(lambda *_: None)
    assert size in saved_sizes(hooked, x)
    circular = net("minimal")
    circular.features.conv0.padding_mode = "circular"
    assert size in saved_sizes(circular, x)


def peak(model: nn.Module, x: Tensor) -> int:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run = lambda: F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()  # noqa: E731
    run()
    effdense.empty_cache()
    return peak_bytes(run)


@pytest.mark.parametrize("dims, size", [(2, 128), (3, 48)])
def test_counted_bytes_and_the_plan(dims: int, size: int) -> None:
    """A volume's map comes alone, with scratch for half of it; an image's with a gradient of its size."""
    torch.manual_seed(0)
    form = {"num_classes": 5, "spatial_dims": dims, "num_init_features": 64, "in_channels": 1}
    balanced, minimal = (DenseNet(4, (2, 2), memory=m, **form) for m in ("balanced", "minimal"))
    x = torch.randn(2, 1, *(size,) * dims)
    map_bytes = 4 * 2 * 64 * (size // 2) ** dims
    counted = peak(minimal, x)
    assert map_bytes < counted <= (1.5 if dims == 3 else 2) * map_bytes * 1.25
    assert counted < peak(balanced, x)
    assert effdense.plan(minimal, x.shape, memory="minimal").total == pytest.approx(counted, rel=0.05)


@pytest.mark.core
@fused_under_compile
def test_compiled_it_keeps_no_map_either() -> None:
    torch._dynamo.reset()
    _, fused = naive_and_minimal()
    compiled, x = torch.compile(copy.deepcopy(fused), fullgraph=True), images(2, torch.float64)
    size = IMAGES * 6 * 18 * 17

    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]

    assert_close(run(compiled), run(fused), 1e-12)
    assert size not in saved_sizes(compiled, x)


def test_an_image_changed_in_place_before_the_backward_is_an_error() -> None:
    fused, x = net("minimal"), images(2, torch.float32)
    y = fused(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_image_of_other_channels_is_refused_as_by_pytorch() -> None:
    fused, x = net("minimal"), torch.randn(2, 4, 33, 33)
    features = effdense.nn.DenseFeatures(OrderedDict(fused.features._modules))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels instead"):
        features(x)


def test_opcheck() -> None:
    x, weight = images(2, torch.float32), torch.randn(6, 3, 7, 7)
    vectors = torch.rand(6), torch.rand(6)
    settings = [2, 2], [3, 3], [1, 1], 1, [3, 3], [2, 2], [1, 1], 1e-5, True, ""
    checks = ("test_schema", "test_faketensor")
    arguments = (x, weight, None, *vectors, None, None, *settings)
    torch.library.opcheck(torch.ops.effdense.stem, arguments, test_utils=checks)
    out, where, mean, var = torch.ops.effdense.stem(*arguments)
    needs = [True, True, False, True, False]
    arguments = (torch.randn_like(out), where, mean, var, x, weight, None, *vectors, needs, *settings)  # type: ignore[assignment]
    torch.library.opcheck(torch.ops.effdense.stem_backward, arguments, test_utils=checks)
    assert len(arguments) == stem.BACKWARD_TENSORS + len(settings)


def test_a_relu_inside_of_pytorchs_norm_is_not_called() -> None:
    """As convert_sync_batchnorm leaves it of timm's norms with an activation."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4)
    norm.add_module("act", torch.nn.ReLU())
    parts = [torch.nn.Conv2d(3, 4, 3, padding=1), norm, torch.nn.MaxPool2d(2)]
    x = torch.randn(2, 3, 8, 8)
    expected = torch.nn.Sequential(*parts)(x)
    assert (expected < 0).any()
    torch.testing.assert_close(effdense.nn.DenseFeatures(*parts)(x), expected)
