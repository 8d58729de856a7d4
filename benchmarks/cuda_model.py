"""A time model: predicts how long a kernel launch takes on a GPU. Nothing in it has been fitted to a measurement.

A launch costs a fixed time, and then the longest of four things, in microseconds:

    memory      its operands and results, once each / the card's bandwidth
    cache       all that its blocks load and store / L2's bandwidth,   times `share`
    arithmetic  operations, padding included / the rate of its type,   times `share`
    latency     waves x (1 + steps of a block / steps that overlap) x the time that a load takes

`share` is what the busiest multiprocessor has of the work, 1 where all have the same: with fewer blocks than multiprocessors
their number / blocks. A wave is as many blocks as the card holds at a time. Host time is not in it: launches queue up.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Card(NamedTuple):
    """What a data sheet says."""

    name: str
    architecture: str
    multiprocessors: int
    clock_ghz: float  # boost
    memory_gb_s: float
    half_tflops: float  # tensor cores, dense, sums in float32
    tf32_tflops: float  # 0: there is none
    float_tflops: float


# NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM; dense rates are half of those with sparsity), "A100 Tensor Core GPU" (80 GB
# SXM), "Ada GPU architecture" (whitepaper, appendix A: RTX 4090), "T4". Clocks: the architectures' whitepapers.
CARDS = {
    card.name: card
    for card in (
        Card("H100", "9.0", 132, 1.83, 3350, 989.4, 494.7, 66.9),
        Card("A100", "8.0", 108, 1.41, 2039, 312.0, 156.0, 19.5),
        Card("RTX 4090", "8.9", 128, 2.52, 1008, 165.2, 82.6, 82.6),
        Card("T4", "7.5", 40, 1.59, 320, 65.0, 0.0, 8.1),
    )
}
# Assumptions, the same for every card; none is in a data sheet.
LAUNCH_US = 1.5  # from the end of a kernel to the work of the next one in the stream
LATENCY_US = (
    0.6  # of a load that misses L1; published microbenchmarks find 0.15 to 0.3 in L2, 0.4 to 0.8 in memory
)
L2_BYTES = 24  # for each multiprocessor and clock; microbenchmarks find 20 to 45
MEMORY_PART = 0.85  # of the bandwidth, that a copy reaches
ARITHMETIC_PART = 0.5  # of the rate, that a plain loop of products reaches
# mma.sync, which the kernels use, reaches some 60 % of the rate of wgmma on 9.0 (arXiv 2402.13499); cuDNN uses the latter.
MMA_PART = {"9.0": 0.6}


class Work(NamedTuple):
    """One launch."""

    blocks: int
    resident: int  # blocks that a multiprocessor holds at a time
    memory_bytes: float
    cache_bytes: float
    flops: float = 0.0
    tflops: float = 1.0  # at what rate these can be
    steps: float = 1.0  # of a block, one after the other, each with a load to wait for
    overlap: float = 1.0  # of these, on their way at a time


class Time(NamedTuple):
    """In microseconds; `launch` comes before the others, of which the longest counts."""

    launch: float
    memory: float
    cache: float
    arithmetic: float
    latency: float

    @property
    def us(self) -> float:
        return self.launch + max(self[1:])

    @property
    def bound(self) -> str:
        """What it takes its time for: launch, memory, cache, arithmetic or latency."""
        return max(self._fields, key=lambda name: getattr(self, name))


def busiest(work: Work, card: Card) -> int:
    """The blocks of the multiprocessor that has the most."""
    return math.ceil(work.blocks / card.multiprocessors)


def waves(work: Work, card: Card) -> int:
    """How often the card is full, the last time perhaps in part."""
    return math.ceil(busiest(work, card) / work.resident)


def fill(blocks: int, multiprocessors: int) -> float:
    """The part of the multiprocessors that have a block."""
    return min(1.0, blocks / multiprocessors)


def time(work: Work, card: Card) -> Time:
    """How long the launch takes."""
    share = busiest(work, card) * card.multiprocessors / work.blocks
    l2 = L2_BYTES * card.multiprocessors * card.clock_ghz * 1e3  # bytes a microsecond
    return Time(
        LAUNCH_US,
        work.memory_bytes / (card.memory_gb_s * 1e3 * MEMORY_PART),
        work.cache_bytes * share / l2,
        work.flops * share / (work.tflops * 1e6),
        waves(work, card) * (1 + work.steps / work.overlap) * LATENCY_US,
    )


def rate(card: Card, numbers: str, own: bool = True) -> float:
    """TFLOP/s that products reach in float16, bfloat16, TF32 or float32. own: of kernels with mma.sync, not cuDNN's."""
    half = card.half_tflops if numbers == "float16" or card.architecture != "7.5" else 0.0
    peak = {"float16": half, "bfloat16": half, "TF32": card.tf32_tflops, "float32": 0.0}[numbers]
    if not peak:
        return ARITHMETIC_PART * card.float_tflops
    return ARITHMETIC_PART * peak * (MMA_PART.get(card.architecture, 1.0) if own else 1.0)
