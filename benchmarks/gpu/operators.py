"""`make gpu`, stage operators: the GPU's ceilings (copy, matrix product), and every operator's time against its floor.

As benchmarks.kernels measures; 121's shapes with 64 images, since with 8 a launch takes longer than the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu import results

REPEATS = 7
# dtype, and whether products may round to TF32
NUMBERS = {"TF32": ("float32", True), "bfloat16": ("bfloat16", False), "float32": ("float32", False)}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the single times: three of their statistics are in it."""
    return {key: value for key, value in row.items() if key != "times_ms"}


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    import torch

    from benchmarks import kernels

    shapes = [shape._replace(batch=64) for shape in kernels.SHAPES["all"]]
    findings = []
    for name, (dtype, tf32) in NUMBERS.items():
        torch.backends.cudnn.allow_tf32 = tf32  # products follow: devices.Cuda.use
        there = [n for n in kernels.OPERATORS if kernels.has_kernel(n, torch.device(options.device).type)]
        measured = kernels.run(shapes, there, dtype, REPEATS, device=options.device)
        rows = [without_times(row) for row in measured["rows"]]
        ceilings = {key: without_times(row) for key, row in measured["ceilings"].items()}
        own = [row for row in rows if row["op"] not in kernels.CONVOLUTIONS]
        worst = max(own, key=lambda row: row["time_to_floor"])
        middle = sorted(row["time_to_floor"] for row in own)[len(own) // 2]
        gemm, copy = ceilings["gemm"]["gflops_per_s"] / 1e3, ceilings["copy"]["gbytes_per_s"] / 1e3
        findings.append(
            f"{name}: {gemm:.0f} TFLOP/s, {copy:.2f} TB/s; to floor {middle:.2f} in the middle, at worst "
            f"{worst['time_to_floor']:.2f} ({worst['op']})"
        )
        row = {"numbers": name, "ceilings": ceilings, "rows": rows}
        result.save(environment=measured["environment"])
        result.add(row, "; ".join(findings))
        del measured
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
