"""Gradients that are differentiated again: of stages, of every part that runs fused and of nets, against the naive ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._stages import (
    CHANNELS,
    MEMORY,
    TAILS,
    assert_as_exact,
    assert_close,
    converted,
    kept_tensors,
    make_input,
    make_naive,
    make_pair,
    weights_of,
)
from tests.engine._second_order import (
    PARTS,
    WAYS,
    assert_ways_agree,
    by_backward,
    by_backward_to_inputs,
    by_grad,
    by_maml,
    by_penalty,
    directions,
    first_order,
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_every_way_in(way: Callable[..., Any], tail: str) -> None:
    for memory in MEMORY:
        assert_ways_agree(make_pair(memory, tail=tail), make_input(), [way])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("memory", MEMORY)
def test_with_dropout(plain: bool, tail: str, memory: str) -> None:
    """The same masks all the way."""
    assert_ways_agree(make_pair(memory, plain, tail, drop_rate=0.3), make_input(), [by_grad, by_penalty])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(plain: bool, dimensions: int) -> None:
    pair = make_pair("balanced", plain, "transition", dimensions=dimensions)
    assert_ways_agree(pair, make_input((4, 5, 3)[:dimensions]), [by_grad, by_backward])


def freeze(model: nn.Module, *names: str) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(not any(n in name for n in names))


def evaluate(model: nn.Module, *names: str) -> None:
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d) and any(n in name for n in names):
            m.eval()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "evaluation": lambda m: m.eval(),
    "frozen below": lambda m: freeze(m, "denselayer1", "denselayer2"),
    "frozen above": lambda m: freeze(m, "denselayer3", "transition"),
    "frozen convolutions": lambda m: freeze(m, "conv"),
    "frozen norms in evaluation": lambda m: (freeze(m, "norm"), evaluate(m, "norm")),
    "one norm in evaluation": lambda m: evaluate(m, "layer2.norm1", "layer3.norm2"),
    "biases": lambda _: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("memory", MEMORY)
def test_frozen_and_changed_parts(change: str, memory: str) -> None:
    options = {"bias": True} if change == "biases" else {}
    pair = make_pair(memory, tail="transition", change=CHANGES[change], **options)
    assert_ways_agree(pair, make_input(), [by_grad, by_backward, by_backward_to_inputs])
    for model in pair:
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_norms_without_affine_parameters() -> None:
    def change(model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.num_features != CHANNELS:
                m.weight = m.bias = None  # type: ignore[assignment]

    assert_ways_agree(make_pair("balanced", tail="head", change=change), make_input(), [by_grad])


def test_an_input_without_a_gradient() -> None:
    results, x = [], make_input()
    for model in make_pair("balanced", tail="head"):
        grads, parameters = first_order(model, x), list(model.parameters())
        results.append(torch.autograd.grad(grads, parameters, directions(grads)))
    assert any(r.any() for r in results[0])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [True, False])
def test_parts_alone(part: str, memory: str, training: bool) -> None:
    naive, fused = (m.double().train(training) for m in PARTS[part](memory))
    with torch.no_grad():
        for tensor in naive.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    fused.load_state_dict(naive.state_dict())
    assert_ways_agree((naive, fused), make_input((6, 6)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5),
    "gpleiss's": structures.StarNet,
    "d2l's": structures.d2l_net,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_whole_models(net: str, training: bool) -> None:
    naive = NETS[net]().double().train(training)
    pair = naive, effdense.convert(copy.deepcopy(naive))
    assert all(e.reason is None for e in effdense.report(pair[1]))
    channels = next(m for m in naive.modules() if isinstance(m, nn.Conv2d)).in_channels
    assert_ways_agree(
        pair, torch.randn(3, channels, 32, 32, dtype=torch.float64), [by_grad, by_penalty, by_maml]
    )


# ---- what the first order keeps, and is


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
def test_first_order_results_are_the_ordinary_ones(memory: str, tail: str) -> None:
    fused, x = converted(make_naive(tail=tail, drop_rate=0.2), memory), make_input().requires_grad_()
    results = []
    for create_graph in (False, True):
        torch.manual_seed(1)
        y = fused(x)
        inputs = [x, *fused.parameters()]
        grads = torch.autograd.grad(y, inputs, weights_of(y), create_graph=create_graph)
        assert all(g.requires_grad == create_graph for g in grads)
        results.append(grads)
    assert_close(*results, 0.0)


def test_the_input_is_not_kept() -> None:
    fused, x = converted(make_naive(), "balanced"), make_input().requires_grad_() * 1
    storage = x.untyped_storage().data_ptr()
    kept, y = kept_tensors(fused, x)
    assert all(t.untyped_storage().data_ptr() != storage for t in (*kept, y.grad_fn.place))
    assert not any(t.shape == x.shape for t in kept)  # whoever packs saved tensors gets no copy either
    assert y.grad_fn.place.untyped_storage().nbytes() == x.element_size()
    assert converted(make_naive(), "balanced")(make_input()).grad_fn.place is None


@pytest.mark.parametrize("tail", TAILS)
def test_an_input_changed_in_place_afterwards(tail: str) -> None:
    """A stage reads its own copy."""
    fused, results = converted(make_naive(tail=tail), "balanced"), []
    for change in (False, True):
        torch.manual_seed(0)
        leaf = make_input().requires_grad_()
        x = leaf * 1
        y = fused(x)
        if change:
            x.mul_(3)
        inputs = [leaf, *fused.parameters()]
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(grads, inputs, directions(list(grads))))
    assert_close(*results, 0.0)


def test_an_output_changed_between_two_derivatives() -> None:
    fused, x = converted(make_naive(), "balanced"), make_input().requires_grad_()
    y = fused(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        grad.square().sum().backward()


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """As Wasserstein GANs have it (Gulrajani et al., arXiv 1704.00028), with its view."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    penalty = (grad.view(len(grad), -1).norm(2, dim=1) - 1).square().mean()
    penalty.backward()
    return penalty.detach()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_an_inputs_gradient_has_its_layout(tail: str, plain: bool, layout: torch.memory_format) -> None:
    for memory in MEMORY:
        naive, fused = make_pair(memory, plain, tail)
        x = make_input().contiguous(memory_format=layout).requires_grad_()
        grads = [torch.autograd.grad(model(x).sum(), x)[0] for model in (naive, fused)]
        assert grads[1].is_contiguous(memory_format=layout)
        assert_close(grads[1:], grads[:1])
        if layout == torch.contiguous_format:
            assert_close([gradient_penalty(fused, x.detach())], [gradient_penalty(naive, x.detach())])


def test_a_penalty_on_a_whole_net() -> None:
    naive = structures.StarNet().double()
    fused, x = effdense.convert(copy.deepcopy(naive)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close([gradient_penalty(fused, x)], [gradient_penalty(naive, x)])
    assert_close([p.grad for p in fused.parameters()], [p.grad for p in naive.parameters()])


# ---- lower precision


@pytest.mark.compiled  # the twin's first gradients are less exact (docs/mathematics.md, "Rounding")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", TAILS)
def test_lower_precision(dtype: torch.dtype, tail: str) -> None:
    """As near to float64 as the naive stage, within the dtype's rounding."""
    naive, fused = make_pair("balanced", tail=tail)
    runs = []
    for _ in range(8):
        x = make_input((8, 8), 6)
        exact = by_grad(naive, x.clone().requires_grad_())
        got, theirs = (
            by_grad(copy.deepcopy(m).to(dtype), x.to(dtype).requires_grad_()) for m in (fused, naive)
        )
        runs.append((got, theirs, exact))
    assert_as_exact(runs, dtype)


@pytest.mark.parametrize("tail", TAILS)
def test_under_autocast(tail: str) -> None:
    naive, fused = (m.float() for m in make_pair("balanced", tail=tail))
    exact, x = copy.deepcopy(naive).double(), make_input((8, 8), 6).float()
    results = []
    for model, enabled in ((fused, True), (naive, True), (exact, False)):
        inputs = [x.to(next(model.parameters()).dtype).requires_grad_(), *model.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = model(inputs[0])
        loss = (y.to(inputs[0].dtype).square() * weights_of(y).to(inputs[0].dtype)).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(grads, inputs, directions(list(grads)), allow_unused=True))
    for a, b, c in zip(*results, strict=True):
        assert a.dtype == b.dtype
        error, other = ((v.double() - c).norm() for v in (a, b))
        assert error <= 2 * other + 4 * torch.finfo(torch.bfloat16).eps * c.norm()


@pytest.mark.core
def test_cross_entropys_hessian() -> None:
    naive = densenet.DenseNet(4, (2, 2), 6, num_classes=5).double().eval()
    fused = effdense.convert(copy.deepcopy(naive))
    x, target = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 1])
    products = []
    for model in (naive, fused):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), target), parameters, create_graph=True)
        products.append(torch.autograd.grad(grads, parameters, directions(parameters)))
    assert_close(products[1], products[0])
