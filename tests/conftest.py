"""Fixtures of all tests: the operator backends, and the certainty that compiled code is what runs.

With EFFDENSE_FORCE_REFERENCE=1 it is plain PyTorch, and what is run is blocks and whole models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense.ops import dispatch, reference
from harness.simt.compiler import compile_operators, cuda_include
from tests._cases import BACKENDS
from tests._on_device import OnDevice
from tests._selection import asks_for_libraries, asks_of_the_instruction_set

# For what this process starts, pytest-xdist's workers above all: threads that wait leave the processor to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
SIMT = ("simt", "simt75")  # backends that run CUDA kernels on the CPU
FALLBACK = effdense.build_info()["reason"] == "EFFDENSE_FORCE_REFERENCE is set"
WITHOUT_THE_EXTENSION = [
    "convert",
    "dense_block",
    "model",
    "models_forward",
    "norms",
    "stage_autograd",
    "structures",
]

# Nothing of it can run without.
collect_ignore = [] if torch.cuda.is_available() else ["test_gpu.py"]
if FALLBACK:
    kept = {f"test_{name}.py" for name in WITHOUT_THE_EXTENSION}
    collect_ignore += [
        str(file) for file in Path(__file__).parent.rglob("test_*.py") if file.name not in kept
    ]


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    assert FALLBACK or effdense.build_info()["compiled"], effdense.build_info()["reason"]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for item in filter(asks_of_the_instruction_set, items):
        item.add_marker("isa")
    for item in items:
        if asks_for_libraries(item.path):
            item.add_marker("libraries")
    without = [item for item in items if FALLBACK and item.get_closest_marker("compiled")]
    for mark in {"ptx", "sanitizers"} - {config.option.markexpr}:
        without += [item for item in items if item.get_closest_marker(mark)]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session", autouse=True)
def _autograd_has_run() -> None:
    """Which tests a process gets first is chance; if opcheck's are, autograd refuses to run after a fork ever after."""
    torch.zeros((), requires_grad=True).backward()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: not run with EFFDENSE_FORCE_REFERENCE=1")
    config.addinivalue_line(
        "markers", "core: a short selection to run beside the oldest and the newest torch, with -k 'not simt'"
    )
    config.addinivalue_line("markers", "gpu: what a GPU's owner runs to verify the card: pytest -m gpu")
    config.addinivalue_line(
        "markers", "tools: builds, benchmarks and `make gpu`, which are not run again beside another torch"
    )
    config.addinivalue_line(
        "markers", "ptx: nvcc's PTX interpreted; compiles for minutes, so run by `pytest -m ptx` alone"
    )
    config.addinivalue_line(
        "markers",
        "sanitizers: the CPU operators under sanitizers; run by `pytest -m sanitizers` alone, as ptx",
    )
    config.addinivalue_line(
        "markers", "isa: what depends on the instruction set (derived, tests/_selection.py)"
    )
    config.addinivalue_line(
        "markers", "libraries: files with tests that need the extras' libraries (derived, as isa)"
    )
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: torch finds no GPU here (torch.cuda.is_available() is False)")


def _with_gpu(backends: Collection[str]) -> list[Any]:
    """And the GPU, where there is one, for what there are CUDA kernels for."""
    if FALLBACK:
        return ["fallback"]
    if "simt" in backends and torch.cuda.is_available():
        return [*backends, pytest.param("cuda", marks=pytest.mark.gpu)]
    return list(backends)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = getattr(metafunc.module, "BACKENDS", BACKENDS)
    for name, every in (
        ("ops", _with_gpu(backends)),
        ("any_ops", [*_with_gpu(backends), "reference"]),
        ("runs_on", _with_gpu(backends)),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, every, indirect=True)


def _load_simt(architecture: int) -> None:
    if cuda_include() is None:
        pytest.skip("needs the CUDA toolkit's headers")
    torch.ops.load_library(str(compile_operators(architecture)))


@pytest.fixture(scope="session")
def simt() -> Any:
    """The CUDA operators on the CPU, compiled by the first test that wants them."""
    _load_simt(800)
    return torch.ops.effdense_simt


@pytest.fixture(scope="session")
def simt75() -> Any:
    """As `simt`, with the code for compute capability 7.5."""
    _load_simt(750)
    return torch.ops.effdense_simt75


def _namespace(request: pytest.FixtureRequest) -> Any:
    if request.param in SIMT:
        return request.getfixturevalue(request.param)
    if request.param == "cuda":
        return OnDevice(torch.ops.effdense, "cuda")
    return BACKENDS.get(request.param, reference)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Any:
    """Every backend, to be compared with the twin."""
    return _namespace(request)


@pytest.fixture
def any_ops(request: pytest.FixtureRequest) -> Any:
    """Every backend and the twin itself, to be compared with something else."""
    return _namespace(request)


@pytest.fixture
def runs_on(request: pytest.FixtureRequest) -> Iterator[str]:
    """What effdense runs on in a test: its CPU kernels, its CUDA kernels on the CPU, a GPU (where tensors are then made), or none."""
    within = contextlib.ExitStack()
    if request.param in SIMT:
        dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        within.enter_context(dispatch.override("cpu", request.getfixturevalue(request.param), dtypes))
    with within, torch.device("cuda" if request.param == "cuda" else "cpu"):
        yield request.param


@pytest.fixture(autouse=True)
def _same_everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed, no TF32; two threads where operators are tested, one elsewhere: whole models of small tensors only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if {"ops", "any_ops"} & set(request.fixturenames) else 1)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # which CUDA kernels heed, wherever they run
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(before)
