"""Ways to ask for second derivatives, and pairs of naive and fused parts to ask them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import densenet
from effdense.functional import cat_bn_relu_conv1x1
from effdense.nn import DenseFeatures, DenseLayer, Transition
from tests._stages import (
    CHANNELS,
    assert_close,
    weights_of,
)


def directions(tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


# ---- ways in: what takes a model and its input, and gives numbers


def first_order(model: nn.Module, x: Tensor, of: list[Tensor] | None = None) -> list[Tensor]:
    """Connected gradients of a loss that is not linear."""
    y = model(x)
    of = [p for p in model.parameters() if p.requires_grad] if of is None else of
    return list(torch.autograd.grad((y.square() * weights_of(y)).sum(), of, create_graph=True))


def by_grad(model: nn.Module, x: Tensor) -> list[Any]:
    """A Hessian-vector product, of the input too."""
    of = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = first_order(model, x, of)
    return [*grads, *torch.autograd.grad(grads, of, directions(grads), allow_unused=True)]


def by_backward(model: nn.Module, x: Tensor) -> list[Any]:
    grads = first_order(model, x)
    torch.autograd.backward(grads, directions(grads))
    return [x.grad, *(p.grad for p in model.parameters())]


def by_backward_to_inputs(model: nn.Module, x: Tensor) -> list[Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = sum((g.square().sum() for g in first_order(model, x)), torch.zeros(()))
    norm.backward(inputs=parameters)
    return [p.grad for p in parameters]


def by_backward_with_graph(model: nn.Module, x: Tensor) -> list[Any]:
    """As AdaHessian does."""
    y, parameters = model(x), [p for p in model.parameters() if p.requires_grad]
    torch.autograd.backward(y.square().sum(), inputs=parameters, create_graph=True)
    grads: Any = [p.grad for p in parameters]
    result = [*torch.autograd.grad(grads, parameters, directions(grads)), *(g.detach() for g in grads)]
    model.zero_grad()  # the graph holds the parameters, and they the graph
    return result


def by_penalty(model: nn.Module, x: Tensor) -> list[Any]:
    """R1."""
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def by_maml(model: nn.Module, x: Tensor) -> list[Any]:
    """Two inner steps, then the gradient of what they led to."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast: dict[str, Tensor] = dict(parameters)
    for _ in range(2):
        y = torch.func.functional_call(model, fast, (x,))
        grads = torch.autograd.grad(y.square().mean(), list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
    y = torch.func.functional_call(model, fast, (x.flip(0),))
    return list(torch.autograd.grad((y * weights_of(y)).sum(), list(parameters.values())))


def by_hvp(model: nn.Module, x: Tensor) -> list[Any]:
    def loss(x: Tensor) -> Tensor:
        return (model(x).square() * 0.5).sum()

    (v,) = directions([x])
    return [torch.autograd.functional.hvp(loss, x, v)[1], torch.autograd.functional.vhp(loss, x, v)[1]]


def by_third_derivative(model: nn.Module, x: Tensor) -> list[Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = first_order(model, x)
    second = torch.autograd.grad(grads, parameters, directions(grads), create_graph=True)
    return list(torch.autograd.grad(second, [x, *parameters], directions(list(second)), allow_unused=True))


def by_incoming_gradient(model: nn.Module, x: Tensor) -> list[Any]:
    """By the gradient that came in: Jacobian-vector products by two backwards."""
    y = model(x)
    v = weights_of(y).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
    return list(torch.autograd.grad(grad, [v, x], directions([grad])))


WAYS = [
    by_grad,
    by_backward,
    by_backward_to_inputs,
    by_backward_with_graph,
    by_penalty,
    by_maml,
    by_hvp,
    by_third_derivative,
    by_incoming_gradient,
]


# torch 2.14's batch norm has none in training.
REFUSED_BY_PYTORCH = "batch_norm does not support 3rd+ order derivatives"


def results_of(way: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Any] | str:
    """The numbers, or that PyTorch has none."""
    model.zero_grad()
    torch.manual_seed(1)
    try:
        values = way(model, x.detach().clone().requires_grad_())
    except RuntimeError as error:
        if REFUSED_BY_PYTORCH not in str(error):
            raise
        return REFUSED_BY_PYTORCH
    return [v if v is None else v.detach().clone() for v in values]


def assert_ways_agree(pair: tuple[nn.Module, nn.Module], x: Tensor, ways: Any = WAYS) -> None:
    for way in ways:
        results: list[Any] = [results_of(way, model, x) for model in pair]
        if REFUSED_BY_PYTORCH in results:
            assert way is by_third_derivative
            assert results[0] == results[1]
            continue
        assert any(v is not None and v.abs().sum() > 0 for v in results[0]), way
        for a, b in zip(results[1], results[0], strict=True):
            # No gradient is none or zeros, depending on what each of PyTorch's operators keeps.
            if a is not None and b is not None:
                assert_close([a], [b])
            else:
                assert all(v is None or not v.any() for v in (a, b))


# ---- parts alone, and whole models


class OnOne(nn.Module):
    """A layer on one tensor as a list of its slices."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer([x[:, :2], x[:, 2:]])


class Functional(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.conv, self.fused = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 4, 1), fused

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.conv(self.norm(x).relu())
        norm, conv = self.norm, self.conv
        parameters = norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight, conv.bias
        return cat_bn_relu_conv1x1([x[:, :2], x[:, 2:]], *parameters, training=norm.training)


def layer_pair(memory: str) -> tuple[nn.Module, nn.Module]:
    naive = densenet._DenseLayer(CHANNELS, 4, 3, 0.3)
    fused = DenseLayer(CHANNELS, 4, 3, 0.3, memory=memory)
    return OnOne(naive), OnOne(fused)


def functional_pair(_: str) -> tuple[nn.Module, nn.Module]:
    return Functional(False), Functional(True)


def transition_pair(_: str) -> tuple[nn.Module, nn.Module]:
    return densenet._Transition(CHANNELS, 4, True), Transition(CHANNELS, 4, bias=True)


def max_pooled_pair(_: str) -> tuple[nn.Module, nn.Module]:
    """A transition whose pool cannot come first: its bottleneck runs alone."""
    pair = transition_pair("")
    for model in pair:
        model.pool = nn.MaxPool2d(2)
    return pair


def stem_pair(_: str) -> tuple[nn.Module, nn.Module]:
    parts = lambda: (nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(3, 2, 1))  # noqa: E731
    return nn.Sequential(*parts()), DenseFeatures(*parts())


PARTS: dict[str, Callable[[str], tuple[nn.Module, nn.Module]]] = {
    "layer": layer_pair,
    "functional": functional_pair,
    "transition": transition_pair,
    "transition with a max pool": max_pooled_pair,
    "stem": stem_pair,
}
