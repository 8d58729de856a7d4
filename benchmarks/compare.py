"""Time and memory of a training or inference step, per implementation, side by side.

    python -m benchmarks.compare --model densenet121 --impl naive,checkpoint,effdense-balanced --json out.json

Each implementation runs in a process of its own; they take turns, one step each, so that drift hits all
alike. On a GPU (`--device cuda`) they all hold memory at the same time. `run` is the measurement, the rest the command
line; worker.py, measure.py and devices.py define the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import devices, isa, measure, models
from benchmarks.program import reports_missing_packages
from benchmarks.worker import Worker, WorkerConfig, WorkerError

if TYPE_CHECKING:  # measuring does without
    from rich.console import Console
    from rich.table import Table

MIB = 2**20

OnProgress = Callable[[str], None]


def run(
    settings: WorkerConfig,
    impls: Sequence[str],
    repeats: int = 7,
    on_progress: OnProgress = lambda what: None,
) -> dict[str, Any]:
    """Measure every implementation and return `{"environment": {...}, "rows": [{...}, ...]}`.

    One row per implementation, in the order of `impls`. Where one failed, its row has the reason under
    "error" and None for the numbers. `on_progress` is called before each of the
    `(repeats + 2) * len(impls)` pieces of work.
    """
    device = devices.find(settings.device)
    result: dict[str, Any] = {
        "environment": {**measure.environment(settings.threads), **device.environment()},
        "rows": [_empty_row(settings, i) for i in impls],
    }
    result["environment"]["isa"] = settings.isa
    if settings.isa:
        result["environment"]["isa_variables"] = isa.variables(settings.isa)
    with contextlib.ExitStack() as stack:
        pairs: list[tuple[dict[str, Any], Worker]] = []
        for row in result["rows"]:
            on_progress(f"{row['impl']}: build and warm up")
            worker = Worker(row["impl"], models.parse_impl(row["impl"]).fallback, settings.isa)
            stack.callback(worker.close)
            if _try(row, worker, "build", settings) and _try(row, worker, "warm_up", device.warm_up_steps):
                pairs.append((row, worker))
        for turn in range(repeats):
            for row, worker in pairs:
                on_progress(f"{row['impl']}: step {turn + 1} of {repeats}")
                if "error" not in row and _try(row, worker, "step"):
                    row["times_ms"].append(row.pop("ms"))
        for row, worker in pairs:
            on_progress(f"{row['impl']}: counted step")
            if "error" not in row and _try(row, worker, "finish"):
                row.update(measure.time_statistics(row["times_ms"]))
    for ran in {row["cpu_capability"] for row in result["rows"]} - {None}:  # one: it was the same for all
        result["environment"]["cpu_capability"] = ran
        (result["environment"]["effdense"] or {}).update(cpu_capability=ran)
    _note_differing_losses(result["rows"], device.loss_tolerance[settings.dtype])
    _compare_with_peers(result["rows"])
    return result


def _empty_row(settings: WorkerConfig, impl: str) -> dict[str, Any]:
    numbers = ("median_ms", "p20_ms", "p80_ms", "peak_bytes", "peak_rss_bytes")
    parsed = models.parse_impl(impl)
    return {
        "impl": impl,
        "label": None,
        "compiled": False,
        **dict.fromkeys(numbers),
        "memory": parsed.memory,
        "mode": settings.mode,
        "model": settings.model,
        "batch": settings.batch,
        "image_size": settings.image_size,
        "dtype": settings.dtype,
        "device": settings.device,
        "isa": settings.isa,
        "cpu_capability": None,
        "vs_fastest_peer": None,
        "data": settings.data,
        "channels_last": parsed.channels_last,
        "times_ms": [],
    }


def _try(row: dict[str, Any], worker: Worker, command: str, *arguments: Any) -> bool:
    try:
        row.update(getattr(worker, command)(*arguments))
    except WorkerError as error:
        row["error"] = str(error)
        worker.close()  # the others need the memory that it still holds
    return "error" not in row


def _note_differing_losses(rows: Sequence[dict[str, Any]], tolerance: float) -> None:
    """All start from the same weights and images: another first loss is another computation."""
    measured = [row for row in rows if "error" not in row]
    for row in measured[1:]:
        first = measured[0]
        expected, found = first["first_loss"], row["first_loss"]
        if not abs(found - expected) <= tolerance * abs(expected):
            row["note"] = f"its first loss is {found:.6g}, {first['impl']}'s is {expected:.6g}"


def _compare_with_peers(rows: Sequence[dict[str, Any]]) -> None:
    """Set `vs_fastest_peer`: how many times as fast a row is as the fastest that is not effdense."""
    measured = [row for row in rows if row["median_ms"]]
    peers = [row["median_ms"] for row in measured if models.parse_impl(row["impl"]).base != "effdense"]
    for row in measured if peers else ():
        row["vs_fastest_peer"] = min(peers) / row["median_ms"]


def ratio_to_naive(rows: Sequence[dict[str, Any]], row: dict[str, Any], key: str) -> float | None:
    """Return `row[key]` divided by the naive row's, or None where either was not measured."""
    naive = next((r for r in rows if r["impl"].partition("+")[0] == "naive" and r[key]), None)
    return row[key] / naive[key] if naive and row[key] else None


def table(result: dict[str, Any], title: str) -> Table:
    """Return the rows as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=title, title_justify="left", caption=machine(result["environment"]), caption_justify="left"
    )
    shown.add_column("implementation", no_wrap=True)
    for heading in ("ms/step", "p20-p80", "vs fastest\npeer", "peak MiB", "memory\nvs naive", "process\nMiB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("what it is")
    rows = result["rows"]
    for row in rows:
        if "error" in row:
            shown.add_row(row["impl"], *["-"] * 6, f"[red]failed:[/red] {escape(row['error'])}")
            continue
        ratios = (row["vs_fastest_peer"], ratio_to_naive(rows, row, "peak_bytes"))
        as_fast, memory_ratio = ("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
        what = row["label"] + (", effdense's C++" if row["compiled"] else "")
        shown.add_row(
            row["impl"],
            milliseconds(row),
            f"{row['p20_ms']:.0f}-{row['p80_ms']:.0f}",
            as_fast,
            f"{row['peak_bytes'] / MIB:.1f}",
            memory_ratio,
            f"{row['peak_rss_bytes'] / MIB:.0f}",
            escape(what) + (f" [yellow](note: {escape(row['note'])})[/yellow]" if "note" in row else ""),
        )
    return shown


def milliseconds(row: dict[str, Any]) -> str:
    """Return a row's time as a table shows it."""
    return f"{row['median_ms']:.0f}" if row["median_ms"] >= 100 else f"{row['median_ms']:.1f}"


def title(settings: WorkerConfig) -> str:
    """Return one line that says what was measured."""
    size = f"{settings.image_size}x{settings.image_size}"
    step = "training step" if settings.mode == "train" else "inference"
    data = "" if settings.data == "synthetic" else f", {settings.data}"
    return f"{settings.model}, {step}, batch {settings.batch}, {size}, {settings.dtype}{data}{elsewhere(settings)}"


def elsewhere(settings: WorkerConfig) -> str:
    """Return the end of a title: the device, where it is not the CPU."""
    return "" if settings.device == "cpu" else f", {settings.device}"


def machine(environment: dict[str, Any]) -> str:
    """Return one line on where and with what it was measured."""
    gpu = ""
    if on := environment.get("gpu"):
        gpu = f"{on['name']} (compute capability {on['compute_capability']}, driver {on['driver']}, CUDA {on['cuda']}, "
        gpu += f"cuDNN {on['cudnn']} with benchmark on, TF32 {'on' if on['tf32'] else 'off'}), "
    asked = f", limited by --isa {environment['isa']}" if environment.get("isa") else ""
    return (
        f"{gpu}{environment['cpu']} ({environment['cpu_capability']}{asked}), {environment['threads']} threads, "
        f"torch {environment['torch']}, load before {environment['load_average']:.1f}"
    )


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write `result` as JSON, as `write_text` does."""
    write_text(json.dumps(result, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


@contextlib.contextmanager
def progress(total: int, console: Console) -> Iterator[OnProgress]:
    """Yield an `on_progress` that moves a bar; nothing is left on the screen afterwards."""
    from rich import progress as rich
    from rich.markup import escape

    columns = (
        rich.SpinnerColumn(),
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        done = iter(range(total + 1))
        yield lambda what: bar.update(task, description=escape(what), completed=next(done, total))


def console(stderr: bool = False) -> Console:
    """Return a console; where there is no terminal to ask for its width, lines may be long."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 160, highlight=False)


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, WorkerConfig, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        default="densenet_bc_100_12",
        help="densenet121 ..., densenet_bc_<depth>_<growth>, densenet_<depth>_<growth> (plain layers), "
        "densenet_d2l, densenet121_3d, torchvision:NAME",
    )
    add("--batch", type=positive, help="images per step (8 for densenet121 ..., else 64)")
    add(
        "--image-size",
        type=positive,
        help="pixels on a side (224 for densenet121 ..., 96 for densenet_d2l, else 32)",
    )
    add(
        "--impl",
        default="all",
        help=f"some of {', '.join(models.IMPLS)}, each also with {models.CHANNELS_LAST}; peers: all that are not effdense "
        "in both layouts; effdense: its memory modes; all: both (all)",
    )
    add("--mode", choices=("train", "inference"), default="train")
    add("--device", type=devices.argument, default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the others are autocast; float16, with scaled gradients, is for cuda",
    )
    add("--data", choices=("synthetic", "fashion-mnist"), default="synthetic")
    add("--channels-last", action="store_true", help="every implementation in channels-last layout")
    isa.add_argument(parser)
    add("--threads", type=positive, metavar="N", help="PyTorch's default unless given")
    add("--repeats", type=positive, metavar="N", default=7, help="timed steps per implementation (7)")
    add("--json", type=output_file, metavar="FILE", help="write everything measured here")
    add("--table", type=output_file, metavar="FILE.md", help="write the rows for a README here")
    add("--plot", type=output_file, metavar="FILE.png", help="draw memory and time here")
    parsed = parser.parse_args(arguments)
    isa.refuse_other_devices(parser, parsed.isa, parsed.device.type)
    impls = models.expand([name.strip() for name in parsed.impl.split(",") if name.strip()], parsed.mode)
    try:
        if parsed.dtype not in parsed.device.loss_tolerance:
            raise ValueError(f"--dtype {parsed.dtype} needs --device cuda")
        if not impls:
            raise ValueError("--impl names no implementation")
        if parsed.channels_last:
            impls = list(
                dict.fromkeys(n.removesuffix(models.CHANNELS_LAST) + models.CHANNELS_LAST for n in impls)
            )
        for name in impls:
            models.parse_impl(name)
        batch, image_size = models.default_sizes(parsed.model)
    except ValueError as error:
        parser.error(str(error))
    shared = {key: getattr(parsed, key) for key in ("model", "mode", "dtype", "data", "threads", "isa")}
    sizes: dict[str, Any] = {"batch": parsed.batch or batch, "image_size": parsed.image_size or image_size}
    return parsed, WorkerConfig(**shared, **sizes, device=parsed.device.name), impls


def positive(text: str) -> int:
    """Return the whole number of 1 or more that an argument of a command line is."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return number


def output_file(text: str) -> Path:
    """Return the path that an argument names, if a file can be written there."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write a file at {text!r}")
    return path


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when an implementation failed."""
    parsed, settings, impls = _parse(arguments)
    if settings.data != "synthetic":
        import numpy  # noqa: F401 (before the measurement, as the next: what is missing must not cost it)
    if parsed.plot:
        from benchmarks import plots
    with progress((parsed.repeats + 2) * len(impls), console(stderr=True)) as on_progress:
        result = run(settings, impls, parsed.repeats, on_progress)
    console().print(table(result, title(settings)))
    if parsed.json:
        write_json(result, parsed.json)
    if parsed.table:
        from benchmarks import markdown

        write_text(markdown.comparison(result, settings), parsed.table)
    if parsed.plot:
        plots.comparison(result["rows"], title(settings), parsed.plot)
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
