"""Other libraries' DenseNets, as they are and converted: what was converted, how far results are apart, memory, time.

    python -m benchmarks.libraries --json out.json --table out.md

Peaks and times are compare.py's; the differences are those of one training step in float64.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import effdense
from benchmarks import compare, models, nets
from benchmarks.compare import MIB, OnProgress
from benchmarks.nets import Parts
from benchmarks.parts import fused
from benchmarks.program import reports_missing_packages
from benchmarks.worker import WorkerConfig, batch_for, loss_of

if TYPE_CHECKING:  # measuring does without
    from rich.table import Table

IMPLS = ("naive", "effdense-balanced")
# With batches of half the usual size.
LARGE = tuple(f"torchvision:densenet{depth}" for depth in (161, 169, 201))
NAMES = ("torchvision:densenet121", *LARGE, *nets.NETS)
PROBE_BATCH = 2  # of the step in float64
PROBE_VOLUME = 64  # the largest volumes in it: PyTorch's convolution in float64 takes minutes for more
HEADINGS = (
    "library: model",
    "input",
    "blocks, transitions, stem, head converted",
    "output error",
    "gradient error",
    "peak MiB before",
    "after",
    "ms/step before",
    "after",
)


def run(
    names: Sequence[str],
    repeats: int = 3,
    threads: int | None = None,
    on_progress: OnProgress = lambda what: None,
) -> dict[str, Any]:
    """Measure every net and return `{"environment": {...}, "rows": [{...}, ...]}`: two rows a net, compare.run's.

    The converted net's row has `parts`, `converted` (how many of each run fused), `output_error` and `gradient_error` too, or an
    "error" that says why not.
    `on_progress` is called `pieces(repeats)` times per net.
    """
    result: dict[str, Any] = {"rows": []}
    for name in names:
        settings = settings_of(name, threads)
        measured = compare.run(
            settings,
            IMPLS,
            repeats,
            lambda what, name=name: on_progress(f"{name}, {what}"),  # type: ignore[misc]
        )
        result.setdefault("environment", measured["environment"])
        on_progress(f"{name}: differences in float64")
        after = measured["rows"][1]
        if "error" not in after:
            after.update(differences(settings))
        result["rows"] += measured["rows"]
    return result


def pieces(repeats: int) -> int:
    """Return how often `run` reports progress for a net."""
    return (repeats + 2) * len(IMPLS) + 1


def settings_of(name: str, threads: int | None = None) -> WorkerConfig:
    """Return the sizes at which a net is measured."""
    batch, image_size = models.default_sizes(name)
    return WorkerConfig(name, batch // 2 if name in LARGE else batch, image_size, threads=threads)


def parts_of(name: str) -> Parts:
    """Return what a net has that could run fused."""
    return nets.NETS[name].parts if name in nets.NETS else Parts(4, 3, 1, 1)


def differences(settings: WorkerConfig) -> dict[str, Any]:
    """Return how many blocks and other parts run fused, and how far one training step's results are from the unconverted net's.

    The errors are those of the output and of all gradients together: |after - before| / |before|, Euclidean norms, in float64.
    """
    torch.manual_seed(settings.seed)
    before = models.build(settings.model, "naive").model.double()
    after = effdense.convert(copy.deepcopy(before))
    volumes = any(isinstance(m, torch.nn.Conv3d) for m in before.modules())
    size = min(settings.image_size, PROBE_VOLUME) if volumes else settings.image_size
    images, labels = batch_for(dataclasses.replace(settings, batch=PROBE_BATCH, image_size=size), before)
    (output, grads), (own_output, own_grads) = (
        _step(model, images.double(), labels) for model in (before, after)
    )
    return {
        "parts": parts_of(settings.model)._asdict(),
        "converted": fused(after, images.double())._asdict(),
        "output_error": _distance([own_output], [output]),
        "gradient_error": _distance(own_grads, grads),
    }


def _step(model: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)  # the same dropout
    images = images.clone().requires_grad_()
    outputs = model.train()(images)
    loss = loss_of(outputs, labels)
    grads = torch.autograd.grad(loss, [images, *model.parameters()], materialize_grads=True)
    return outputs.detach(), list(grads)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    def norm(tensors: Sequence[Tensor]) -> float:
        return sum(float(t.square().sum()) for t in tensors) ** 0.5

    return norm([a - b for a, b in zip(found, expected, strict=True)]) / norm(expected)


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, a list per net."""
    cells = []
    for before, after in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        library, _, model = before["model"].partition(":")
        dims = 3 if "3d" in model else 2
        what = [f"{library}: {model}", f"{before['batch']} x {'x'.join([str(before['image_size'])] * dims)}"]
        errors = [row["error"] for row in (before, after) if "error" in row]
        if errors:
            cells.append([*what, f"failed: {errors[0]}", *["-"] * (len(HEADINGS) - 3)])
            continue
        peaks = [f"{row['peak_bytes'] / MIB:,.0f}" for row in (before, after)]
        times = [f"{row['median_ms']:,.0f}" for row in (before, after)]
        peaks[1] += f" ({after['peak_bytes'] / before['peak_bytes']:.2f}x)"
        times[1] += f" ({before['median_ms'] / after['median_ms']:.2f}x as fast)"
        distances = [f"{after[key]:.0e}" for key in ("output_error", "gradient_error")]
        counts = [f"{after['converted'][part]}/{n}" if n else "-" for part, n in after["parts"].items()]
        cells.append([*what, ", ".join(counts), *distances, *peaks, *times])
    return cells


def table(result: dict[str, Any], repeats: int) -> Table:
    """Return the table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    caption = compare.machine(result["environment"])
    title = (
        f"Training steps before and after effdense.convert, float32, medians of {repeats}; errors in float64"
    )
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if i < 2 else "right")
    for cells in lines(result):
        shown.add_row(*map(escape, cells))
    return shown


def markdown(result: dict[str, Any]) -> str:
    """Return the table for a README."""
    rows = [HEADINGS, ["---", "---", *["---:"] * (len(HEADINGS) - 2)], *lines(result)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.libraries", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", type=_names, metavar="NAME,...", default=NAMES, help=f"some of {', '.join(NAMES)}")
    add("--repeats", type=compare.positive, metavar="N", default=3, help="timed steps per implementation (3)")
    add("--threads", type=compare.positive, metavar="N", help="PyTorch's default unless given")
    add("--json", type=compare.output_file, metavar="FILE", help="write everything measured here")
    add("--table", type=compare.output_file, metavar="FILE.md", help="write the table here")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    """Names in full, or their beginnings: timm is all of timm's."""
    chosen = []
    for part in filter(None, map(str.strip, text.split(","))):
        matching = [name for name in NAMES if name == part or name.startswith(f"{part}:")]
        if not matching:
            raise argparse.ArgumentTypeError(f"there is no {part!r}; there are {', '.join(NAMES)}")
        chosen += matching
    if not chosen:
        raise argparse.ArgumentTypeError("it names no model")
    return list(dict.fromkeys(chosen))


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when something failed."""
    parsed = _parse(arguments)
    with compare.progress(
        pieces(parsed.repeats) * len(parsed.only), compare.console(stderr=True)
    ) as on_progress:
        result = run(parsed.only, parsed.repeats, parsed.threads, on_progress)
    compare.console().print(table(result, parsed.repeats))
    if parsed.json:
        compare.write_json(result, parsed.json)
    if parsed.table:
        compare.write_text(markdown(result), parsed.table)
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
