"""The time model: a case by hand, and that more work, or fewer multiprocessors with a block, never takes less time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cuda_model
from benchmarks.cuda_model import CARDS, Card, Work

pytestmark = pytest.mark.tools

# 10 multiprocessors of 1 GHz: L2 moves 240,000 bytes a microsecond; memory of 100 GB/s 85,000
CARD = Card("by hand", "8.0", 10, 1.0, 100.0, 20.0, 10.0, 4.0)


def test_by_hand() -> None:
    """25 blocks, two of which a multiprocessor holds: the busiest has 3 of 2.5, in two waves."""
    work = Work(25, 2, 85_000, 480_000, 6e6, 10.0, 8, 2)
    time = cuda_model.time(work, CARD)
    assert cuda_model.busiest(work, CARD) == 3 and cuda_model.waves(work, CARD) == 2
    assert time.launch == cuda_model.LAUNCH_US
    assert time.memory == pytest.approx(1.0)
    assert time.cache == pytest.approx(2 * 1.2)
    assert time.arithmetic == pytest.approx(0.6 * 1.2)
    assert time.latency == pytest.approx(2 * (1 + 8 / 2) * cuda_model.LATENCY_US)
    assert time.us == time.launch + time.latency and time.bound == "latency"


def test_blocks_for_a_few_multiprocessors_share_what_those_can() -> None:
    """A quarter of the blocks that the card has multiprocessors: four times as long."""
    one, quarter = (cuda_model.time(Work(n, 1, 0, 960_000, 8e6, 10.0), CARDS["H100"]) for n in (132, 33))
    assert quarter.cache == pytest.approx(4 * one.cache)
    assert quarter.arithmetic == pytest.approx(4 * one.arithmetic)
    assert cuda_model.fill(33, 132) == 0.25 and cuda_model.fill(200, 132) == 1


WORK = Work(100, 2, 10**7, 3 * 10**7, 10**9, 50.0, 10, 2)
GROWS = ["memory_bytes", "cache_bytes", "flops", "steps"]
# What a launch is made of where the term is the longest, that the field makes shorter.
SHRINKS: dict[str, dict[str, Any]] = {
    "resident": {"blocks": 10**4, "steps": 100},
    "tflops": {"flops": 1e13},
    "overlap": {"steps": 1e5},
}


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
@pytest.mark.parametrize("field", [*GROWS, *SHRINKS])
def test_more_work_takes_no_less_time(card: Card, field: str) -> None:
    work = WORK._replace(**SHRINKS.get(field, {}))
    times = [
        cuda_model.time(work._replace(**{field: getattr(work, field) * n}), card).us for n in (1, 2, 1000)
    ]
    assert times == sorted(times, reverse=field in SHRINKS) and times[0] != times[-1]


def test_an_empty_launch_takes_its_fixed_time_and_a_load() -> None:
    time = cuda_model.time(Work(1, 1, 0, 0, steps=0), CARD)
    assert time.us == cuda_model.LAUNCH_US + cuda_model.LATENCY_US and time.bound == "launch"


def test_rates() -> None:
    h100, t4 = CARDS["H100"], CARDS["T4"]
    assert cuda_model.rate(h100, "float16") == pytest.approx(989.4 * 0.5 * 0.6)
    assert cuda_model.rate(h100, "TF32", own=False) == pytest.approx(494.7 * 0.5)
    assert cuda_model.rate(h100, "float32") == pytest.approx(66.9 * 0.5)
    assert cuda_model.rate(t4, "float16") == pytest.approx(65 * 0.5)
    assert cuda_model.rate(t4, "bfloat16") == cuda_model.rate(t4, "TF32") == pytest.approx(8.1 * 0.5)
