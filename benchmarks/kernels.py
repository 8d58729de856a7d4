"""Time of every operator against what the machine can do: its GEMM rate and its copy bandwidth.

    python -m benchmarks.kernels --shape bc --threads 2 --json out.json

All run in this process and take turns, ceilings too, one call each, with PyTorch's convolutions where a layer has them.
The floor is the larger of operations / GEMM rate and bytes / bandwidth. `least` says what is counted. On a GPU
(--device cuda) those that have a CUDA kernel run, and read from memory: caches are overwritten before each call.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import effdense
from benchmarks import compare, devices, isa, measure
from benchmarks.program import reports_missing_packages
from effdense.engine.workspace import on_large_pages
from effdense.ops.reference import accumulate_dtype

if TYPE_CHECKING:  # measuring does without
    from rich.table import Table

GEMM_SIZE = {"cpu": 2048, "cuda": 4096}  # rows and columns of the matrices
COPY_BYTES = 2**28  # of each tensor: beyond every cache
# In the order of a step; then what takes the place of the fused convolution where there is none, and the rest.
LAYER: tuple[str, ...] = ("bottleneck", "bn_relu_conv3x3")
LAYER += ("apply_correction", "bn_relu_conv3x3_backward", "bottleneck_backward")
LAYER += (
    "bn_relu",
    "conv3x3",
    "append_features",
    "conv3x3_backward",
    "bn_relu_backward_sums",
    "bn_relu_backward",
)
LAYER += (
    "channel_statistics",
    "bn_relu_backward_accumulate",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward",
)
STEM = ("bn_relu_max_pool", "max_pool_backward")
OPERATORS = LAYER + STEM
CONVOLUTIONS = ("conv3x3", "conv3x3_backward")  # PyTorch's
DTYPES = ("float32", "bfloat16", "float64", "float16")
CONVOLUTION = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation; the rest: a plain one
WINDOWS = ([3, 3], [2, 2], [1, 1])  # of a stem's max pool: kernel_size, stride, padding


class Shape(NamedTuple):
    """A dense layer that reads the first `channels` of a buffer, a stem's map, or (for a test) both."""

    batch: int
    height: int
    width: int
    channels: int
    buffer_channels: int
    out_channels: int
    growth_rate: int
    pool: int = 2  # kernel size behind the block: a transition's, or as large as the map, the head's
    operators: tuple[str, ...] = LAYER

    def __str__(self) -> str:
        rest = f"of {self.buffer_channels}, to {self.out_channels}, to {self.growth_rate}"
        size = f"{self.batch} x {self.height}x{self.width}, {self.channels} channels"
        return f"{size} {'(stem)' if self.operators == STEM else rest}"


SHAPES = {
    "bc": [  # DenseNet-BC-100-12
        Shape(64, 32, 32, 120, 216, 48, 12),
        Shape(64, 16, 16, 204, 300, 48, 12),
        Shape(64, 8, 8, 246, 342, 48, 12, pool=8),
    ],
    "121": [
        Shape(8, 56, 56, 160, 256, 128, 32),
        Shape(8, 28, 28, 320, 512, 128, 32),
        Shape(8, 14, 14, 640, 1024, 128, 32),
        Shape(8, 7, 7, 768, 1024, 128, 32, pool=7),
        Shape(8, 112, 112, 64, 64, 0, 0, operators=STEM),
    ],
}
SHAPES["all"] = SHAPES["bc"] + SHAPES["121"]


def least(s: Shape, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """The bytes that each operator must at least move, and its operations (of the GEMMs and convolutions alone).

    Every input is read once and every output written once; vectors are left out, and so is what a prefix's rows take
    of further cache lines. A convolution's border counts as its inside.
    """
    e, e_sum = dtype.itemsize, accumulate_dtype(dtype).itemsize  # bytes of a value, of a sum
    m, c, t = s.batch * s.height * s.width, s.channels, s.buffer_channels  # m: pixels
    o, k = s.out_channels, s.growth_rate
    p = s.batch * (s.height // s.pool) * (s.width // s.pool)  # pixels of the average pool's output
    q = s.batch * ((s.height + 1) // 2) * ((s.width + 1) // 2)  # of the max pool's
    covered = p * s.pool**2  # pixels that the average pool's windows reach
    return {
        "bottleneck": (e * (m * c + o * c + m * o), 2 * m * c * o),  # reads x, weight; writes y
        # reads y, weight; writes the new features
        "bn_relu_conv3x3": (e * (m * o + 9 * o * k + m * k), 2 * m * 9 * o * k),
        # reads grad, y, weight; writes grad_y, and grad_weight as sums
        "bn_relu_conv3x3_backward": (
            e * (m * k + 2 * m * o + 9 * o * k) + e_sum * 9 * o * k,
            4 * m * 9 * o * k,
        ),
        "bn_relu": (e * 2 * m * o, 0),  # reads y; writes z
        # reads z, weight; writes the new features
        "conv3x3": (e * (m * o + 9 * o * k + m * k), 2 * m * 9 * o * k),
        "append_features": (e * 2 * m * k, 0),  # reads the new features; writes them to the buffer
        "apply_correction": (e * 3 * m * k, 0),  # reads x, grad of the new features; writes out
        # reads grad, z, weight; writes grad_z, grad_weight
        "conv3x3_backward": (e * (m * k + 2 * m * o + 2 * 9 * o * k), 4 * m * 9 * o * k),
        "bn_relu_backward_sums": (e * 3 * m * o, 0),  # reads grad, y; writes z
        # reads grad, y; writes grad. The batch's sums take a second pass (5 m o) where a cache does not hold both
        "bn_relu_backward": (e * 3 * m * o, 0),
        # reads x, grad_y, y, weight, grad_x; writes grad_x, and grad_weight as sums
        "bottleneck_backward": (e * (3 * m * c + 2 * m * o + o * c) + e_sum * o * c, 4 * m * c * o),
        "channel_statistics": (e * m * c, 0),  # reads x
        "bn_relu_backward_accumulate": (e * 4 * m * c, 0),  # reads grad, x, grad_x; writes grad_x
        "bn_relu_avg_pool": (e * (covered + p) * t, 0),  # reads x in windows; writes out
        # reads grad, x in windows; writes grad_x
        "bn_relu_avg_pool_backward": (e * (p + covered + m) * t, 0),
        "bn_relu_max_pool": (e * (m + q) * c + q * c, 0),  # reads x; writes out, and for each of it a byte
        # reads grad, and for each of it a byte; writes grad_z
        "max_pool_backward": (e * (m + q) * c + q * c, 0),
    }


def _map(s: Shape, channels: int, dtype: torch.dtype) -> Tensor:
    """A random [N, channels, H, W], channels-last, in memory like the engine's."""
    empty = torch.empty(s.batch, s.height, s.width, channels, dtype=dtype)
    return on_large_pages(empty).normal_().movedim(-1, 1)


def _norm(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, shift, mean. With a scale of 1 a gradient stays of its size, though every call changes it in place."""
    zeros = torch.zeros(channels, dtype=accumulate_dtype(dtype))
    return zeros + 1, torch.randn_like(zeros) / 10, zeros


def _calls(s: Shape, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every operator on the tensors of this shape, called as in effdense/engine/passes.py and effdense/engine/pool.py."""
    ops, aten, c, o, k = torch.ops.effdense, torch.ops.aten, s.channels, s.out_channels, s.growth_rate
    t, unit = s.buffer_channels, 16 // dtype.itemsize  # the buffers' rows are of whole 16 bytes
    features, grads = (_map(s, -(-t // unit) * unit, dtype)[:, :t] for _ in range(2))
    x, grad_x, x_new, grad_x_new = features[:, :c], grads[:, :c], features[:, c : c + k], grads[:, c : c + k]
    y, z, grad_y = (_map(s, o, dtype) for _ in range(3))
    new, grad_new, grad_c = _map(s, k, dtype), _map(s, k, dtype), _map(s, c, dtype)
    w1, w2 = (torch.randn(n, dtype=dtype) / n[1] ** 0.5 for n in ((o, c), (k, o, 3, 3)))
    norm_c, norm_o, norm_t = (_norm(n, dtype) for n in (c, o, t))
    (_, ab, mean), kernel = _norm(k, dtype), [s.pool, s.pool]
    pooled = _map(s._replace(height=s.height // s.pool, width=s.width // s.pool), t, dtype)
    taken, where = ops.bn_relu_max_pool(x, *norm_c[:2], *WINDOWS)
    return {
        "bottleneck": lambda: ops.bottleneck([x], *norm_c[:2], w1, None, None, None, True, y),
        "bn_relu_conv3x3": lambda: ops.bn_relu_conv3x3(y, *norm_o[:2], w2, None, x_new),
        "bn_relu_conv3x3_backward": lambda: ops.bn_relu_conv3x3_backward(
            grad_new, y, *norm_o, w2, z, False, True, True
        ),
        "bn_relu": lambda: ops.bn_relu(y, *norm_o[:2], z),
        "conv3x3": lambda: aten.convolution(z, w2, None, *CONVOLUTION),
        "append_features": lambda: ops.append_features(new, x_new),
        "apply_correction": lambda: ops.apply_correction(x_new, mean, ab, ab, grad_x_new, grad_new),
        "conv3x3_backward": lambda: aten.convolution_backward(
            grad_new, z, w2, None, *CONVOLUTION, [True, True, False]
        ),
        "bn_relu_backward_sums": lambda: ops.bn_relu_backward_sums(grad_y, y, *norm_o, z),
        "bn_relu_backward": lambda: ops.bn_relu_backward(grad_y, y, *norm_o, norm_o[0], True),
        "bottleneck_backward": lambda: ops.bottleneck_backward(
            [x], grad_y, *norm_c, w1, [grad_x], True, True, True, [y, norm_o[2], norm_o[2], norm_o[2]]
        ),
        "channel_statistics": lambda: ops.channel_statistics([x]),
        "bn_relu_backward_accumulate": lambda: ops.bn_relu_backward_accumulate(grad_c, x, *norm_c, grad_x),
        "bn_relu_avg_pool": lambda: ops.bn_relu_avg_pool(features, *norm_t[:2], kernel),
        "bn_relu_avg_pool_backward": lambda: ops.bn_relu_avg_pool_backward(
            pooled, features, *norm_t, kernel, grads
        ),
        "bn_relu_max_pool": lambda: ops.bn_relu_max_pool(x, *norm_c[:2], *WINDOWS),
        "max_pool_backward": lambda: ops.max_pool_backward(taken, where, *WINDOWS, grad_c),
    }


def _ceilings(dtype: torch.dtype, size: int) -> dict[str, dict[str, Any]]:
    a, b, product = (torch.randn(size, size).to(dtype) for _ in range(3))
    x, out = (on_large_pages(torch.empty(COPY_BYTES, dtype=torch.uint8)).fill_(i) for i in range(2))
    return {
        "gemm": _row(lambda: torch.mm(a, b, out=product), (0, 2 * size**3)),
        "copy": _row(lambda: out.copy_(x), (2 * COPY_BYTES, 0)),
    }


def _row(call: Callable[[], Any], needs: tuple[int, int]) -> dict[str, Any]:
    return {"bytes": needs[0], "flops": needs[1], "times_ms": [], "call": call}


def run(
    shapes: Sequence[Shape],
    operators: Sequence[str] = OPERATORS,
    dtype: str = "float32",
    repeats: int = 9,
    on_progress: Callable[..., None] = lambda description: None,
    device: str = "cpu",
    isa_name: str | None = None,
) -> dict[str, Any]:
    """Measure and return `{"environment": {...}, "ceilings": {"gemm": {...}, "copy": {...}}, "rows": [{...}, ...]}`.

    One row per shape and operator that it has. In every turn each is called once, and the ceilings before each shape,
    so that its first operator reads from memory; the others (on the CPU) also what is still in a cache of the ones
    before. `isa_name` is the instruction set that this process was started with (isa.variables), and RuntimeError says where it was not.
    `on_progress` is called before each of the `(repeats + 1) * len(shapes)` pieces of work.
    """
    on, type_ = devices.find(device), getattr(torch, dtype)
    on.use()
    if isa_name:
        isa.check_active(isa_name)
    environment = {
        **measure.environment(),
        **isa.record(isa_name),
        **on.environment(),
    }  # with the load before
    if isa_name:
        environment["isa_variables"] = isa.variables(isa_name)
    with torch.device(on.name):
        ceilings, rows_of = _ceilings(type_, GEMM_SIZE[on.type]), []
        calls_of = [_calls(shape, type_) for shape in shapes]
    for shape, calls in zip(shapes, calls_of, strict=True):
        needs, about = least(shape, type_), {"shape": str(shape), "dtype": dtype, "device": on.name}
        about |= isa.record(isa_name)
        about |= {name: getattr(shape, name) for name in Shape._fields[:-1]}
        names = [n for n in shape.operators if n in operators]
        rows_of.append([{"op": n, **about, **_row(calls[n], needs[n])} for n in names])
    for turn in range(repeats + 1):
        for shape, rows in zip(shapes, rows_of, strict=True):
            on_progress(description=f"{shape}: " + (f"turn {turn} of {repeats}" if turn else "warm up"))
            for row in (*ceilings.values(), *rows):
                row["times_ms"] += [on.time_call(row["call"])] * (turn > 0)
    rows = [row for rows in rows_of for row in rows]
    for row in (*ceilings.values(), *rows):
        del row["call"]
        row.update(measure.time_statistics(row["times_ms"]))
        row["gflops_per_s"] = row["flops"] / row["median_ms"] / 1e6
        row["gbytes_per_s"] = row["bytes"] / row["median_ms"] / 1e6
    for row in rows:
        gemm_ms = row["flops"] / ceilings["gemm"]["gflops_per_s"] / 1e6
        copy_ms = row["bytes"] / ceilings["copy"]["gbytes_per_s"] / 1e6
        row["floor_ms"], row["bound"] = max((gemm_ms, "gemm"), (copy_ms, "copy"))
        row["time_to_floor"] = row["median_ms"] / row["floor_ms"]
    return {"environment": environment, "ceilings": ceilings, "rows": rows}


def table(result: dict[str, Any]) -> Table:
    """Return the rows as a table for the terminal."""
    from rich.table import Table

    rows: list[dict[str, Any]] = result["rows"]
    gemm, copy = result["ceilings"].values()
    caption = f"ceilings: GEMM {gemm['gflops_per_s']:.1f} GFLOP/s, copy {copy['gbytes_per_s']:.1f} GB/s; "
    caption += "below 1x: the maps were in a cache\n" + compare.machine(result["environment"])
    title = f"effdense's operators and PyTorch's convolutions, {rows[0]['dtype']}"
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("operator", no_wrap=True)
    for heading in ("MFLOP", "MB", "ms", "p20-p80", "GFLOP/s", "GB/s", "floor ms", "time vs\nfloor"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before["shape"] != row["shape"]:
            shown.add_section()
            shown.add_row(f"[bold]{row['shape']}[/bold]")
        shown.add_row(
            f"  {row['op']}",
            f"{row['flops'] / 1e6:.1f}" if row["flops"] else "-",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['median_ms']:.3f}",
            f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}",
            f"{row['gflops_per_s']:.1f}" if row["flops"] else "-",
            f"{row['gbytes_per_s']:.2f}",
            f"{row['floor_ms']:.3f} {row['bound']}",
            f"{row['time_to_floor']:.2f}x",
        )
    return shown


def _operators(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OPERATORS:
            nearest = difflib.get_close_matches(name, OPERATORS, n=1, cutoff=0)[0]
            raise argparse.ArgumentTypeError(f"unknown operator {name!r}, did you mean {nearest!r}?")
    return names


def _shapes(text: str) -> list[Shape]:
    if text in SHAPES:
        return SHAPES[text]
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(sizes) != 6 or min(sizes) < 1:
        message = f"must be {', '.join(SHAPES)}, or N,H,W,C,O,K, six whole numbers of 1 or more, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    n, h, w, c, o, k = sizes
    return [Shape(n, h, w, c, c + k, o, k, min(2, h, w), OPERATORS)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.allow_abbrev = False
    add, positive = parser.add_argument, compare.positive
    add(
        "--op",
        type=_operators,
        metavar="NAMES",
        help=f"some of {', '.join(OPERATORS)} (all that the device has)",
    )
    add("--shape", type=_shapes, metavar="NAME", default="all", help="bc, 121, all (these) or N,H,W,C,O,K")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=devices.argument, default="cpu", help="cpu, cuda or cuda:N (cpu)")
    isa.add_argument(parser)
    add("--threads", type=positive, metavar="N", help="PyTorch's default unless given")
    add("--repeats", type=positive, metavar="N", default=9, help="timed calls of each operator (9)")
    add("--json", type=compare.output_file, metavar="FILE", help="write everything measured here")
    parsed = parser.parse_args(arguments)
    if not (build := effdense.build_info())["compiled"]:
        parser.error(f"effdense's operators are not compiled, there is nothing to time: {build['reason']}")
    kind = parsed.device.type
    isa.refuse_other_devices(parser, parsed.isa, kind)
    if parsed.dtype == "float16" and kind == "cpu":
        parser.error("--dtype float16 needs --device cuda")
    there = [name for name in OPERATORS if has_kernel(name, kind)]
    if set(there) == set(CONVOLUTIONS):
        parser.error(f"effdense's operators are not compiled for {kind}: install it where nvcc is")
    parsed.op = parsed.op or there
    if missing := [name for name in parsed.op if name not in there]:
        parser.error(f"no {kind} kernel for {', '.join(missing)}; there are {', '.join(there)}")
    parsed.shape = [s for s in parsed.shape if not set(s.operators).isdisjoint(parsed.op)]
    if not parsed.shape:
        parser.error(f"no shape of --shape has {', '.join(parsed.op)} (DenseNet-BC's stem has no pool)")
    return parsed


def has_kernel(operator: str, kind: str) -> bool:
    """Whether the operator runs on a device of this kind."""
    if operator in CONVOLUTIONS:
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"effdense::{operator}", kind.upper())


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parsed = _parse(arguments)
    if parsed.isa and not isa.is_active(parsed.isa):
        return isa.run_again("benchmarks.kernels", arguments, parsed.isa)
    from rich.progress import Progress

    torch.set_num_threads(parsed.threads or torch.get_num_threads())
    # Without the thread that refreshes: it would take time from what is timed.
    with Progress(console=compare.console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=(parsed.repeats + 1) * len(parsed.shape))
        on_progress = functools.partial(bar.update, task, advance=1, refresh=True)
        result = run(
            *(
                parsed.shape,
                parsed.op,
                parsed.dtype,
                parsed.repeats,
                on_progress,
                parsed.device.name,
                parsed.isa,
            )
        )
    compare.console().print(table(result))
    if parsed.json:
        compare.write_json(result, parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
