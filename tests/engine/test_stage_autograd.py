"""Stages under autograd, torch.func, torch.compile and the dispatcher; what is refused; exactness in every dtype."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effdense.engine import node
from effdense.ops import reference
from tests._stages import (
    CHANNELS,
    MEMORY,
    TAILS,
    assert_as_exact,
    assert_close,
    converted,
    fused_under_compile,
    make_input,
    make_naive,
    make_pair,
    weights_of,
)

# ---- the graph


@pytest.mark.parametrize("tail", TAILS)
def test_an_output_changed_in_place_is_never_silent(tail: str) -> None:
    """An error or the right gradient; the naive block allows it."""
    naive, fused = make_pair("balanced", tail=tail)
    x, results = make_input(), []
    for model in (naive, fused):
        y = model(x)
        try:
            y.mul_(2)
            results.append(torch.autograd.grad(y, list(model.parameters()), weights_of(y)))
        except RuntimeError as error:
            assert "inplace" in str(error)
    if len(results) == 2:
        assert_close(results[1], results[0])


@pytest.mark.core
@pytest.mark.parametrize("what", ["parameter", "detached output"])
def test_what_the_backward_reads_may_not_change(what: str) -> None:
    fused = converted(make_naive(), "balanced")
    y = fused(make_input())
    with torch.no_grad():
        (fused.denselayer2.conv2.weight if what == "parameter" else y.detach()).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.sum().backward()


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
def test_two_backwards_through_one_graph(memory: str, tail: str) -> None:
    fused = converted(make_naive(tail=tail, drop_rate=0.2), memory)
    x = make_input().requires_grad_()
    y = fused(x)
    inputs = [x, *fused.parameters()]
    first = torch.autograd.grad(y, inputs, weights_of(y), retain_graph=True)
    kept = [g.clone() for g in first]
    torch.autograd.grad(y, inputs, -weights_of(y), retain_graph=True)
    assert_close(first, kept, 0.0)
    assert_close(torch.autograd.grad(y, inputs, weights_of(y)), first, 0.0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, weights_of(y))


def twice(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[..., 1:] + 2 * model(x.flip(0))[..., :-1]


def in_itself(model: nn.Module, x: Tensor) -> Tensor:
    return model(torch.tanh(model(x)[:, -CHANNELS:]))


def sliced(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return torch.cat([y[:, 2:5] * y[:, -3:], y[:, :3].exp()], 1)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("use", [twice, in_itself, sliced])
def test_uses_of_one_block(use: Callable[[nn.Module, Tensor], Tensor], memory: str) -> None:
    results = []
    x = make_input()
    for model in make_pair(memory):
        y = use(model, x.requires_grad_())
        grads = torch.autograd.grad(y, [x, *model.parameters()], weights_of(y))
        results.append([y.detach(), *grads, *model.buffers()])
    assert_close(results[1], results[0])


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda w: w.new_ones(()).expand(w.shape),
    "contiguous": lambda w: w.contiguous(),
    "channels-last": lambda w: w.movedim(1, -1).contiguous().movedim(-1, 1),
    "slice": lambda w: torch.cat([w, w], 1)[:, w.shape[1] :],
    "transposed": lambda w: w.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", GRADS)
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_that_come_in(layout: str, tail: str) -> None:
    """In every layout, and nobody writes to them."""
    results = []
    x = make_input()
    for model in make_pair("balanced", tail=tail):
        y = model(x.requires_grad_())
        seen: list[Tensor] = []
        y.register_hook(seen.append)
        grad = GRADS[layout](weights_of(y))
        before = grad.clone()
        results.append(torch.autograd.grad(y, [x, *model.parameters()], grad))
        assert torch.equal(grad, before) and torch.equal(seen[0], before)
    assert_close(results[1], results[0])


@pytest.mark.core
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoint(reentrant: bool) -> None:
    fused = converted(make_naive(tail="transition", drop_rate=0.2), "minimal")
    results = []
    x = make_input().requires_grad_()
    run = lambda m: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    for model, call in ((fused, run), (copy.deepcopy(fused), lambda m: m(x))):
        torch.manual_seed(1)
        x.grad = None
        call(model).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_close(*results, 0.0)


def test_no_reference_cycle() -> None:
    fused = converted(make_naive(tail="transition"), "balanced")
    gc.disable()
    try:
        x = make_input().requires_grad_() * 1
        watched = [weakref.ref(x), weakref.ref(fused(x))]
        del x
        assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


# ---- errors


def test_messages_name_the_layer() -> None:
    fused = converted(make_naive(), "balanced")
    before = copy.deepcopy(fused.state_dict())
    cases: list[tuple[Any, type[Exception], str]] = [
        (make_input(channels=4), ValueError, r"DenseBlock: denselayer1.norm1.weight must have 4 elements"),
        (make_input().float(), TypeError, r"DenseBlock: denselayer1.conv1.weight must be torch.float32"),
        (make_input((1, 1), 1), ValueError, r"DenseBlock: normalising with the batch's statistics"),
        (torch.ones(3, CHANNELS), ValueError, r"expected 4D input \(got 2D input\)"),  # PyTorch's own
        (make_input((4,)), ValueError, r"expected 4D input \(got 3D input\)"),
        (make_input().long(), TypeError, r"DenseBlock: features\[0\] must have a floating dtype"),
        (make_input().to("meta"), ValueError, r"DenseBlock: denselayer1.* must be on meta"),
    ]
    for x, error, message in cases:
        with pytest.raises(error, match=message):
            fused(x)
    fused.denselayer2.norm2 = nn.BatchNorm2d(7).double()
    with pytest.raises(ValueError, match=r"DenseBlock: denselayer2.norm2.weight must have 12 elements"):
        fused(make_input())
    del fused.denselayer2.norm2
    fused.denselayer3.norm1.eval().running_var = None
    fused.denselayer2.norm2 = nn.BatchNorm2d(12).double()
    with pytest.raises(ValueError, match=r"needs denselayer3.norm1.running_var, got None"):
        fused(make_input())
    for name, value in fused.state_dict().items():  # nothing has moved
        if "denselayer2.norm2" not in name:
            assert torch.equal(value, before[name])


def test_empty_batch() -> None:
    for training in (True, False):
        results = []
        for model in make_pair("balanced", tail="transition"):
            x = make_input(images=0).requires_grad_()
            y = model.train(training)(x)
            y.sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
        assert_close(results[1], results[0])


# ---- torch.func and forward mode


def gradients_by_func(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}

    def loss(parameters: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(model, (parameters, buffers), (x,))
        return (y * weights_of(y)).sum()

    # The buffers are wrapped: PyTorch's own batch norm changes them in place.
    loss_of = lambda parameters, x, buffers: (  # noqa: E731
        loss(parameters, x, {k: b.clone() for k, b in buffers.items()})
    )
    grads, grad_x = torch.func.grad(loss_of, argnums=(0, 1))(parameters, x, buffers)
    return [*grads.values(), grad_x]


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [True, False])
def test_func_grad(memory: str, training: bool) -> None:
    x = make_input()
    naive, fused = (gradients_by_func(m.train(training), x) for m in make_pair(memory, tail="transition"))
    assert_close(fused, naive)


def by_jvp(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


def by_dual(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert tangent is not None, "the tangent was dropped"
        return tangent


def by_vmap(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(model)(torch.stack([x, 2 * x]))


def by_hessian(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.hessian(lambda v: model(x + v).square().sum())(x.new_zeros(1))


@pytest.mark.core
@pytest.mark.parametrize("how", [by_jvp, by_dual, by_vmap, by_hessian])
@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_are_those_of_the_naive_stage(
    how: Callable[[nn.Module, Tensor], Tensor], frozen: bool
) -> None:
    """PyTorch's own operators run then."""
    naive, fused = (m.eval().requires_grad_(not frozen) for m in make_pair("balanced", tail="transition"))
    x = make_input()
    assert_close([how(fused, x)], [how(naive, x)])


def test_functional_call_runs_fused() -> None:
    fused = converted(make_naive(), "balanced")
    parameters = {k: (2 * p).detach().requires_grad_() for k, p in fused.named_parameters()}
    x = make_input()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fused.denselayer1), "forward", None)
        y = torch.func.functional_call(fused, parameters, (x,))
    grads = torch.autograd.grad(y, list(parameters.values()), weights_of(y))
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(2)
    expected = fused(x)
    assert_close(
        [y, *grads], [expected, *torch.autograd.grad(expected, list(fused.parameters()), weights_of(y))]
    )


# ---- compiled, checked


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@fused_under_compile
@pytest.mark.compiled
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("memory", MEMORY)
def test_compiled_as_one_graph(memory: str) -> None:
    fused = converted(make_naive(tail="transition"), memory)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = make_input()
    for _ in range(2):
        results = []
        for model in (fused, compiled):
            y = model(x.requires_grad_())
            grads = torch.autograd.grad(y, [x, *model.parameters()], weights_of(y))
            results.append([y.detach(), *grads, *(b.clone() for b in model.buffers())])
        assert_close(*results, 1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), fused.eval()(x))  # type: ignore[attr-defined]


@pytest.mark.compiled
@pytest.mark.parametrize("memory", [*MEMORY, "inference"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_operators_are_what_their_schemas_say(
    memory: str, tail: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = converted(make_naive(plain, tail, drop_rate=0.3), "minimal")
    calls: list[Any] = []
    run = node.run
    monkeypatch.setattr(node, "run", lambda *a: calls.append(a) or run(*a))
    fused(make_input((4, 5), 2))
    settings, x, parameters, running, masks = calls[0]
    settings = settings._replace(memory=memory)
    parameters = [None if p is None else p.detach() for p in parameters]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (x, parameters, running, masks, *settings)
    torch.library.opcheck(torch.ops.effdense.dense_stage.default, forward, test_utils=tests)
    if memory == "inference":
        return
    out, features, saved, vectors = torch.ops.effdense.dense_stage(*forward)
    y = out if settings.pool else features
    needs = [True, *(p is not None for p in parameters)]
    needs[2] = False
    backward = (weights_of(y), CHANNELS, features, saved, vectors, parameters, masks, needs, *settings)
    torch.library.opcheck(torch.ops.effdense.dense_stage_backward.default, backward, test_utils=tests)


def test_operators_that_move_statistics() -> None:
    buffers, values = [torch.rand(3), torch.rand(4).double()], [torch.rand(3), torch.rand(4).double()]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    update, count = torch.ops.effdense.update_running_statistics, torch.ops.effdense.count_batches
    move, arguments = torch.ops.effdense.move_running_statistics, (buffers, values, [0.1, 0.5], [False, True])
    torch.library.opcheck(move.default, (*arguments, 6, ""), test_utils=tests)
    torch.library.opcheck(update.default, (buffers, values, [0.9, 0.5], [0.1, 0.5]), test_utils=tests)
    torch.library.opcheck(count.default, ([torch.tensor(3), torch.tensor(0)],), test_utils=tests)


@pytest.mark.parametrize(
    "update", [torch.ops.effdense.update_running_statistics, reference.update_running_statistics]
)
def test_a_norm_that_layers_share_moves_once_for_each(update: Callable[..., None]) -> None:
    running, first, second = (torch.rand(3, dtype=torch.float64) for _ in range(3))
    expected = (running * 0.9 + first * 0.1) * 0.9 + second * 0.1
    update([running, running], [first, second], [0.9, 0.9], [0.1, 0.1])
    torch.testing.assert_close(running, expected)


# ---- exactness


def results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype).requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y, [x, *model.parameters()], weights_of(y).to(dtype))
    return [y.detach(), *grads, *(b for b in model.buffers() if b.is_floating_point())]


RUNS = 5


@pytest.mark.compiled
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_as_exact_as_the_naive_stage(memory: str, dtype: torch.dtype, tail: str, plain: bool) -> None:
    runs = []
    for _ in range(RUNS):
        naive = make_naive(plain, tail).to(dtype)
        x = make_input((13, 12), 8).to(dtype)
        models = (converted(naive, memory), dtype), (naive, dtype), (naive, torch.float64)
        runs.append(tuple(results(model, x, wide) for model, wide in models))
    assert_as_exact(runs, dtype)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_two_threads(memory: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    fused, x = converted(make_naive(tail="transition"), memory), make_input((24, 24), 4)
    first = results(fused, x, dtype)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(fused, x, dtype), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plain", [False, True])
def test_under_autocast(dtype: torch.dtype, tail: str, plain: bool, runs_on: str) -> None:
    """The dtypes of the naive stage under autocast, and no larger errors."""
    runs, low = [], torch.float16 if dtype == torch.float16 else torch.bfloat16
    for _ in range(RUNS):
        naive = make_naive(plain, tail).float()
        x, run = make_input((13, 12), 8).to(dtype), []
        models = (converted(naive, "balanced"), dtype), (naive, dtype), (naive, torch.float64)
        for model, wide in models:
            model = copy.deepcopy(model).double() if wide == torch.float64 else copy.deepcopy(model)
            inputs = x.to(wide).requires_grad_()
            with torch.autocast(x.device.type, dtype=low, enabled=wide != torch.float64):
                y = model(inputs)
            grads = torch.autograd.grad(y, [inputs, *model.parameters()], weights_of(y))
            run.append([y.detach(), *grads, *(b for b in model.buffers() if b.is_floating_point())])
        runs.append(tuple(run))
    assert_as_exact(runs, low)
