"""What effdense/tools/measure.py measures and effdense/machine.py says, and the process's peak.

Those files are read by themselves: peers are measured beside an effdense that does not load.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path
from typing import Any

_effdense = importlib.util.find_spec("effdense")  # where it is, unread
assert _effdense is not None and _effdense.origin is not None, "effdense is neither here nor installed"
_FOLDER = Path(_effdense.origin).parent


def _read(name: str) -> Any:
    """A module of effdense that imports nothing of it, from its file."""
    spec = importlib.util.spec_from_file_location(f"effdense_{Path(name).stem}", _FOLDER / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_machine, _steps = _read("machine.py"), _read("tools/measure.py")
available_bytes, cpu_model = _machine.available_bytes, _machine.cpu_model
peak_bytes, cuda_milliseconds, cuda_peaks = _steps.peak_bytes, _steps.cuda_milliseconds, _steps.cuda_peaks
time_statistics = _steps.time_statistics


def peak_rss_bytes() -> int:
    """Return this process's largest resident size so far, in bytes."""
    try:
        with open("/proc/self/status") as status:  # ru_maxrss would inherit the parent's through exec
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return what a reader needs to judge the numbers: versions, machine, load, effdense's build."""
    return _machine.environment(threads, _effdense_build_info())


def _effdense_build_info() -> dict[str, Any] | None:
    try:
        import effdense

        return effdense.build_info()
    except ModuleNotFoundError:
        return None
    except Exception as error:  # peers can be measured beside an effdense that does not load
        return {"error": str(error)}
