"""`make gpu`, stage counters: Nsight Compute on the two GEMM kernels: bandwidth, occupancy, and what warps wait for.

The card's clocks are left as they are (--clock-control none).
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu import results

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
KERNELS = "regex:^bottleneck(_backward)?_kernel$"
FORBIDDEN = "ERR_NVGPUCTRPERM"
NO_PERMISSION = (
    "the driver does not permit reading counters (ERR_NVGPUCTRPERM): run as root, or load the nvidia module with "
    "NVreg_RestrictProfilingToAdminUsers=0"
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active")
# The first that there is: names differ between versions of ncu.
METRICS = {
    "ns": ("gpu__time_duration.sum",),
    "memory_bytes_per_s": ("dram__bytes.sum.per_second",),
    "memory_percent": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "compute_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
SCALE = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def command(device: str) -> list[str]:
    """ncu's command line: one row of raw metrics for each launch, units as they are."""
    line = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    line += ["--kernel-name", KERNELS, *(word for name in SECTIONS for word in ("--section", name))]
    return [*line, sys.executable, "-m", "benchmarks.gpu.gemm_kernels", device]


def parse(text: str) -> list[dict[str, Any]]:
    """The rows of ncu's CSV output, of each kernel its last launch; what programs print before it is passed over."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    table = [line for line in lines[first:] if line.startswith('"')]
    launches = list(csv.DictReader(io.StringIO("\n".join(table))))
    units = launches[0] if launches and not launches[0]["ID"].strip() else {}
    by_kernel = {row["Kernel Name"]: row for row in launches if row["ID"].strip()}
    return [_row(name, row, units) for name, row in by_kernel.items()]


def _row(name: str, launch: dict[str, str], units: dict[str, str]) -> dict[str, Any]:
    values: dict[str, float | None] = {}
    for key, names in METRICS.items():
        metric = next((name for name in names if launch.get(name)), "")
        values[key] = _number(launch.get(metric), units.get(metric, ""))
    stalls: list[dict[str, Any]] = []
    for column, text in launch.items():
        found = _STALL.match(column or "")
        value = _number(text, "")
        if found and value is not None and "not_issued" not in found[1]:
            stalls.append({"reason": found[1], "warps": value})
    stalls.sort(key=lambda stall: -stall["warps"])
    seconds, bandwidth = values.pop("ns"), values.pop("memory_bytes_per_s")
    return {
        "kernel": _short(name),
        "grid": launch.get("Grid Size"),
        "block": launch.get("Block Size"),
        "us": None if seconds is None else seconds * 1e6,
        "memory_gbytes_per_s": None if bandwidth is None else bandwidth / 1e9,
        **values,
        "stalls": stalls,
    }


def _short(name: str) -> str:
    """bottleneck_kernel<TensorCore<__half>, 128> of a demangled signature."""
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    return re.sub(r"^void |effdense::kernels::|\(int\)|\(.*", "", name)


def _number(text: str | None, unit: str) -> float | None:
    """In seconds and bytes: units are ns, us, byte/s, Gbyte/s …"""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    found = re.match(r"([numKkMGT])(?:s|second|byte)", unit)
    return value * (SCALE[found[1]] if found else 1)


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """Each kernel's use of memory and multiprocessors, and what its warps wait for most."""
    return "; ".join(
        f"{row['kernel']}: {row['memory_percent'] or 0:.0f} % of memory, {row['compute_percent'] or 0:.0f} % of compute, "
        f"occupancy {row['occupancy_percent'] or 0:.0f} %, {row['stalls'][0]['reason'] if row['stalls'] else 'no stalls'}"
        for row in rows
    )


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    done = subprocess.run(command(options.device), cwd=results.ROOT, capture_output=True, text=True)
    print(done.stdout[-200_000:] + done.stderr[-20_000:])
    if FORBIDDEN in done.stdout + done.stderr:
        return results.fail(NO_PERMISSION)
    rows = parse(done.stdout)
    result.save(finding(rows), rows=rows, command=command(options.device))
    if done.returncode or not rows:
        said = re.findall(r"==ERROR== (.*)", done.stdout + done.stderr)
        return results.fail(
            f"ncu ended with status {done.returncode}: {said[0] if said else 'it has seen no kernel'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
