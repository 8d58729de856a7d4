"""convert on what is half converted."""

from __future__ import annotations

import copy

import pytest

import effdense
from tests.test_convert import assert_same_step, make_batch, make_small

pytestmark = pytest.mark.core


@pytest.mark.parametrize("part", ["features.denseblock2", "features.denseblock1.denselayer2", "features"])
def test_what_is_half_converted_becomes_whole(part: str) -> None:
    naive = make_small()
    ours = copy.deepcopy(naive)
    effdense.convert(ours.get_submodule(part), memory="minimal")
    first = [type(m) for m in ours.get_submodule(part).modules()]
    states = {e.converted for e in effdense.report(ours)}
    assert states == {True, False}
    effdense.convert(ours)
    assert [type(m) for m in ours.get_submodule(part).modules()] == first
    before, report = [type(m) for m in ours.modules()], str(effdense.report(ours))
    assert "not converted" not in report and "DenseNet: 1 of 1 run fused" in report
    effdense.convert(ours)
    assert [type(m) for m in ours.modules()] == before and str(effdense.report(ours)) == report
    assert_same_step(naive, ours, make_batch(), 1e-9)
    assert [type(m) for m in effdense.revert(ours).modules()] == [type(m) for m in naive.modules()]
