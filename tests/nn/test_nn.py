"""The drop-in modules: call forms, state, every normalisation option, frozen parts, dropout, hooks and wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks import densenet
from effdense.nn import DenseBlock, DenseLayer, Transition
from tests._cases import rms

MEMORY = ["balanced", "minimal"]


def make_pair(memory: str = "balanced", drop_rate: float = 0.0) -> tuple[nn.Module, DenseLayer]:
    """A naive layer and ours with the same parameters, in float64, with statistics that are not the initial ones."""
    naive = densenet._DenseLayer(10, 4, 3, drop_rate).double()
    with torch.no_grad():
        for tensor in (*naive.parameters(), *naive.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    fused = DenseLayer(10, 4, 3, drop_rate, memory=memory).double()
    fused.load_state_dict(naive.state_dict())
    return naive, fused


def make_input(spatial: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    return [torch.randn(3, c, *spatial, dtype=torch.float64).requires_grad_() for c in (4, 3, 3)]


def step(
    module: nn.Module, features: list[Tensor], forward: Callable[..., Tensor] | None = None
) -> list[Any]:
    """Output, gradients (None where there is none) and buffers of one step."""
    features = [x.detach().clone().requires_grad_(x.requires_grad) for x in features]
    module.zero_grad()
    torch.manual_seed(1)
    y = (forward or module)(features)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return [
        y.detach(),
        *(x.grad for x in features),
        *(p.grad for p in module.parameters()),
        *module.buffers(),
    ]


def assert_same(
    naive: nn.Module, fused: nn.Module, features: list[Tensor] | None = None, steps: int = 2
) -> None:
    features = features or make_input()
    for _ in range(steps):
        for a, b in zip(step(fused, features), step(naive, features), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_naive_layer(memory: str, training: bool) -> None:
    naive, fused = make_pair(memory)
    assert fused.obstacle() is None
    assert_same(naive.train(training), fused.train(training))


@pytest.mark.parametrize("memory", MEMORY)
def test_dropout_draws_the_same_numbers(memory: str) -> None:
    naive, fused = make_pair(memory, drop_rate=0.3)
    assert_same(naive, fused)
    assert_same(naive.eval(), fused.eval())
    assert step(fused.train(), make_input())[0].eq(0).any()


def test_call_forms() -> None:
    _, fused = make_pair()
    fused.eval()
    features = make_input()
    expected = fused(features)
    for form in (fused(*features), fused(tuple(features)), fused(torch.cat(features, 1))):
        torch.testing.assert_close(form, expected)


def spoil(change: Callable[[Any], Any], memory: str = "balanced") -> tuple[nn.Module, DenseLayer]:
    """The pair after the same change to both."""
    naive, fused = make_pair(memory)
    change(naive), change(fused)
    return naive, fused


def set_momentum_none(layer: Any) -> None:
    layer.norm1.momentum = layer.norm2.momentum = None


def set_eps(layer: Any) -> None:
    layer.norm1.eps, layer.norm2.eps = 1e-3, 0.1


def freeze_norm1_statistics(layer: Any) -> None:
    layer.norm1.eval()


def freeze_norm2_statistics(layer: Any) -> None:
    layer.norm2.eval()


def drop_running_statistics(layer: Any) -> None:
    layer.norm1 = nn.BatchNorm2d(10, track_running_stats=False).double()
    layer.norm2 = nn.BatchNorm2d(12, track_running_stats=False).double().eval()


def drop_affine(layer: Any) -> None:
    layer.norm1 = nn.BatchNorm2d(10, affine=False).double()
    layer.norm2 = nn.BatchNorm2d(12, affine=False).double()


def add_biases(layer: Any) -> None:
    torch.manual_seed(3)
    layer.conv1 = nn.Conv2d(10, 12, 1).double()
    layer.conv2 = nn.Conv2d(12, 4, 3, padding=1).double()


CHANGES = [
    set_momentum_none,
    set_eps,
    freeze_norm1_statistics,
    freeze_norm2_statistics,
    drop_running_statistics,
    drop_affine,
    add_biases,
]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("change", CHANGES)
def test_options_keep_their_meaning(change: Callable[[Any], Any], memory: str) -> None:
    naive, fused = spoil(change, memory)
    assert fused.obstacle() is None
    assert_same(naive, fused, steps=3)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("frozen", ["norm1", "conv1", "norm2", "conv2", "norm", "conv", "", "input"])
def test_frozen_parts_get_no_gradient(frozen: str, memory: str) -> None:
    def freeze(layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))

    naive, fused = spoil(freeze, memory)
    features = make_input()
    if frozen == "input":
        features[0].requires_grad_(False)
        features[2].requires_grad_(False)
    assert_same(naive, fused, features)


@pytest.mark.core
@pytest.mark.parametrize("spatial", [(7,), (4, 3, 5)])
@pytest.mark.parametrize("memory", MEMORY)
def test_1d_and_3d(spatial: tuple[int, ...], memory: str) -> None:
    def change(layer: Any) -> None:
        torch.manual_seed(3)
        d = len(spatial)
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[d]
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[d]
        layer.norm1, layer.norm2 = norm(10).double(), norm(12).double()
        layer.conv1, layer.conv2 = conv(10, 12, 1).double(), conv(12, 4, 3, padding=1).double()

    naive, fused = spoil(change, memory)
    assert fused.obstacle() is None
    assert_same(naive, fused, make_input(spatial))


@pytest.mark.parametrize("memory", MEMORY)
def test_gradcheck_through_a_block(memory: str) -> None:
    block = DenseBlock(2, 3, 2, 2, 0.0, memory=memory).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    block.denselayer1.conv1.weight.requires_grad_(False)
    names = [name for name, p in block.named_parameters() if p.requires_grad]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *(p for p in block.parameters() if p.requires_grad)))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_as_exact_as_the_naive_one(memory: str, dtype: torch.dtype) -> None:
    naive = densenet._DenseBlock(4, 16, 4, 12, 0.0)
    fused = DenseBlock(4, 16, 4, 12, 0.0, memory=memory)
    fused.load_state_dict(naive.to(dtype).state_dict())
    x = torch.randn(8, 16, 12, 12).to(dtype)

    def results(block: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        block = copy.deepcopy(block).to(dtype)
        inputs = x.to(dtype).requires_grad_()
        y = block(inputs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).view_as(y)
        grads = torch.autograd.grad(y, [inputs, *block.parameters()], weights)
        return [y.detach(), *grads, *(b for b in block.buffers() if b.is_floating_point())]

    exact = results(naive, torch.float64)
    for a, b, c in zip(results(fused.to(dtype), dtype), results(naive, dtype), exact, strict=True):
        assert a.dtype == b.dtype
        assert rms(a.double() - c) <= 2 * rms(b.double() - c) + torch.finfo(dtype).eps * rms(c)


@pytest.mark.parametrize("training", [True, False])
def test_transition_is_the_naive_transition(training: bool) -> None:
    naive, fused = densenet._Transition(10, 5).double(), Transition(10, 5).double()
    fused.load_state_dict(naive.state_dict())
    naive.norm.momentum = fused.norm.momentum = None
    assert fused.obstacle() is None
    x = torch.randn(3, 10, 6, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        results = [step(m.train(training), [x], lambda f, m=m: m(f[0])) for m in (fused, naive)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


SUBMODULES = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]


@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_on_submodules_see_what_they_see_in_the_naive_layer(name: str) -> None:
    seen: dict[str, list[Tensor]] = {"naive": [], "fused": []}
    naive, fused = make_pair()
    for who, layer in (("naive", naive), ("fused", fused)):
        submodule = getattr(layer, name)
        submodule.register_forward_hook(
            lambda _, args, out, who=who: seen[who].extend([args[0].clone(), out.clone()])
        )
    assert fused.obstacle() == f"{name} has hooks"
    assert_same(naive, fused)
    assert len(seen["fused"]) == len(seen["naive"]) == 4
    for a, b in zip(seen["fused"], seen["naive"], strict=True):
        torch.testing.assert_close(a, b)


def test_a_removed_hook_lets_the_layer_run_fused_again() -> None:
    _, fused = make_pair()
    handles = [
        fused.conv1.register_forward_pre_hook(lambda *_: None),
        fused.norm2.register_full_backward_hook(lambda *_: None),
        nn.modules.module.register_module_forward_hook(lambda *_: None),
    ]
    assert fused.obstacle() is not None
    for handle in handles:
        handle.remove()
    assert fused.obstacle() is None


class LoRA(nn.Module):
    """A wrapper as adapters write it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.extra = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


def add_lora(layer: Any) -> None:
    torch.manual_seed(3)
    layer.conv1 = LoRA(layer.conv1)


def replace_forward(layer: Any) -> None:
    layer.relu2.forward = lambda x: x * 2


WRAPPERS = {
    "weight_norm": lambda m: nn.utils.weight_norm(m.conv1),
    "parametrized weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv2),
    "spectral_norm": lambda m: torch.manual_seed(3) and nn.utils.spectral_norm(m.conv2),
    "parametrized spectral_norm": lambda m: (
        torch.manual_seed(3) and nn.utils.parametrizations.spectral_norm(m.conv1)
    ),
    "pruning": lambda m: prune.l1_unstructured(m.conv1, "weight", 0.5),
    "pruned norm": lambda m: prune.l1_unstructured(m.norm1, "weight", 0.5),
    "LoRA": add_lora,
    "replaced forward": replace_forward,
    "other activation": lambda m: setattr(m, "relu2", nn.SiLU()),
    "other norm": lambda m: setattr(m, "norm2", nn.GroupNorm(3, 12).double()),
    "strided convolution": lambda m: (
        setattr(m.conv2, "dilation", (2, 2)) or setattr(m.conv2, "padding", (2, 2))
    ),
}


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_put_on_later_is_never_bypassed(name: str) -> None:
    naive, fused = spoil(WRAPPERS[name])
    assert fused.obstacle() is not None
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (naive, fused)]
    for _ in range(3):
        assert_same(naive, fused, steps=1)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.core
@pytest.mark.parametrize("memory", MEMORY)
def test_under_checkpoint_statistics_move_once(memory: str) -> None:
    _, fused = make_pair(memory)
    other = copy.deepcopy(fused)
    x = torch.randn(3, 10, 4, 4, dtype=torch.float64, requires_grad=True)
    fused(x).sum().backward()
    torch.utils.checkpoint.checkpoint(other, x, use_reentrant=False).sum().backward()
    for a, b in zip(fused.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert other.norm1.num_batches_tracked == 1


def test_messages() -> None:
    _, fused = make_pair()
    with pytest.raises(
        ValueError, match=r"DenseLayer: norm1.weight must have 8 elements .* got shape \(10,\)"
    ):
        fused(torch.ones(2, 8, 4, 4).double())
    with pytest.raises(TypeError, match=r"DenseLayer: conv1.weight must be torch.float32 like the features"):
        fused(torch.ones(2, 10, 4, 4))
    with pytest.raises(
        ValueError, match=r"DenseLayer: normalising with the batch's statistics .* more than one value"
    ):
        fused(torch.ones(1, 10, 1, 1).double())
    with pytest.raises(ValueError, match=r'DenseLayer: memory must be "balanced" or "minimal", got \'tiny\''):
        DenseLayer(10, 4, 3, 0.0, memory="tiny")
    transition = Transition(10, 5)
    with pytest.raises(
        ValueError, match=r"Transition: norm.weight must have 8 elements .* got shape \(10,\)"
    ):
        transition(torch.ones(2, 8, 4, 4))


@pytest.mark.parametrize("memory", MEMORY)
def test_a_feature_changed_in_place_is_refused(memory: str) -> None:
    _, fused = make_pair(memory)
    features = [x * 1 for x in make_input()]
    y = fused(features)
    features[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
