"""Fixtures of all tests: the operator backends, and the certainty that compiled code is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effdense
from tests.cases import BACKENDS


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    assert effdense.build_info()["compiled"], effdense.build_info()["reason"]


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
