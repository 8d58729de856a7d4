"""The planner against counted bytes, its command, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effdense
from benchmarks import models, structures
from benchmarks.measure import peak_bytes
from effdense import cli, values
from effdense.models import names
from effdense.ops import dispatch, reference
from effdense.tools import planner, timeline

MIB = 2**20


def measured(model: nn.Module, x: torch.Tensor) -> int:
    """Peak of one training step above the model and its gradients, with an empty workspace."""
    target = torch.arange(len(x)) % 10
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step = lambda: F.cross_entropy(model(x), target).backward()  # noqa: E731
    step()  # whatever is allocated once
    effdense.empty_cache()
    return peak_bytes(step)


def build(name: str, impl: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, impl).model


def drop(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.2  # type: ignore[assignment]


def norms_in_evaluation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def frozen(model: nn.Module) -> None:
    """Only the last block and the head learn."""
    model.requires_grad_(False)
    model.features[-2].requires_grad_()
    model.classifier.requires_grad_()


def hooked(model: nn.Module) -> None:
    """A layer with a hook, so that its block runs layer by layer."""
    model.features.denseblock2.denselayer2.norm2.register_forward_hook(lambda *_: None)


CONFIGURATIONS = [  # model, batch, image size, what is changed
    ("densenet_bc_40_12", 16, 32, None),
    ("densenet_bc_64_12", 8, 33, None),
    ("densenet_bc_100_12", 8, 32, None),
    ("densenet_bc_40_24", 9, 32, None),
    ("densenet121", 8, 64, None),
    ("densenet121", 4, 97, None),
    ("densenet_40_12", 8, 32, None),
    ("densenet_22_24", 16, 31, None),
    ("densenet_d2l", 16, 96, None),
    ("densenet_bc_40_12", 16, 32, drop),
    ("densenet_bc_40_12", 16, 32, norms_in_evaluation),
    ("densenet_bc_40_12", 16, 32, frozen),
    ("densenet_bc_40_12", 16, 32, hooked),
]


CASES = [  # plain layers have no bottlenecks to keep
    (*configuration, mode)
    for configuration in CONFIGURATIONS
    for mode in ("balanced", "minimal")
    if mode == "balanced" or configuration[0].startswith(("densenet1", "densenet_bc"))
]


@pytest.mark.parametrize("name, batch, size, change, mode", CASES)
def test_the_plan_is_within_5_percent_of_counted_bytes(
    name: str, batch: int, size: int, change: Callable[[nn.Module], None] | None, mode: str
) -> None:
    model = build(name, f"effdense-{mode}")
    if change is not None:
        change(model)
    x = torch.randn(batch, 1 if name == "densenet_d2l" else 3, size, size)
    plan = effdense.plan(model, x.shape, memory=mode)
    expected = measured(model, x)
    assert expected > 10 * MIB or change is frozen
    assert abs(plan.total / expected - 1) < 0.05, f"{plan}\nmeasured: {expected / MIB:.1f} MiB"


@pytest.mark.parametrize("mode", ["naive", "checkpoint"])
@pytest.mark.parametrize("name, batch, size", [("densenet_bc_40_12", 16, 32), ("densenet_bc_22_24", 16, 33)])
def test_so_is_that_of_the_others(name: str, batch: int, size: int, mode: str) -> None:
    model, x = build(name, mode), torch.randn(batch, 3, size, size)
    plan = effdense.plan(model, x.shape, memory=mode)
    assert plan.total == pytest.approx(measured(model, x), rel=0.05), str(plan)
    converted = build(name, "effdense-balanced")
    assert effdense.plan(converted, x.shape, memory=mode).total == plan.total


@pytest.mark.parametrize("mode", ["naive", "balanced", "minimal"])
def test_so_is_that_of_other_libraries_blocks(mode: str) -> None:
    model, x = structures.StarNet(0.0, False, 24, (3, 3, 3), 48, 4, 10), torch.randn(16, 3, 32, 32)
    plan = effdense.plan(model, x.shape, memory=mode)
    with pytest.raises(ValueError, match='memory="checkpoint" is not known of StarBlock, only of blocks'):
        effdense.plan(model, x.shape, memory="checkpoint")
    model = model if mode == "naive" else effdense.convert(model, memory=mode)
    assert plan.total == pytest.approx(measured(model, x), rel=0.05), str(plan)


def in_inference(name: str, batch: int, size: int, mode: str) -> tuple[planner.Plan, int]:
    """The plan of a forward, and its counted bytes."""
    impl = "naive" if mode == "naive" else "effdense-balanced"
    model, x = build(name, impl).eval(), torch.randn(batch, 1 if name == "densenet_d2l" else 3, size, size)
    plan = effdense.plan(model, x.shape, memory=mode, training=False)
    assert plan.gradients == plan.optimizer == 0 and plan.everything == plan.total + plan.parameters
    found = planner.largest_batch(
        model, x.shape, plan.everything, memory=mode, training=False, most=2 * batch
    )
    assert found == batch
    with torch.no_grad():
        model(x)
        effdense.empty_cache()
        return plan, peak_bytes(lambda: model(x))


@pytest.mark.parametrize(
    "name, batch, size", [("densenet_bc_40_12", 16, 32), ("densenet121", 2, 160), ("densenet_d2l", 16, 96)]
)
def test_so_is_that_of_inference(name: str, batch: int, size: int) -> None:
    plan, expected = in_inference(name, batch, size, "balanced")
    assert plan.total == pytest.approx(expected, rel=0.05), f"{plan}\nmeasured: {expected / MIB:.1f} MiB"


class WithCopies(timeline.OneByOne):
    """Counts what oneDNN takes at most while it convolves, too: image, weight and result once more, in layouts of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            self._note(sum(t.untyped_storage().nbytes() for t in (*args[:2], made)))
        return made


@pytest.mark.parametrize("name, batch, size", [("densenet_bc_40_12", 16, 32), ("densenet121", 1, 96)])
def test_plain_pytorchs_inference_takes_onednns_copies_besides(
    name: str, batch: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan counts PyTorch's tensors. Of the copies oneDNN makes what the processor and the layout ask for: none to all."""
    plan, expected = in_inference(name, batch, size, "naive")
    monkeypatch.setattr(planner, "OneByOne", WithCopies)
    most = effdense.plan(build(name, "naive"), plan.input_shape, memory="naive", training=False)
    assert 0.95 * plan.total < expected < 1.05 * most.total, f"{plan}\nmeasured: {expected / MIB:.1f} MiB"


def test_the_numbers_of_a_plan_add_up() -> None:
    model, shape = build("densenet_bc_22_12", "naive"), (16, 3, 32, 32)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    for mode in planner.MEMORY:
        plan = effdense.plan(model, shape, memory=mode)
        assert sum(plan.breakdown.values()) == plan.total
        assert (plan.parameters, plan.gradients, plan.optimizer) == (
            parameters + buffers,
            parameters,
            parameters,
        )
        assert plan.everything == plan.total + 3 * parameters + buffers
        assert f"{plan.total / MIB:.1f} MiB" in str(plan)
    balanced, minimal = (effdense.plan(model, shape, memory=m).breakdown for m in ("balanced", "minimal"))
    assert balanced["bottlenecks"] > 0 == minimal["bottlenecks"]
    assert 0 < balanced["features"] == minimal["features"]


def test_half_the_width_is_half_the_maps() -> None:
    model = build("densenet_bc_40_12", "naive")
    single = effdense.plan(model, (16, 3, 32, 32)).total
    half = effdense.plan(model.bfloat16(), (16, 3, 32, 32)).total
    assert half == pytest.approx(single / 2, rel=0.1)


def test_the_model_is_not_touched() -> None:
    model, calls = build("densenet_bc_22_12", "naive"), []
    model.features.norm5.register_forward_hook(lambda *_: calls.append(1))
    model.features.norm5.momentum = None  # the average over all batches
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    classes, random = [type(m) for m in model.modules()], torch.get_rng_state()
    for mode in planner.MEMORY:
        effdense.plan(model, (2, 3, 16, 16), memory=mode)
    assert not calls and classes == [type(m) for m in model.modules()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1]) and tensor.grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert dispatch.implementation("meta") == (reference, ())


@pytest.mark.core
def test_nothing_is_allocated() -> None:
    model = build("densenet_bc_40_12", "effdense-balanced")
    effdense.plan(model, (1000, 3, 32, 32))  # imports
    assert peak_bytes(lambda: effdense.plan(model, (1000, 3, 32, 32))) < MIB


@pytest.mark.parametrize("mode", planner.MEMORY)
def test_a_plan_leaves_nothing_for_the_next(mode: str) -> None:
    """One prepared copy, walked through for several batches, as largest_batch does."""
    model = build("densenet_bc_22_12", "naive")
    prepared = planner.Planner(model)
    for batch in (8, 1, 64):
        shape = (batch, 3, 32, 32)
        found = prepared.plan(shape, mode)
        assert found == effdense.plan(model, shape, memory=mode) == prepared._walk(shape, mode)


def test_the_largest_batch_is_the_largest() -> None:
    model, budget = build("densenet_bc_22_12", "naive"), 40 * MIB
    batch = planner.largest_batch(model, (64, 3, 32, 32), budget)
    assert batch > 8
    assert effdense.plan(model, (batch, 3, 32, 32)).everything <= budget
    assert effdense.plan(model, (batch + 1, 3, 32, 32)).everything > budget
    assert planner.largest_batch(model, (1, 3, 32, 32), budget) == batch
    assert planner.largest_batch(model, (64, 3, 32, 32), MIB) == 0


class _Foreign(nn.Sequential):
    pass


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("densenet", (2, 3, 16, 16), "balanced"), TypeError, "model must be a torch.nn.Module, got str"),
        (
            (None, (2, 3), "balanced"),
            ValueError,
            "input_shape must be batch, channels and one to three sizes",
        ),
        ((None, 64, "balanced"), ValueError, "got 64"),
        ((None, (0, 3, 16, 16), "balanced"), ValueError, "all positive"),
        ((None, (2, 3, 16, 16.0), "balanced"), ValueError, "16.0"),
        (
            (None, (2, 4, 16, 16), "balanced"),
            ValueError,
            r"does not run on an input of shape \(2, 4, 16, 16\)",
        ),
        ((None, (2, 3, 16, 16), "small"), ValueError, "'minimal', got 'small'"),
        ((_Foreign(nn.Conv2d(3, 4, 1)), (2, 3, 16, 16), "naive"), ValueError, "effdense.report"),
    ],
)
def test_mistakes_are_named(arguments: tuple[Any, Any, str], error: type[Exception], message: str) -> None:
    model, shape, mode = arguments
    model = build("densenet_bc_22_12", "naive") if model is None else model
    with pytest.raises(error, match=message):
        effdense.plan(model, shape, memory=mode)


@pytest.mark.parametrize("name", ["densenet_bc_40_12", "densenet_40_12", "densenet_d2l", "densenet121"])
def test_the_commands_models_are_the_benchmarks(name: str) -> None:
    mine, theirs = effdense.models.build(name), build(name, "naive")
    assert {n: t.shape for n, t in mine.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }


@pytest.mark.core
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "densenet_bc_22_12", "--image-size", "32", "--batch", "8"]
    assert cli.main([*command, "--budget", "100 MiB"]) == 0
    out = capsys.readouterr().out
    assert all(mode in out for mode in planner.MEMORY)
    plan = effdense.plan(build("densenet_bc_22_12", "naive"), (8, 3, 32, 32))
    row = next(line.split() for line in out.splitlines() if line.startswith("balanced"))
    assert row[1] == f"{plan.total / MIB:.1f}"
    assert "Largest batch within 100 MiB" in out


def test_the_command_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal, where nothing is left of it; a large net takes seconds."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    command = ["plan", "--model", "densenet_bc_22_12", "--image-size", "32", "--batch", "8"]
    assert cli.main([*command, "--budget", "1GiB"]) == 0
    said = [line for line in capsys.readouterr().err.split("\r\x1b[K") if line]
    plans = [f"planning {mode} …" for mode in planner.MEMORY]
    searches = [f"looking for the largest batch with {mode} …" for mode in planner.MEMORY]
    assert said == ["building densenet_bc_22_12 …", *plans, *searches]


def test_command_on_another_librarys_net(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "without_memory", lambda _: structures.StarNet())
    command = ["plan", "--model", "timm:densenet", "--image-size", "32", "--batch", "8", "--budget", "1GiB"]
    assert cli.main(command) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert [word for word in first if word in planner.MEMORY] == ["naive", "balanced", "minimal"] * 2


@pytest.mark.parametrize(
    "changed, message",
    [
        (("--model", "resnet50"), "unknown model 'resnet50'"),
        (("--model", "densenet_bc_41_12"), "depth must be 6 n + 4"),
        (("--model", "densenet_bc_1000000000_12"), "would have 499999998 layers with 4.4e+19 parameters"),
        (("--model", "densenet_100_1000000000"), "a name stands for at most 3000 layers with 1e+09"),
    ],
)
def test_command_says_what_is_wrong(
    changed: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", "densenet_bc_22_12", "--image-size", "32", "--batch", "8"]
    assert cli.main([*command, *changed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("effdense plan: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, size",
    [
        *(("8GiB", 8 * 2**30), ("1.5 GB", 1500000000), ("4096", 4096), ("1MiB", MIB), ("8e9", 8 * 10**9)),
        *(("2gib", 2**31), ("500 mb", 5 * 10**8), ("3K", 3000), ("7 B", 7), ("1024TiB", 2**50)),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert values.size(text) == size


@pytest.mark.parametrize(
    "text",
    ["much", "8 apples", "-1GiB", "", "0", "0.5", "1e400", "1e18", "1025 TiB", "0x10", "8GiBs", "nan", "inf"],
)
def test_a_wrong_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--model", "densenet121", "--image-size", "8", "--batch", "1", f"--budget={text}"])
    assert stop.value.code == 2 and "8GiB" in capsys.readouterr().err


def test_nothing_is_downloaded_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector of torchvision's fetches its backbone's weights, unless it is told not to."""

    def detector(*, weights: Any = None, weights_backbone: Any = "DEFAULT") -> nn.Module:
        assert weights is None and weights_backbone is None
        return nn.Conv2d(3, 4, 1)

    def classifier(*, weights: Any = None) -> nn.Module:
        return nn.Conv2d(3, 5, 1)

    builders = {"detector": detector, "classifier": classifier}

    def get_model_builder(name: str) -> Any:
        if name not in builders:
            raise ValueError(f"Unknown model {name}")
        return builders[name]

    fake = SimpleNamespace(
        get_model=lambda name, **options: get_model_builder(name)(**options),
        get_model_builder=get_model_builder,
    )
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    assert effdense.models.build("torchvision:detector").out_channels == 4
    assert effdense.models.build("torchvision:classifier").out_channels == 5
    with pytest.raises(ValueError, match="torchvision says: Unknown model other"):
        effdense.models.build("torchvision:other")
