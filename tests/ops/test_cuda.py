"""The GPUs that get CUDA kernels, the check before their first use, and the messages: without a GPU, with stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import dispatch, gpu_check, reference, self_test
from tests._cases import CONVOLUTIONS, channels_last
from tests._on_device import OnDevice

ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
HALF = next(number for number in self_test.NUMBERS["cuda"] if number.dtype == torch.float16)


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        (ARCHITECTURES, (8, 0), True),
        (ARCHITECTURES, (8, 7), True),  # 8.6's machine code
        (ARCHITECTURES, (10, 3), True),
        (ARCHITECTURES, (11, 0), False),
        (ARCHITECTURES, (12, 1), True),
        (ARCHITECTURES, (13, 0), True),  # PTX
        (ARCHITECTURES, (7, 5), True),
        (ARCHITECTURES, (7, 0), False),
        (["8.0"], (7, 5), False),
        (["7.5"], (8, 0), False),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        ([], (8, 0), False),
    ],
)
def test_what_is_built_for_one_card_runs_on_another(
    built: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert bool(gpu_check.runs_on(built, capability)) == runs


class Card:
    """A stand-in for card 0: what torch says of it, and operators that run there, perhaps wrong ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ops: Any) -> None:
        self.capability, self.capturing, self.checks, self.ops = (9, 0), False, 0, ops
        self.info: dict[str, Any] = {"cuda": "13.0", "arch_list": ARCHITECTURES}
        self.x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float16)
        patch = monkeypatch.setattr
        patch(gpu_check, "_usable", {})
        patch(gpu_check, "build_info", lambda: self.info)
        patch(torch.cuda, "get_device_capability", lambda index: self.capability)
        patch(torch.cuda, "get_device_name", lambda index: "Test Card")
        patch(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        run = gpu_check.check  # type: ignore[attr-defined]

        def checked(device: str, ops: Any, **options: Any) -> Any:
            assert device == "cuda:0"
            self.checks += 1
            return run("cpu", self.ops, [HALF], **options)  # in all numbers: below

        patch(gpu_check, "check", checked)
        patch(torch.cuda, "synchronize", lambda index: None)

    def operators(self) -> Any:
        return dispatch.operators(self.x)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, simt: Any) -> Card:
    return Card(monkeypatch, simt)


def test_the_kernels_are_checked_once_and_then_run(card: Card, recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(3):
        assert card.operators() is torch.ops.effdense
    assert card.checks == 1 and not recwarn.list


def test_a_card_on_which_they_are_wrong_gets_plain_pytorch(card: Card) -> None:
    def wrong(x: Tensor, *rest: Tensor) -> None:
        right.bn_relu(x, *rest)
        if x.dtype == torch.float16:
            rest[-1].mul_(1.01)

    right = card.ops
    every = {name: getattr(right, name) for name in self_test.OPERATORS if hasattr(right, name)}
    card.ops = SimpleNamespace(**{**every, "bn_relu": wrong})
    with pytest.warns(RuntimeWarning) as caught:
        assert card.operators() is reference
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("effdense runs on plain PyTorch on cuda:0 (")
    assert "its kernels are wrong on Test Card: bn_relu in float16. Please open an issue" in message
    assert "python -m effdense check --device cuda:0" in message and "EFFDENSE_SELF_CHECK=0" in message
    assert card.operators() is reference and card.checks == 1  # and says it once


def test_a_card_on_which_they_fail_gets_plain_pytorch(card: Card) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("bn_relu: failed for shape [2, 24, 9, 9]")

    card.ops = SimpleNamespace(bn_relu=fail)
    with pytest.warns(RuntimeWarning, match=r"its kernels fail on Test Card: bn_relu: failed for shape \[2"):
        assert card.operators() is reference


def test_a_full_card_is_not_a_wrong_one(card: Card) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    right, card.ops = card.ops, SimpleNamespace(bn_relu=fail)
    with pytest.raises(torch.OutOfMemoryError):
        card.operators()
    card.ops = right
    assert card.operators() is torch.ops.effdense


def test_who_fakes_tensors_does_not_disturb_the_check(card: Card) -> None:
    with torch._subclasses.FakeTensorMode():
        assert card.operators() is torch.ops.effdense
    assert card.checks == 1


def test_the_check_leaves_the_settings_alone(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by setting them back: a setting that follows another one would follow no longer."""

    def changed(self: Any, name: str, value: Any) -> None:
        raise AssertionError(f"{name} was set")

    monkeypatch.setattr(type(CONVOLUTIONS), "__setattr__", changed)
    assert card.operators() is torch.ops.effdense and card.checks == 1


def test_the_check_can_be_switched_off(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDENSE_SELF_CHECK", "0")
    assert card.operators() is torch.ops.effdense and card.checks == 0


def test_what_waits_for_a_result_is_not_captured(card: Card) -> None:
    card.capturing = True
    assert card.operators() is torch.ops.effdense and card.checks == 0
    card.capturing = False
    assert card.operators() is torch.ops.effdense and card.checks == 1


@pytest.mark.parametrize(
    "capability, reason",
    [
        ((7, 0), "compute capability 7.0, and effdense's kernels need 7.5 at least"),
        (
            (11, 0),
            "compute capability 11.0, and effdense's kernels were built for 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0+PTX "
            "(set TORCH_CUDA_ARCH_LIST when you build them)",
        ),
    ],
)
def test_a_card_without_kernels_gets_plain_pytorch(
    card: Card, capability: tuple[int, int], reason: str
) -> None:
    card.capability = capability
    with pytest.warns(RuntimeWarning) as caught:
        assert card.operators() is reference
    (message,) = [str(w.message) for w in caught]
    told = (
        "effdense runs on plain PyTorch on cuda:0 (same results, slower, more memory), because Test Card has "
    )
    assert message == told + reason and card.checks == 0


def test_turing_gets_kernels(card: Card) -> None:
    card.capability = (7, 5)
    assert card.operators() is torch.ops.effdense and card.checks == 1


def test_a_build_without_kernels_says_so(card: Card) -> None:
    card.info = {"cuda": None, "arch_list": []}
    with pytest.warns(RuntimeWarning, match="because effdense was built without its CUDA kernels"):
        assert card.operators() is reference


def test_torch_compile_asks_once(card: Card) -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1 if gpu_check.usable(0) else x

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1] and card.checks == 1


def test_the_whole_check_passes_on_the_cuda_kernels(simt: Any) -> None:
    results = self_test.check("cpu", simt, self_test.NUMBERS["cuda"])
    assert all(result.passed for result in results), [r for r in results if not r.passed]
    names = {n for n in self_test.OPERATORS if dispatch.has_kernel(torch.ops.effdense, n, "cuda")}
    names.remove("update_running_statistics")  # there it is plain PyTorch
    products = {"bottleneck", "bottleneck_backward"}
    assert {(r.operator, str(r.number)) for r in results} == {
        (name, str(n)) for name in names for n in self_test.NUMBERS["cuda"] if not n.tf32 or name in products
    }
    by = {(r.operator, str(r.number)): r.error for r in results}
    assert by["bottleneck", "tf32"] > 20 * by["bottleneck", "float32"]  # it is really another arithmetic


def test_a_launch_that_fails_names_operator_shape_and_kernel(simt: Any) -> None:
    x = torch.zeros(1, 4, 8 * 2**20, dtype=torch.float32)[:, :1].movedim(
        1, 2
    )  # more channels than a grid has tiles
    assert x.shape == (1, 8 * 2**20, 1)
    wanted = r"channel_statistics: failed for shape \[1, 8388608, 1\] of type Float: .*grid \(1,65536,1\)"
    with pytest.raises(RuntimeError, match=wanted):
        simt.channel_statistics([x])


# ---- The way of the operator tests to a GPU, with the CPU as its end


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_travel_in_their_storages(device: str) -> None:
    seen: dict[str, Any] = {}

    def operator(maps: list[Tensor], out: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        seen["maps"], seen["out"] = maps, out
        out.copy_(maps[0] * factor)
        return maps[0].sum(), out.movedim(1, -1).clone()

    buffer = channels_last(torch.randn(2, 7, 3, 4))
    before, x, out = buffer.clone(), buffer[:, :3], buffer[:, 4:]
    ops = OnDevice(SimpleNamespace(operator=operator), device)
    if device == "meta":  # nothing comes back from there
        with pytest.raises(NotImplementedError):
            ops.operator([x], out, factor=2.0)
    else:
        total, result = ops.operator([x], out, factor=2.0)
        assert torch.equal(buffer[:, :4], before[:, :4]) and torch.equal(out, before[:, :3] * 2)
        assert total == before[:, :3].sum() and torch.equal(result.movedim(-1, 1), out)
    there = seen["maps"][0]
    assert there.device.type == device and there.stride() == x.stride()
    assert there.untyped_storage()._cdata != x.untyped_storage()._cdata
    assert there.untyped_storage()._cdata == seen["out"].untyped_storage()._cdata
