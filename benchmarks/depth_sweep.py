"""Memory and time of a training step against the depth of a DenseNet-BC, per implementation.

    python -m benchmarks.depth_sweep --budget 2GiB --json out.json --plot out.png

After the figures of "Memory-Efficient Implementation of DenseNets" (Pleiss et al., arXiv:1707.06990). `run` lets
compare.py measure depth after depth; `largest_within` finds the deepest network that fits a memory budget.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import compare, devices, measure, models
from benchmarks.compare import MIB, OnProgress
from benchmarks.program import reports_missing_packages
from benchmarks.worker import Worker, WorkerConfig, WorkerError
from effdense import values

if TYPE_CHECKING:  # measuring does without
    from rich.table import Table

DEFAULT_DEPTHS = "34,64,94,124,154"
DEFAULT_IMPLS = "naive,checkpoint,effdense-balanced,effdense-minimal"
STEP, SHALLOWEST = 6, 10  # of the depths a DenseNet-BC can have
ROOM = 0.9  # of the machine's free memory may be asked for when counting
STATE_BYTES = 3 * 4  # per parameter, before the step: weight, gradient and momentum in float32
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": MIB, "gib": 2**30, "tib": 2**40}
METHOD = (
    "the depth is the largest whose counted peak above the built model is within the budget; the next depth, 6 "
    "deeper, was counted too and is not. A fit through what has been counted only chooses what to count next. "
    "'at least': the search ended early, for the reason given. Weights, gradients and momentum come on top."
)

Points = dict[int, dict[str, int]]  # depth: peak_bytes and peak_rss_bytes


def model_name(depth: int, growth_rate: int) -> str:
    """Return the name of the DenseNet-BC of this depth."""
    return f"densenet_bc_{depth}_{growth_rate}"


def parameters(name: str) -> int:
    """Return how many parameters model `name` has, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in models.build(name, "naive").model.parameters())


def run(
    settings: WorkerConfig,
    growth_rate: int,
    depths: Sequence[int],
    impls: Sequence[str],
    repeats: int = 3,
    on_progress: OnProgress = lambda what: None,
) -> dict[str, Any]:
    """Measure every implementation at every depth and return `{"environment": {...}, "rows": [{...}, ...]}`.

    The rows are compare.run's with their "depth" and "parameters", also where an implementation failed.
    `settings.model` is not used. `on_progress` is called `(repeats + 2) * len(impls)` times per depth.
    """
    result: dict[str, Any] = {"rows": []}
    for depth in depths:
        at_depth = dataclasses.replace(settings, model=model_name(depth, growth_rate))
        measured = compare.run(
            at_depth,
            impls,
            repeats,
            lambda what, depth=depth: on_progress(f"depth {depth}, {what}"),  # type: ignore[misc]
        )
        result.setdefault("environment", measured["environment"])
        known = {"depth": depth, "parameters": parameters(at_depth.model)}
        result["rows"] += [{**row, **known} for row in measured["rows"]]
    return result


def within_budget(
    result: dict[str, Any],
    settings: WorkerConfig,
    growth_rate: int,
    budget_bytes: int,
    on_progress: OnProgress = lambda what: None,
) -> dict[str, Any]:
    """Return the deepest network within the budget, for every implementation in `run`'s result.

    `{"bytes": ..., "method": ..., "rows": [{"impl": ..., "depth": ..., "parameters": ..., "peak_bytes": ...,
    "next_depth": ..., "next_peak_bytes": ..., "stopped": ..., ...}, ...]}`; "depth" is None where none fits.
    """
    found, available = [], devices.find(settings.device).available_bytes
    for impl in dict.fromkeys(row["impl"] for row in result["rows"]):

        def count(depth: int, impl: str = impl) -> dict[str, int]:
            on_progress(f"{impl}: does depth {depth} fit?")
            return counted_step(impl, dataclasses.replace(settings, model=model_name(depth, growth_rate)))

        points = {
            row["depth"]: {key: row[key] for key in ("peak_bytes", "peak_rss_bytes")}
            for row in result["rows"]
            if row["impl"] == impl and "error" not in row
        }
        row = {"impl": impl, **largest_within(budget_bytes, points, count, available)}
        row["parameters"] = parameters(model_name(row["depth"], growth_rate)) if row["depth"] else None
        row["state_bytes"] = STATE_BYTES * row["parameters"] if row["depth"] else None
        found.append(row)
    return {"bytes": budget_bytes, "method": METHOD, "rows": found}


def counted_step(impl: str, settings: WorkerConfig) -> dict[str, int]:
    """Return the `peak_bytes` and `peak_rss_bytes` of one step, untimed, in a process of its own.

    One step comes before it, after which gradients and momentum exist. Raises WorkerError.
    """
    with contextlib.closing(Worker(impl, force_reference=models.parse_impl(impl).fallback)) as worker:
        worker.build(settings)
        worker.warm_up(1)
        return worker.finish()


def largest_within(
    budget_bytes: int,
    points: Points,
    count: Callable[[int], dict[str, int]],
    available: Callable[[], int] = measure.available_bytes,
) -> dict[str, Any]:
    """Count depths until the largest that fits and the first that does not are next to each other.

    `points` is what has been counted before, `count` counts one depth more. "stopped" says why the search
    ended before that: the next depth would need more than the device's `available()` bytes, or failed.
    """
    points, stopped = dict(points), None
    counted: list[Any] = []
    if not points:
        stopped = "no depth was measured"
    while stopped is None:
        largest, smallest_over = _bracket(points, budget_bytes)
        if smallest_over is not None and smallest_over - largest <= STEP:
            break
        depth = _guess(points, budget_bytes, largest, smallest_over)
        if smallest_over is not None and len(counted) % 3 == 2:  # where no fit holds, halve
            depth = largest + max(1, (smallest_over - largest) // (2 * STEP)) * STEP
        room = ROOM * available()
        while depth > largest + STEP and _memory_needed(points, depth) > room:
            depth -= STEP
        if (needed := _memory_needed(points, depth)) > room:
            stopped = f"depth {depth} would need {needed / MIB:,.0f} MiB of {room / MIB:,.0f} free here"
            break
        try:
            points[depth] = count(depth)
            counted.append(depth)
        except WorkerError as error:
            stopped = f"depth {depth}: {error}"
    largest, smallest_over = _bracket(points, budget_bytes)
    return {
        "depth": largest if largest in points else None,
        "peak_bytes": points[largest]["peak_bytes"] if largest in points else None,
        "next_depth": smallest_over,
        "next_peak_bytes": points[smallest_over]["peak_bytes"] if smallest_over else None,
        "stopped": stopped,
        "counted": [{"depth": depth, **points[depth]} for depth in sorted(counted)],
    }


def _bracket(points: Points, budget_bytes: int) -> tuple[int, int | None]:
    """The largest depth that fits, `SHALLOWEST - STEP` where none does; the first above it that does not."""
    over = [depth for depth, point in points.items() if point["peak_bytes"] > budget_bytes]
    largest = max(points.keys() - set(over), default=SHALLOWEST - STEP)
    return largest, min((depth for depth in over if depth > largest), default=None)


def _guess(points: Points, budget_bytes: int, largest: int, smallest_over: int | None) -> int:
    """The depth that should be the largest to fit: not counted yet, and at most twice as deep as any that was."""
    nearest = sorted(points, key=lambda depth: abs(points[depth]["peak_bytes"] - budget_bytes))[:3]
    expected = _fit({depth: points[depth] for depth in nearest}, "peak_bytes")
    deepest = 2 * max(points) if smallest_over is None else smallest_over - STEP
    depth = largest + STEP
    while depth + STEP <= deepest and expected(depth + STEP) <= budget_bytes:
        depth += STEP
    return depth


def _memory_needed(points: Points, depth: int) -> float:
    """The bytes that a process counting this depth should take."""
    return max(_fit(points, key)(depth) for key in ("peak_bytes", "peak_rss_bytes"))


def _fit(points: Points, key: str) -> Callable[[int], float]:
    """The parabola, line or multiple (by the number of points) that fits `key` over depth best."""
    depths, values = list(points), [point[key] for point in points.values()]
    if len(depths) == 1:
        return lambda depth: values[0] * depth / depths[0]
    import numpy as np

    coefficients = np.polyfit(depths, values, min(2, len(depths) - 1))
    return lambda depth: float(np.polyval(coefficients, depth))


def table(result: dict[str, Any], title: str) -> Table:
    """Return one line per depth: every implementation's peak above the built model and its time per step."""
    from rich.table import Table

    impls = list(dict.fromkeys(row["impl"] for row in result["rows"]))
    labels = {row["impl"]: _what(row) for row in result["rows"] if row["label"]}
    caption = [compare.machine(result["environment"]), *(f"{impl}: {what}" for impl, what in labels.items())]
    shown = Table(title=title, title_justify="left", caption="\n".join(caption), caption_justify="left")
    shown.add_column("depth", justify="right", no_wrap=True)
    shown.add_column("parameters", justify="right", no_wrap=True)
    for impl in impls:
        heading = impl.replace("-", "-\n", 1).replace("+", "\n+")
        shown.add_column(f"{heading}\nMiB", justify="right", no_wrap=True)
        shown.add_column("ms", justify="right", no_wrap=True)
    by_place = {(row["depth"], row["impl"]): row for row in result["rows"]}
    for depth in dict.fromkeys(row["depth"] for row in result["rows"]):
        rows = [by_place[depth, impl] for impl in impls]
        cells = [f"{depth}", f"{rows[0]['parameters']:,}"]
        for row in rows:
            failed = "error" in row
            cells.append("[red]failed[/red]" if failed else f"{row['peak_bytes'] / MIB:,.1f}")
            cells.append("-" if failed else f"{row['median_ms']:,.{0 if row['median_ms'] >= 100 else 1}f}")
        shown.add_row(*cells)
    return shown


def _what(row: dict[str, Any]) -> str:
    from rich.markup import escape

    return escape(row["label"] + (", effdense's C++" if row["compiled"] else ""))


def remarks(result: dict[str, Any]) -> list[str]:
    """Return a line, with rich's markup, for every row that failed, computed something else or has an open end."""
    from rich.markup import escape

    lines = []
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"[red]depth {row['depth']}, {row['impl']}, failed:[/red] {escape(row['error'])}")
        elif "note" in row:
            lines.append(f"[yellow]depth {row['depth']}, {row['impl']}:[/yellow] {escape(row['note'])}")
    for row in result.get("budget", {"rows": ()})["rows"]:
        if row["stopped"]:
            lines.append(f"[yellow]budget, {row['impl']}, stopped:[/yellow] {escape(row['stopped'])}")
    return lines


def budget_table(budget: dict[str, Any]) -> Table:
    """Return one line per implementation with the deepest network within the budget."""
    from rich.table import Table

    shown = Table(title=f"Deepest within {_size(budget['bytes'])}", title_justify="left")
    shown.caption, shown.caption_justify = f"How found: {budget['method']}", "left"
    shown.add_column("implementation", no_wrap=True)
    for heading in (
        "depth",
        "parameters",
        "peak\nMiB",
        "on top\nMiB",
        "next depth,\ntoo deep",
        "its peak\nMiB",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in budget["rows"]:
        shown.add_row(
            row["impl"],
            "-" if not row["depth"] else f"{'at least ' if row['stopped'] else ''}{row['depth']}",
            f"{row['parameters']:,}" if row["depth"] else "-",
            *(
                f"{row[key] / MIB:,.1f}" if row[key] is not None else "-"
                for key in ("peak_bytes", "state_bytes")
            ),
            f"{row['next_depth'] or '-'}",
            f"{row['next_peak_bytes'] / MIB:,.1f}" if row["next_depth"] else "-",
        )
    return shown


def _size(size_bytes: int) -> str:
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if size_bytes >= UNITS[unit.lower()])
    return f"{size_bytes / UNITS[unit.lower()]:.6g} {unit}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth_sweep", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add, positive, output = parser.add_argument, compare.positive, compare.output_file
    add("--growth", type=positive, metavar="K", default=12, help="features a layer adds (12)")
    add("--depths", default=DEFAULT_DEPTHS, help=f"of the form 6 n + 4 ({DEFAULT_DEPTHS})")
    add("--batch", type=positive, default=64, help="images per step (64)")
    add("--image-size", type=positive, default=32, help="pixels on a side (32)")
    add(
        "--impl",
        default=DEFAULT_IMPLS,
        help=f"some of {', '.join(models.IMPLS)}, each also with {models.CHANNELS_LAST}",
    )
    add("--device", type=devices.argument, default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=positive, metavar="N", help="PyTorch's default unless given")
    add(
        "--repeats",
        type=positive,
        metavar="N",
        default=3,
        help="timed steps per depth and implementation (3)",
    )
    add("--budget", type=values.size, metavar="SIZE", help="find the deepest network within, e.g. 2GiB")
    add("--json", type=output, metavar="FILE", help="write everything measured here")
    add("--plot", type=output, metavar="FILE.png", help="draw memory and time over depth here")
    parsed = parser.parse_args(arguments)
    try:
        parsed.impl = _impls(parsed.impl)
        parsed.depths = _depths(parsed.depths, parsed.growth)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def _impls(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError("--impl names no implementation")
    return [models.parse_impl(name).name for name in names]


def _depths(text: str, growth_rate: int) -> list[int]:
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--depths must be whole numbers with commas between them, got {text!r}")
    depths = sorted({int(number) for number in numbers})
    for depth in depths:
        models.default_sizes(model_name(depth, growth_rate))  # a ValueError names the nearest depth
    return depths


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when an implementation failed."""
    parsed = _parse(arguments)
    if parsed.budget:
        import numpy  # noqa: F401 (before the measurement, as the next: what is missing must not cost it)
    if parsed.plot:
        from benchmarks import plots
    device = parsed.device.name
    settings = WorkerConfig("", parsed.batch, parsed.image_size, threads=parsed.threads, device=device)
    title = f"DenseNet-BC, growth {parsed.growth}, training step, batch {parsed.batch}, "
    title += f"{parsed.image_size}x{parsed.image_size}, {settings.dtype}{compare.elsewhere(settings)}"
    pieces = len(parsed.impl) * ((parsed.repeats + 2) * len(parsed.depths) + 2 * bool(parsed.budget))
    with compare.progress(pieces, compare.console(stderr=True)) as on_progress:
        result = run(settings, parsed.growth, parsed.depths, parsed.impl, parsed.repeats, on_progress)
        if parsed.budget:
            result["budget"] = within_budget(result, settings, parsed.growth, parsed.budget, on_progress)
    console = compare.console()
    console.print(table(result, title))
    if parsed.budget:
        console.print(budget_table(result["budget"]))
    for line in remarks(result):
        console.print(line)
    if parsed.json:
        compare.write_json(result, parsed.json)
    if parsed.plot:
        plots.depth_sweep(result["rows"], title, parsed.plot, parsed.budget)
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
