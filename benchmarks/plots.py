"""The benchmarks' pictures, in the style of effdense.tools.plots: values or names written beside what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from effdense.tools.plots import CURVES, LINE, MIB, OURS, PEER, STYLE


def comparison(rows: Sequence[dict[str, Any]], title: str, path: str | Path) -> None:
    """Draw the peak memory and the time of every row of benchmarks.compare into the PNG at `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(rows)), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        memory, time = figure.subplots(1, 2, sharey=True)
        memory_and_time(memory, time, rows)
        figure.savefig(path)


def demonstration(
    losses: Mapping[str, Sequence[float]],
    rows: Sequence[dict[str, Any]],
    trained: str,
    measured: str,
    path: str | Path,
) -> None:
    """Draw the loss curves of benchmarks.demo over each other, below them memory and time of every row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.9 + 0.42 * len(rows)), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, 1.5 + 0.42 * len(rows)])
        top.suptitle(f"{trained} trained on Fashion-MNIST, float64", x=0.01, ha="left", fontsize=11)
        bottom.suptitle(measured, x=0.01, ha="left", fontsize=11)
        loss_curves(top.subplots(), losses)
        memory, time = bottom.subplots(1, 2, sharey=True)
        memory_and_time(memory, time, rows)
        figure.savefig(path)


def depth_sweep(
    rows: Sequence[dict[str, Any]], title: str, path: str | Path, budget_bytes: int | None = None
) -> None:
    """Draw peak memory and time over depth for every row of benchmarks.depth_sweep into the PNG at `path`.

    A budget is drawn as a line where it is within the panel.
    """
    scale, unit = _time_scale(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        memory, time = figure.subplots(1, 2)
        over_depth(memory, rows, "peak_bytes", "peak_bytes", MIB)
        over_depth(time, rows, "median_ms", "p80_ms", scale)
        for row in rows:
            if "error" not in row:
                low, high = row["p20_ms"] / scale, row["p80_ms"] / scale
                time.vlines(row["depth"], low, high, color="black", linewidth=1, zorder=3)
        if budget_bytes and budget_bytes / MIB <= memory.get_ylim()[1]:
            memory.axhline(budget_bytes / MIB, color="black", linewidth=0.8, linestyle=(0, (6, 4)))
            place = (0.01, budget_bytes / MIB)
            memory.annotate("budget", place, (0, 3), memory.get_yaxis_transform(), "offset points")
        memory.set(title="memory", ylabel="peak above the built model (MiB)")
        time.set(title="time", ylabel=f"per step ({unit}; bar: 20th to 80th percentile)")
        figure.savefig(path)


def over_depth(axes: Axes, rows: Sequence[dict[str, Any]], key: str, upper_key: str, divisor: float) -> None:
    """Draw a line per implementation, its name at its end, and with the name the depths where it failed.

    The axis reaches to the largest `upper_key`.
    """
    lines: dict[str, dict[int, float]] = {row["impl"]: {} for row in rows}
    failed: dict[str, list[str]] = {impl: [] for impl in lines}
    for row in rows:
        if "error" in row:
            failed[row["impl"]].append(str(row["depth"]))
        else:
            lines[row["impl"]][row["depth"]] = row[key] / divisor
    top = 1.05 * max((row[upper_key] / divisor for row in rows if "error" not in row), default=1)
    depths = sorted({row["depth"] for row in rows})
    axes.set(xlabel="depth (layers)", xticks=depths, ylim=(0, top))
    margin = 0.03 * (depths[-1] - depths[0]) + 1
    axes.set_xlim(depths[0] - margin, depths[-1] + margin)
    ends: dict[str, tuple[int, float]] = {}
    for (impl, line), look in zip(lines.items(), _line_looks(lines), strict=True):
        if line:
            axes.plot(line.keys(), line.values(), linewidth=1.5, markersize=4.5, **look)
            ends[impl] = max(line.items())
    beside = offset_copy(axes.transData, axes.figure, x=14, units="points")
    for impl, y in _spread({impl: value for impl, (_, value) in ends.items()}, 0.065 * top).items():
        axes.annotate(
            impl + (f" ({', '.join(failed[impl])} failed)" if failed[impl] else ""),
            ends[impl],
            (depths[-1], y),
            textcoords=beside,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "grey",
                "linewidth": 0.6,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
    if nowhere := [impl for impl in lines if impl not in ends]:
        axes.text(0.02, 0.97, f"failed: {', '.join(nowhere)}", transform=axes.transAxes, va="top")


def _line_looks(impls: Iterable[str]) -> list[dict[str, Any]]:
    """Colour by family; line and marker by the place in it, so that no two are the same in grey."""
    shapes = {color: cycle([("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]) for color in (LINE, OURS)}
    looks = []
    for impl in impls:
        color = OURS if impl.startswith("effdense") else LINE
        linestyle, marker = next(shapes[color])
        looks.append({"color": color, "linestyle": linestyle, "marker": marker})
    return looks


def _spread(values: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move values up until they are at least `gap` apart."""
    moved: dict[str, float] = {}
    lowest = 0.0
    for name in sorted(values, key=values.__getitem__):
        moved[name] = max(values[name], lowest)
        lowest = moved[name] + gap
    return moved


def _time_scale(rows: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """The milliseconds in the unit in which all times are easy to read, and its name."""
    return (1, "ms") if max((row["median_ms"] or 0 for row in rows), default=0) < 2000 else (1000, "s")


def loss_curves(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw one curve per name."""
    for (name, values), look in zip(losses.items(), CURVES, strict=False):
        axes.plot(range(1, len(values) + 1), values, label=name, solid_capstyle="round", **look)
    axes.set(xlabel="training step", ylabel="cross entropy (nats)", ylim=(0, None))
    axes.margins(x=0.01)
    axes.legend(loc="lower left")


def memory_and_time(memory: Axes, time: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw two panels of horizontal bars over one axis of implementations, the first row on top."""
    names = [row["impl"] for row in rows]
    memory.set_yticks(range(len(rows)), names)
    memory.set_ylim(len(rows) - 0.4, -0.6)
    naive = next(
        (row for row in rows if row["impl"].partition("+")[0] == "naive" and "error" not in row), None
    )
    scale, unit = _time_scale(rows)
    digits = 0 if unit == "ms" else 2
    for axes, key, divisor, decimals in ((memory, "peak_bytes", MIB, 0), (time, "median_ms", scale, digits)):
        for y, row in enumerate(rows):
            if "error" in row:
                axes.text(0, y, " failed", va="center", color="dimgrey", style="italic")
                continue
            value = row[key] / divisor
            ratio = f"  ({row[key] / naive[key]:.2f}x)" if naive and row is not naive else ""
            axes.barh(y, value, height=0.62, color=OURS if row["impl"].startswith("effdense") else PEER)
            end = value
            if axes is time:
                end = row["p80_ms"] / divisor
                axes.plot([row["p20_ms"] / divisor, end], [y, y], color="black", linewidth=1)
            axes.annotate(
                f"{_number(value, decimals)}{ratio}",
                (max(value, end), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.42)
        axes.set_xlim(left=0)
        axes.spines["left"].set_visible(False)
    memory.set_title("memory (times naive's)")
    memory.set_xlabel("peak above the built model (MiB)")
    time.set_title("time (times naive's)")
    time.set_xlabel(f"per step ({unit}; line: 20th to 80th percentile)")
    time.tick_params(axis="y", labelleft=False)


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals if value >= 10 or decimals else 1}f}"
