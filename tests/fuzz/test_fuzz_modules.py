"""Modules and converted nets through histories at random of what users do to them, step by step against plain PyTorch in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests._cases import LAYOUTS
from tests.fuzz._fuzz import fuzz
from tests.fuzz._nets import (
    ACTIONS,
    LOW,
    OURS,
    REFUSALS,
    Action,
    Input,
    Net,
    Side,
    change_ours,
    engine,
    is_checkpointed,
    make,
    norms_of,
    step,
)
from tests.fuzz._roundings import SAMPLES, Errors, allowed, are_sure, before_relus, rounded, rounding

pytestmark = pytest.mark.compiled
Case = tuple[Net, Input, list[Action]]
Results = dict[str, Tensor | None]

small = st.integers(0, 20)


@st.composite
def histories(draw: Any, way: str) -> Case:
    """A net, its first input, and what happens before each step."""
    spatial = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    sure = draw(st.booleans())
    low = [torch.float64, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
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
        dtype=draw(st.sampled_from(low if sure else [torch.float64, torch.float64, torch.float32])),
        seed=draw(st.integers(0, 2**16)),
        drop=draw(st.sampled_from([0.0, 0.0, 0.3])),
        sure=sure,
    )
    first = Input(net.images, spatial, draw(st.sampled_from(list(LAYOUTS))), draw(st.booleans()))
    names = st.sampled_from([name for name in (*ACTIONS, *OURS) if sure or name not in LOW])
    actions = draw(st.lists(st.builds(Action, names, small, small), min_size=1, max_size=5))
    return net, first, actions


def state_of(side: Side) -> list[Tensor]:
    return [t.data for t in (*side.model.parameters(), *side.model.buffers())]


def follow(naive: Side, ours: Side, exact: bool) -> None:
    """Gives the plain net the other's values, so that differences do not add up; `exact`: which are the same but for rounding."""
    flags = [[p.requires_grad for p in side.model.parameters()] for side in (naive, ours)]
    assert flags[0] == flags[1], "other parameters are frozen"
    for old, new in zip(state_of(naive), state_of(ours), strict=True):
        if exact and old.numel() and old.is_floating_point():
            error, eps = (old - new.double()).abs().max(), torch.finfo(new.dtype).eps
            assert error <= 4 * eps * old.abs().max(), f"an action has changed the values by {error:.3g}"
        old.copy_(new)


def without(results: Results, words: tuple[str, ...]) -> Results:
    return {name: t for name, t in results.items() if not name.startswith(words)}


def expect(
    naive: Side, run: Any, size: float, readers: int, dtype: torch.dtype, seed: int
) -> tuple[Results, list[Results], bool]:
    """Plain PyTorch's results in float64, those with roundings at random, and whether gradients can be told from them."""
    before = [t.clone() for t in state_of(naive)]
    norms = norms_of(naive.model)
    with before_relus(norms) as exact:
        results = run(naive, None)
    after = [t.clone() for t in state_of(naive)]
    samples, others = [], []
    for i in range(SAMPLES if size else 0):
        for t, then in zip(state_of(naive), before, strict=True):
            t.copy_(then)
        errors = Errors(size, readers, dtype, seed + i)
        with before_relus(norms) as other, rounded(naive.model, errors):
            samples.append(run(naive, errors))
        others.append(other)
    for t, now in zip(state_of(naive), after, strict=True):
        t.copy_(now)
    return results, samples, are_sure(exact, others, size)


def plainly(naive: Side, ours: Side, run: Any) -> Results | None:
    """The results of plain PyTorch in the other net's precision; None where it refuses."""
    twin = Side(copy.deepcopy(naive.model))
    twin.how = "" if is_checkpointed(ours) else ours.how
    twin.passes, twin.autocast = ours.passes, ours.autocast
    tensors = [*twin.model.parameters(), *twin.model.buffers()]
    for t, like in zip(tensors, state_of(ours), strict=True):
        t.data = t.data.to(like.dtype)
    try:
        results: Results = run(twin)
    except REFUSALS:
        return None
    return {name: t for name, t in results.items() if "hook" not in name}


def dtypes_of(results: Results) -> dict[str, torch.dtype | None]:
    return {name: None if t is None else t.dtype for name, t in results.items()}


def close(
    got: Results, expected: Results, samples: list[Results], plain: Results, size: float, dtype: torch.dtype
) -> None:
    """`plain`: what plain PyTorch has in the same precision; where that overflows, anything may be."""
    assert list(got) == list(expected), f"results {list(got)}, plain PyTorch has {list(expected)}"
    for name, a in got.items():
        b = expected[name]
        assert (a is None) == (b is None), f"{name}: {a} for {b}"
        if a is None or b is None:
            continue
        assert a.shape == b.shape, name
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{name}: {a} for {b}"
        elif b.numel():
            low = plain.get(name)
            there = torch.ones_like(b, dtype=torch.bool) if low is None else low.isfinite()
            others = [t.double()[there] for s in (*samples, plain) if (t := s.get(name)) is not None]
            others = [t for t in others if t.isfinite().all()]
            if not there.any():
                continue
            error = (a.double() - b)[there].abs().max().item()
            limit = allowed(b[there], others, size, dtype)
            assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def moved_once_or_twice(side: Side, before: list[Tensor], naive: Side) -> None:
    """Under a checkpoint, what runs fused counts a batch once; what runs one by one again in every backward, as in plain PyTorch."""
    runs = 3 if side.passes in ("again", "second") else 2
    for now, then, plain in zip(side.model.buffers(), before, naive.model.buffers(), strict=True):
        if not now.is_floating_point():
            once = plain - then
            assert now - then in (once, runs * once), f"{now - then} batches counted, {once} in plain PyTorch"


def refused(ours: Side, naive: Side, before: list[Tensor]) -> None:
    """Statistics stay where they were, or move as in plain PyTorch, where a module of several refuses what those before it took."""
    after, theirs = list(ours.model.buffers()), list(naive.model.buffers())
    if is_checkpointed(ours):
        return moved_once_or_twice(ours, before, naive)
    for now, then, plain in zip(after, before, theirs, strict=True):
        if now.dtype in (torch.bfloat16, torch.float16):
            continue  # how exact they are, nothing says: the number of batches does
        same = torch.equal(now, then) or now.allclose(plain.to(now.dtype), 1e-3)
        assert same, "a refused forward has moved statistics"


def dtype_of(side: Side) -> torch.dtype:
    return next(p.dtype for p in side.model.parameters() if p.dim() > 2)


def check_step(naive: Side, ours: Side, net: Net, like: Input, seed: int) -> bool:
    """One step of both; whether there can be another."""
    dtype = dtype_of(ours)
    xs = [like.make(net.channels, seed + i).to(dtype).double() for i in (0, 2**16)]
    terms = max(
        like.images * math.prod(like.spatial),
        3 ** len(like.spatial) * (net.layers * net.growth + net.channels),
    )
    size = rounding(dtype, ours.autocast, terms)

    def of_naive(side: Side, errors: Errors | None) -> Results:
        images = xs if errors is None else [errors.moved(x) for x in xs]
        return step(side, images, like, torch.float64, seed, plain=True)

    before = [b.clone() for b in ours.model.buffers()]
    try:
        expected, samples, sure = expect(naive, of_naive, size, net.layers + 1, dtype, seed)
    except REFUSALS:
        # Too few values for statistics, no values at all: then ours refuse it too, or can do it.
        with engine(net.engine):
            try:
                step(ours, xs, like, dtype, seed)
            except REFUSALS:
                refused(ours, naive, before)
        return False
    in_this_precision = lambda twin: step(twin, xs, like, dtype, seed)  # noqa: E731

    def nearly(i: int) -> Any:
        """Of images that differ by a rounding: operators then round otherwise inside of themselves."""
        errors = Errors(size, 1, dtype, seed + i)
        return lambda twin: step(twin, [errors.moved(x) for x in xs], like, dtype, seed)

    plain = plainly(naive, ours, in_this_precision) if size else {}
    if plain:
        samples += [s for i in range(SAMPLES) if (s := plainly(naive, ours, nearly(i))) is not None]
    try:
        with engine(net.engine):
            got = step(ours, xs, like, dtype, seed)
    except REFUSALS:
        if plain is None or plainly(naive, ours, in_this_precision) is None:
            return False  # as float64 with norms of float32
        raise
    if plain:
        mine = dtypes_of({name: t for name, t in got.items() if name in plain})
        assert mine == dtypes_of(plain), "other dtypes than plain PyTorch's"
    if is_checkpointed(ours):
        moved_once_or_twice(ours, before, naive)
        got, expected = (without(r, tuple(n for n, _ in ours.model.named_buffers())) for r in (got, expected))
    if not sure:  # ReLUs about which rounding decides: what is forward is continuous there
        got, expected = (without(r, ("gradient",)) for r in (got, expected))
    close(got, expected, samples, plain or {}, size, dtype)
    return True


def check_history(case: Case) -> None:
    net, like, actions = case
    torch.manual_seed(net.seed)
    naive, ours = map(Side, make(net))
    for i, action in enumerate(actions):
        if action.name == "input":
            like = like.changed(action)
        elif action.name in OURS:
            change_ours(ours, action)
        else:
            for side in (naive, ours):
                ACTIONS[action.name](side, action.a, action.b)
        follow(naive, ours, exact=action.name != "to")
        if not check_step(naive, ours, net, like, net.seed + i):
            return
        follow(naive, ours, exact=False)


BASE = Net(
    2, 3, 2, 2, "head", True, 0, (3, 2), "minimal", "modules", "compiled", torch.float64, 55, 0.0, True
)


def found(way: str) -> list[Case]:
    """Cases that the test or the code once had wrong, in the way given.

    No images under a checkpoint, where the head's norm runs by itself and counts the batch twice; a refused forward in bfloat16;
    gradients of float16 that come close to its smallest numbers; a penalty under a checkpoint, whose two backwards run forwards again;
    a bias before a norm, whose gradient is all rounding inside of that norm; float64 images for norms of float32; a norm of two
    values in float16, whose gradient overflows.
    """
    empty = BASE._replace(way=way)
    refused = empty._replace(tail="transition", images=3, spatial=(2, 1), dtype=torch.bfloat16)
    least = empty._replace(tail="transition", images=1, spatial=(2,), layers=4, dtype=torch.float16)
    rounded_away = empty._replace(
        layers=4, channels=1, growth=5, bn_size=0, images=1, spatial=(7, 1), dtype=torch.float32, seed=0
    )
    mixed = empty._replace(layers=1, channels=1, growth=1, bn_size=0, tail="block", images=2, spatial=(1,))
    ways = [Action("how", 0, b) for b in (3, 5, 6)]
    return [
        (
            empty,
            Input(0, (3, 2), "contiguous", True),
            [*ways, Action("no affine", 0, 0), Action("how", 0, 1)],
        ),
        (refused, Input(3, (2, 1), "contiguous", True), [Action("autocast", 0, 0)]),
        (empty, Input(0, (3, 2), "contiguous", True), [Action("how", 0, 3), Action("passes", 0, 4)]),
        (least, Input(1, (2,), "contiguous", False), [Action("nothing", 0, 0)]),
        (rounded_away, Input(1, (7, 1), "contiguous", False), [Action("nothing", 0, 0)]),
        (mixed, Input(2, (1,), "contiguous", False), [Action("to", 2, 3)]),
        (
            mixed._replace(bn_size=2, bias=True, dtype=torch.float32, seed=0, sure=False),
            Input(2, (1,), "contiguous", False),
            [Action("nothing", 0, 0)],
        ),
        (
            mixed._replace(layers=2, seed=0),
            Input(2, (1,), "contiguous", False),
            [Action("passes", 0, 14), Action("to", 3, 0)],
        ),
    ]


@fuzz(histories("modules"), 40, *found("modules"))
def test_modules(case: Case) -> None:
    check_history(case)


@fuzz(histories("convert"), 25, *found("convert"))
def test_convert(case: Case) -> None:
    check_history(case)
