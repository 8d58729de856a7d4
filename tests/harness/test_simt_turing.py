"""The GEMM operators' tests again, and one of the engine, with the code for compute capability 7.5 (Turing).

What 7.5 lacks is replaced: copies are synchronous, products in half precision come in two steps, those in
bfloat16 and TF32 are exact, blocks have 64 KB of shared memory. All other kernels are the same ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effdense.ops import self_test
from tests.engine import test_simt_engine
from tests.harness.test_simt_bottleneck import (  # noqa: F401
    ARITHMETICS,
    CARDS,
    TRAFFIC,
    WIDE,
    Arithmetic,
    _forget,
    arithmetic,
    backward,
    check_traffic,
    forward,
    in_every_arithmetic,
    make_case,
    on_card,
    test_backward_in_every_tile,
    test_backward_of_what_is_wanted,
    test_epilogues,
    test_forward_in_every_tile,
    test_infinity_comes_through,
    test_nan_comes_through,
    test_the_order_of_threads_and_blocks_changes_no_bit,
)
from tests.ops.test_bottleneck import (  # noqa: F401
    test_backward_matches_the_float64_twin,
    test_forward_matches_the_float64_twin,
    test_runs_are_bitwise_repeatable,
)

BACKENDS = ["simt75"]


@pytest.fixture(scope="session")
def simt(simt75: Any) -> Any:
    """What the tests of "the CUDA kernels" run on in this file."""
    return simt75


@in_every_arithmetic
@pytest.mark.parametrize("shape", TRAFFIC, ids=str)
@pytest.mark.parametrize("multiprocessors", CARDS)
def test_each_element_moves_once_a_launch(
    simt: Any,
    on_card: Any,  # noqa: F811
    arithmetic: Arithmetic,  # noqa: F811
    shape: tuple,
    multiprocessors: int,
) -> None:
    """Of 32 bits too, 64 out channels are the most that a launch has room for."""
    on_card(multiprocessors)
    launches = 1 if arithmetic.dtype.itemsize == 2 else -(-shape[2] // 64)
    check_traffic(simt, shape, arithmetic, launches)


def test_tf32_changes_nothing(simt: Any) -> None:
    case = make_case(WIDE[0], torch.float32)
    results = []
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        of_x = forward(simt, case, ARITHMETICS["float"])
        results.append([*of_x, *backward(simt, case, ARITHMETICS["float"], correction=6).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_check_before_a_cards_first_use_passes(simt: Any) -> None:
    results = self_test.check("cpu", simt, self_test.NUMBERS["cuda"])
    assert results and all(result.passed for result in results), [r for r in results if not r.passed]


@pytest.mark.usefixtures("runs_on")
@pytest.mark.parametrize("dtype", test_simt_engine.LOW)
def test_the_engine_in_low_precision(dtype: torch.dtype) -> None:
    for tail in ("block", "transition"):
        test_simt_engine.test_low_precision_is_as_exact_as_plain_pytorch(dtype, "balanced", tail)
