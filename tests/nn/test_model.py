"""Whole models: stem, transitions and head as they run fused, alone, hooked, replaced, copied and traced."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effdense
from benchmarks import densenet
from effdense.nn import DenseBlock, DenseFeatures, DenseNet, Transition
from tests._stages import MEMORY, assert_close, assert_same, converted, step


def make_naive(plain: bool = False, **options: Any) -> nn.Module:
    """A DenseNet of seven layers in float64, with statistics that are not the initial ones."""
    torch.manual_seed(5)
    options = {"num_classes": 5, "bn_size": None if plain else 2, **options}
    model = densenet.DenseNet(4, (2, 3, 2), 6, **options).double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
                if name.endswith(("bias", "running_mean")):
                    tensor.sub_(1)
    return model


def make_input(size: int = 32, images: int = 3) -> Tensor:
    return torch.randn(images, 3, size, size, dtype=torch.float64)


def make_pair(change: Any = None, memory: str = "balanced", **options: Any) -> tuple[Any, Any]:
    """A naive and a converted model; both changed afterwards."""
    naive = make_naive(**options)
    fused = converted(naive, memory)
    for model in (naive, fused) if change else ():
        change(model)
    return naive, fused


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("small_inputs", [False, True])
def test_a_model_is_the_naive_one(memory: str, plain: bool, small_inputs: bool) -> None:
    options = {"plain": plain, "small_inputs": small_inputs, "bias": plain}
    naive, fused = make_pair(None, memory, **options)
    for size in (32, 37):
        assert_same((naive, fused), make_input(size // 2 if small_inputs else size))
    assert_same((naive.eval(), fused.eval()), make_input())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_model", [False, True])
def test_layouts(layout: torch.memory_format, of_model: bool) -> None:
    # The naive model draws dropout's numbers in its own layout's order, ours as if everything were contiguous.
    pair = make_pair(drop_rate=0.2 if layout is torch.contiguous_format else 0.0)
    if of_model:
        pair = tuple(m.to(memory_format=layout) for m in pair)
    x = make_input().contiguous(memory_format=layout)
    assert_same(pair, x)
    x = make_input(64)[:, :, ::2, 1::2]
    assert_same(pair, x)


class Convolutions(TorchDispatchMode):
    """Notes what every convolution gave, and the shapes of all copies."""

    effdense_may_fuse = True

    def __init__(self) -> None:
        super().__init__()
        self.outputs, self.copies = list[Tensor](), list[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.outputs.append(out)
        elif func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.copies.append(out.shape)
        return out


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("small_inputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stems_convolution_is_channels_last(
    channels: int, small_inputs: bool, dtype: torch.dtype
) -> None:
    """What it gives, for the layout of what follows: the images are not copied, and neither is the output."""
    _, fused = make_pair(in_channels=channels, small_inputs=small_inputs)
    x = torch.randn(2, channels, 32, 32, dtype=dtype)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        with Convolutions() as seen:
            fused.to(dtype)(image)
        stem = seen.outputs[0]
        assert stem.shape[1] == 6 and stem.is_contiguous(memory_format=torch.channels_last)
        assert not {image.shape, stem.shape} & set(seen.copies)


@pytest.mark.core
def test_inference_is_the_naive_one() -> None:
    naive, fused = make_pair()
    x = make_input()
    for training in (True, False):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert_close([fused.train(training)(x)], [naive.train(training)(x)])
    assert_close(fused.buffers(), naive.buffers())
    assert_same((naive.train(), fused.train()), x)  # with the scratch memory made in inference mode
    with torch.inference_mode():
        made = make_input()
    assert_same((naive, fused), made)


# ---- parts called by themselves

PARTS: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "features": (lambda m: m.features, 3),
    "stem and block": (lambda m: m.features[:5], 3),
    "stem": (lambda m: m.features[1:4], 6),
    "block": (lambda m: m.features.denseblock1, 6),
    "block and transition": (lambda m: m.features[4:6], 6),
    "transition": (lambda m: m.features.transition1, 14),
    "norm of a transition": (lambda m: m.features.transition1.norm, 14),
    "last block and norm": (lambda m: m.features[-2:], 9),
    "norm0": (lambda m: m.features.norm0, 6),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("training", [True, False])
def test_parts_by_themselves(name: str, training: bool) -> None:
    part, channels = PARTS[name]
    pair = tuple(part(m.train(training)) for m in make_pair())
    torch.manual_seed(7)
    assert_same(pair, torch.randn(3, channels, 16, 16, dtype=torch.float64))
    results = []
    for module in pair:
        x = (
            torch.linspace(-1, 1, 3 * channels * 33 * 33, dtype=torch.float64)
            .view(3, channels, 33, 33)
            .requires_grad_()
        )
        module(x).sum().backward()  # the gradient that comes in is expanded
        results.append(x.grad)
    assert_close([results[1]], [results[0]])


# ---- hooks

HOOKED = [
    "classifier",
    "features",
    "features.conv0",
    "features.norm0",
    "features.relu0",
    "features.pool0",
    "features.denseblock1",
    "features.denseblock1.denselayer1",
    "features.denseblock2.denselayer3.conv2",
    "features.transition1",
    "features.transition1.norm",
    "features.transition1.pool",
    "features.denseblock3",
    "features.norm5",
]
# Elsewhere an inplace relu follows, which PyTorch refuses, or the input is a list.
BACKWARD = [
    name for name in HOOKED if name.endswith(("classifier", "conv0", "pool0", "block1", "conv2", "1", "pool"))
]
KINDS = ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_what_they_see_in_the_naive_model(name: str, kind: str) -> None:
    if kind == "register_full_backward_hook" and name not in BACKWARD:
        pytest.skip("not possible in the naive model")
    seen: dict[str, list[Tensor]] = {"naive": [], "fused": []}

    def hook(who: str) -> Callable[..., None]:
        def note(_: nn.Module, *values: Any) -> None:
            for value in values:
                pending = [value]
                while pending:
                    v = pending.pop()
                    if isinstance(v, Tensor):
                        seen[who].append(v.detach().clone())
                    elif v is not None:
                        pending += list(v)

        return note

    pair = make_pair()
    handles = []
    for who, model in zip(seen, pair, strict=True):
        handles.append(getattr(model.get_submodule(name), kind)(hook(who)))
    assert_same(pair, make_input(), steps=1)
    assert len(seen["fused"]) == len(seen["naive"]) > 0
    assert_close(seen["fused"], seen["naive"])
    for handle in handles:
        handle.remove()
    assert_same(pair, make_input(), steps=1)
    assert len(seen["fused"]) == len(seen["naive"]) < 10


def test_a_hook_may_change_what_comes_next() -> None:
    def change(model: Any) -> None:
        for name in ("features.norm0", "features.denseblock1", "features.transition1.conv", "features.norm5"):
            model.get_submodule(name).register_forward_hook(lambda _, __, out: out * 2)

    assert_same(make_pair(change), make_input())


def test_hooks_on_all_modules() -> None:
    pair = make_pair()
    names: list[list[str]] = []
    for model in pair:
        names.append([])
        known = {m: name for name, m in model.named_modules()}
        hook = lambda m, *_, known=known: names[-1].append(known.get(m, ""))  # noqa: E731
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            model(make_input())
        finally:
            handle.remove()
    assert names[0] == names[1]


# ---- replaced parts


def replace(name: str, module: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        torch.manual_seed(3)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module().double())

    return change


def insert_behind(name: str, module: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parent, _, child = name.rpartition(".")
        children = dict(model.get_submodule(parent).named_children())
        model.get_submodule(parent)._modules.clear()
        for key, value in children.items():
            model.get_submodule(parent).add_module(key, value)
            if key == child:
                model.get_submodule(parent).add_module("inserted", module())

    return change


def delete_pool(model: Any) -> None:
    del model.features.transition1.pool


def eval_norm(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).eval() and None


REPLACED = {
    "stem pool 2": replace("features.pool0", lambda: nn.MaxPool2d(2)),
    "stem pool (3, 2)": replace("features.pool0", lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0))),
    "stem pool ceil": replace("features.pool0", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "stem pool dilated": replace("features.pool0", lambda: nn.MaxPool2d(2, 2, dilation=2)),
    "stem pool average": replace("features.pool0", lambda: nn.AvgPool2d(2)),
    "stem pool overlapping": replace("features.pool0", lambda: nn.MaxPool2d(5, 1, 2)),
    "stem pool large": replace("features.pool0", lambda: nn.MaxPool2d(16, 1, 8)),
    "no stem pool": replace("features.pool0", nn.Identity),
    "stem norm": replace("features.norm0", lambda: nn.GroupNorm(2, 6)),
    "stem relu": replace("features.relu0", nn.SiLU),
    "stem eval": eval_norm("features.norm0"),
    "transition max": replace("features.transition1.pool", lambda: nn.MaxPool2d(2)),
    "transition 3": replace("features.transition1.pool", lambda: nn.AvgPool2d(3)),
    "transition (1, 2)": replace("features.transition1.pool", lambda: nn.AvgPool2d((1, 2))),
    "transition stride": replace("features.transition1.pool", lambda: nn.AvgPool2d(3, 2)),
    "transition padding": replace("features.transition1.pool", lambda: nn.AvgPool2d(2, padding=1)),
    "transition ceil": replace("features.transition1.pool", lambda: nn.AvgPool2d(3, ceil_mode=True)),
    "transition divisor": replace("features.transition1.pool", lambda: nn.AvgPool2d(2, divisor_override=3)),
    "no transition pool": replace("features.transition1.pool", nn.Identity),
    "transition pool deleted": delete_pool,
    "transition conv 3x3": replace("features.transition1.conv", lambda: nn.Conv2d(14, 7, 3, padding=1)),
    "transition norm": replace("features.transition1.norm", lambda: nn.GroupNorm(2, 14)),
    "transition norm none": replace("features.transition1.norm", nn.Identity),
    "transition relu": replace("features.transition1.relu", nn.SiLU),
    "transition eval": eval_norm("features.transition1"),
    "transition": replace("features.transition1", lambda: nn.Conv2d(14, 7, 2, 2)),
    "head norm": replace("features.norm5", lambda: nn.GroupNorm(1, 17)),
    "head norm none": replace("features.norm5", nn.Identity),
    "head eval": eval_norm("features.norm5"),
    "layer norm": replace("features.denseblock3.denselayer2.norm1", lambda: nn.GroupNorm(1, 13)),
    "relu behind a block": insert_behind("features.denseblock1", lambda: nn.ReLU(inplace=True)),
    "tanh behind a block": insert_behind("features.denseblock1", nn.Tanh),
    "one more norm": lambda m: m.features.append(nn.BatchNorm2d(17).double()),
    "classifier": replace("classifier", nn.Identity),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_afterwards_runs(name: str) -> None:
    pair = make_pair(REPLACED[name])
    assert isinstance(effdense.report(pair[1]), list)
    assert_same(pair, make_input())


@pytest.mark.parametrize("size", [1, 5, 15, 17, 31, 33])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_small_images(size: int, kernel: int, training: bool) -> None:
    """The same result or an error of the same type, down to images that the pools do not fit into."""
    change = replace("features.transition1.pool", lambda: nn.AvgPool2d(kernel))
    pair = tuple(m.train(training) for m in make_pair(change))
    x, outcomes = make_input(size), list[Any]()
    for model in pair:
        try:
            outcomes.append(step(model, x))
        except (RuntimeError, ValueError) as error:
            outcomes.append(type(error))
    if isinstance(outcomes[0], type):
        assert outcomes[1] is outcomes[0]
    else:
        assert_close(outcomes[1], outcomes[0])


@pytest.mark.parametrize("pool", [nn.MaxPool2d(8), nn.MaxPool2d(2, 2, 2), nn.MaxPool2d(2, 0)])
def test_a_stem_pool_that_cannot_be(pool: nn.Module) -> None:
    naive, fused = (model.features[1:4] for model in make_pair(lambda m: setattr(m.features, "pool0", pool)))
    for module in (naive, fused):
        with pytest.raises((RuntimeError, ValueError), match=r"pad|kernel|size|stride"):
            module(torch.randn(2, 6, 4, 4, dtype=torch.float64))


# ---- reports and copies


class OtherHead(densenet.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.features(x))
        return self.classifier(F.adaptive_avg_pool2d(features, (1, 1)).flatten(1))


def test_of_a_net_with_another_head_the_rest_is_converted() -> None:
    naive = OtherHead(4, (2, 2), 6, num_classes=5).double()
    fused = effdense.convert(copy.deepcopy(naive))
    assert type(fused) is OtherHead and isinstance(fused.features, DenseFeatures)
    left = [e for e in effdense.report(fused) if not e.converted]
    assert [(e.name, e.kind, e.reason) for e in left] == [
        ("", "DenseNet", "its forward computes something else (training, on a probe)")
    ]
    assert_same((naive, fused), make_input())


def test_the_report_names_features_and_head() -> None:
    _, fused = make_pair()
    report = {e.name: e for e in effdense.report(fused)}
    assert report[""].kind == "DenseNet" and report["features"].kind == "DenseFeatures"
    handle = fused.features.norm5.register_forward_hook(lambda *_: None)
    report = {e.name: e for e in effdense.report(fused)}
    assert report["features"].reason is None
    assert report[""].reason == "its features do not end with a dense block that runs as a whole and a norm"
    handle.remove()
    assert all(e.reason is None for e in effdense.report(fused))
    assert {e.converted for e in effdense.report(make_naive())} == {False}


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file]


@pytest.mark.core
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_copies(copied: Callable[[Any], Any], used: bool) -> None:
    naive, fused = make_pair(memory="minimal")
    if used:
        assert_same((naive, fused), make_input(), steps=1)
    other = copied(fused)
    assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
    assert other.features.denseblock1.denselayer1._memory == "minimal"
    assert_same((naive, other), make_input())


def test_modules_built_by_hand() -> None:
    naive, _ = make_pair()
    features = DenseFeatures(OrderedDict(copy.deepcopy(naive.features).named_children()))
    for i, (layers, channels) in enumerate([(2, 6), (3, 7), (2, 9)], 1):
        setattr(features, f"denseblock{i}", DenseBlock(layers, channels, 2, 4, 0.0))
        if i < 3:
            setattr(
                features, f"transition{i}", Transition(channels + 4 * layers, (channels + 4 * layers) // 2)
            )
    fused = DenseNet(features, copy.deepcopy(naive.classifier)).double()
    fused.load_state_dict(naive.state_dict())
    assert all(e.reason is None for e in effdense.report(fused))
    assert_same((naive, fused), make_input())


@pytest.mark.core
def test_symbolic_tracing() -> None:
    """A traced model calls submodules one by one; dropout's mode is traced too, as in the naive model."""
    naive, fused = make_pair()
    traced = torch.fx.symbolic_trace(fused.eval())
    x = make_input(33)
    assert_close([traced(x)], [naive.eval()(x)])
