"""convert and revert on dense blocks that are written another way than torchvision's (benchmarks/structures.py)."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from benchmarks import structures
from effdense.nn import structure
from effdense.nn.foreign import ForeignBlock
from tests._conversions import (
    COPIES,
    assert_same,
    assert_same_classes,
    convert_and_compare,
    copied,
    images_for,
    kinds,
    randomised,
)
from tests._stages import MEMORY, fused_under_compile

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
    expected = {"DenseFeatures": 1, "DenseBlock": 2, "Transition": 1}
    assert kinds(effdense.convert(structures.tutorial_net())) == expected


class Blur(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("weight", line.outer(line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.weight, stride=2, groups=x.shape[1])


BEHIND: dict[str, list[Callable[[], nn.Module]]] = {
    "dropout": [lambda: nn.Dropout(0.3), lambda: nn.AvgPool2d(2)],
    "dropout that does nothing": [lambda: nn.Dropout(0.0), lambda: nn.AvgPool2d(2)],
    "max pool": [lambda: nn.MaxPool2d(3, 2, 1)],
    "blur pool": [lambda: Blur(9)],
    "overlapping windows": [lambda: nn.AvgPool2d(3, 2)],
    "nothing": [],
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_transition_with_anything_behind_its_convolution(name: str) -> None:
    parts = nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1), *(make() for make in BEHIND[name])
    blocks = structures.NetBlock(3, 6, 4), nn.Sequential(*parts), structures.NetBlock(3, 9, 4)
    naive = randomised(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks))
    fused = convert_and_compare(naive, images_for(naive, 8), 2)
    assert kinds(fused) == {"DenseFeatures": 1, "DenseBlock": 2, "Transition": 1}
    saved = {}
    for model in (naive.train(), fused.train()):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            model[2](torch.randn(2, 18, 8, 8, dtype=torch.float64).requires_grad_())
        saved[model] = sizes.count(2 * 18 * 8 * 8)
    assert (saved[naive], saved[fused]) == (
        3,
        1,
    )  # the norm's, the ReLU's and the convolution's input; the input
    fused[2][0].register_forward_hook(lambda *_: None)
    assert effdense.report(fused)[-2].reason == "0 has hooks"


ONE_LAYER: dict[str, Callable[[], nn.Module]] = {
    "d2l": lambda: structures.NetBlock(1, 6, 4),
    "gpleiss": lambda: structures.StarBlock(1, 6, 4, 3, 0.2, False),
    "torchxrayvision": lambda: structures.GrowingBlock(1, 6, 4, 0.2),
    "tutorial": lambda: structures.dense_block(1, 6, 4, 0.2),
}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_block_of_one_layer_is_converted(name: str) -> None:
    naive = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), ONE_LAYER[name](), nn.Conv2d(10, 3, 1)))
    convert_and_compare(naive, images_for(naive, 8), 1)


def test_checkpointed_blocks_are_converted() -> None:
    """Naive and checkpointed, statistics would move twice."""
    naive, checkpointed = randomised(structures.StarNet()), structures.StarNet(efficient=True).double()
    checkpointed.load_state_dict(naive.state_dict())
    fused = effdense.convert(copy.deepcopy(checkpointed))
    assert kinds(fused)["DenseBlock"] == 2
    assert_same(naive, fused, images_for(naive))
    assert_same_classes(effdense.revert(fused), checkpointed)


def test_a_hook_inside_is_called() -> None:
    naive = randomised(structures.d2l_net())
    fused = convert_and_compare(naive, images_for(naive, 32), 2)
    naive.train(), fused.train()
    seen: list[Tensor] = []
    for model in (naive, fused):
        model[1].net[1][0].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    report = {e.name: e for e in effdense.report(fused)}
    assert (report["1"].converted, report["1"].reason) == (True, "net.1.0 has hooks")
    assert_same(naive, fused, images_for(naive, 32), 1)
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
    fused = effdense.convert(copy.deepcopy(naive))
    for block in (naive, fused):
        block.net[1][1] = module
    changed = r"effdense.convert has (not )?compared"
    for again in (lambda: fused, lambda: effdense.convert(fused, memory="minimal")):
        assert re.search(changed, again().obstacle()) or isinstance(module, nn.Dropout)
    x = torch.randn(2, 6, 5, 5)
    for block in (naive.eval(), fused.eval()):
        assert torch.equal(block(x), naive(x))


@pytest.mark.parametrize("how", COPIES)
def test_copies_work(how: str) -> None:
    model = effdense.convert(randomised(structures.growing_net(0.2)), memory="minimal")
    other = copied(model, how)
    assert str(effdense.report(other)) == str(effdense.report(model))
    assert type(other[1]) is type(model[1])
    assert_same(model, other, images_for(model), 1)


def test_a_forward_looks_at_every_module_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = effdense.convert(structures.tutorial_net(0.0).double())
    seen: list[nn.Module] = []
    changed = structure.changed  # type: ignore[attr-defined]

    def count(name: str, module: nn.Module, *rest: bool) -> str | None:
        seen.append(module)
        return changed(name, module, *rest)

    monkeypatch.setattr(structure, "changed", count)
    model(images_for(model, 32))
    parts = {m for block in (model[3], model[5]) for m in list(block.modules())[1:]}
    assert len(seen) == len(set(seen)) and set(seen) >= parts


@fused_under_compile
@pytest.mark.parametrize("training", [True, False])
def test_a_foreign_block_is_compiled_whole(training: bool) -> None:
    block = effdense.convert(structures.NetBlock(2, 6, 4)).train(training)
    x = torch.randn(2, 6, 5, 5)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))


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
    fused = effdense.convert(copy.deepcopy(naive))
    for model in (naive, fused):
        for m in model.modules():
            if isinstance(m, structures.RateLayer):
                m.droprate = 0.4
    assert kinds(fused)["DenseBlock"] == 1
    assert_same(naive, fused, images_for(naive))


def test_a_dropout_in_evaluation_by_itself_counts() -> None:
    naive = randomised(structures.tutorial_net())
    fused = effdense.convert(copy.deepcopy(naive))
    for model in (naive, fused):
        model[3].layers[1].conv1.dropout.eval()
    assert_same(naive, fused, images_for(naive))


def test_revert_of_our_own_classes() -> None:
    from benchmarks import densenet

    naive = densenet.DenseNet(4, (2, 2), 6, num_classes=5).double()
    fused = effdense.revert(effdense.convert(copy.deepcopy(naive)))
    assert [type(m) for m in fused.modules()] == [type(m) for m in naive.modules()]
    assert all(
        vars(a).keys() == vars(b).keys() for a, b in zip(fused.modules(), naive.modules(), strict=True)
    )
    x = images_for(naive, 32)
    assert_same(naive, fused, x)
    built = effdense.nn.DenseBlock(2, 6, 2, 4, 0.0)
    assert type(effdense.revert(effdense.convert(built))) is effdense.nn.DenseBlock
    with pytest.raises(TypeError, match=r"revert: model must be a torch.nn.Module, got str"):
        effdense.revert("densenet121")


def test_a_reverted_model_can_be_scripted() -> None:
    model = effdense.revert(effdense.convert(structures.d2l_net()))
    x = torch.randn(2, 3, 16, 16)
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(x), model(x))
