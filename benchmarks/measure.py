"""What effdense/tools/measure.py measures, and the process's peak.

That file is read by itself: peers are measured beside an effdense that does not load.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path
from typing import Any

_effdense = importlib.util.find_spec("effdense")  # where it is, unread
assert _effdense is not None and _effdense.origin is not None, "effdense is neither here nor installed"
_spec = importlib.util.spec_from_file_location(
    "effdense_measure", Path(_effdense.origin).parent / "tools" / "measure.py"
)
assert _spec is not None and _spec.loader is not None
_package: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_package)

available_bytes, cpu_model, time_statistics = (
    _package.available_bytes,
    _package.cpu_model,
    _package.time_statistics,
)
peak_bytes, cuda_milliseconds, cuda_peaks = (
    _package.peak_bytes,
    _package.cuda_milliseconds,
    _package.cuda_peaks,
)


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
    return _package.environment(threads, _effdense_build_info())


def _effdense_build_info() -> dict[str, Any] | None:
    try:
        import effdense

        return effdense.build_info()
    except ModuleNotFoundError:
        return None
    except Exception as error:  # peers can be measured beside an effdense that does not load
        return {"error": str(error)}
