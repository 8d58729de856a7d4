"""The operator tests again, on the row loops of smaller instruction sets: they are picked at run time."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

OPERATOR_TESTS = [f"tests/test_{name}.py" for name in ("bottleneck", "features", "batch_norm", "pool")]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_operators_on_other_instruction_sets(capability: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip().lower() == capability
    # opcheck and the CUDA kernels do not depend on the instruction set, the twin runs PyTorch's own code.
    chosen = "not opcheck and not reference and not simt"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, *OPERATOR_TESTS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 250
