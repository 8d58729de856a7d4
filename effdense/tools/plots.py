"""The pictures of the command line, and the style of all: readable in grey, axes with units, names beside what is drawn.

Needs matplotlib, which effdense does without elsewhere.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from effdense import files
from effdense.tools.reuse import BlockReuse

FORMS = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "eps")
MIB = 2**20
SECONDS = {"s": 1, "min": 60, "h": 3600}
PEER, OURS = "#c4c4c4", "#3b7cb5"  # told apart in grey too, and a black line is seen on both
LINE = "#999999"  # PEER where it is a thin line
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
# Curves that may lie on each other: each has a colour of its own (Okabe and Ito's, which the colour-blind tell apart), and is narrower
# than those below it or has gaps, so that these stay visible; the gaps tell them apart in grey.
CURVES: list[dict[str, Any]] = [
    {"color": "#56b4e9", "linewidth": 2.6},
    {"color": "#d55e00", "linewidth": 1.4},
    {"color": "black", "linewidth": 1.2, "linestyle": (0, (2, 3))},
    {"color": "#009e73", "linewidth": 1.6, "linestyle": (0, (6, 3))},
    {"color": "#cc79a7", "linewidth": 1.6, "linestyle": (0, (1, 1.5))},
    {"color": "#e69f00", "linewidth": 1.4, "linestyle": (0, (6, 2, 1, 2))},
]
_SHADES = LinearSegmentedColormap.from_list(
    "effdense", ["#e9f0f6", OURS, "#0b2238"]
)  # ever darker, in grey too
_POINTS: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markerfacecolor": "white",
    "markeredgecolor": "black",
    "markeredgewidth": 0.9,
}
_ONCE = {"marker": "D", "markerfacecolor": "black"}  # the test at the end, where a validation picks the epoch
_ALONE: dict[str, Any] = {"marker": "s", "markersize": 4}  # where a line would have no length
_LEGEND, _NAME = 104, 60  # characters that fit side by side, and of a run's name
_COLUMNS = ("epoch", "split", "loss", "accuracy", "peak_bytes", "seconds")


Curve = dict[float, float]  # value by epoch
Run = dict[str, dict[str, Curve]]  # by column, then by split


def reuse_picture(blocks: Sequence[BlockReuse], title: str, path: str | Path) -> None:
    """Draw Huang et al.'s figure 5 (arXiv 1608.06993), a heat map per block, into the PNG at `path`.

    What reads the whole block, a transition or the classifier, is the framed last column.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.1 + 2.9 * len(blocks), 3.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(1, len(blocks), squeeze=False)[0]
        for axes, block in zip(panels, blocks, strict=True):
            _heat_map(axes, block)
        panels[0].set_ylabel("source layer")
        shades = mpl.cm.ScalarMappable(cmap=_SHADES)
        label = "mean absolute weight\n(1: the block's largest; framed: the column's)"
        figure.colorbar(shades, ax=panels, label=label, shrink=0.8, pad=0.02).outline.set_visible(False)
        _save(figure, path)


def check_format(path: str | Path) -> str:
    """The form of a picture, by the end of its name; PNG where that has none.

    Raises:
        ValueError: there is no such form.
    """
    form = Path(path).suffix.removeprefix(".").lower() or "png"
    if form not in FORMS:
        raise ValueError(f"{path}: pictures are {', '.join(FORMS)}, and the end of the name says which")
    return form


def _save(figure: Figure, path: str | Path) -> None:
    form = check_format(path)
    with files.replacing(path) as file:
        figure.savefig(file, format=form)


def _heat_map(axes: Axes, block: BlockReuse) -> None:
    layers = len(block.sources) - 1
    shades = block.weights.clone()
    for part in shades.split(layers, 1):  # the last column has other kernels, so another scale
        part /= part.nan_to_num().max().clamp(min=1e-30)
    axes.imshow(shades.numpy(), cmap=_SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    step = math.ceil(layers / 8)
    shown = range(step, layers + 1, step)
    axes.set_yticks([0, *shown], ["input", *map(str, shown)])
    axes.set_xticks([layer - 1 for layer in shown], [str(layer) for layer in shown])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(title=_last(block.block) or "dense block", xlabel="target layer")
    if len(block.targets) > layers:
        axes.add_patch(
            Rectangle((layers - 0.5, -0.5), 1, layers + 1, fill=False, linewidth=0.8, clip_on=False)
        )
        axes.set_title(_last(block.targets[-1]), loc="right", fontsize="medium")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def read_run(run: str | Path) -> Run:
    """Read what `effdense train --out RUN` has written to RUN/metrics.csv; or such a file itself.

    Raises:
        ValueError: there is none, it holds no rows or others; the message names file, line and column.
    """
    path = Path(run)
    path = path / "metrics.csv" if path.is_dir() else path
    curves: Run = {column: {} for column in _COLUMNS[2:]}
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}: no metrics of effdense train")
            for row in reader:
                for column in curves:
                    _note(curves[column], row, column, f"{path}, line {reader.line_num}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not curves["loss"]:
        raise ValueError(f"{path} has no epochs yet")
    return curves


def _note(curves: dict[str, Curve], row: Mapping[str, str | None], column: str, where: str) -> None:
    """Adds a row's value, if it is an epoch's. A column may be empty."""
    text, split = row[column], row["split"] or ""
    if text == "" or split == "step":
        return
    try:
        epoch, value = float(row["epoch"] or ""), float(text or "")
    except ValueError:
        found = {"epoch": row["epoch"], column: text}
        raise ValueError(f"{where}: numbers were expected, got {found}") from None
    curves.setdefault(split, {})[epoch] = value


def runs_picture(runs: Mapping[str, Run], path: str | Path) -> None:
    """Draw loss, accuracy, peak memory and time of several runs over epochs into the PNG at `path`.

    Memory and time are the training's, loss and accuracy the test's or the validation's as well, with points.

    Raises:
        OSError: it cannot be written.
        ValueError: there are more runs than can be told apart, or the file's format is unknown.
    """
    if len(runs) > len(CURVES):
        raise ValueError(f"at most {len(CURVES)} runs can be told apart in a picture, got {len(runs)}")
    training = {
        column: [{"train": run[column].get("train", {})} for run in runs.values()]
        for column in ("peak_bytes", "seconds")
    }
    longest = max((max(run["train"].values(), default=0) for run in training["seconds"]), default=0)
    unit = "h" if longest >= 5 * 3600 else "min" if longest >= 5 * 60 else "s"
    panels = (
        ("loss", [run["loss"] for run in runs.values()], "cross entropy (nats)", 1.0),
        ("accuracy", [run["accuracy"] for run in runs.values()], "accuracy (%)", 0.01),
        ("memory", training["peak_bytes"], "peak (MiB)", MIB),
        ("time", training["seconds"], f"since the start ({unit})", SECONDS[unit]),
    )
    looks = CURVES[: len(runs)] if len(runs) > 1 else CURVES[1:2]
    epochs = {epoch for run in runs.values() for curve in run["loss"].values() for epoch in curve}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.6), layout="constrained")
        for axes, (title, curves, label, divisor) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for by_split, look in zip(curves, looks, strict=True):
                _curves(axes, by_split, look, divisor)
            axes.set(title=title, ylabel=label)
            _epochs_axis(axes, epochs)
            if title == "loss" and _spread(curves) > 30:  # the rest would be a line at the bottom
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            elif title != "accuracy":
                axes.set_ylim(0, 1.05 * max(axes.dataLim.y1, 1e-9))
            elif axes.dataLim.height < 1:  # per cent: no difference is drawn larger than life
                middle = (axes.dataLim.y0 + axes.dataLim.y1) / 2
                axes.set_ylim(middle - 1, middle + 1)
        names = short_names(list(runs))
        handles = [Line2D([], [], label=name, **look) for name, look in zip(names, looks, strict=True)]
        handles.append(
            Line2D([], [], label="training", color="black", **(_ALONE if len(epochs) == 1 else {}))
        )
        handles += _legend_of_splits({split for run in runs.values() for split in run["loss"]})
        columns = _LEGEND // (max(len(str(handle.get_label())) for handle in handles) + 8)
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, columns))
        _save(figure, path)


def _legend_of_splits(splits: set[str]) -> list[Line2D]:
    shown = (
        {"validation": _POINTS, "test, once": {**_POINTS, **_ONCE}} if "val" in splits else {"test": _POINTS}
    )
    return [
        Line2D([], [], label=name, color="black", linestyle="", **points) for name, points in shown.items()
    ]


def short_names(runs: Sequence[str]) -> list[str]:
    """What tells runs apart: their paths without the folders that all of them are in, long ones without their middle."""
    parts = [Path(run).parts for run in runs]
    common = 0
    while len(runs) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    names = [str(Path(*p[common:])) for p in parts]
    short = [n if len(n) <= _NAME else f"{n[: _NAME // 2 - 1]} … {n[-(_NAME // 2 - 2) :]}" for n in names]
    return [f"{i}: {s}" if short.count(s) > 1 else s for i, s in enumerate(short, 1)]


def _epochs_axis(axes: Axes, epochs: set[float]) -> None:
    """Whole epochs, and no fractions of one around a single one."""
    axes.set_xlabel("epoch")
    if len(epochs) == 1:
        (epoch,) = epochs
        axes.set_xlim(epoch - 0.5, epoch + 0.5)
        axes.set_xticks([epoch], [f"{epoch:g}"])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _spread(runs: Sequence[Mapping[str, Curve]]) -> float:
    """The largest value of some curves by the smallest."""
    values = [value for by_split in runs for curve in by_split.values() for value in curve.values()]
    return max(values) / max(min(values), 1e-30)


def _curves(axes: Axes, curves: Mapping[str, Curve], look: dict[str, Any], divisor: float) -> None:
    """Draw a line per split, with points where it is not the training's or has one epoch."""
    for split, curve in curves.items():
        epochs = sorted(curve)
        values = [curve[epoch] / divisor for epoch in epochs]
        alone = _ALONE if len(epochs) == 1 else {}
        once = _ONCE if split == "test" and "val" in curves else {}
        points = alone if split == "train" else {**_POINTS, **once}
        axes.plot(epochs, values, markevery=max(1, len(epochs) // 12), **points, **look)


def evaluation_picture(
    classes: Sequence[tuple[str, int, float | None, float | None, float | None]],
    confusion: Sequence[Sequence[int]],
    curves: Mapping[str, tuple[Any, Any]],
    title: str,
    path: str | Path,
) -> None:
    """Draw a confusion matrix, and beside it ROC curves or, of many classes, precision and recall, into the picture at `path`.

    Args:
        classes: name, images, precision, recall and area under the ROC curve of each; None: not defined.
        confusion: images by class, then by predicted class.
        curves: false and true positive rates by class.
        title: of the picture.
        path: where it is written.

    Raises:
        OSError: it cannot be written.
        ValueError: the file's format is unknown.
    """
    count = len(classes)
    names = [_cut(name, 20) for name, *_ in classes]
    with mpl.rc_context(STYLE):
        side = min(12.0, 3.4 + 0.22 * count)
        figure = Figure(figsize=(2 * side + 0.6, side), layout="constrained")
        figure.suptitle(_cut(title, round(24 * side)), x=0.01, ha="left", fontsize=11)
        left, right = figure.subplots(1, 2)
        _confusion_map(figure, left, confusion, names)
        if 0 < len(curves) <= len(CURVES):
            areas = {name: area for name, _, _, _, area in classes}
            _roc(right, curves, areas)
        else:
            _precision_and_recall(right, classes, names)
        _save(figure, path)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _confusion_map(figure: Figure, axes: Axes, confusion: Sequence[Sequence[int]], names: list[str]) -> None:
    """Shades are parts of a class's images, numbers are images."""
    count = len(names)
    parts = [[100 * n / max(sum(row), 1) for n in row] for row in confusion]
    shades = LinearSegmentedColormap.from_list("effdense", ["white", OURS, "#0b2238"])
    picture = axes.imshow(parts, cmap=shades, vmin=0, vmax=100, interpolation="nearest")
    if count <= 20:
        for i, row in enumerate(confusion):
            for j, n in enumerate(row):
                color = "white" if parts[i][j] > 40 else "black"
                if n:
                    size = 9 if count <= 8 else 6
                    axes.text(j, i, f"{n}", ha="center", va="center", color=color, fontsize=size)
    step = math.ceil(count / 40)
    shown = range(0, count, step)
    upright = count > 6 or max(map(len, names)) > 8
    axes.set_xticks(list(shown), [names[i] for i in shown], rotation=90 if upright else 0)
    axes.set_yticks(list(shown), [names[i] for i in shown])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(title="confusion matrix (images)", xlabel="predicted class", ylabel="class of the images")
    bar = figure.colorbar(picture, ax=axes, label="of the class's images (%)", shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)


def _roc(axes: Axes, curves: Mapping[str, tuple[Any, Any]], areas: Mapping[str, float | None]) -> None:
    looks = CURVES[: len(curves)] if len(curves) > 1 else CURVES[1:2]
    axes.plot([0, 100], [0, 100], color=LINE, linewidth=0.8)
    axes.annotate("guessing", (62, 58), color="#666666", fontsize=8)
    for (name, (false, true)), look in zip(curves.items(), looks, strict=True):
        label = f"{_cut(name, 24)}, area {areas[name]:.3f}"
        axes.plot(100 * false, 100 * true, label=label, clip_on=False, **look)
    axes.set(
        title="ROC curves, one class against the rest",
        xlabel="others predicted as the class (%)",
        ylabel="of the class predicted as it (%)",
        xlim=(0, 100),
        ylim=(0, 100),
        aspect="equal",
    )
    if len(curves) == 1:
        axes.legend(loc="lower right")
    else:  # beneath, where it hides nothing
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), fontsize=8)


def _precision_and_recall(
    axes: Axes, classes: Sequence[tuple[str, int, float | None, float | None, float | None]], names: list[str]
) -> None:
    places = range(len(classes))
    for label, column, marker, color in (
        ("precision", [precision for _, _, precision, _, _ in classes], "o", CURVES[1]["color"]),
        ("recall", [recall for _, _, _, recall, _ in classes], "s", OURS),
    ):
        axes.plot(
            [math.nan if value is None else 100 * value for value in column],
            list(places),
            linestyle="",
            marker=marker,
            markersize=4.5,
            color=color,
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=label,
            clip_on=False,
        )
    step = math.ceil(len(classes) / 40)
    shown = places[::step]
    axes.set_yticks(list(shown), [names[i] for i in shown])
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set(title="precision and recall", xlabel="%", xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5))
    axes.legend(loc="lower left", bbox_to_anchor=(0.45, 1.0), ncols=2)
