"""The CPU operators under sanitizers (harness/sanitizers): they find nothing, and they find what is planted.

Run by `pytest -m sanitizers` alone, since it compiles for minutes.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from harness.sanitizers.compiler import CSRC, SANITIZERS, compile_program, run

pytestmark = [
    pytest.mark.sanitizers,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None,
        reason="needs g++ on Linux, and its sanitizers",
    ),
]

CAPABILITIES = ["default", "avx2", "avx512"]
HERE = torch.backends.cpu.get_cpu_capability().lower()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_they_find_nothing(sanitizer: str, threads: int, capability: str) -> None:
    if HERE not in CAPABILITIES[CAPABILITIES.index(capability) :]:
        pytest.skip(f"this machine has {HERE}")
    if sanitizer == "thread" and threads == 1:
        pytest.skip("one thread has nobody to race with")
    done = run(compile_program(sanitizer), threads, capability)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"\d+ operators have run with {threads} threads on {capability}\n", done.stdout.lower()
    )


# What is planted: file, what is there, what comes instead, the sanitizer, what it says.
PLANTED = {
    "a row behind the last is read": (
        "features.cpp",
        "channels, from_row(from.block, tile.first), mean",
        "channels, from_row(from.block, tile.first + 1), mean",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "another's channel beside a slice is written": (
        "features.cpp",
        "loops.copy(tile.rows(), channels, from_row(x.block",
        "loops.copy(tile.rows(), channels + (channels < to.step), from_row(x.block",
        "address",
        "AddressSanitizer: use-after-poison",
    ),
    "a number overflows": (
        "pool.cpp",
        "y = h * stride[1] - padding[1] + j",
        "y = (h + 2) * stride[1] - 2 * stride[1] - padding[1] + j",
        "address",
        "runtime error: signed integer overflow",
    ),
    "threads add to the same sums": (
        "batch_norm.cpp",
        "mean.const_data_ptr<A>(), from_row(dz.block, tile.first), sums.d(slot)",
        "mean.const_data_ptr<A>(), from_row(dz.block, tile.first), sums.d(0)",
        "thread",
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_they_find_what_is_planted(bug: str, tmp_path: Path) -> None:
    name, there, instead, sanitizer, says = PLANTED[bug]
    source = CSRC / "cpu" / name
    text = re.sub(r"\s+", " ", there)
    pattern = r"\s+".join(re.escape(word) for word in text.split())
    changed, count = re.subn(pattern, lambda _: instead, source.read_text())
    assert count == 1, f"{name} does not have {there!r} once"
    planted = tmp_path / name
    planted.write_text(changed)
    done = run(compile_program(sanitizer, {source: planted}), 3, "default")
    assert done.returncode != 0 and says in done.stderr, done.stdout + done.stderr
