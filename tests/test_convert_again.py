"""convert on what is half converted, and one that fails half-way."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
from torch import nn

import effdense
from tests import structures
from tests.test_convert import assert_same_step, make_batch, make_small


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_convert_that_fails_half_way_changes_nothing(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    naive = nn.ModuleList([make_small(), structures.d2l_net(), effdense.convert(make_small())])
    before = [(type(m), dict(vars(m))) for m in naive.modules()]
    convert = importlib.import_module("effdense.convert")  # not the function
    adopt, calls = convert._adopt, list[Any]()

    def failing(module: Any, *arguments: Any) -> None:
        calls.append(module)
        if module is naive[2].features:  # nearly the last
            raise error
        adopt(module, *arguments)

    report = str(effdense.report(naive))
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(convert, "_adopt", failing)
        effdense.convert(naive, memory="minimal")
    assert len(set(calls) & set(naive.modules())) >= 20
    assert [(type(m), dict(vars(m))) for m in naive.modules()] == before
    assert str(effdense.report(naive)) == report
