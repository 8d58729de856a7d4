"""The pictures, in one style: readable in grey, axes with units, values written beside the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MIB = 2**20
PEER, OURS = "#c4c4c4", "#3b7cb5"  # told apart in grey too, and a black line is seen on both
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


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
        memory_and_time(*bottom.subplots(1, 2, sharey=True), rows)
        figure.savefig(path)


def loss_curves(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw one curve per name; the first is a broad light band, so that curves on top of it stay visible."""
    looks = [
        {"color": PEER, "linewidth": 5},
        {"color": OURS, "linewidth": 1.4},
        {"color": "black", "linewidth": 1.0, "linestyle": (0, (2, 3))},
    ]
    for (name, values), look in zip(losses.items(), looks, strict=False):
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
    scale = 1 if max((row["median_ms"] or 0 for row in rows), default=0) < 2000 else 1000
    unit, digits = ("ms", 0) if scale == 1 else ("s", 2)
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
