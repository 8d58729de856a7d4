"""Runs the two GEMM kernels at a shape of DenseNet-121, in bfloat16 and TF32: the program that counters.py profiles."""

from __future__ import annotations

import sys
from collections.abc import Sequence

OPERATORS = ("bottleneck", "bottleneck_backward")


def main(given: Sequence[str] | None = None) -> int:
    """Run each kernel once per type to warm up, and once."""
    (device,) = given or sys.argv[1:]
    import torch

    from benchmarks import kernels

    shape = kernels.SHAPES["121"][0]._replace(batch=64)
    torch.backends.cudnn.allow_tf32 = True
    for dtype in ("bfloat16", "float32"):
        kernels.run([shape], OPERATORS, dtype, 1, device=device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
