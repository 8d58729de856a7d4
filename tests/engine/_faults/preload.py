"""Runs a module with failing_malloc.c before the C library, which lets the allocations fail that it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def with_failing_malloc(folder: Path, module: str, *words: str) -> str:
    """What the module prints, which gets the library's path, compiled into a folder, and these words. It must end well."""
    library = folder / "failing_malloc.so"
    compiler = os.environ.get("CC") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, FOLDER / "failing_malloc.c"], check=True)
    ran = subprocess.run(
        [sys.executable, "-m", module, library, *words],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
