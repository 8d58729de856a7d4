"""Gradients that are differentiated again: every way to ask for them, of every part that runs fused, against the naive parts."""

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
from effdense.functional import cat_bn_relu_conv1x1
from effdense.nn import DenseFeatures, DenseLayer, Transition
from tests._processes import run_in_processes
from tests._stages import (
    CHANNELS,
    MEMORY,
    TAILS,
    assert_as_exact,
    assert_close,
    converted,
    fused_under_compile,
    kept_tensors,
    make_input,
    make_naive,
    make_pair,
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


# ---- with PyTorch's tools


def packed(way: Callable[..., Any]) -> Callable[..., Any]:
    def run(model: nn.Module, x: Tensor) -> list[Any]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().contiguous(), lambda t: t):
            return way(model, x)

    return run


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("tail", TAILS)
def test_saved_tensors_packed_and_checkpointed(tail: str) -> None:
    naive, fused = make_pair("minimal", tail=tail, drop_rate=0.2)
    for way in (by_grad, by_backward, by_penalty):
        assert_ways_agree((naive, fused), make_input(), [packed(way)])
        assert_ways_agree((naive, Checkpointed(fused)), make_input(), [way])


def test_one_block_twice_and_in_itself() -> None:
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.tanh(self.block(x)[:, -CHANNELS:])) + self.block(x * x)

    pair = make_pair("balanced")
    assert_ways_agree((Twice(pair[0]), Twice(pair[1])), make_input(), [by_grad, by_penalty])


def test_an_input_made_of_a_parameter() -> None:
    """What the input is made of must not be counted twice."""
    results = []
    for model in make_pair("balanced"):
        weight: Any = model.get_submodule("denselayer1").conv2.weight
        torch.manual_seed(0)
        x = make_input() * weight.sum() + weight.mean()
        results.append(by_grad(model, x))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("tail", TAILS)
def test_gradgradcheck(tail: str) -> None:
    naive = make_naive(tail=tail)
    fused, x = converted(naive.eval(), "minimal"), make_input((2, 3), 2).requires_grad_()
    parameters = dict(list(fused.named_parameters())[:6])

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(fused, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, fast_mode=True)


def by_vectorized_jacobian(model: nn.Module, x: Tensor) -> list[Any]:
    def sums(x: Tensor) -> Tensor:
        y = model(x)
        return y.reshape(len(y), y.shape[1], -1).sum((0, 2))

    return [torch.autograd.functional.jacobian(sums, x, vectorize=True)]


def by_vectorized_hessian(model: nn.Module, x: Tensor) -> list[Any]:
    small = x[:1, :, :2, :2].detach().clone()
    loss = lambda v: model(torch.cat([v, v.flip(2), v * 2])).square().sum()  # noqa: E731
    return [torch.autograd.functional.hessian(loss, small, vectorize=v) for v in (False, True)]


def by_batched_gradients(model: nn.Module, x: Tensor) -> list[Any]:
    y = model(x)
    batch = torch.stack([weights_of(y), weights_of(y).cos(), torch.zeros_like(y)])
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, inputs, batch, is_grads_batched=True, create_graph=True)
    second = torch.autograd.grad(first, inputs, directions(list(first)), retain_graph=True, allow_unused=True)
    by_func = torch.func.vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True), in_dims=1)
    return [*first, *second, *by_func(batch.movedim(0, 1))]


@pytest.mark.core
@pytest.mark.parametrize("part", [*TAILS, *PARTS])
def test_gradients_in_a_batch(part: str) -> None:
    if part in PARTS:
        naive, fused = (m.double() for m in PARTS[part]("balanced"))
        fused.load_state_dict(naive.state_dict())
        pair: Any = (naive, fused)
    else:
        pair = make_pair("balanced", tail=part, drop_rate=0.2)
    assert_ways_agree(pair, make_input((6, 6)), [by_batched_gradients])
    pair = tuple(m.eval() for m in pair)
    try:
        assert_ways_agree(pair, make_input((4, 4)), [by_vectorized_jacobian, by_vectorized_hessian])
    except RuntimeError as error:  # what PyTorch's own pool says to channels-last, before torch 2.15
        if part != "transition with a max pool" or "is_contiguous inside of vmap" not in str(error):
            raise


@pytest.mark.core
def test_a_dual_gradient_is_refused() -> None:
    """Its tangent would be lost in our operators."""
    fused, x = converted(make_naive(), "balanced"), make_input().requires_grad_()
    y = fused(x)
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(weights_of(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="DenseBlock: forward-mode derivatives of its backward"):
            torch.autograd.grad(y, x, grad)


def _refusals() -> list[str]:
    """What two processes with synchronised norms get, by every way in."""
    messages = []
    for way in (by_grad, by_backward, by_backward_to_inputs, by_backward_with_graph, by_penalty):
        model = effdense.models.DenseNet(4, (2, 2), 6, 2, num_classes=3).double()
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        try:
            way(model, torch.randn(2, 3, 32, 32, dtype=torch.float64).requires_grad_())
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.compiled
def test_norms_synchronised_over_processes_refuse() -> None:
    for messages in run_in_processes(_refusals, 2):
        assert len(messages) == 5
        assert all("second derivatives are not supported while norms are synchronised" in m for m in messages)


@fused_under_compile
@pytest.mark.compiled
@pytest.mark.parametrize("tail", TAILS)
def test_a_compiled_model_refuses(tail: str) -> None:
    torch._dynamo.reset()
    compiled, x = (
        torch.compile(converted(make_naive(tail=tail), "balanced"), backend="aot_eager"),
        make_input(),
    )
    try:
        # As PyTorch does; where it has to copy the incoming gradient first, it fails there.
        with pytest.raises(RuntimeError, match=r"double backward|leaf Variable that requires grad"):
            by_grad(compiled, x.requires_grad_())
    finally:
        torch._dynamo.reset()


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
