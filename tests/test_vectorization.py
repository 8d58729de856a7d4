"""The compiler's report: every loop of csrc/cpu/rows.inc that asks for vectors has them, under every instruction set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).parents[1] / "csrc" / "cpu"
# Instances of a loop (types, rows at a time) are many; one that stays scalar is a remark in the loop's lines.
REMARK = re.compile(
    r"rows\.inc:(?P<line>\d+):\d+: (?:optimized|missed): "
    r"(?:(?P<vectors>loop vectorized|basic block part vectorized)|couldn't vectorize loop)"
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
    remarks = [(int(m["line"]), m["vectors"]) for m in REMARK.finditer(run.stderr)]
    loops, lines = simd_loops(source), source.splitlines()
    assert remarks and loops
    scalar = []
    for at, body in loops.items():
        said = [vectors for line, vectors in remarks if line in body]
        if None in said or not said:
            scalar.append(f"rows.inc:{at}: {lines[at - 1].strip()}")
    return scalar


def skip_unless_gcc() -> None:
    compiler = os.environ.get("CXX") or "g++"
    said = shutil.which(compiler) and subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if not said or "Free Software Foundation" not in said.stdout:
        pytest.skip("reads the report of GCC")


@pytest.mark.parametrize("target", TARGETS)
def test_every_loop_is_vectorised(target: str, tmp_path: Path) -> None:
    skip_unless_gcc()
    assert scalar_loops(target, (CPU / "rows.inc").read_text(), tmp_path) == []


def test_a_scalar_loop_is_found(tmp_path: Path) -> None:
    """Without the option that rows.inc sets, and with a loop whose steps depend on each other."""
    skip_unless_gcc()
    source = (CPU / "rows.inc").read_text()
    found = scalar_loops("avx2", source.replace('#pragma GCC optimize("no-trapping-math")', ""), tmp_path)
    assert len(found) > 3 and all(re.match(r"rows\.inc:\d+: for", loop) for loop in found)
    planted = source.replace("to[c] += bias[c];", "if (bias[c] > to[c]) to[c] += bias[c]; else return;")
    assert planted != source
