"""The harness that runs CUDA kernels on the CPU: clean kernels pass, and every kind of planted bug is caught."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from harness.simt.compiler import ROOT, SAMPLES, compile_for_gpu, compile_samples, cuda_include

ORDERS = ["fwd", "rev", "20240229"]
# The reports of ThreadSanitizer and AddressSanitizer end the process.
SANITIZER_OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}

pytestmark = pytest.mark.skipif(cuda_include() is None, reason="needs the CUDA toolkit's headers")

# What runs -> the largest error allowed, relative to 1 + the result: the rounding of the result's type, or of its sums.
CLEAN = {
    "gemm 70 65 37": 1e-6,
    "gemm 64 64 256": 1e-5,
    "half 70 65 37 plain": 2.0**-11,
    "half 70 65 37 by_depth": 2.0**-11,
    "half 7 12 300 plain": 2.0**-11,
    "bfloat16 130 40 100 plain": 2.0**-8,
    "bfloat16 1 1 1 by_depth": 2.0**-8,
    "tf32 3 24": 1e-6,
    "primitives": 0,
    "row_sums 7 100": 1e-15,
    "reverse dynamic 64 50": 0,
    "reverse static 64 64": 0,
    "reverse static 64 31": 0,
}

Result = tuple[int, str]  # exit status, and what was printed


@pytest.fixture(scope="session")
def library() -> Callable[[str], Result]:
    """Runs a sample inside of this process, as a torch extension would."""
    loaded = ctypes.CDLL(str(compile_samples("library", "-shared")))

    def run(sample: str) -> Result:
        words = [word.encode() for word in sample.split()]
        text = ctypes.create_string_buffer(4096)
        status = loaded.run_sample(len(words), (ctypes.c_char_p * len(words))(*words), text, len(text))
        return status, text.value.decode()

    return run


@pytest.fixture(params=["ucontext", "address", "thread"])
def variant(request: pytest.FixtureRequest) -> Callable[[str], Result]:
    return executable(request.param)


def executable(name: str) -> Callable[[str], Result]:
    flags = ["-DSIMT_UCONTEXT"] if name == "ucontext" else [f"-fsanitize={name}", "-g1"]
    program = compile_samples(name, "-O1", *flags)

    def run(sample: str) -> Result:
        environment = {**os.environ, **SANITIZER_OPTIONS}
        done = subprocess.run(
            [program, *sample.split()], capture_output=True, text=True, env=environment, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SIMT_ORDER", request.param)
    return request.param


def succeed(result: Result) -> dict[str, Any]:
    status, text = result
    assert status == 0, text
    return json.loads(text)


@pytest.mark.parametrize("sample", CLEAN)
def test_a_clean_kernel_passes(library: Callable[[str], Result], order: str, sample: str) -> None:
    assert succeed(library(sample))["error"] <= CLEAN[sample]


@pytest.mark.parametrize("sample", CLEAN)
def test_a_clean_kernel_passes_on_other_stacks_and_under_sanitizers(
    variant: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    for name in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", name)
        assert succeed(variant(sample))["error"] <= CLEAN[sample]


# ---- What the scheduler knows to be wrong: an error with file, line, kernel, block and thread.

ERRORS = {
    "divergent_barrier": "__syncthreads is divergent: thread (",
    "skipped_barrier": "threads",
    "mismatched_mask": "__shfl_xor_sync",
    "mask_without_caller": "the mask 0x0000ffff lacks the calling lane",
    "shuffle_from_outside_the_mask": "which is not in the mask 0x",
    "shuffle_with_exited_lane": "__shfl_xor_sync",
    "different_operations": "of its warp wait at",
    "deadlock": "and no thread can run",
    "misaligned_load": "is not a multiple of 16",
    "ldmatrix_of_global_memory": "are not in shared memory",
    "blocks_store_to_one_place watched": "byte 24 of y, which another block has stored to",
    "blocks_read_each_other watched": "of y, which another block has",
}


def lines_of(kernel: str) -> range:
    """The lines of a planted bug's kernel."""
    lines = (SAMPLES / "bugs.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if f"void {kernel}(" in line)
    return range(first, lines.index("}", first) + 1)


@pytest.mark.parametrize("bug", ERRORS)
def test_a_misuse_is_an_error_that_names_the_place(
    library: Callable[[str], Result], order: str, bug: str
) -> None:
    status, message = library(f"bug {bug}")
    assert status == 2
    assert ERRORS[bug] in message
    place, kernel, block = message.removeprefix("simt: ").split(": ")[:3]
    file, line = place.rsplit(":", 1)
    name = bug.split()[0]
    assert (ROOT / file).samefile(SAMPLES / "bugs.cu") and int(line) in lines_of(name)
    assert f"{name}(" in kernel
    assert block.startswith("block (") and "thread (" in block
    # The launch was given up in the middle; the next one is as good as ever.
    assert succeed(library("reverse static 64 50"))["error"] == 0


@pytest.mark.parametrize("bug", ["divergent_barrier", "shuffle_with_exited_lane", "deadlock"])
def test_errors_leave_every_kind_of_stack(variant: Callable[[str], Result], bug: str) -> None:
    status, message = variant(f"bug {bug}")
    assert status == 2 and ERRORS[bug] in message, message


def test_a_launch_that_the_device_would_refuse_is_an_error(library: Callable[[str], Result]) -> None:
    status, message = library("gemm 0 64 64")
    assert status == 2 and "invalid configuration: grid (0,1,1)" in message


def test_an_unknown_order_is_an_error(
    library: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMT_ORDER", "backwards")
    status, message = library("primitives")
    assert status == 2 and "SIMT_ORDER must be fwd, rev or a seed, got backwards" in message


# ---- What shows in the data, in every order: nobody wrote it, or it has not arrived.


@pytest.mark.parametrize(
    "bug, count",
    [
        ("unwritten_dynamic_shared", 1),
        ("unwritten_static_shared", 64),  # what an earlier block wrote is gone
        ("missing_wait", 64),
        ("missing_barrier", 32),
    ],
)
def test_what_was_not_written_or_waited_for_is_nan(
    library: Callable[[str], Result], order: str, bug: str, count: int
) -> None:
    assert succeed(library(f"bug {bug}"))["nan"] == count


@pytest.mark.parametrize("plant", ["no_wait", "early_copy"])
def test_a_broken_pipeline_gives_wrong_data(library: Callable[[str], Result], order: str, plant: str) -> None:
    assert succeed(library(f"half 70 65 300 {plant}"))["error"] > 1


# ---- What needs a sanitizer.


@pytest.mark.parametrize(
    "bug, report",
    [
        ("load_out_of_bounds", "READ of size 4"),
        ("copy_out_of_bounds", "READ of size 4"),
        ("store_out_of_bounds", "WRITE of size 4"),
        ("dynamic_shared_out_of_bounds", "WRITE of size 4"),
        ("static_shared_out_of_bounds", "WRITE of size 4"),
    ],
)
def test_address_sanitizer_finds_accesses_out_of_bounds(order: str, bug: str, report: str) -> None:
    status, message = executable("address")(f"bug {bug}")
    assert status not in (0, 2) and "AddressSanitizer" in message and report in message
    assert any(f"bugs.cu:{line}" in message for line in lines_of(bug)), message


@pytest.mark.parametrize("bug", ["missing_barrier", "missing_barrier_that_works", "missing_syncwarp"])
def test_thread_sanitizer_finds_missing_barriers(order: str, bug: str) -> None:
    status, message = executable("thread")(f"bug {bug}")
    assert status not in (0, 2) and "ThreadSanitizer: data race" in message
    assert any(f"bugs.cu:{line}" in message for line in lines_of(bug)), message


def test_thread_sanitizer_finds_a_copy_into_a_stage_that_is_read(order: str) -> None:
    status, message = executable("thread")("half 70 65 300 early_copy")
    assert status not in (0, 2) and "ThreadSanitizer: data race" in message and "cp_async" in message


# ---- Counters


@pytest.mark.parametrize("rows, columns, depth", [(70, 65, 37), (64, 64, 32), (1, 200, 300)])
def test_global_traffic_is_counted_exactly(
    library: Callable[[str], Result], order: str, rows: int, columns: int, depth: int
) -> None:
    """Copies of 16 bytes, of which only the valid ones count; scale and shift once a block."""
    result = succeed(library(f"half {rows} {columns} {depth} plain"))
    across, down, tiles = ceil(columns / 64), ceil(rows / 64), ceil(depth / 32)
    operands = 2 * depth * (rows * across + columns * down)
    assert result["load_bytes"] == operands + across * down * 2 * 4 * depth
    assert result["loads"] == across * down * tiles * (2 * 64 * 4 + 2 * 8)
    assert (result["stores"], result["store_bytes"]) == (rows * columns, 2 * rows * columns)
    assert (result["w_load_bytes"], result["w_store_bytes"]) == (2 * columns * depth * down, 0)
    assert (result["y_load_bytes"], result["y_store_bytes"]) == (0, 2 * rows * columns)
    assert result["shared"] == 31488


# ---- The same sources are CUDA.


def test_nvcc_compiles_the_same_source(tmp_path: Path) -> None:
    compile_for_gpu(SAMPLES / "samples.cu", tmp_path / "samples.o", "sm_80")
