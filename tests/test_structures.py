"""convert and revert on dense blocks that are written another way than torchvision's: copies here, and the libraries."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from effdense.nn.foreign import ForeignBlock
from tests import structures
from tests.stages import MEMORY, assert_close

ALLOWED = "not one of a dense layer's norms, ReLUs, convolutions or dropouts"

WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "gpleiss": structures.StarNet,
    "gpleiss, dropout": lambda: structures.StarNet(0.3),
    "d2l": structures.d2l_net,
    "tutorial": structures.tutorial_net,
    "tutorial, no dropout": lambda: structures.tutorial_net(0.0),
    "one rate for all": structures.rate_net,
    "one rate for all, zero": lambda: structures.rate_net(0.0),
    "growing": structures.growing_net,
    "growing, dropout": lambda: structures.growing_net(0.3),
}


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with norms that are not the initial ones."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor in (m.weight, m.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (m.bias, m.running_mean):
                    tensor.uniform_(-0.5, 0.5)
    return model.double()


def images_for(model: nn.Module, size: int = 16, channels: int = 3) -> Tensor:
    conv = next(m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return torch.randn(2, channels, *(size,) * len(conv.kernel_size), dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> list[Any]:
    """Outputs, gradients (of the input and the parameters) and buffers of one step with fixed random numbers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    outputs = model(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
    loss.backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(naive: nn.Module, ours: nn.Module, x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        assert_close(step(ours, x), step(naive, x))
    naive.eval(), ours.eval()
    assert_close(step(ours, x), step(naive, x))


def kinds(model: nn.Module) -> dict[str, int]:
    """How many of each kind run fused."""
    report = effdense.report(model)
    fused = [e.kind for e in report if e.converted and e.reason is None]
    return {kind: fused.count(kind) for kind in dict.fromkeys(fused)}


def convert_and_compare(naive: nn.Module, x: Tensor, blocks: int, memory: str = "balanced") -> nn.Module:
    """Converts a copy and compares it; the copy given back is the naive model again. Returns a converted one."""
    classes, state = [type(m) for m in naive.modules()], copy.deepcopy(naive.state_dict())
    modes, rng = [m.training for m in naive.modules()], torch.get_rng_state()
    ours = copy.deepcopy(naive)
    assert effdense.convert(ours, memory=memory) is ours
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in ours.modules()]
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    assert kinds(ours)["DenseBlock"] == blocks, str(effdense.report(ours))
    assert_same(naive, ours, x)
    reverted = effdense.revert(copy.deepcopy(ours))
    assert [type(m) for m in reverted.modules()] == classes
    assert all(
        vars(a).keys() == vars(b).keys() for a, b in zip(reverted.modules(), naive.modules(), strict=True)
    )
    return ours


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_block_written_another_way_is_converted(name: str, memory: str) -> None:
    naive = randomised(WRITTEN[name]())
    blocks = 1 if name.startswith("one rate") else 2
    convert_and_compare(naive, images_for(naive), blocks, memory)


def test_the_transition_behind_a_block_and_the_sequence_run_fused_too() -> None:
    assert kinds(effdense.convert(structures.d2l_net())) == {
        "DenseFeatures": 1,
        "DenseBlock": 2,
        "Transition": 1,
    }
    expected = {"DenseNet": 1, "DenseFeatures": 1, "DenseBlock": 2, "Transition": 1}
    assert kinds(effdense.convert(structures.StarNet())) == expected
    # Dropout behind the transition's convolution: the pool cannot come first.
    assert kinds(effdense.convert(structures.tutorial_net())) == {"DenseFeatures": 1, "DenseBlock": 2}


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    for name in ("densenet121", "densenetblur121d"):
        small = {"block_config": (2, 3, 2), "growth_rate": 8, "proj_drop_rate": 0.2}
        naive = randomised(timm.create_model(name, **small))
        ours = convert_and_compare(naive, images_for(naive, 32), 3)
        assert kinds(ours) == {"DenseFeatures": 1, "DenseBlock": 3, "Transition": 2}
        ours.set_grad_checkpointing(True)
        assert isinstance(ours.features.denseblock1, type(naive.features.denseblock1))
    model = effdense.convert(timm.create_model("densenet121", act_layer="gelu", block_config=(2, 2)))
    reasons = {e.reason for e in effdense.report(model) if e.kind == "DenseBlock"}
    assert reasons == {f"denselayer1.norm1.act is GELU, {ALLOWED}"}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_monai(dimensions: int) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    small = {"init_features": 8, "growth_rate": 4, "block_config": (2, 3, 2), "dropout_prob": 0.2}
    naive = randomised(nets.DenseNet(dimensions, 1, 3, **small))
    ours = convert_and_compare(naive, images_for(naive, 32, 1), 3)
    assert kinds(ours) == {"DenseFeatures": 1, "DenseBlock": 3, "Transition": 2}
    other = nets.DenseNet(dimensions, 1, 3, **small, norm="instance")
    block = other.features.denseblock1
    classes = [type(m) for m in block.modules()]
    effdense.convert(other)
    assert [type(m) for m in block.modules()] == classes
    entry = next(e for e in effdense.report(other) if e.kind == "DenseBlock")
    norm = f"denselayer1.layers.norm1 is InstanceNorm{dimensions}d"
    assert (entry.name, entry.reason) == ("features.denseblock1", f"{norm}, {ALLOWED}")


def test_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    naive = randomised(smp.Unet("densenet121", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8)))
    ours = convert_and_compare(naive, images_for(naive, 64), 4)
    assert kinds(ours)["DenseLayer"] == 58


def test_torchxrayvision() -> None:
    xrv = pytest.importorskip("torchxrayvision")
    small = {"block_config": (2, 3, 2), "growth_rate": 8, "num_init_features": 16, "drop_rate": 0.2}
    naive = randomised(xrv.models.DenseNet(**small))
    ours = convert_and_compare(naive, images_for(naive, 64, 1), 3)
    assert kinds(ours) == {"DenseFeatures": 1, "DenseBlock": 3, "Transition": 2}


class ReversedNetBlock(structures.NetBlock):
    """kuangliu's order: the new features first."""

    def forward(self, x: Tensor) -> Tensor:
        for blk in self.net:
            x = torch.cat((blk(x), x), dim=1)
        return x


class PostActivationBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([structures.conv_block(6 + 4 * i, 4) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, relu, conv in self.net:
            x = torch.cat((x, conv(norm(relu(x)))), dim=1)
        return x


def with_layer(change: Callable[[nn.Sequential], Any]) -> nn.Module:
    block = structures.NetBlock(3, 6, 4)
    change(block.net[1])
    return block


def replace(index: int, module: nn.Module) -> Callable[[nn.Sequential], Any]:
    return lambda layer: layer.__setitem__(index, module)


def gate(layer: nn.Sequential) -> None:
    layer.gate = nn.Parameter(torch.ones(1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reversed": (
        lambda: ReversedNetBlock(3, 6, 4),
        "its forward computes something else (training, on a probe)",
    ),
    "other order": (PostActivationBlock, "its forward computes something else (training, on a probe)"),
    "norm": (lambda: with_layer(replace(0, nn.GroupNorm(2, 10))), f"net.1.0 is GroupNorm, {ALLOWED}"),
    "instance norm": (
        lambda: with_layer(replace(0, nn.InstanceNorm2d(10))),
        f"net.1.0 is InstanceNorm2d, {ALLOWED}",
    ),
    "activation": (lambda: with_layer(replace(1, nn.SiLU())), f"net.1.1 is SiLU, {ALLOWED}"),
    "padding": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 3, padding=1, padding_mode="reflect"))),
        "net.1.2.padding_mode is reflect, not zeros",
    ),
    "groups": (
        lambda: with_layer(replace(2, nn.Conv2d(10, 4, 3, padding=1, groups=2))),
        "net.1.2.groups is 2, not 1",
    ),
    "parametrized": (
        lambda: with_layer(lambda layer: nn.utils.parametrizations.weight_norm(layer[2])),
        "net.1.2.weight is not a plain parameter",
    ),
    "own parameter": (lambda: with_layer(gate), "net.1 has parameters or buffers of its own: gate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_refused_and_left_alone(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    naive = make()
    ours = copy.deepcopy(naive)
    effdense.convert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in naive.modules()]
    (entry,) = [e for e in effdense.report(ours) if e.kind == "DenseBlock"]
    assert (entry.converted, entry.reason) == (False, reason)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(ours(x), naive(x))


def test_a_hook_inside_is_called() -> None:
    naive = randomised(structures.d2l_net())
    ours = convert_and_compare(naive, images_for(naive, 32), 2)
    naive.train(), ours.train()
    seen: list[Tensor] = []
    for model in (naive, ours):
        model[1].net[1][0].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    report = {e.name: e for e in effdense.report(ours)}
    assert (report["1"].converted, report["1"].reason) == (True, "net.1.0 has hooks")
    assert_same(naive, ours, images_for(naive, 32), 1)
    torch.testing.assert_close(seen[1], seen[0])


def test_a_hook_on_the_container_is_called() -> None:
    block = effdense.convert(structures.NetBlock(3, 6, 4))
    block.net.register_forward_hook(lambda *_: None)
    assert block.obstacle() == "net has hooks"


def test_a_replaced_submodule_runs() -> None:
    block = effdense.convert(structures.NetBlock(3, 6, 4))
    x = torch.randn(2, 6, 5, 5)
    block.net[0][1] = nn.Tanh()
    naive = effdense.revert(copy.deepcopy(block))
    assert type(naive) is structures.NetBlock
    torch.testing.assert_close(block(x), naive(x))


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(0.5), nn.Sequential(nn.ReLU(), nn.ReLU())])
def test_a_submodule_of_another_kind_though_the_structure_fits_runs(module: nn.Module) -> None:
    naive = structures.NetBlock(3, 6, 4)
    ours = effdense.convert(copy.deepcopy(naive))
    for block in (naive, ours):
        block.net[1][1] = module
    assert "not those that effdense.convert has compared" in ours.obstacle() or isinstance(module, nn.Dropout)
    x = torch.randn(2, 6, 5, 5)
    for block in (naive.eval(), ours.eval()):
        assert torch.equal(block(x), naive(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work(how: str) -> None:
    model = effdense.convert(randomised(structures.growing_net(0.2)), memory="minimal")
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert str(effdense.report(other)) == str(effdense.report(model))
    assert type(other[1]) is type(model[1])
    assert_same(model, other, images_for(model), 1)


def test_its_own_class_stays_in_front_of_nothing() -> None:
    block = effdense.convert(structures.GrowingBlock(3, 6, 4, 0.0))
    assert isinstance(block, structures.GrowingBlock) and isinstance(block, ForeignBlock)
    assert len(block) == 3 and type(block[0]) is structures.GrowingLayer


def test_converting_again_changes_the_memory_mode_only() -> None:
    model = structures.tutorial_net().double()
    kept = []
    for memory in ("balanced", "minimal"):
        effdense.convert(model, memory=memory)
        before = [type(m) for m in model.modules()]
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images_for(model, 32))
        kept.append(sum(sizes))
    assert [type(m) for m in model.modules()] == before
    assert kept[1] < kept[0]
    gc.collect()


def test_a_rate_that_changes_later_counts() -> None:
    naive = randomised(structures.rate_net(0.0))
    ours = effdense.convert(copy.deepcopy(naive))
    for model in (naive, ours):
        for m in model.modules():
            if isinstance(m, structures.RateLayer):
                m.droprate = 0.4
    assert kinds(ours)["DenseBlock"] == 1
    assert_same(naive, ours, images_for(naive))


def test_a_dropout_in_evaluation_by_itself_counts() -> None:
    naive = randomised(structures.tutorial_net())
    ours = effdense.convert(copy.deepcopy(naive))
    for model in (naive, ours):
        model[3].layers[1].conv1.dropout.eval()
    assert_same(naive, ours, images_for(naive))


def test_revert_of_our_own_classes() -> None:
    from benchmarks import models

    naive = models.DenseNet(4, (2, 2), 6, num_classes=5).double()
    ours = effdense.revert(effdense.convert(copy.deepcopy(naive)))
    assert [type(m) for m in ours.modules()] == [type(m) for m in naive.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(ours.modules(), naive.modules(), strict=True))
    x = images_for(naive, 32)
    assert_same(naive, ours, x)
    built = effdense.nn.DenseBlock(2, 6, 2, 4, 0.0)
    assert type(effdense.revert(effdense.convert(built))) is effdense.nn.DenseBlock
    with pytest.raises(TypeError, match=r"revert: model must be a torch.nn.Module, got str"):
        effdense.revert("densenet121")


def test_a_reverted_model_can_be_scripted() -> None:
    model = effdense.revert(effdense.convert(structures.d2l_net()))
    x = torch.randn(2, 3, 16, 16)
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(x), model(x))


def test_other_networks_are_left_alone() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = structures.conv_block(6, 6), structures.conv_block(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Residual(), nn.Sequential(Residual(), Residual()))
    classes = [type(m) for m in model.modules()]
    effdense.convert(model)
    assert [type(m) for m in model.modules()] == classes
    assert effdense.report(model) == []
