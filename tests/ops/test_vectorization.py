"""The compiler's report: every loop of csrc/cpu/rows.inc that asks for vectors has them, under every instruction set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
REMARK = re.compile(
    r"rows\.inc:(?P<line>\d+):(?P<column>\d+): (?:optimized: (?P<vectors>loop) vectorized|missed: couldn't vectorize loop)"
)
TARGETS = {
    "default": "rows_default.cpp",
    "avx2": "rows_avx2.cpp",
    "avx512": "rows_avx512.cpp",
}


def simd_loops(source: str) -> dict[int, range]:
    """The lines of each loop behind `#pragma omp simd`, by the line of its `for`."""
    lines, loops = source.splitlines(), {}
    for i, line in enumerate(lines):
        if line.strip() != "#pragma omp simd":
            continue
        depth, end = 0, i + 1
        while True:
            depth += lines[end].count("{") - lines[end].count("}")
            if depth == 0 and lines[end].rstrip().endswith((";", "}")):
                break
            end += 1
        loops[i + 2] = range(i + 2, end + 2)
    return loops


def scalar_loops(target: str, source: str, folder: Path) -> list[str]:
    """The loops of `source`, in place of rows.inc, of which some instance was not vectorised for `target`."""
    (folder / "cpu").mkdir(exist_ok=True)
    (folder / "cpu" / "rows.inc").write_text(source)
    command = [os.environ.get("CXX") or "g++", "-O3", "-fopenmp", "-fPIC", "-std=c++20", f"-I{folder}"]
    command += [f"-I{CPU.parent}", "-c", str(CPU / TARGETS[target]), "-o", os.devnull, "-fopt-info-vec-all"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    remarks = [((int(m["line"]), int(m["column"])), bool(m["vectors"])) for m in REMARK.finditer(run.stderr)]
    vectorised, missed = ({place for place, vectors in remarks if vectors is what} for what in (True, False))
    loops, lines = simd_loops(source), source.splitlines()
    assert vectorised and len(loops) > 10
    scalar = []
    for at, body in loops.items():
        # A loop has as many instances as there are types, and rows at a time. All have one place in the report; a
        # loop around them may have another one in the same lines, and is to be scalar.
        places = {place for place in vectorised if place[0] in body}
        if not places or places & missed:
            scalar.append(f"rows.inc:{at}: {lines[at - 1].strip()}")
    return scalar


def skip_unless_gcc(target: str) -> None:
    compiler = os.environ.get("CXX") or "g++"
    said = shutil.which(compiler) and subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if not said or "Free Software Foundation" not in said.stdout:
        pytest.skip("reads the report of GCC")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout.strip()
    if target != "default" and not machine.startswith("x86_64"):
        pytest.skip(f"{TARGETS[target]} is for x86-64, {compiler} compiles for {machine}")


@pytest.mark.parametrize("target", TARGETS)
def test_every_loop_is_vectorised(target: str, tmp_path: Path) -> None:
    skip_unless_gcc(target)
    assert scalar_loops(target, (CPU / "rows.inc").read_text(), tmp_path) == []


@pytest.mark.parametrize(
    "old, new, line",
    [
        ('#pragma GCC optimize("no-trapping-math")', "", "masked"),  # every loop with a comparison
        ("to[c] += bias[c];", "if (bias[c] != 0) to[c] = bias[c] / to[c - 1];", "bias[c]"),
    ],
)
def test_a_scalar_loop_is_found(old: str, new: str, line: str, tmp_path: Path) -> None:
    skip_unless_gcc("avx2")
    source = (CPU / "rows.inc").read_text()
    assert source.count(old) == 1
    found = scalar_loops("avx2", source.replace(old, new), tmp_path)
    assert found and all(re.match(r"rows\.inc:\d+: for", loop) for loop in found)
    changed = source.replace(old, new).splitlines()
    bodies = ["\n".join(changed[int(re.findall(r":(\d+):", loop)[0]) - 1 :][:12]) for loop in found]
    assert any(line in body for body in bodies)
