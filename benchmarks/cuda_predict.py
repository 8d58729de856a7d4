"""Predicts the launches of a training step on a GPU: what they are, how they fill it, and how long cuda_model expects them to take.

benchmarks.cuda_static calls it (--fill, --predict), because it has read the registers. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import cuda_model, cuda_traffic, grids, kernels, traced
from benchmarks.cuda_model import CARDS, Card, Work
from benchmarks.grids import Launch
from benchmarks.traced import Call

MODELS = {"densenet121": 224, "densenet_bc_100_12": 32}  # and their images' size
BATCHES = (16, 32, 64)
ENOUGH = 0.8  # of them; the launchers' rule (kernels/fill.cuh)
GEMMS = ("bottleneck_kernel", "bottleneck_backward_kernel")
# Shared memory of a multiprocessor in KB, by architecture: cuda_static.LIMITS has the same.
SHARED_KB = {"7.5": 64, "8.0": 164, "8.6": 100, "8.9": 100, "9.0": 228, "10.0": 228, "12.0": 100}
NUMBERS = {"float16": torch.half, "TF32": torch.float32}
VECTORS = ("fold", "accumulate_correction")  # operators without maps


class Residency(NamedTuple):
    """How many blocks of a kernel a multiprocessor of each architecture holds: {(kernel, architecture): blocks}."""

    blocks: Mapping[tuple[str, str], int]

    def of(self, launch: Launch, architecture: str) -> int:
        """KeyError where nobody has read the kernel."""
        return self.blocks[launch.kernel, architecture]


# What is traced is the Python engine. The stage in C++ has these in the kernels that make the vectors; of the norms' folding a
# launch is left for so many norms.
IN_KERNELS = ("accumulate_correction", "copy_", "zeros_like", "mul")
FOLDS_OF_A_LAUNCH = 24  # kFoldsAtOnce of csrc/cuda/kernels/batch_norm.cu


def step(model: str, images: int, impl: str = "effdense-balanced") -> list[Call]:
    """The calls of one training step, in half precision."""
    calls = _trace(model, images, impl, MODELS[model])
    if not impl.startswith("effdense"):
        return calls
    folds = [call for call in calls if call.op == "fold"]
    left = {id(call) for call in folds[::FOLDS_OF_A_LAUNCH]}
    return [
        call
        for call in calls
        if _size(call) or (id(call) in left if call.op == "fold" else call.op not in IN_KERNELS)
    ]


@functools.cache
def _trace(model: str, images: int, impl: str, size: int) -> list[Call]:
    return traced.trace_model(model, impl, images, size)


def plan(call: Call, card: Card, numbers: str = "float16") -> list[Launch]:
    """The launches of one of effdense's operators."""
    call = grids.with_dtype(call, NUMBERS[numbers])
    shared = SHARED_KB[card.architecture]
    return grids.plan(call, card.architecture, card.multiprocessors, shared)


def tile_of(launch: Launch, architecture: str) -> tuple[int, int, int, int]:
    """Of a GEMM forward: pixels and out channels of a block, bytes of depth of a stage, stages (bottleneck.cuh)."""
    out, pixels = map(int, re.findall(r", (\d+)", launch.kernel))
    stages = 2 if architecture == "7.5" else 4 if pixels == 64 else 3
    return pixels, out, 64 if pixels >= 64 else 4096 // pixels, stages


def works(call: Call, planned: Sequence[Launch], card: Card, numbers: str, resident: Residency) -> list[Work]:
    """What each launch of an operator's call does. Its first one has the operands, others the partial sums."""
    call = grids.with_dtype(call, NUMBERS[numbers])
    need = cuda_traffic.least(call).bytes
    made = []
    for launch in planned:
        held = resident.of(launch, card.architecture)
        if launch.family in GEMMS:
            forward = launch.family == GEMMS[0]
            cache, flops, *loop = (
                _forward(call, launch, card.architecture) if forward else _backward(call, launch)
            )
            speed = cuda_model.rate(card, numbers)
            made.append(
                Work(launch.blocks, held, need, cache + _part_bytes(call, launch), flops, speed, *loop)
            )
        elif not made:
            made.append(Work(launch.blocks, held, need, need))
        else:
            first = planned[0]
            parts = _part_bytes(call, first)
            made.append(Work(launch.blocks, held, 0, parts, steps=_merging_steps(launch, first)))
    return made


def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Pixels, channels and out channels of a GEMM, and bytes of an element."""
    x = traced.tensors(call.arguments[0])[0]
    weight = next(t for t in traced.tensors(call.arguments) if len(t.shape) == 2)
    return x.pixels, weight.shape[1], weight.shape[0], x.dtype.itemsize


def _part_bytes(call: Call, first: Launch) -> int:
    """Of the partial sums that a GEMM leaves to the next launch, in float; 0 of other operators, whose are few."""
    if first.family not in GEMMS:
        return 0
    _, channels, out, _ = _sizes(call)
    if first.family == GEMMS[0]:
        return 4 * 3 * out * first.grid[0]
    return 4 * (out + 2) * channels * first.grid[1] if first.grid[1] > 1 else 0


def _merging_steps(launch: Launch, first: Launch) -> float:
    """Loads that a thread waits for, one after the other: the kernels have four at a time on their way."""
    if launch.family == "merge_statistics_kernel":
        return 2 * math.ceil(first.grid[0] / (64 * 4))
    if launch.family == "add_parts_kernel":
        return math.ceil(first.grid[1] / (8 * 4))
    return 1


def _forward(call: Call, launch: Launch, architecture: str) -> tuple[int, int, int, int]:
    """Of a launch: bytes through the cache, operations, steps of the loop, and how many of them are loaded ahead."""
    pixels, channels, out, size = _sizes(call)
    of_block, width, depth, stages = tile_of(launch, architecture)
    down, across, _ = launch.grid
    steps = math.ceil(channels * size / depth)
    padded = 2 * down * of_block * across * width * steps * depth // size
    cache = size * (pixels * channels * across + out * channels * down + pixels * out)
    return cache, padded, steps, stages - 1


def _backward(call: Call, launch: Launch) -> tuple[int, int, int]:
    """The same; loaded ahead is what Work has by default."""
    pixels, channels, out, size = _sizes(call)
    width = int(re.findall(r", (\d+)", launch.kernel)[-1])
    across, down, _ = launch.grid
    tiles = math.ceil(pixels / 32)
    padded = 4 * tiles * 32 * across * (64 if size == 2 else 32) * width
    cache = size * (3 * pixels * channels + 2 * pixels * out * across + out * channels * down)
    return cache, padded, math.ceil(tiles / down)


def pytorchs(call: Call, card: Card, numbers: str) -> list[Work]:
    """PyTorch's kernels at their best: every operand once, a block on every multiprocessor, all products at cuDNN's rate.

    Batch norm is two kernels each way, the second of which reads the maps again.
    """
    call = grids.with_dtype(call, NUMBERS[numbers])
    bytes_ = sum(like.bytes for like in traced.tensors((call.arguments, call.results)))
    blocks, speed = card.multiprocessors, cuda_model.rate(card, numbers, own=False)
    if call.op.startswith("convolution"):
        *_, x, weight = (like for like in traced.tensors(call.arguments) if len(like.shape) > 1)
        y = traced.tensors(call.results)[0] if call.op == "convolution" else traced.tensors(call.arguments)[0]
        flops = 2 * y.pixels * math.prod(weight.shape)
        each = Work(blocks, 1, x.bytes + weight.bytes + y.bytes, 0, flops, speed)
        return [each] if call.op == "convolution" else [each, each]
    if "batch_norm" in call.op:
        again = max((like.bytes for like in traced.tensors(call.arguments)), default=0)
        again *= 2 if "backward" in call.op else 1
        return [Work(blocks, 1, again, 0), Work(blocks, 1, bytes_, 0)]
    return [Work(blocks, 1, bytes_, 0)]


class Predicted(NamedTuple):
    """One launch of a step."""

    op: str
    size: str  # of the map: 14x14
    kernel: str
    work: Work
    time: cuda_model.Time


def predict(calls: Iterable[Call], card: Card, numbers: str, resident: Residency) -> Iterator[Predicted]:
    """Every launch of the calls."""
    known: dict[Call, list[Predicted]] = {}
    for call in calls:
        if call not in known:
            if call.space == "effdense":
                planned = plan(call, card, numbers)
                pairs = zip(planned, works(call, planned, card, numbers, resident), strict=True)
                of_call = [(launch.kernel, work) for launch, work in pairs]
            else:
                of_call = [(call.op, work) for work in pytorchs(call, card, numbers)]
            known[call] = [
                Predicted(call.op, _size(call), name, work, cuda_model.time(work, card))
                for name, work in of_call
            ]
        yield from known[call]


def _size(call: Call) -> str:
    maps = [like.shape[2:] for like in traced.tensors(call.arguments) if len(like.shape) > 2]
    return "x".join(map(str, max(maps, key=math.prod))) if maps else ""


# ---- The fill of a card


class Fill(NamedTuple):
    """The GEMM launches of one kind and size of map, over all layers: the least and the most."""

    model: str
    images: int
    size: str
    kernel: str  # without its arithmetic
    layers: int
    blocks: tuple[int, int]
    resident: int
    waves: tuple[float, float]  # blocks / those that the card holds at a time
    fill: float  # the least
    underfilled: int  # layers with less than ENOUGH


def fill_rows(card: Card, resident: Residency) -> list[Fill]:
    """A row per net, batch, size of map and kernel, of the GEMMs, in half precision."""
    rows = []
    for model in MODELS:
        for images in BATCHES:
            groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
            for call in step(model, images):
                if call.op.startswith("bottleneck"):
                    for launch in plan(call, card):
                        if launch.family in GEMMS:
                            groups[launch.kernel, _size(call)].append(launch)
            for (kernel, size), own in groups.items():
                held = resident.of(own[0], card.architecture)
                blocks = [launch.blocks for launch in own]
                fills = [cuda_model.fill(n, card.multiprocessors) for n in blocks]
                at_a_time = held * card.multiprocessors
                rows.append(
                    Fill(
                        model,
                        images,
                        size,
                        short(kernel),
                        len(own),
                        (min(blocks), max(blocks)),
                        held,
                        (min(blocks) / at_a_time, max(blocks) / at_a_time),
                        min(fills),
                        sum(part < ENOUGH for part in fills),
                    )
                )
    return sorted(rows, key=lambda row: (row.model, row.images, -int(row.size.split("x")[0]), row.kernel))


def short(kernel: str) -> str:
    """bottleneck 128x64 (pixels x out channels), bottleneck_backward 128 (out channels)."""
    numbers = re.findall(r", (\d+)", kernel)
    return f"{kernel.partition('_kernel')[0]} {'x'.join(reversed(numbers))}"


def fill_markdown(card: Card, rows: Sequence[Fill]) -> list[str]:
    """The table of `fill_rows`."""

    def between(low: float, high: float, form: str) -> str:
        a, b = format(low, form), format(high, form)
        return a if a == b else f"{a} to {b}"

    lines = [
        f"| {card.name}: net, images | map | kernel | launches | blocks | resident | waves | least fill | below {ENOUGH:.0%} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is not None and (before.model, before.images) == (row.model, row.images)
        cells = (
            "" if same else f"{row.model}, {row.images}",
            row.size,
            f"`{row.kernel}`",
            str(row.layers),
            between(*row.blocks, "d"),
            str(row.resident),
            between(*row.waves, ".2f"),
            f"{row.fill:.0%}",
            str(row.underfilled or "-"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# ---- The time of a step

PARTS = ("bottleneck", "bottleneck_backward", "other operators", "vectors", "PyTorch's")


def part_of(one: Predicted, space: str) -> str:
    """Which of PARTS a launch belongs to."""
    if space != "effdense":
        return PARTS[4]
    return one.op if one.op in PARTS[:2] else PARTS[3] if one.op in VECTORS else PARTS[2]


def step_row(
    model: str, images: int, card: Card, numbers: str, resident: Residency, impl: str = "effdense-balanced"
) -> dict[str, Any]:
    """A step's launches and predicted milliseconds, by part; `launch_ms`: what of it is the fixed time of launches."""
    calls = step(model, images, impl)
    ms: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    count, fixed = 0, 0.0
    space = {call.op: call.space for call in calls}
    for one in predict(calls, card, numbers, resident):
        ms[part_of(one, space[one.op])] += one.time.us / 1e3
        count += 1
        fixed += one.time.launch / 1e3
    total = sum(ms.values())
    about = {"model": model, "images": images, "card": card.name, "numbers": numbers, "impl": impl}
    return {**about, "launches": count, "ms": total, "launch_ms": fixed, "parts_ms": ms}


def operator_rows(card: Card, numbers: str, resident: Residency) -> list[dict[str, Any]]:
    """Predicted milliseconds of every operator at the shapes of benchmarks.kernels with 64 images, as `make gpu` times them."""
    rows = []
    for shape in kernels.SHAPES["all"]:
        shape = shape._replace(batch=64)
        for op, calls in operator_calls(shape).items():
            if not calls:
                continue
            us = sum(one.time.us for one in predict(calls, card, numbers, resident))
            rows.append(
                {"shape": str(shape), "op": op, "numbers": numbers, "card": card.name, "ms": us / 1e3}
            )
    return rows


def operator_calls(shape: kernels.Shape) -> dict[str, list[Call]]:
    """The calls that benchmarks.kernels times, on the meta device. Operators without CUDA kernels are left out."""
    names = [name for name in shape.operators if not name.startswith("bn_relu_conv3x3")]
    with torch.device("meta"):
        own = kernels._calls(shape, torch.half)
    found = {}
    for name in names:
        recorder = traced.Recorder()
        with recorder:
            own[name]()
        found[name] = [call for call in recorder.calls if traced.tensors(call.arguments)]
    return found


def document(resident: Residency, cards: Iterable[Card] | None = None) -> dict[str, Any]:
    """Everything, as JSON: rows of steps and of operators, and how full an H100 is."""
    cards = list(CARDS.values() if cards is None else cards)
    steps, operators = [], []
    for card in cards:
        for numbers in NUMBERS:
            if numbers == "TF32" and not card.tf32_tflops:
                continue
            steps += [
                step_row(model, images, card, numbers, resident) for model in MODELS for images in BATCHES
            ]
            operators += operator_rows(card, numbers, resident)
    fills = {card.name: [row._asdict() for row in fill_rows(card, resident)] for card in cards}
    return {"measured": False, "steps": steps, "operators": operators, "fill": fills}


def markdown(of: Mapping[str, Any]) -> str:
    """The tables of `document`."""
    lines = [
        "<!-- Written by python -m benchmarks.cuda_static --predict. -->",
        "Predicted by `benchmarks/cuda_model.py` from data sheets and assumptions. **Nothing here was measured: nothing has run on a GPU.**",
        "",
        "## A training step (`balanced`), milliseconds",
        "",
        *steps_markdown(of["steps"]),
        "",
        "## How the GEMM launches fill a card (float16)",
    ]
    for name, rows in of["fill"].items():
        lines += ["", *fill_markdown(CARDS[name], [Fill(**row) for row in rows])]
    return "\n".join([*lines, ""])


def steps_markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps as a table: a line per card, net and batch."""
    lines = [
        "| card, numbers | net, images | launches | ms | " + " | ".join(PARTS) + " | of it launching |",
        "|---|---|--:|--:|" + "--:|" * (len(PARTS) + 1),
    ]
    for row in rows:
        cells = [f"{row['card']}, {row['numbers']}", f"{row['model']}, {row['images']}", str(row["launches"])]
        cells += [f"{row['ms']:.1f}", *(f"{row['parts_ms'][part]:.2f}" for part in PARTS)]
        lines.append("| " + " | ".join([*cells, f"{row['launch_ms']:.2f}"]) + " |")
    return lines
