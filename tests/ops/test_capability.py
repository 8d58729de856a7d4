"""The instruction set that runs is the one that was asked for, and `pytest -m isa` has all that depends on it.

env $(python -m benchmarks.isa default) pytest -m isa
"""

from __future__ import annotations

import inspect
import os
import types
from typing import Any

import pytest
import torch

import effdense
from tests import _selection as selection
from tests.conversion import test_convert
from tests.ops import test_conv3x3
from tests.tools import test_plan
from tests.train import test_train


def test_the_instruction_set_is_the_one_asked_for() -> None:
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    if wanted is None:
        pytest.skip("ATEN_CPU_CAPABILITY asks for none")
    assert torch.backends.cpu.get_cpu_capability().lower() == wanted
    assert effdense.build_info()["cpu_capability"].lower() == wanted


def chosen(function: Any, module: types.ModuleType, **parameters: str) -> bool:
    """Whether a test function of a module, with these fixtures, is run on other instruction sets."""
    names = [*inspect.signature(function).parameters, *parameters]
    item = types.SimpleNamespace(function=function, module=module, fixturenames=names)
    if parameters:
        item.callspec = types.SimpleNamespace(params=parameters)
    return selection.asks_of_the_instruction_set(item)


def a_test() -> None:
    """Of a new operator."""


def calls_opcheck() -> None:
    torch.library.opcheck(None, ())


def test_a_new_operators_tests_are_chosen() -> None:
    """On effdense's CPU kernels, wherever they stand; not what says nothing of them."""
    for module in (test_conv3x3, test_train, types.ModuleType("new")):
        for fixture in selection.OPERATOR_FIXTURES:
            assert chosen(a_test, module, **{fixture: "cpu"})
            assert not any(
                chosen(a_test, module, **{fixture: name}) for name in ("simt", "reference", "cuda")
            )
        assert not chosen(calls_opcheck, module, ops="cpu")
        assert not chosen(lambda simt: None, module)


def test_what_is_about_blocks_and_models_is_chosen() -> None:
    assert chosen(a_test, test_convert) and chosen(a_test, types.ModuleType("new"))
    assert not chosen(a_test, test_train) and not chosen(a_test, test_plan)  # of programs


def test_the_marker_is_set(request: pytest.FixtureRequest) -> None:
    assert all(
        (item.get_closest_marker("isa") is not None) == selection.asks_of_the_instruction_set(item)
        for item in request.session.items
    )
