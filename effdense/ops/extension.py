"""Loads the compiled module `_effdense`, or says in one sentence why plain PyTorch runs instead.

The module's file says which torch it was built for (csrc/built_for.cpp). That is read before it is loaded:
under another minor version it fails with an undefined symbol or, worse, does not fail. The metadata of the
installed package would not do: beside a source tree they can be another build's than the module's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from effdense._torch_range import minor_version, why_unsupported
from effdense._version import __version__

if _unsupported := why_unsupported(torch.__version__, str(Path(torch.__file__ or "").parent)):
    raise ImportError(_unsupported)

MODULE = "_effdense"
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir"


def _read_built_for(file: Path | None) -> str | None:
    """The version of torch that the compiled module in `file` was built for."""
    found = file and re.search(rb"effdense was built for torch ([\w.+]+)", file.read_bytes())
    return found[1].decode() if found else None


def _load() -> tuple[ModuleType | None, str | None, str | None]:
    """Returns the module, why there is none, and the torch that it was built for."""
    spec = importlib.util.find_spec(MODULE)
    file = Path(spec.origin) if spec and spec.origin else None
    built_for = _read_built_for(file)
    if os.environ.get("EFFDENSE_FORCE_REFERENCE", "0") not in ("", "0"):
        return None, "EFFDENSE_FORCE_REFERENCE is set", built_for

    target = "."
    if file is None:
        reason = f"there is no compiled module {MODULE} (was effdense installed without a C++ compiler?)"
    elif not built_for or minor_version(built_for) != minor_version(torch.__version__):
        reason = f"{file} was built for torch {built_for}, and this is torch {torch.__version__}"
        target = "-e ." if (file.parent / "setup.py").exists() else "."
    else:
        try:
            return importlib.import_module(MODULE), None, built_for
        except ImportError as error:
            reason = f"{file} does not load ({error})"
    warnings.warn(
        f"effdense runs on plain PyTorch (same results, slower, more memory), because {reason}; to fix it, "
        f"run `{REINSTALL} {target}` in effdense's source directory"
        + (", with a C++ compiler installed" if file is None else ""),
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason, built_for


extension, reason, _built_for = _load()


def build_info() -> dict[str, Any]:
    """What effdense was built with, and whether its compiled code runs.

    Returns:
        A dict with the keys `effdense`, `torch` and `python` (running versions), `compiled` (bool),
        `implementation` ("compiled" or "fallback"), `reason` (why compiled code does not run, or None),
        `torch_built_for`, `compiler`, `openmp` and `cuda` (what the module was built with), `arch_list` (the
        GPU architectures it was built for) and `cpu_capability` (the instruction set that PyTorch picked).

    Examples:
        >>> effdense.build_info()["effdense"] == effdense.__version__
        True
    """
    built_with = extension.build_info() if extension else {}
    return {
        "effdense": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "compiled": extension is not None,
        "implementation": "compiled" if extension else "fallback",
        "reason": reason,
        "torch_built_for": _built_for,
        "compiler": built_with.get("compiler"),
        "openmp": built_with.get("openmp", False),
        "cuda": built_with.get("cuda"),
        "arch_list": re.findall(r"[\w.+]+", built_with.get("arch_list", "")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
