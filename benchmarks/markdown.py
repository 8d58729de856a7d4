"""A comparison as a Markdown table: a line that says what was measured, and one for every implementation."""

from __future__ import annotations

import re
from typing import Any

from benchmarks import compare, models
from benchmarks.worker import WorkerConfig

HEADINGS = ("", "ms/step", "vs fastest peer", "peak MiB", "vs naive")


def comparison(result: dict[str, Any], settings: WorkerConfig) -> str:
    """Return the table of one comparison."""
    blank = [""] * (len(HEADINGS) - 1)
    lines = [HEADINGS, ["---"] * len(HEADINGS), [f"**{_heading(result, settings)}**", *blank]]
    lines += [_cells(result["rows"], row) for row in result["rows"]]
    return "".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|\n" for line in lines)


def _heading(result: dict[str, Any], settings: WorkerConfig) -> str:
    size = f"{settings.image_size}x{settings.image_size}"
    mode = "training" if settings.mode == "train" else "inference"
    what = [model_name(settings.model), f"batch {settings.batch}", size, mode]
    what += [settings.dtype] * (settings.dtype != "float32") + [settings.data] * (
        settings.data != "synthetic"
    )
    what += [settings.device] * (settings.device != "cpu")
    what += [f"limited to {result['environment']['cpu_capability']}"] * bool(settings.isa)
    threads = settings.threads
    return ", ".join([*what, *([f"{threads} thread{'s' * (threads > 1)}"] if threads else [])])


def model_name(name: str) -> str:
    """Return a model's name as it is written: DenseNet-BC-100-12 for densenet_bc_100_12."""
    if match := re.fullmatch(r"densenet_?((?:bc_)?\d+(?:_\d+)?)", name):
        return f"DenseNet-{match[1].upper().replace('_', '-')}"
    return name


def impl_name(row: dict[str, Any]) -> str:
    """Return an implementation's name as it is written."""
    parsed = models.parse_impl(row["impl"])
    base = "`torch.compile`" if parsed.base == "compile" else parsed.base
    parts = [base]
    if parsed.memory and row["mode"] == "train":
        parts.append(f'`memory="{parsed.memory}"`')
    parts += ["fallback"] * parsed.fallback + ["channels-last"] * parsed.channels_last
    return ", ".join(parts)


def _cells(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [impl_name(row), f"failed: {row['error']}", "-", "-", "-"]
    as_fast, memory = row["vs_fastest_peer"], compare.ratio_to_naive(rows, row, "peak_bytes")
    return [
        impl_name(row),
        compare.milliseconds(row),
        f"{as_fast:.2f}x as fast" if as_fast else "-",
        f"{row['peak_bytes'] / compare.MIB:.0f}",
        f"{memory:.2f}x" if memory else "-",
    ]
