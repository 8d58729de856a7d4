"""Proof from the built library that its CUDA kernels are what they should be; no GPU is needed.

    python -m benchmarks.cuda_static --arch 8.0,9.0 --table docs/results/cuda-static.md --predict docs/results/cuda-prediction.json

Registers, memory and machine code of every kernel and architecture are read from the library with cuobjdump. Whatever
misses a requirement (`failures`) is one line on stderr, and the exit status is 1. --predict: how many multiprocessors each
launch of a step fills, and what cuda_model says that it takes on some cards (cuda_predict); from a clone's root, some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import compare, cuda_library
from benchmarks.cuda_library import Kernel, LibraryError
from benchmarks.program import reports_missing_packages

if TYPE_CHECKING:  # measuring does without
    from rich.table import Table

MOST_BYTES = 25_000_000  # of the library, all architectures together


class Limits(NamedTuple):
    """What a multiprocessor has room for, and how much shared memory one block may ask for."""

    threads: int
    blocks: int
    shared_kb: int
    block_shared_kb: int
    shared_unit: int = 128  # what a block's shared memory is rounded up to, in bytes
    driver_shared: int = 1024  # bytes of every block


# CUDA Programming Guide, table "Technical Specifications per Compute Capability"; the last two as cuda_occupancy.h has them.
LIMITS = {
    "7.5": Limits(1024, 16, 64, 64, 256, 0),
    "8.0": Limits(2048, 32, 164, 163),
    "8.6": Limits(1536, 16, 100, 99),
    "8.9": Limits(1536, 24, 100, 99),
    "9.0": Limits(2048, 32, 228, 227),
    "10.0": Limits(2048, 32, 228, 227),
    "12.0": Limits(1536, 24, 100, 99),
}
# Launch bounds are one promise for all architectures: where there is less, shared memory may permit fewer blocks.
MOST_SHARED_KB = max(limits.shared_kb for limits in LIMITS.values())
# The same in all of them: registers of a multiprocessor, and that a block of so many registers can start at all.
REGISTERS, PARTITIONS = 65_536, 4
REGISTER_UNIT = 256  # what a warp's registers are rounded up to

# Every kernel, so that none escapes its requirements by another name, and what it is:
#   gemm    tiles through shared memory, products in a loop
#   vector  a pass over maps, <T, elements of an access, ...>, that writes one
#   small   vectors, and partial sums of blocks
FAMILIES = {
    "bottleneck_kernel": "gemm",
    "bottleneck_backward_kernel": "gemm",
    "rows_kernel": "vector",
    "avg_pool_kernel": "vector",
    "avg_pool_backward_kernel": "vector",
    "max_pool_kernel": "vector",
    "max_pool_backward_kernel": "vector",
    "channels_kernel": "small",
    "fold_kernel": "small",
    "merge_kernel": "small",
    "add_parts_kernel": "small",
}
# rows_kernel with these takes sums alone.
READ_ONLY: tuple[str, ...] = ("Statistics<float, false>", "Statistics<double, false>")
READ_ONLY += ("Backward<float, (Write)0>", "Backward<double, (Write)0>")
BYTES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}
# A GEMM's arithmetic, and the instruction that is to be in its loop.
PRODUCTS = {
    "TensorCore<__half>": "HMMA.16816.F32",
    "TensorCore<__nv_bfloat16>": "HMMA.16816.F32.BF16",
    "Tf32": "HMMA.1688.F32.TF32",
    "Plain<float>": "FFMA",
    "Plain<double>": "DFMA",
}
# 7.5 has no mma m16n8k16, and none of bfloat16 and TF32, which become exact products.
PRODUCTS_OF_TURING = PRODUCTS | {
    "TensorCore<__half>": "HMMA.1688.F32",
    "TensorCore<__nv_bfloat16>": "FFMA",
    "Tf32": "FFMA",
}


def resident(kernel: Kernel) -> dict[str, int]:
    """How many blocks a multiprocessor holds, by each of its limits; the least of them is what it does hold.

    As cuda_occupancy.h of the CUDA toolkit counts.
    """
    limits, warps = LIMITS[kernel.architecture], -(-kernel.bounds.threads // 32)
    warp_registers = _round_up(kernel.registers * 32, REGISTER_UNIT)
    shared = _round_up(kernel.shared + limits.driver_shared, limits.shared_unit)
    return {
        "registers": REGISTERS // PARTITIONS // warp_registers * PARTITIONS // warps,
        "threads": limits.threads // (32 * warps),
        "shared memory": limits.shared_kb * 1024 // max(shared, 1),
        "blocks": limits.blocks,
    }


def occupancy(kernel: Kernel) -> float:
    """The part of a multiprocessor's threads that can be there at a time."""
    return min(resident(kernel).values()) * kernel.bounds.threads / LIMITS[kernel.architecture].threads


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def is_launched(kernel: Kernel) -> bool:
    """Whether a block has room for it: where not, smaller tiles are launched instead."""
    return kernel.shared <= LIMITS[kernel.architecture].block_shared_kb * 1024


def is_widest(kernel: Kernel) -> bool:
    """Whether nobody moves more at a time: all but the variants for rows that are aligned to less than 16 bytes."""
    if FAMILIES.get(kernel.family) != "vector":
        return True
    element, vector = re.findall(r"[^<>,\s]+", kernel.name)[1:3]
    return BYTES[element] * int(vector) == 16


# ---- Requirements


def failures(kernels: Sequence[Kernel], library_bytes: int) -> list[str]:
    """Return a line for everything that is not as it should be."""
    lines = [f"{title(kernel)}: {fault}" for kernel in kernels for fault in _faults(kernel)]
    if library_bytes >= MOST_BYTES:
        lines.append(f"the library has {library_bytes:,} bytes, {MOST_BYTES:,} or more")
    by_architecture: dict[str, set[str]] = {}
    for kernel in kernels:
        by_architecture.setdefault(kernel.architecture, set()).add(kernel.name)
    every = set().union(*by_architecture.values())
    for architecture, names in by_architecture.items():
        lines += [f"{pretty(name)} for {architecture}: is missing" for name in sorted(every - names)]
    families = {kernel.family for kernel in kernels}
    lines += [f"{family}: no such kernel is in the library" for family in FAMILIES if family not in families]
    return lines


def _faults(kernel: Kernel) -> Iterable[str]:
    """What is wrong with one kernel."""
    limits, blocks, threads = LIMITS[kernel.architecture], resident(kernel), kernel.bounds.threads
    if not is_launched(kernel):
        if any(opcode.startswith(("LD", "ST")) for opcode in kernel.code.opcodes):
            yield f"{kernel.shared:,} bytes of shared memory are more than a block's {limits.block_shared_kb} KB"
        return  # without code it only has a name
    if kernel.stack or kernel.local:
        yield f"has a stack of {kernel.stack} and local memory of {kernel.local} bytes, must have none"
    if local := sorted(opcode for opcode in kernel.code.opcodes if opcode.startswith(("LDL", "STL"))):
        yield f"uses local memory ({', '.join(local)})"

    if kernel.registers * threads > REGISTERS:
        yield f"{kernel.registers} registers for each of {threads} threads are more than {REGISTERS:,}"
    for what, count in blocks.items():
        if count < kernel.bounds.blocks and not (
            what == "shared memory" and limits.shared_kb < MOST_SHARED_KB
        ):
            yield f"{what} permit {count} blocks on a multiprocessor, its launch bounds promise {kernel.bounds.blocks}"

    kind = FAMILIES.get(kernel.family)
    if kind is None:
        yield "is unknown: FAMILIES must say what kind of kernel it is"
    elif kind == "gemm":
        arithmetic = re.sub(r"(, \d+)+>$", "", kernel.name.partition("<")[2])
        turing = kernel.architecture == "7.5"
        products = PRODUCTS_OF_TURING if turing else PRODUCTS
        product = products.get(arithmetic, f"instruction that PRODUCTS has for {arithmetic}")
        main = [loop for loop in kernel.code.loops if product in loop]
        if not main:
            yield f"has no {product} in a loop"
        elif turing and not any(_has(loop, "LDG", "128") and _has(loop, "STS", "128") for loop in main):
            yield f"has no copy of 16 bytes (LDG.128, STS.128) in its loop of {product}"
        elif not turing and not any(_has(loop, "LDGSTS", "128") for loop in main):
            yield f"has no asynchronous copy of 16 bytes (LDGSTS.128) in its loop of {product}"
        if not _has(kernel.code.opcodes, "STG", "128"):
            yield "has no store of 16 bytes (STG.128)"
    elif kind == "vector" and is_widest(kernel):
        if not any(_has(loop, "LDG", "128") for loop in kernel.code.loops):
            yield "has no load of 16 bytes (LDG.128) in a loop"
        writes = not any(f" {body}," in kernel.name for body in READ_ONLY)
        if writes and not any(_has(loop, "STG", "128") for loop in kernel.code.loops):
            yield "has no store of 16 bytes (STG.128) in a loop"


def _has(opcodes: Iterable[str], name: str, modifier: str) -> bool:
    return any(opcode.split(".")[0] == name and modifier in opcode.split(".") for opcode in opcodes)


# ---- What is shown


def pretty(name: str) -> str:
    """The name as it is shown."""
    return name.replace("__nv_", "").replace("__half", "half").replace("(Write)", "Write ")


def title(kernel: Kernel) -> str:
    return f"{pretty(kernel.name)} for {kernel.architecture}"


def record(kernel: Kernel) -> dict[str, Any]:
    """What goes into the JSON file."""
    return {
        "kernel": pretty(kernel.name),
        "architecture": kernel.architecture,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "local_bytes": kernel.local,
        "static_shared_bytes": kernel.static_shared,
        "dynamic_shared_bytes": kernel.dynamic_shared,
        "threads": kernel.bounds.threads,
        "promised_blocks": kernel.bounds.blocks,
        "resident_blocks": min(resident(kernel).values()),
        "occupancy": occupancy(kernel),
        "sass_bytes": kernel.code.bytes,
    }


def by_name(kernels: Iterable[Kernel]) -> dict[str, dict[str, Kernel]]:
    """{name: {architecture: kernel}}, in the order of FAMILIES. Of a kernel that several files have, the last."""
    rows: dict[str, dict[str, Kernel]] = {}
    order = {family: i for i, family in enumerate(FAMILIES)}
    for kernel in sorted(kernels, key=lambda k: (order.get(k.family, -1), pretty(k.name))):
        rows.setdefault(pretty(kernel.name), {})[kernel.architecture] = kernel
    return rows


def _cell(kernel: Kernel | None) -> str:
    if kernel is None or not is_launched(kernel):
        return "-"
    return f"{kernel.registers}/{min(resident(kernel).values())}/{occupancy(kernel):.0%}"


def _shared(row: dict[str, Kernel]) -> str:
    """Of the architecture with the most."""
    most = max(kernel.shared for kernel in row.values())
    return f"{most / 1024:.1f} KB" if most else "-"


def table(kernels: Sequence[Kernel], architectures: Sequence[str]) -> Table:
    """Return every kernel as a row for the terminal."""
    caption = "per architecture: registers of a thread / blocks on a multiprocessor / part of its threads; "
    caption += "SASS: least and most of all architectures"
    from rich.table import Table

    shown = Table(
        title="CUDA kernels as compiled", title_justify="left", caption=caption, caption_justify="left"
    )
    shown.add_column("kernel", no_wrap=True)
    for heading in ("threads", "shared", "SASS KB", *architectures):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in by_name(kernels).items():
        code, any_ = [kernel.code.bytes / 1024 for kernel in row.values()], next(iter(row.values()))
        shown.add_row(
            name,
            str(any_.bounds.threads),
            _shared(row),
            f"{min(code):.0f}-{max(code):.0f}",
            *(_cell(row.get(a)) for a in architectures),
        )
    return shown


def verdict(kernels: Sequence[Kernel], architectures: Sequence[str], size: int, faults: Sequence[str]) -> str:
    """Return one line that says what was read, and what came of it."""
    result = f"{len(faults)} failures" if faults else "all as required"
    return (
        f"{len(kernels)} kernels for {', '.join(architectures)}, a library of {size / 1e6:.1f} MB: {result}"
    )


def markdown(kernels: Sequence[Kernel], architectures: Sequence[str], result: str) -> str:
    """Return the table for the documentation: the variants with the widest accesses."""
    widest = by_name(kernel for kernel in kernels if is_widest(kernel))
    lines = [
        "<!-- Written by python -m benchmarks.cuda_static --table. -->",
        f"{result}. Here are the variants that move the most at a time, with the most shared memory that they are launched with on any architecture. "
        "Per architecture: registers of a thread / blocks that a multiprocessor holds / part of its threads; -: not launched there.",
        "",
        "| kernel | threads | shared memory | " + " | ".join(architectures) + " |",
        "|---|--:|--:|" + "--:|" * len(architectures),
    ]
    for name, row in widest.items():
        any_ = next(iter(row.values()))
        cells = [
            f"`{name}`",
            str(any_.bounds.threads),
            _shared(row),
            *(_cell(row.get(a)) for a in architectures),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def residency(kernels: Iterable[Kernel]) -> dict[tuple[str, str], int]:
    """{(kernel, architecture): how many of its blocks a multiprocessor holds}."""
    return {(k.name, k.architecture): min(resident(k).values()) for k in kernels}


def _predict(kernels: Sequence[Kernel], output: Path) -> None:
    """Writes the fill and the predicted times on those cards whose architecture has been read."""
    from benchmarks import cuda_model, cuda_predict

    has = {kernel.architecture for kernel in kernels}
    cards = [card for card in cuda_model.CARDS.values() if card.architecture in has]
    document = cuda_predict.document(cuda_predict.Residency(residency(kernels)), cards)
    compare.write_json(document, output)
    compare.write_text(cuda_predict.markdown(document), output.with_suffix(".md"))


# ---- Command line


def _architectures(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LIMITS:
            raise argparse.ArgumentTypeError(f"unknown architecture {name!r}, must be of {', '.join(LIMITS)}")
    return names


def _input_file(text: str) -> Path:
    if not os.access(text, os.R_OK) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"cannot read a file at {text!r}")
    return Path(text)


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 when a kernel or the library misses a requirement."""
    parser = argparse.ArgumentParser("python -m benchmarks.cuda_static", description=__doc__.splitlines()[0])
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--library", type=_input_file, metavar="FILE", help="the installed module unless given")
    add("--arch", type=_architectures, metavar="LIST", help="as 8.0,9.0; all in the library unless given")
    add(
        "--table",
        type=compare.output_file,
        metavar="FILE.md",
        help="write a table for the documentation here",
    )
    add("--json", type=compare.output_file, metavar="FILE", help="write everything read here")
    add(
        "--predict",
        type=compare.output_file,
        metavar="FILE.json",
        help="write the launches' fill and predicted times here, and as tables beside it (.md)",
    )
    parsed = parser.parse_args(arguments)
    console = compare.console()  # before what takes a minute: a missing rich must not cost it
    try:
        library = parsed.library or cuda_library.find_library()
        has = cuda_library.architectures_in(library)
        architectures = parsed.arch or has
        if not has or not set(architectures) <= set(has) & set(LIMITS):
            parser.error(
                f"{library} has code for {', '.join(has) or 'no architecture'}; known: {', '.join(LIMITS)}"
            )
        kernels = list(cuda_library.read(library, architectures))
    except LibraryError as error:
        parser.error(str(error))
    library_bytes = library.stat().st_size
    faults = failures(kernels, library_bytes)
    result = verdict(kernels, architectures, library_bytes, faults)
    console.print(table(kernels, architectures))
    if parsed.table:
        compare.write_text(markdown(kernels, architectures, result), parsed.table)
    if parsed.json:
        read = {"library_bytes": library_bytes, "failures": faults, "kernels": [record(k) for k in kernels]}
        compare.write_json(read, parsed.json)
    if parsed.predict:
        _predict(kernels, Path(parsed.predict))
    for fault in faults:
        print(fault, file=sys.stderr)
    print(result)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
