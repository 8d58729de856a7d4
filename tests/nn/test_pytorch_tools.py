"""PyTorch's tools on whole models: replicas, saved tensors, transforms, tracing, scripting, hooks for pictures."""

from __future__ import annotations

import copy
import functools
import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import effdense
from benchmarks import densenet, structures
from effdense.engine import node
from tests._stages import assert_close, assert_same

pytestmark = pytest.mark.core

NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: densenet.DenseNet(4, (2, 2), 6, num_classes=5),
    "gpleiss's": structures.StarNet,
}


@functools.cache
def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    naive = NETS[name]().double()
    return naive, effdense.convert(copy.deepcopy(naive))


@pytest.fixture(params=NETS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Naive and converted."""
    return copy.deepcopy(make_pair(request.param))


def make_images(images: int = 3) -> Tensor:
    return torch.randn(images, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def stages() -> Iterator[Any]:
    """Counts the dense blocks that run fused."""
    with mock.patch.object(node, "run", wraps=node.run) as run:
        yield run


# ---- copies, saved tensors


def test_data_parallels_replicas_run_fused(
    pair: tuple[nn.Module, nn.Module], stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nn.parallel.replicate itself, with copies where it broadcasts to GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    x, results = make_images(), []
    for model in pair:
        stages.reset_mock()
        replica = module.replicate(model, [0, 1])[1]
        y = replica(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert stages.call_count == 2
    assert_close(results[1], results[0])


def test_saved_tensors_may_be_elsewhere(pair: tuple[nn.Module, nn.Module]) -> None:
    with torch.autograd.graph.save_on_cpu():
        assert_same(pair, make_images(), steps=1)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(1) or t.clone().contiguous(), lambda t: t
    ):
        assert_same(pair, make_images(), steps=1)
    assert packed


class Again(torch.autograd.Function):
    """Whose backward trains on other images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            ctx.model(make_images(2).fill_(0.5)).sum().backward()
        return grad, None


@pytest.mark.parametrize("way", ["hook", "function"])
def test_a_new_forward_in_a_backward_moves_the_statistics(
    pair: tuple[nn.Module, nn.Module], way: str
) -> None:
    x, states = make_images(), []
    for model in pair:
        y = model(x)
        if way == "hook":
            y.register_hook(lambda grad, model=model: grad * model(x + 1).isfinite())
        else:
            y = Again.apply(y, model)
        y.square().sum().backward()
        states.append([*model.buffers(), *(p.grad for p in model.parameters())])
    assert_close(states[1], states[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_foreign_block_under_checkpoint(reentrant: bool) -> None:
    """Statistics move once, dropout draws the same numbers again."""
    fused = effdense.convert(structures.StarBlock(2, 6, 4, 3, 0.2, False).double())
    x, results = torch.randn(3, 6, 5, 5, dtype=torch.float64).requires_grad_(), []
    run = lambda block: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)  # noqa: E731
    for block, call in ((fused, run), (copy.deepcopy(fused), lambda block: block(x))):
        torch.manual_seed(1)
        x.grad = None
        call(block).square().sum().backward()
        results.append([x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert_close(*results, 0.0)


# ---- transforms


def test_an_ensemble_by_vmap(pair: tuple[nn.Module, nn.Module]) -> None:
    x, results = make_images(), []
    for model in pair:
        several = [copy.deepcopy(model).eval() for _ in range(2)]
        with torch.no_grad():
            for p in several[1].parameters():
                p.mul_(1.5)
        state = torch.func.stack_module_state(several)
        call = lambda p, b, model=several[0]: torch.func.functional_call(model, (p, b), (x,))  # noqa: E731
        results.append(torch.func.vmap(call)(*state))
        assert_close([results[-1][1]], [several[1](x)])
    assert_close([results[1]], [results[0]])


def test_forward_mode(pair: tuple[nn.Module, nn.Module]) -> None:
    x = make_images()
    got = [torch.func.jvp(model.eval(), (x,), (x.cos(),)) for model in pair]
    assert_close(got[1], got[0])


# ---- modes: what sees, or changes, every operator


class Leaky(TorchFunctionMode):
    """Another activation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.relu, torch.relu):
            return F.leaky_relu(args[0], 0.1)
        return func(*args, **kwargs)


class Rounded(TorchDispatchMode):
    """Convolutions with fewer digits, and a list of what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        result = func(*args, **(kwargs or {}))
        return result.round(decimals=2) if func is torch.ops.aten.convolution.default else result


@pytest.mark.parametrize("mode", [Leaky, Rounded])
def test_a_users_mode_sees_pytorchs_operators(
    pair: tuple[nn.Module, nn.Module], mode: Any, stages: Any
) -> None:
    x, calls, results = make_images(), [], []
    for model in pair:
        with mode() as active:
            y = model(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), tuple(model.parameters()))])
            if model is pair[1]:
                reasons = {e.reason for e in effdense.report(model) if e.kind == "DenseBlock"}
        calls.append(getattr(active, "calls", None))
    assert_close(results[1], results[0])
    assert calls[0] == calls[1]
    assert [f"{mode.__name__} is active" in str(reason) for reason in reasons] == [True]
    assert not stages.called
    assert_close([pair[1](x)], [pair[0](x)])
    assert stages.called


def test_a_default_device_is_no_obstacle(pair: tuple[nn.Module, nn.Module], stages: Any) -> None:
    x = make_images()
    with torch.device("cpu"):
        assert_close([pair[1](x)], [pair[0](x)])
    assert stages.called


def test_flops_are_counted_as_of_the_model_that_it_was(pair: tuple[nn.Module, nn.Module]) -> None:
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            model(make_images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- tracing, scripting


def test_jit_trace_records_the_submodules(pair: tuple[nn.Module, nn.Module]) -> None:
    naive, fused = (m.eval() for m in pair)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(fused, make_images()), file)
    file.seek(0)
    x = make_images(5)
    assert_close([torch.jit.load(file)(x)], [naive(x)])


def test_scripting_says_what_to_do(pair: tuple[nn.Module, nn.Module]) -> None:
    fused = pair[1]
    parts = [fused, fused.features, fused.features.denseblock1, fused.features.transition1]
    for module in (*parts, nn.Sequential(fused), effdense.nn.DenseLayer(6, 4, 2, 0.0)):
        with pytest.raises(
            TypeError, match=r"torch.jit.script: .* script what effdense.revert\(model\) gives"
        ):
            torch.jit.script(module)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torch_jit_has_compiled_is_refused(how: str) -> None:
    model = structures.d2l_net().double().eval()
    compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, make_images())
    for function in (effdense.convert, effdense.report):
        with pytest.raises(TypeError, match=r"model is a \w+: its code is fixed already; convert before"):
            function(compiled)
    net = nn.Sequential(densenet._DenseBlock(2, 3, 2, 2, 0.0), compiled)
    with pytest.raises(TypeError, match=r"convert: 1 is a \w+: its code is fixed already; convert before"):
        effdense.convert(net)
    assert type(net[0]) is densenet._DenseBlock


def test_a_traced_graph_is_left_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    traced, x = torch.fx.symbolic_trace(pair[0].eval()), make_images()
    expected = traced(x)
    assert not any(e.converted for e in effdense.report(effdense.convert(traced)))
    assert_close([traced(x)], [expected])


def test_a_half_converted_model_is_converted_to_its_end(pair: tuple[nn.Module, nn.Module]) -> None:
    naive, fused = pair
    half = copy.deepcopy(naive)
    effdense.convert(half.features.denseblock1)
    assert {e.converted for e in effdense.report(half)} == {True, False}
    for _ in range(2):  # the second time there is nothing to do
        effdense.convert(half)
        assert str(effdense.report(half)) == str(effdense.report(fused))
        assert [type(m) for m in half.modules()] == [type(m) for m in fused.modules()]
    assert_same((naive, half), make_images(), steps=1)


# ---- hooks for pictures, feature extractors, tables


def test_hooks_as_grad_cam_puts_them(pair: tuple[nn.Module, nn.Module]) -> None:
    """On the activations and the gradients of a block, of the final norm and of all features."""
    x, results = make_images(), []
    for model in pair:
        seen: list[Tensor] = []

        def note(_: Any, __: Any, y: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(y.detach().clone())
            y.register_hook(lambda grad: seen.append(grad.clone()))

        model.eval()
        features = model.features
        for module in (features.denseblock2, list(features.children())[-1], features):
            module.register_forward_hook(note)
        features.denseblock2.register_full_backward_hook(
            lambda _, __, grads, seen=seen: seen.append(grads[0].clone())  # type: ignore[misc]
        )
        model(x)[:, 2].sum().backward()
        results.append([*seen, *(p.grad for p in model.parameters())])
        assert len(seen) == 7
    assert_close(results[1], results[0])


@pytest.mark.parametrize("training", [True, False])
def test_create_feature_extractor(training: bool) -> None:
    pytest.importorskip("torchvision", reason="torchvision needs its own torch build")
    from torchvision.models import DenseNet
    from torchvision.models.feature_extraction import create_feature_extractor

    naive = DenseNet(4, (2, 2), 6, num_classes=5).double().train(training)
    nodes = ["features.denseblock1", "features.transition1", "features.norm5"]
    x, results = make_images(), []
    for model in (naive, effdense.convert(copy.deepcopy(naive))):
        extractor = create_feature_extractor(model, nodes)
        maps = extractor(x)
        assert list(maps) == nodes
        # Not norm5's: torchvision's own relu changes it in place.
        loss = maps[nodes[0]].square().sum() + maps[nodes[1]].sum()
        parameters = [p for p in extractor.parameters() if p.requires_grad]
        results.append([*maps.values(), *torch.autograd.grad(loss, parameters, allow_unused=True)])
    assert_close(results[1], results[0])


def test_torchinfo(pair: tuple[nn.Module, nn.Module]) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    tables = [
        torchinfo.summary(m.eval(), (2, 3, 32, 32), dtypes=[torch.float64], verbose=0, device="cpu")
        for m in pair
    ]
    for number in ("total_params", "total_mult_adds", "total_output_bytes"):
        assert getattr(tables[1], number) == getattr(tables[0], number) > 0
    assert all(e.reason is None for e in effdense.report(pair[1]))  # its hooks are gone
