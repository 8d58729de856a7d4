"""The engine on every backend: whole stages against naive blocks, with dropout, frozen parts, both memory modes, every option of a norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from effdense.engine import node, passes
from effdense.engine.stage import BackwardInputs, ForwardInputs
from effdense.ops import reference
from effdense.ops.dispatch import operators
from tests._stages import (
    CHANNELS,
    GROWTH,
    LAYERS,
    MEMORY,
    TAILS,
    WIDTH,
    assert_close,
    assert_same,
    block_of,
    converted,
    kept_tensors,
    make_input,
    make_naive,
    make_pair,
    named_norms,
    step,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("runs_on")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stage_is_the_naive_one(memory: str, tail: str, plain: bool, bias: bool) -> None:
    naive, fused = make_pair(memory, plain, tail, bias=bias)
    for spatial in ((6, 4), (7, 5)):  # the pool leaves out a row and a column
        assert_same((naive, fused), make_input(spatial))
    counters = [m.num_batches_tracked.item() for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counters == [4] * len(counters)
    assert_same((naive.eval(), fused.eval()))


@pytest.mark.parametrize("spatial", [(7,), (2, 3, 5)])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_1d_and_3d(plain: bool, tail: str, spatial: tuple[int, ...]) -> None:
    for memory in MEMORY:
        pair = make_pair(memory, plain, tail, bias=True, dimensions=len(spatial))
        assert_same(pair, make_input(spatial))


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tail", ["block", "transition"])
def test_gradcheck(memory: str, plain: bool, tail: str) -> None:
    fused = converted(make_naive(plain, tail), memory)
    frozen = block_of(fused).denselayer2
    frozen.norm1.eval()
    frozen.norm1.weight.requires_grad_(False)
    frozen.conv1.weight.requires_grad_(False)
    names = [name for name, p in fused.named_parameters() if p.requires_grad]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(fused, dict(zip(names, parameters, strict=True)), (x,))

    x = make_input((2, 3), 2).requires_grad_()
    inputs = (x, *(p for p in fused.parameters() if p.requires_grad))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def capture(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine is called with: settings, x, parameters, running statistics, masks."""
    calls: list[Any] = []
    run = node.run
    with monkeypatch.context() as patch:
        patch.setattr(node, "run", lambda *a: calls.append(a) or run(*a))
        model(x)
    (call,) = calls
    return list(call)


def detached(values: Any) -> list[Tensor | None]:
    return [None if v is None else v.detach() for v in values]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_compiled_operators_and_the_twin_agree(
    memory: str, tail: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = converted(make_naive(plain, tail, bias=True, drop_rate=0.3), memory)
    settings, x, parameters, running, masks = capture(fused, make_input((5, 6)), monkeypatch)
    assert masks and settings.memory == memory
    parameters, needs = detached(parameters), [True, *(p is not None for p in parameters)]
    results = []
    for ops in (operators(x), reference):
        given = ForwardInputs(x, parameters, running, masks)
        out, features, saved, vectors = passes.forward(ops, settings, given)
        y = out if settings.pool else features
        kept = (features, saved, vectors, parameters, masks)
        behind = BackwardInputs(weights_of(y), x.shape[1], *kept, needs)
        grads = passes.backward(ops, settings, behind)
        results.append([out, features.contiguous(), saved, vectors, *grads])
    assert_close(*results, 1e-12)


SETTINGS = ["as they are", "lowest layers frozen", "norms in evaluation", "first convolution's bias"]


def change(model: nn.Module, setting: str) -> None:
    layers = list(block_of(model).values())
    if setting == "lowest layers frozen":
        layers[0].requires_grad_(False)
    elif setting == "norms in evaluation":
        for m in (m for m in layers[1].modules() if isinstance(m, nn.BatchNorm2d)):
            m.eval()
            m.weight.requires_grad_(False)
    elif setting == "first convolution's bias":
        for name, p in layers[1].named_parameters():
            p.requires_grad_(name == "conv1.bias")


@pytest.mark.compiled  # without the compiled module there is the engine in Python alone
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("memory", [*MEMORY, "inference"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_both_orchestrations_give_the_same_bits(
    plain: bool, tail: str, memory: str, setting: str, drop_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine in Python and in C++, on the same operators."""
    ops = operators(make_input())
    fused = converted(make_naive(plain, tail, bias=True, drop_rate=drop_rate), "minimal")
    change(fused, setting)
    settings, x, parameters, running, masks = capture(fused, make_input((5, 6)), monkeypatch)
    settings = settings._replace(memory=memory)
    for newest_first in (False, True):
        for needs_x in (False, True):
            needs = [needs_x, *(p is not None and p.requires_grad for p in parameters)]
            lowest = -1 if needs_x else (needs.index(True) - 1) // settings.parameters_per_layer
            case = settings._replace(newest_first=newest_first, lowest=lowest)
            assert_same_bits(ops, case, x, detached(parameters), running, masks, needs)


def assert_same_bits(
    ops: Any, settings: Any, x: Tensor, parameters: Any, running: Any, masks: Any, needs: list[bool]
) -> None:
    given = ForwardInputs(x, parameters, running, masks)
    one, other = passes.forward(ops, settings, given), node.compiled_forward(ops, settings, given)
    out, features, saved, vectors = one
    assert_equal(one, other)
    if settings.memory == "inference":
        return
    grad = weights_of(out if settings.pool else features)
    behind = BackwardInputs(grad, x.shape[1], features, saved, vectors, parameters, masks, needs)
    grads = passes.backward(ops, settings, behind)
    assert_equal([g for g in grads if g is not None], node.compiled_backward(ops, settings, behind))


def assert_equal(ones: Any, others: Any) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.stride() == other.stride() and one.dtype == other.dtype
        assert torch.equal(one, other)


# ---- dropout


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("drop_rate", [0.4, 1.0])
def test_dropout_draws_the_same_numbers(memory: str, plain: bool, drop_rate: float, runs_on: str) -> None:
    if runs_on == "cuda" and drop_rate < 1:
        pytest.skip("on a GPU, torch's dropout draws them for four elements at a time")
    naive, fused = make_pair(memory, plain, "transition", drop_rate=drop_rate)
    assert_same((naive, fused))
    assert (block_of(copy.deepcopy(fused))(make_input())[:, CHANNELS:] == 0).any()
    following = []
    for model in (naive, fused):
        torch.manual_seed(3)
        model(make_input())
        following.append(torch.rand(1))
    assert following[0] == following[1]
    assert_same((naive.eval(), fused.eval()), steps=1)


def test_layers_may_drop_differently() -> None:
    def change(naive: Any) -> None:
        naive.denselayer1.drop_rate, naive.denselayer3.drop_rate = 0.5, 0.2
        naive.denselayer3.eval()

    assert_same(make_pair("balanced", change=change))


def make_masks(x: Tensor, plain: bool) -> tuple[list[float], list[Tensor | None]]:
    """Dropout of 0.5 after the bottleneck's first convolution in layers 1 and 2, of 0.3 after layers 2 and 3."""
    drop, masks = [], []
    for i in range(LAYERS):
        first, second = (0.5 if i < 2 and not plain else 0.0), (0.3 if i else 0.0)
        for p, channels in ((first, WIDTH), (second, GROWTH)):
            shape = (x.shape[0], channels, *x.shape[2:])
            drop.append(p)
            masks.append(torch.rand(shape) >= p if p else None)
    return drop, masks


def naive_with_masks(block: Any, x: Tensor, drop: list[float], masks: list[Tensor | None]) -> Tensor:
    for i, layer in enumerate(block.values()):
        (p, q), (first, second) = drop[2 * i : 2 * i + 2], masks[2 * i : 2 * i + 2]
        y = layer.conv1(torch.relu(layer.norm1(x)))
        if hasattr(layer, "conv2"):
            y = y if first is None else y * first / (1 - p)
            y = layer.conv2(torch.relu(layer.norm2(y)))
        x = torch.cat([x, y if second is None else y * second / (1 - q)], 1)
    return x


@pytest.mark.parametrize("memory", [*MEMORY, "inference"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("norms", ["training", "norm2 in eval", "eval"])
def test_masks_inside_a_layer(memory: str, plain: bool, norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine drops y before its statistics are taken, also where y is not kept, or nothing is."""
    naive, fused = make_pair("minimal" if memory == "inference" else memory, plain, bias=True)
    for model in (naive, fused):
        for name, m in model.named_modules():
            if isinstance(m, nn.BatchNorm2d):
                m.train(norms == "training" or (norms != "eval" and "norm2" not in name))
    x = make_input().requires_grad_()
    settings, _, parameters, running, _ = capture(fused, x, monkeypatch)
    drop, masks = make_masks(x, plain)
    expected = naive_with_masks(naive, x, drop, masks)
    with torch.set_grad_enabled(memory != "inference"):
        got, _ = node.run(settings._replace(drop=drop), x, parameters, running, masks)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    if memory == "inference":
        return
    inputs = [[x, *naive.parameters()], [x, *fused.parameters()]]
    grads = [torch.autograd.grad(y, i, weights_of(y)) for y, i in zip((expected, got), inputs, strict=True)]
    assert_close(grads[1], grads[0])


def test_of_dropout_bytes_are_kept() -> None:
    fused = converted(make_naive(drop_rate=0.3), "minimal")
    kept, _ = kept_tensors(fused, make_input())
    large = [t for t in kept if t.dim() == 4 and t.shape[-2:] == (6, 5)]
    assert sorted(str(t.dtype) for t in large) == ["torch.bool"] * LAYERS + ["torch.float64"]


def test_what_is_kept_may_be_moved_meanwhile() -> None:
    """Saved-tensor hooks, as of save_on_cpu, may give back a copy in another layout."""
    naive, fused = make_pair("balanced", tail="transition")
    x = make_input()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)
    ):
        got = step(fused, x)
    assert_close(got, step(naive, x))


# ---- norms


def eval_all_norm1(name: str, norm: Any) -> None:
    norm.train("norm1" not in name)


def eval_all_norm2(name: str, norm: Any) -> None:
    norm.train("norm2" not in name)


def eval_the_last(name: str, norm: Any) -> None:
    norm.train(not name.endswith((".norm", "norm5")))


def eval_the_second_layer(name: str, norm: Any) -> None:
    norm.train("denselayer2" not in name)


def eval_all_but_the_second_layer(name: str, norm: Any) -> None:
    norm.train("denselayer2" in name)


def different_eps(name: str, norm: Any) -> None:
    norm.eps = 10.0 ** -(len(name) % 5)


def momenta(name: str, norm: Any) -> None:
    norm.momentum = [None, 0.0, 1.0, 0.3][sum(map(ord, name)) % 4]


def no_affine(name: str, norm: Any) -> None:
    norm.affine, norm.weight, norm.bias = False, None, None


def no_bias(name: str, norm: Any) -> None:
    norm.bias = None


def no_statistics(name: str, norm: Any) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.train("norm1" in name)


NORM_CHANGES = [
    eval_all_norm1,
    eval_all_norm2,
    eval_the_last,
    eval_the_second_layer,
    eval_all_but_the_second_layer,
    different_eps,
    momenta,
    no_affine,
    no_bias,
    no_statistics,
]


@pytest.mark.parametrize("change", NORM_CHANGES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_norms_keep_their_meaning(change: Callable[..., None], tail: str, plain: bool) -> None:
    for memory in MEMORY:
        pair = make_pair(memory, plain, tail)
        for model in pair:
            for name, norm in named_norms(model).items():
                change(name, norm)
        assert_same(pair, steps=3)


def test_a_norm_that_two_layers_share() -> None:
    def change(naive: Any) -> None:
        naive.denselayer2.norm2 = naive.denselayer1.norm2
        naive.denselayer3.conv2 = naive.denselayer1.conv2

    assert_same(make_pair("balanced", change=change))


@pytest.mark.parametrize("tail", ["block", "transition"])
def test_a_backward_does_not_see_later_changes_of_the_statistics(tail: str) -> None:
    fused = converted(make_naive(tail=tail), "minimal")
    for norm in list(named_norms(fused).values())[::2]:
        norm.eval()
    results = []
    for change in (False, True):
        x = (
            torch.linspace(-1, 1, 2 * CHANNELS * 12, dtype=torch.float64)
            .view(2, CHANNELS, 3, 4)
            .requires_grad_()
        )
        model = copy.deepcopy(fused)
        y = model(x)
        with torch.no_grad():
            for buffer in model.buffers() if change else ():
                buffer.mul_(3)
        results.append(torch.autograd.grad(y, [x, *model.parameters()], weights_of(y)))
    assert_close(*results, 0.0)


# ---- only the gradients asked for


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_every_parameter_alone(plain: bool, tail: str) -> None:
    naive, fused = make_pair("balanced", plain, tail, bias=True)
    x = make_input((3, 4), 2)
    names = [name for name, _ in naive.named_parameters()]
    for i, name in enumerate(names):
        for model in (naive, fused):
            for other, p in model.named_parameters():
                p.requires_grad_(other == name)
        effdense.convert(fused, memory=MEMORY[i % 2])
        assert_same((naive, fused), x, steps=1, need_x=False)


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("first", range(LAYERS + 1))
@pytest.mark.parametrize("need_x", [False, True])
def test_frozen_first_layers(memory: str, first: int, need_x: bool) -> None:
    naive, fused = make_pair(memory, tail="transition")
    for model in (naive, fused):
        for layer in list(block_of(model).values())[:first]:
            layer.requires_grad_(False)
    assert_same((naive, fused), steps=1, need_x=need_x)


@pytest.mark.parametrize("tail", TAILS)
def test_a_frozen_stage_makes_no_graph(tail: str) -> None:
    fused = converted(make_naive(tail=tail), "balanced").requires_grad_(False)
    assert fused(make_input()).grad_fn is None
    assert step(fused, make_input())[1] is not None  # the input alone
