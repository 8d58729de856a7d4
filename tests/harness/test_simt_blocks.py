"""CUDA blocks that hand a result to the last block: they give the same bits in every order and interleaved, and every wrong memory
order or counter is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.simt.compiler import cuda_include
from tests.harness.test_simt_bottleneck import ARITHMETICS, as_arguments, make_case
from tests.harness.test_simt_harness import ORDERS, Result, library, lines_of  # noqa: F401
from tests.harness.test_simt_operators import OF_MAPS

pytestmark = pytest.mark.skipif(cuda_include() is None, reason="needs the CUDA toolkit's headers")
AT_A_TIME = ["1", "2", "5"]  # blocks


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SIMT_ORDER", request.param)
    return request.param


@pytest.mark.parametrize("blocks", AT_A_TIME)
def test_the_last_block_makes_the_sum(
    library: Callable[[str], Result],  # noqa: F811
    order: str,
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIMT_BLOCKS", blocks)
    status, text = library("bug last_block")
    assert status == 0 and json.loads(text)["nan"] == 0, text


# What is planted -> what is said of it.
UNORDERED = "loads what block"
BUGS = {
    "last_block_no_release": UNORDERED,
    "last_block_no_acquire": UNORDERED,
    "last_block_no_barrier_before": UNORDERED,
    "last_block_no_barrier_after": "",  # a thread loads too early, or has returned before a barrier
    "last_block_too_early": "",  # it loads what is not ordered, or leaves the counter to the other one
    "last_block_not_reset": "a counter is left at 2, not at 0",
}


@pytest.mark.parametrize("blocks", AT_A_TIME[1:])
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_order_or_counter_is_an_error(
    library: Callable[[str], Result],  # noqa: F811
    order: str,
    bug: str,
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIMT_BLOCKS", blocks)
    status, message = library(f"bug {bug}")
    assert status == 2 and BUGS[bug] in message, message
    if BUGS[bug] == UNORDERED:
        line = int(message.split(": ")[1].rsplit(":", 1)[1])
        assert line in lines_of("last_block") and "no fence and counter order the two" in message


def test_a_counter_that_is_not_reset_is_found_without_interleaving(library: Callable[[str], Result]) -> None:  # noqa: F811
    status, message = library("bug last_block_not_reset")
    assert status == 2 and BUGS["last_block_not_reset"] in message


@pytest.mark.parametrize("blocks", ["0", "65", "many", "2x"])
def test_a_wrong_number_of_blocks_is_an_error(
    library: Callable[[str], Result],  # noqa: F811
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIMT_BLOCKS", blocks)
    status, message = library("primitives")
    assert status == 2 and f"SIMT_BLOCKS must be 1 to 64, got {blocks}" in message


# ---- The operators


def assert_the_same_bits(run: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ORDERS:
        for blocks in AT_A_TIME:
            monkeypatch.setenv("SIMT_ORDER", order)
            monkeypatch.setenv("SIMT_BLOCKS", blocks)
            results.append(run())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# Several row blocks, in one tile of channels and in several.
LARGE: list[tuple[Any, ...]] = [(2, (20, 13), (13,), 3), (1, (20, 10), (300,), 3)]
SUMS = [
    "channel_statistics",
    "append_features",
    "bn_relu_backward_sums",
    "bn_relu_backward",
    "bn_relu_backward_accumulate",
]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.half])
def test_operators_of_maps(
    simt: Any, monkeypatch: pytest.MonkeyPatch, op: str, shape: tuple[Any, ...], dtype: torch.dtype
) -> None:
    run = OF_MAPS[op](shape, dtype)
    assert_the_same_bits(lambda: run(simt, dtype), monkeypatch)


@pytest.mark.parametrize("arithmetic", ["half", "float", "double"])
@pytest.mark.parametrize("out", [12, 200])
def test_the_bottleneck(simt: Any, monkeypatch: pytest.MonkeyPatch, arithmetic: str, out: int) -> None:
    kind = ARITHMETICS[arithmetic]
    case = make_case((400, 20, out), kind.dtype)

    def run() -> list[torch.Tensor]:
        c = as_arguments(case, kind, (0, 0))
        y, grad_x = c["y"].clone(), c["grad_x"].clone()
        of_y = simt.bottleneck([c["x"]], c["scale"], c["shift"], c["weight"], None, None, None, True, y)
        grads = simt.bottleneck_backward(
            [c["x"]],
            c["grad_y"],
            c["scale"],
            c["shift"],
            c["mean"],
            c["weight"],
            [grad_x],
            True,
            True,
            True,
            [],
        )
        return [y, *of_y, *grads, grad_x]

    assert_the_same_bits(run, monkeypatch)
