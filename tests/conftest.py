"""Fixtures of all tests: the operator backends, and the certainty that compiled code is what runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import effdense
from effdense import reference
from tests.cases import BACKENDS


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    assert effdense.build_info()["compiled"], effdense.build_info()["reason"]


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Any:
    """Every backend, to be compared with the twin."""
    return BACKENDS[request.param]


@pytest.fixture(params=[*BACKENDS, "reference"])
def any_ops(request: pytest.FixtureRequest) -> Any:
    """Every backend and the twin itself, to be compared with something else."""
    return BACKENDS.get(request.param, reference)


@pytest.fixture(autouse=True)
def _same_everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed; two threads where operators are tested, one elsewhere: whole models of small tensors only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if {"ops", "any_ops"} & set(request.fixturenames) else 1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
