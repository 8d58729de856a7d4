"""Modules and converted nets through histories at random of what users do to them, step by step against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from tests._cases import LAYOUTS
from tests.fuzz._fuzz import fuzz
from tests.fuzz._nets import (
    ACTIONS,
    OURS,
    REFUSALS,
    Action,
    Input,
    Net,
    Side,
    change_ours,
    engine,
    least_of_relus,
    make,
    step,
)

pytestmark = pytest.mark.compiled
Case = tuple[Net, Input, list[Action]]
# float64 is where a wrong value shows; how exact other dtypes are, other tests say.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-3}
KINK = {torch.float64: 1e-9, torch.float32: 1e-4}

small = st.integers(0, 20)


@st.composite
def histories(draw: Any, way: str) -> Case:
    """A net, its first input, and what happens before each step."""
    spatial = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    net = Net(
        layers=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 7)),
        growth=draw(st.integers(1, 5)),
        bn_size=draw(st.integers(0, 3)),
        tail=draw(st.sampled_from(["block", "transition", "head"])),
        bias=draw(st.booleans()),
        images=draw(st.integers(0, 4)),
        spatial=spatial,
        memory=draw(st.sampled_from(["balanced", "minimal"])),
        way=way,
        engine=draw(st.sampled_from(["compiled", "compiled", "python", "reference"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        seed=draw(st.integers(0, 2**16)),
    )
    first = Input(net.images, spatial, draw(st.sampled_from(list(LAYOUTS))), draw(st.booleans()))
    names = st.sampled_from([*ACTIONS, *OURS])
    actions = draw(st.lists(st.builds(Action, names, small, small), min_size=1, max_size=5))
    return net, first, actions


def close(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float, dtype: Any) -> None:
    assert len(got) == len(expected), (
        f"{len(got)} results, hooks' among them, plain PyTorch has {len(expected)}"
    )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"result {i}: {a} for {b}"
        if a is None or b is None:
            continue
        assert a.shape == b.shape, f"result {i}"
        assert a.dtype in (b.dtype, dtype, torch.float64), f"result {i}"
        if b.numel():
            error, size = (a.double() - b.double()).abs().max(), b.double().abs().max().clamp(min=1)
            assert error <= tolerance * size, f"result {i}: error {error:.3g} of {size:.3g}"


def check_history(case: Case) -> None:
    net, like, actions = case
    torch.manual_seed(net.seed)
    naive, ours = map(Side, make(net))
    tolerance = TOLERANCE[net.dtype]
    for i, action in enumerate(actions):
        if action.name == "input":
            like = like.changed(action)
        elif action.name in OURS:
            change_ours(ours, action)
        else:
            for side in (naive, ours):
                ACTIONS[action.name](side, action.a, action.b)
        x = like.make(net.channels, net.seed + i)
        before = [b.clone() for b in ours.model.buffers()]
        try:
            with least_of_relus(naive.model) as least:
                expected = step(naive, x, like, torch.float64, plain=True)
        except REFUSALS:
            # Too few values for statistics, no values at all: then ours refuse it too, or can do it. Statistics stay where
            # they were, or move as in plain PyTorch, where a module of several refuses what those before it took.
            with engine(net.engine):
                try:
                    step(ours, x, like, net.dtype)
                except REFUSALS:
                    after, theirs = list(ours.model.buffers()), list(naive.model.buffers())
                    for now, then, plain in zip(after, before, theirs, strict=True):
                        same = torch.equal(now, then) or now.allclose(plain.to(now.dtype), 1e-3)
                        assert same, "a refused forward has moved statistics"
            return
        assume(least[0] > KINK[net.dtype])
        with engine(net.engine):
            got = step(ours, x, like, net.dtype)
        close(got, expected, tolerance, net.dtype)
        if ours.how == "checkpoint":
            for now, plain in zip(ours.model.buffers(), naive.model.buffers(), strict=True):
                now.data.copy_(plain)
        tolerance = 3 * tolerance  # the next step begins with what differs


@fuzz(histories("modules"), 60)
def test_modules(case: Case) -> None:
    check_history(case)


@fuzz(histories("convert"), 40)
def test_convert(case: Case) -> None:
    check_history(case)
