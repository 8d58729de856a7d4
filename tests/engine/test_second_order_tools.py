"""Second derivatives with PyTorch's tools: hooks, checkpoints, batched and checked gradients; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from tests._processes import run_in_processes
from tests._stages import (
    CHANNELS,
    TAILS,
    assert_close,
    converted,
    fused_under_compile,
    make_input,
    make_naive,
    make_pair,
    weights_of,
)
from tests.engine._second_order import (
    PARTS,
    assert_ways_agree,
    by_backward,
    by_backward_to_inputs,
    by_backward_with_graph,
    by_grad,
    by_penalty,
    directions,
)


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
