"""Counted bytes of known allocations, the process's peak, and statistics of times."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from benchmarks import measure

pytestmark = pytest.mark.tools

FLOATS = 250_000  # of the known allocations below
FLOAT_BYTES = 4 * FLOATS


class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        torch.empty(3 * FLOATS)
        return grad_output


def in_backward():
    x = torch.ones(1, requires_grad=True)
    AllocatesInBackward.apply(x).backward()


def in_cpp():
    """The log-softmax is an intermediate that only C++ sees; it lives until the loss is there."""
    torch.nn.functional.cross_entropy(known_logits, known_labels)


known_logits = torch.zeros(FLOATS // 10, 10)
known_labels = torch.zeros(FLOATS // 10, dtype=torch.int64)


def one_after_the_other():
    torch.empty(FLOATS)
    torch.empty(FLOATS)


def both_at_once():
    _first, _second = torch.empty(FLOATS), torch.empty(FLOATS)


def freed_in_between():
    first = torch.empty(2 * FLOATS)
    second = torch.empty(FLOATS)
    del first
    third = torch.empty(FLOATS)
    return second, third


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: None, 0),
        (one_after_the_other, FLOAT_BYTES),
        (both_at_once, 2 * FLOAT_BYTES),
        (freed_in_between, 3 * FLOAT_BYTES),
        (in_backward, 3 * FLOAT_BYTES),
        (in_cpp, FLOAT_BYTES),
    ],
)
def test_peak_bytes_of_known_allocations(fn, expected):
    assert 0 <= measure.peak_bytes(fn) - expected < 4096


def test_peak_bytes_does_not_remember():
    """Memory of one measurement that is released between them, or in the next, must not count there."""
    kept = []
    measure.peak_bytes(lambda: kept.append(torch.empty(FLOATS)))
    assert measure.peak_bytes(kept.clear) == 0
    measure.peak_bytes(lambda: kept.append(torch.empty(FLOATS)))
    kept.clear()
    assert 0 <= measure.peak_bytes(both_at_once) - 2 * FLOAT_BYTES < 4096


def test_peak_bytes_counts_the_calling_thread_only():
    def in_another_thread():
        thread = threading.Thread(target=both_at_once)
        thread.start()
        thread.join()

    assert measure.peak_bytes(in_another_thread) < FLOAT_BYTES  # as its docstring says


def test_peak_rss_sees_what_is_touched():
    before = measure.peak_rss_bytes()
    touched = np.ones(before // 8 + 2**23)  # 64 MiB more than was ever there
    assert measure.peak_rss_bytes() - before >= 2**26 - 2**24, touched.size


def test_time_statistics():
    assert measure.time_statistics([5.0]) == {"median_ms": 5.0, "p20_ms": 5.0, "p80_ms": 5.0}
    assert measure.time_statistics([6, 1, 2, 3, 4, 5]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    with pytest.raises(ValueError, match="no times"):
        measure.time_statistics([])
