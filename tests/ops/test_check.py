"""`python -m effdense check`: it passes here, fails where an operator is wrong, and says so for a missing device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from effdense import cli
from effdense.ops import dispatch, reference, schemas, self_test


@pytest.mark.core
def test_everything_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert f"{len(self_test.OPERATORS) * len(self_test.NUMBERS['cpu'])} passed, 0 failed" in out
    assert "compiled operators on cpu" in out


SCHEMAS = Path(__file__).parents[2] / "csrc" / "schemas.h"


def defined_in(text: str) -> set[str]:
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', text))


@pytest.mark.core
def test_every_operator_is_checked() -> None:
    registered = defined_in(SCHEMAS.read_text())
    # Of those that are written in Python, the ones with a twin.
    registered |= {s.partition("(")[0] for s in schemas.SCHEMAS if hasattr(reference, s.partition("(")[0])}
    assert all(hasattr(torch.ops.effdense, name) for name in registered)
    assert set(self_test.OPERATORS) == registered
    assert all(hasattr(reference, name) for name in registered)


def test_the_dispatcher_knows_what_only_the_cpu_has() -> None:
    _, marker, of_cpu = SCHEMAS.read_text().partition("define_cpu_operators")
    ops = torch.ops.effdense
    not_on_cuda = {name for name in self_test.OPERATORS if not dispatch.has_kernel(ops, name, "cuda")}
    assert marker and defined_in(of_cpu) == not_on_cuda
    assert all(
        dispatch.has_kernel(ops, name, kind) for name in self_test.OPERATORS for kind in ("cpu", "meta")
    )
    assert not dispatch.has_kernel(ops, "no_such_operator", "cpu")


def test_what_takes_an_operators_place_does_so_until_it_is_left() -> None:
    x, before = torch.empty(1), dispatch.operators(torch.empty(1))
    with dispatch.override("cpu", SimpleNamespace(), (torch.float32,)):
        assert dispatch.operators(x) is not before and dispatch.operators(x.double()) is reference
        with dispatch.override("meta", before, (torch.float32,)):
            assert dispatch.operators(x.to("meta")) is before
    assert dispatch.operators(x) is before and dispatch.operators(x.to("meta")) is reference


def test_a_wrong_operator_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(features: list[Tensor]) -> tuple[Tensor, Tensor]:
        mean, var = reference.channel_statistics(features)
        return mean.roll(1), var

    every = {name: getattr(torch.ops.effdense, name) for name in self_test.OPERATORS}
    ops = SimpleNamespace(**{**every, "channel_statistics": wrong})
    monkeypatch.setattr(cli, "operators", lambda x: ops)
    assert cli.main(["check"]) == 1
    assert "3 failed" in capsys.readouterr().out


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", "cuda:7"]) == 2
    assert "device 'cuda:7' cannot be used here" in capsys.readouterr().err


@pytest.mark.core
@pytest.mark.parametrize("force", ["0", "1"])
def test_the_twin_can_be_forced(force: str) -> None:
    code = "import effdense; print(effdense.build_info()['implementation'])"
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "EFFDENSE_FORCE_REFERENCE": force}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ("fallback" if force == "1" else "compiled")
    assert not run.stderr
