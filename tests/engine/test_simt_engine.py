"""The engine on the CUDA kernels in the dtypes and shapes of their own: half precision, autocast, TF32, ragged edges, whole models.

That the engine is the naive stage in float64 on every backend, whatever is frozen, dropped or normalised, is in
test_dense_block.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import models
from effdense.engine.passes import empty_buffer
from tests._cases import CONVOLUTIONS, permit_tf32
from tests._stages import MEMORY, TAILS, assert_same, converted, make_input, make_naive, make_pair, step

BACKENDS = ["simt"]
pytestmark = pytest.mark.usefixtures("runs_on")
LOW = [torch.bfloat16, torch.float16]


def relative_error(got: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """Of everything a step makes, the largest: of each tensor by its own norm."""
    pairs = [(a, b) for a, b in zip(got, exact, strict=True) if a is not None and b is not None]
    pairs = [(a, b) for a, b in pairs if b.is_floating_point()]
    return max(((a.double() - b).norm() / (b.norm() + 1e-6)).item() for a, b in pairs)


def low_precision(naive: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Maps and convolutions in `dtype`, norms in float32, as autocast has them."""
    for module in naive.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return naive


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("tail", TAILS)
def test_low_precision_is_as_exact_as_plain_pytorch(dtype: torch.dtype, memory: str, tail: str) -> None:
    naive = make_naive(tail=tail)
    x = make_input().to(dtype)
    exact = step(copy.deepcopy(naive), x.double())
    naive = low_precision(naive.float(), dtype)
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    theirs, mine = (step(model, x) for model in (naive, fused))
    assert [a if a is None else a.dtype for a in mine] == [a if a is None else a.dtype for a in theirs]
    assert relative_error(mine, exact) <= 1.5 * relative_error(theirs, exact)


@pytest.mark.parametrize("tail", TAILS)
def test_float32_rounds_to_tf32_where_pytorch_permits_it(tail: str) -> None:
    naive, x = make_naive(tail=tail), make_input((13, 12), 8)
    exact = step(copy.deepcopy(naive), x)
    errors = []
    for permitted in (False, True):
        permit_tf32(CONVOLUTIONS, permitted)
        errors.append(relative_error(step(converted(naive, "balanced").float(), x.float()), exact))
    bfloat16 = relative_error(step(low_precision(naive.float(), torch.bfloat16), x.bfloat16()), exact)
    assert errors[0] < 1e-4 and 20 * errors[0] < errors[1] < bfloat16, (errors, bfloat16)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("spatial, images", [((7, 7), 3), ((1, 1), 5), ((14, 3), 1), ((9, 17), 2)])
def test_ragged_images(memory: str, spatial: tuple[int, int], images: int) -> None:
    assert_same(make_pair(memory), make_input(spatial, images))


@pytest.mark.parametrize("dtype, step_", [(torch.float16, 304), (torch.float32, 300), (torch.float64, 300)])
def test_the_rows_of_a_buffer_are_whole_pieces_of_16_bytes(dtype: torch.dtype, step_: int) -> None:
    buffer = empty_buffer(torch.empty(2, 3, 4, 5, dtype=dtype), 300)
    assert buffer.shape == (2, 300, 4, 5) and buffer.stride() == (20 * step_, 1, 5 * step_, step_)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name, size", [("densenet_bc_22_5", 16), ("densenet_16_7", 12)])
def test_a_whole_model_trains_as_the_naive_one(name: str, size: int, memory: str) -> None:
    naive: Any = models.build(name, "naive").model.double()
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    assert_same((naive, fused), torch.randn(4, 3, size, size, dtype=torch.float64))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), naive.eval()(x), rtol=1e-9, atol=1e-10)
