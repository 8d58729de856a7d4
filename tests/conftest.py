"""Fixtures of all tests: the operator backends, and the certainty that compiled code is what runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import effdense
from effdense import reference
from tests.cases import BACKENDS
from tests.simt.compiler import compile_operators, cuda_include


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    assert effdense.build_info()["compiled"], effdense.build_info()["reason"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = getattr(metafunc.module, "BACKENDS", BACKENDS)
    for name, every in (("ops", backends), ("any_ops", [*backends, "reference"])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, every, indirect=True)


@pytest.fixture(scope="session")
def simt() -> Any:
    """The CUDA operators on the CPU, compiled by the first test that wants them."""
    if cuda_include() is None:
        pytest.skip("needs the CUDA toolkit's headers")
    torch.ops.load_library(str(compile_operators()))
    return torch.ops.effdense_simt


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Any:
    """Every backend, to be compared with the twin."""
    return request.getfixturevalue("simt") if request.param == "simt" else BACKENDS[request.param]


@pytest.fixture
def any_ops(request: pytest.FixtureRequest) -> Any:
    """Every backend and the twin itself, to be compared with something else."""
    if request.param == "simt":
        return request.getfixturevalue("simt")
    return BACKENDS.get(request.param, reference)


@pytest.fixture(autouse=True)
def _same_everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed. Where operators are tested: two threads, and float32 without TF32, PyTorch's default for
    convolutions. Elsewhere one thread: whole models of small tensors only wait."""
    operators = bool({"ops", "any_ops", "simt"} & set(request.fixturenames))
    convolutions = torch.backends.cudnn.conv
    threads, precision = torch.get_num_threads(), convolutions.fp32_precision
    torch.set_num_threads(2 if operators else 1)
    if operators:
        convolutions.fp32_precision = "ieee"
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    convolutions.fp32_precision = precision
