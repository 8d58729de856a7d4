"""Host time: a step of models on images so small that hardly anything is computed. It is the time around the kernels.

    python -m benchmarks.host --json out.json

On a card where the host is the bottleneck, as it is at ordinary batch sizes, this is what a step takes. A step is forward and
backward; the optimizer's is the same for all. One thread; implementations take turns; minima.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, measure, models
from benchmarks.program import reports_missing_packages
from benchmarks.worker import WorkerConfig, batch_for, loss_of

SIZES = {"densenet_bc_100_12": (4, 4), "densenet121": (2, 32)}  # images, and their size
IMPLS = ("naive", "checkpoint", "compile", "effdense-balanced", "effdense-minimal")
WARM_UP = 4
HEADINGS = ("model", "implementation", "training ms", "of naive's", "inference ms", "of naive's")


def run(
    names: Sequence[str] = tuple(SIZES),
    impls: Sequence[str] = IMPLS,
    rounds: int = 30,
    on_progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure and return `{"environment": {...}, "rows": [{model, impl, training_ms, inference_ms}, ...]}`, minima of `rounds`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: list[dict[str, Any]] = []
        for name in names:
            images, size = SIZES[name]
            settings = WorkerConfig(name, images, size, threads=1)
            calls = {}
            for impl in impls:
                on_progress(f"{name}, {impl}")
                calls[impl] = _calls(settings, impl)
            times = _take_turns(
                {(i, mode): f for i, both in calls.items() for mode, f in both.items()}, rounds
            )
            rows += [
                {"model": name, "batch": images, "image_size": size, "impl": impl}
                | {f"{mode}_ms": 1e3 * times[impl, mode] for mode in both}
                for impl, both in calls.items()
            ]
        return {"environment": measure.environment(1), "rounds": rounds, "rows": rows}
    finally:
        torch.set_num_threads(threads)


def _calls(settings: WorkerConfig, impl: str) -> dict[str, Callable[[], Any]]:
    """A training step and a forward of models of their own, warmed up."""
    calls: dict[str, Callable[[], Any]] = {}
    for mode in ("training", "inference"):
        if mode == "inference" and impl == "checkpoint":
            continue  # it is naive's
        torch.manual_seed(settings.seed)
        model = models.build(settings.model, impl).model
        x, labels = batch_for(settings, model)
        if mode == "training":
            calls[mode] = _step(model.train(), x, labels)
        else:
            model.eval()
            calls[mode] = torch.no_grad()(lambda model=model, x=x: model(x))
        for _ in range(WARM_UP):
            calls[mode]()
    return calls


def _step(model: Any, x: Any, labels: Any) -> Callable[[], Any]:
    parameters = list(model.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        loss_of(model(x), labels).backward()

    return step


def _take_turns(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """The least seconds of each, one after the other, round by round."""
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key] = min(times[key], time.perf_counter() - start)
    return times


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, a list per row."""
    naive = {row["model"]: row for row in result["rows"] if row["impl"] == "naive"}
    cells = []
    for row in result["rows"]:
        cell = [row["model"], row["impl"]]
        for mode in ("training_ms", "inference_ms"):
            base = naive.get(row["model"], {}).get(mode)
            cell += (
                [f"{row[mode]:.1f}", f"{row[mode] / base:.2f}" if base else "-"]
                if mode in row
                else ["-", "-"]
            )
        cells.append(cell)
    return cells


@reports_missing_packages
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--impl", nargs="+", default=list(IMPLS), help=f"default: {' '.join(IMPLS)}")
    parser.add_argument("--rounds", type=int, default=30, help="times that each is run (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    def progress(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    result = run(arguments.model, arguments.impl, arguments.rounds, progress)
    table = Table(
        title="Host time, minima", title_justify="left", caption=compare.machine(result["environment"])
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for cells in lines(result):
        table.add_row(*cells)
    Console().print(table)
    if arguments.json is not None:
        compare.write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
