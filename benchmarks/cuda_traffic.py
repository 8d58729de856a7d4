"""Bytes that the CUDA operators of a training step move, counted on the CPU, against what they must move.

    python -m benchmarks.cuda_traffic --json docs/results/cuda-traffic.json

The kernels' own source runs under the harness of harness/simt, which counts every load and store of global memory. So it runs
from the repository's root only, and needs g++ and the CUDA toolkit's headers, no GPU. Half precision, every layer, few
images: the harness makes some hundred million products a second. What happens in caches is not simulated.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import compare, grids, measure, separate_kernels, traced
from benchmarks.program import reports_missing_packages
from benchmarks.traced import Call, Like

if TYPE_CHECKING:  # measuring does without
    from rich.table import Table

MODELS = {"densenet_bc_100_12": 32, "densenet121": 224, "densenet161": 224}  # and their images' size
IMPLS = ("effdense-balanced", "effdense-minimal")
GATE = 1.1  # bytes / floor of an operator in a model, without what is read again within L2
# What is counted of one image is what each of 132 images costs on an H100, whose card has a multiprocessor for each: large
# tiles. With fewer images blocks are smaller, so that the card is filled, and have more partial sums: `partial_rows`.
MULTIPROCESSORS_PER_IMAGE, MULTIPROCESSORS = 1, 132
MANY = 64  # images, for what can be computed from shapes
BATCHES = (16, 32, 64, 256)  # for the partial sums of bottleneck_backward; the gate is for the last
MIB = 2**20
# Of the arguments that are written, those that are read as well.
READ_TOO = {
    ("bn_relu_backward", "grad"),
    ("bottleneck_backward", "grad_features"),
    ("bn_relu_backward_accumulate", "grad_x"),
    ("accumulate_correction", "a"),
    ("accumulate_correction", "b"),
}
# PyTorch's part of a step that is the same for everybody: the classifier, the loss, the stem's weight gradient.
LEFT_OUT = ("addmm", "mm", "sum", "ones_like", "clone")


class Least(NamedTuple):
    """What a call must move, in bytes by tensor (`Like.number`), and what it returns."""

    reads: dict[int, int]
    writes: dict[int, int]
    results: int

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.results


class Count(NamedTuple):
    """What a call moves, in bytes: floor + again + partial."""

    floor: int  # every operand once, every result once
    again: int  # operands that other blocks of the launch read too: from L2, where they run side by side
    partial: int  # partial results, which a second kernel reads at once, and what it makes for a third

    @property
    def bytes(self) -> int:
        return self.floor + self.again + self.partial


def load_harness() -> Any:
    """torch.ops.effdense_simt, compiled where it is not yet."""
    from harness.simt.compiler import compile_operators

    torch.ops.load_library(str(compile_operators()))
    return torch.ops.effdense_simt


def least(call: Call) -> Least:
    """Every operand once, every result once; with the batch's statistics bn_relu_backward reads both maps twice."""
    schema = getattr(torch.ops.effdense, call.op).default._schema
    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    statistics = call.op == "bn_relu_backward" and call.arguments[-1]
    for argument, value in zip(schema.arguments, call.arguments, strict=True):
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or (call.op, argument.name) in READ_TOO
        if argument.name == "rstd" and call.op == "bn_relu_backward" and not statistics:
            read = False
        for like in traced.tensors(value):
            # accumulate_correction has the vectors of a whole buffer and uses a prefix
            size = (
                min(like.bytes, call.arguments[0].bytes) if call.op == "accumulate_correction" else like.bytes
            )
            passes = 2 if statistics and len(like.shape) > 1 else 1
            reads[like.number] += passes * size * read
            writes[like.number] += size * written
    return Least(reads, writes, sum(like.bytes for like in traced.tensors(call.results)))


def count(simt: Any, call: Call, multiprocessors: int = MULTIPROCESSORS) -> Count:
    """Runs the call under the harness, cut for so many multiprocessors.

    RuntimeError where loads are fewer, or stores other, than `least` has them.
    """
    made: dict[int, Tensor] = {}

    def make(value: Any) -> Any:
        if isinstance(value, Like):
            if value.number not in made:
                made[value.number] = value.make()
            return made[value.number]
        return [make(part) for part in value] if isinstance(value, tuple) else value

    arguments = [make(value) for value in call.arguments]
    simt.forget()
    for number, tensor in made.items():
        simt.watch(str(number), tensor)
    simt.override_multiprocessors(multiprocessors)
    try:
        getattr(simt, call.op)(*arguments)
    finally:
        simt.override_multiprocessors(0)
    must, again, elsewhere = least(call), 0, _moved(simt.traffic())
    for number in made:
        _, loaded, _, stored = of_operand = simt.watched(str(number))
        if loaded < must.reads[number] or stored != must.writes[number]:
            raise RuntimeError(
                f"{call.op}: operand {number} must be read {must.reads[number]} bytes and written "
                f"{must.writes[number]}, but {loaded} and {stored} were counted"
            )
        again += loaded - must.reads[number]
        elsewhere -= _moved(of_operand)
    simt.forget()
    return Count(must.bytes, again, elsewhere - must.results)


def _moved(counters: Sequence[int]) -> int:
    _, loaded, _, stored = counters
    return loaded + stored


def backward_partial_sums(call: Call, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Bytes of a bottleneck_backward's partial sums, up to 192 out channels: from its grid, for batches that take too long to run.

    Every count of `run` is compared with it.
    """
    channels, out = traced.tensors(call.arguments[0])[0].shape[1], call.arguments[5].shape[0]
    blocks = grids.plan(call, multiprocessors=multiprocessors)[0].grid[1]  # along the pixels
    return 2 * 4 * blocks * (out + 2) * channels if blocks > 1 else 0  # written and read, in float


def pytorch_bytes(calls: Iterable[Call]) -> int:
    """What PyTorch's kernels move in effdense's step: the transitions' 1x1 convolutions, and vectors."""
    total = 0
    for call in calls:
        if call.space != "aten" or call.op in LEFT_OUT:
            continue
        if call.op.startswith("convolution"):
            *_, x, weight = traced.tensors(call.arguments)
            if weight.shape[2:] == (1, 1):
                parts = separate_kernels.conv1x1(separate_kernels.Map(x.shape[1], x.pixels), weight.shape[0])
                forward = parts.pop("conv1x1")
                total += forward if call.op == "convolution" else sum(parts.values())
        else:
            total += sum(like.bytes for like in traced.tensors((call.arguments, call.results)))
    return total


def _ours(calls: Iterable[Call]) -> list[Call]:
    return [call for call in calls if call.space == "effdense"]


def operator_rows(model: str, calls: Sequence[Call], counts: dict[Call, Count]) -> list[dict[str, Any]]:
    """One row per operator of a step: its calls' sums, and the three worst of them."""
    of_op: dict[str, list[Call]] = defaultdict(list)
    for call in _ours(calls):
        of_op[call.op].append(call)
    rows = []
    for op, own in of_op.items():
        fields = ("bytes", "floor", "again", "partial")
        sums = {name: sum(getattr(counts[call], name) for call in own) for name in fields}
        worst = sorted(set(own), key=lambda call: -_ratio(counts[call]))[:3]
        layers = [{"layer": _layer(call), "ratio": _ratio(counts[call])} for call in worst]
        ratio = _ratio(Count(sums["floor"], sums["again"], sums["partial"]))
        rows.append({"model": model, "op": op, "calls": len(own), **sums, "ratio": ratio, "worst": layers})
    return sorted(rows, key=lambda row: -row["bytes"])


def _ratio(counted: Count) -> float:
    """What the gate is about."""
    return (counted.floor + counted.partial) / counted.floor


def _layer(call: Call) -> str:
    like = max(traced.tensors(call.arguments), key=lambda like: (len(like.shape), like.bytes))
    size = "x".join(map(str, like.shape[2:]))
    return f"{size + ', ' if size else ''}{like.shape[1] if size else like.shape[0]} channels"


def step_rows(
    model: str, images: int, size: int, steps: Mapping[str, Sequence[Call]], counts: dict[Call, Count]
) -> list[dict[str, Any]]:
    """One row per implementation: bytes per image of a step, and how many times less than naive's.

    `all_bytes` are all accesses, with `images` images; for plain PyTorch those of kernels that read every operand once.
    `memory_bytes` are with MANY images, and without what effdense reads again within L2; `memory_by` says whose they
    are. `cached_bytes` are the same without plain PyTorch's second passes of batch norm.
    """
    rows: list[dict[str, Any]] = []
    for impl, checkpoint in (("naive", False), ("checkpoint", True)):
        few, many, cached = (
            separate_kernels.step(model, n, size, checkpoint, passes)
            for n, passes in ((images, 2), (MANY, 2), (MANY, 1))
        )
        row: dict[str, Any] = {
            "impl": impl,
            "all_bytes": sum(few.values()) / images,
            "cached_bytes": sum(cached.values()) / MANY,
        }
        rows.append({**row, "memory_by": {term: size / MANY for term, size in many.items()}})
    for impl, calls in steps.items():
        total = pytorch_bytes(calls) + sum(counts[call].bytes for call in _ours(calls))
        by = memory_by_operator(traced.trace_model(model, impl, MANY, size))
        for call in _ours(calls):  # other partial sums grow with the images at most
            if call.op != "bottleneck_backward":
                by["partial sums"] += counts[call].partial / images
        rows.append(
            {"impl": impl, "all_bytes": total / images, "cached_bytes": sum(by.values()), "memory_by": by}
        )
    for row in rows:
        row.update(model=model, images=images, memory_bytes=sum(row["memory_by"].values()))
        for key in ("all", "memory", "cached"):
            row[f"{key}_ratio"] = rows[0][f"{key}_bytes"] / row[f"{key}_bytes"]
    return rows


def memory_by_operator(calls: Sequence[Call]) -> dict[str, float]:
    """Bytes per image of a step of MANY images, from shapes: floors, and bottleneck_backward's partial sums."""
    by = defaultdict[str, float](float, {"PyTorch's": pytorch_bytes(calls) / MANY})
    for call in _ours(calls):
        by[call.op] += least(call).bytes / MANY
        if call.op == "bottleneck_backward":
            by["partial sums"] += backward_partial_sums(call) / MANY
    return by


def partial_rows(model: str, size: int) -> list[dict[str, Any]]:
    """bottleneck_backward's partial sums in a step, as a part of its floor, for some batches."""
    rows = []
    for images in BATCHES:
        calls = traced.trace_model(model, IMPLS[0], images, size)
        own = [call for call in calls if call.op == "bottleneck_backward"]
        partial, floor = sum(map(backward_partial_sums, own)), sum(least(call).bytes for call in own)
        rows.append({"model": model, "images": images, "partial": partial, "floor": floor})
    return rows


def run(
    names: Sequence[str], images: int = 1, on_progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Count and return `{"environment", "images", "rows": [...], "steps": [...], "partial_sums": [...]}`.

    `rows` has one row per model and operator of a balanced step. `on_progress` is called before each model.
    """
    simt = load_harness()
    result: dict[str, Any] = {"environment": measure.environment(), "images": images, "image_sizes": MODELS}
    result.update(rows=[], steps=[], partial_sums=[])
    for name in names:
        on_progress(name)
        size = MODELS[name]
        steps = {impl: traced.trace_model(name, impl, images, size) for impl in IMPLS}
        distinct = {call for calls in steps.values() for call in _ours(calls)}
        card = MULTIPROCESSORS_PER_IMAGE * images
        counts = {call: count(simt, call, card) for call in distinct}
        for call in distinct:
            if call.op == "bottleneck_backward":
                said, found = backward_partial_sums(call, card), counts[call].partial
                if said != found:
                    raise RuntimeError(f"backward_partial_sums says {said}, counted: {found}")
        result["rows"] += operator_rows(name, steps[IMPLS[0]], counts)
        result["steps"] += step_rows(name, images, size, steps, counts)
        result["partial_sums"] += partial_rows(name, size)
    return result


def is_too_much(result: dict[str, Any]) -> bool:
    """Whether an operator misses the gate, counted or (its partial sums) with the most images."""
    many = [row for row in result["partial_sums"] if row["images"] == BATCHES[-1]]
    return any(row["ratio"] > GATE for row in result["rows"]) or any(
        row["partial"] > (GATE - 1) * row["floor"] for row in many
    )


def operators_table(result: dict[str, Any]) -> Table:
    """Return the operators as a table for the terminal; MB are MiB per image."""
    from rich.table import Table

    title = f"CUDA operators of a training step, float16, {result['images']} image(s), MiB per image"
    caption = (
        "floor: every operand and result once; bn_relu_backward with the batch's statistics reads its maps twice\n"
        f"cut for {MULTIPROCESSORS_PER_IMAGE} multiprocessor per image, as with {MULTIPROCESSORS} images on an H100\n"
        "again in L2: what blocks side by side read too: bottleneck's weight once per 128 pixels, bottleneck_backward's\n"
        "  grad_y and y once per 64 channels of x, the pixels of overlapping windows\n"
        f"gated, at most {GATE}: (floor + partial sums) / floor; with more images: the last table"
    )
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("operator", no_wrap=True)
    for heading in ("calls", "bytes", "floor", "again\nin L2", "partial\nsums", "bytes\n/ floor", "gated"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("worst layer", no_wrap=True)
    for before, row in zip([None, *result["rows"]], result["rows"], strict=False):
        if before is None or before["model"] != row["model"]:
            shown.add_section()
            shown.add_row(f"[bold]{row['model']}[/bold]")
        shown.add_row(
            f"  {row['op']}",
            str(row["calls"]),
            *(f"{row[key] / result['images'] / MIB:.2f}" for key in ("bytes", "floor", "again", "partial")),
            f"{row['bytes'] / row['floor']:.2f}",
            f"{'' if row['ratio'] <= GATE else '[red]'}{row['ratio']:.3f}",
            f"{row['worst'][0]['ratio']:.3f} ({row['worst'][0]['layer']})",
        )
    return shown


def steps_table(result: dict[str, Any]) -> Table:
    """Return the whole steps as a table for the terminal."""
    from rich.table import Table

    shown = Table(title="A training step, MiB per image (naive / this)", title_justify="left")
    shown.add_column("implementation", no_wrap=True)
    for heading in (
        f"{result['images']} image(s),\nall accesses",
        f"{MANY} images,\nfrom memory",
        "BN's second\npass from a cache",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in result["steps"]:
        if row["impl"] == "naive":
            shown.add_section()
            shown.add_row(f"[bold]{row['model']}[/bold]")
        cells = (
            f"{row[f'{key}_bytes'] / MIB:.1f} ({row[f'{key}_ratio']:.2f}x)"
            for key in ("all", "memory", "cached")
        )
        shown.add_row(f"  {row['impl']}", *cells)
    return shown


def partial_table(result: dict[str, Any]) -> Table:
    """Return the partial sums of larger batches as a table for the terminal."""
    from rich.table import Table

    title = "bottleneck_backward's partial sums / its floor, by images"
    shown = Table("model", title=title, title_justify="left")
    for images in BATCHES:
        shown.add_column(str(images), justify="right")
    parts = {(row["model"], row["images"]): row["partial"] / row["floor"] for row in result["partial_sums"]}
    for model in dict.fromkeys(model for model, _ in parts):
        shown.add_row(model, *(f"{parts[model, images]:.3f}" for images in BATCHES))
    return shown


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cuda_traffic", description=__doc__.splitlines()[0])
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--model", choices=MODELS, action="append", help="may be given more than once; all unless given")
    add("--images", type=compare.positive, metavar="N", default=1, help="per step (1)")
    add("--json", type=compare.output_file, metavar="FILE", help="write everything counted here")
    return parser.parse_args(arguments)


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when an operator moves too much."""
    parsed = _parse(arguments)
    names = list(dict.fromkeys(parsed.model or MODELS))
    with compare.progress(len(names), compare.console(stderr=True)) as on_progress:
        result = run(names, parsed.images, on_progress)
    for table in (operators_table, steps_table, partial_table):
        compare.console().print(table(result))
    if parsed.json:
        compare.write_json(result, parsed.json)
    return int(is_too_much(result))


if __name__ == "__main__":
    sys.exit(main())
