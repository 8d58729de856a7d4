"""Lists of features and of their gradients, as the CUDA bottleneck takes them: in place where they are one map of a
buffer, else gathered, and handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import reference
from tests._cases import channels_last
from tests.ops.test_bottleneck import VECTORS, make_case

Cut = Callable[[Tensor], list[Tensor]]
SIZES = (3, 8, 5)  # channels of each


@pytest.fixture(autouse=True)
def _forget(simt: Any) -> Iterator[None]:
    yield
    simt.forget()


def side_by_side(x: Tensor, between: int = 0) -> list[Tensor]:
    """The features of x as slices of one buffer, with more or less room between them."""
    images, _, *spatial = x.shape
    buffer = x.new_full((images, *spatial, 24), 77).movedim(-1, 1)
    parts, first = [], 2
    for part in x.split(SIZES, 1):
        parts.append(buffer[:, first : first + part.shape[1]].copy_(part))
        first += part.shape[1] + between
    return parts


def backwards(x: Tensor) -> list[Tensor]:
    """Side by side, but the last one first."""
    parts = x.split(SIZES, 1)
    swapped = channels_last(torch.cat(parts[::-1], 1))
    return list(swapped.split(SIZES[::-1], 1))[::-1]


SCATTERED: dict[str, Cut] = {
    "of their own": lambda x: [channels_last(part.clone()) for part in x.split(SIZES, 1)],
    "a gap between": lambda x: side_by_side(x, 1),
    "backwards": backwards,
    "another step": lambda x: [*side_by_side(x)[:2], channels_last(x.split(SIZES, 1)[2].clone())],
}
PLACES: dict[str, Cut] = {"side by side": side_by_side, **SCATTERED}


def make_lists(images: int, spatial: tuple[int, ...]) -> dict[str, Any]:
    case = make_case((images, spatial, SIZES, 20))
    return case | {name: torch.cat(case[name], 1) for name in ("features", "grad_features")}


def run_lists(
    ops: Any, case: dict[str, Any], features: list[Tensor], grads: list[Tensor], accumulate: bool
) -> list[Tensor]:
    vectors = [case[name] for name in VECTORS]
    y = channels_last(torch.zeros_like(case["grad_y"]))
    of_y = ops.bottleneck(features, *vectors[:2], case["weight"], None, None, None, True, y)
    arguments = features, case["grad_y"], *vectors, case["weight"], grads, accumulate, True, True, []
    return [y, *of_y, *ops.bottleneck_backward(*arguments), *grads]


def some(maps: list[Tensor], wanted: Sequence[bool | int]) -> list[Tensor]:
    return [x if mine else x.new_empty(0) for x, mine in zip(maps, wanted, strict=True)]


@pytest.mark.parametrize("images, spatial", [(2, (5, 7)), (2, (1, 1)), (1, (1, 1)), (1, (3,))])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_lists_wherever_they_lie(
    simt: Any, place: str, wanted: tuple[bool, ...], accumulate: bool, images: int, spatial: tuple[int, ...]
) -> None:
    case, cut = make_lists(images, spatial), PLACES[place]
    results, rests = [], []
    for ops in (simt, reference):
        grads = cut(case["grad_features"])
        results.append(run_lists(ops, case, cut(case["features"]), some(grads, wanted), accumulate))
        buffer = grads[0]._base
        rests.append(grads if buffer is None else [*grads, buffer])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*rests)  # what lies between them, and what is not wanted, too


def of_storages(maps: list[Tensor]) -> list[Tensor]:
    """One map of every storage: all of it is watched."""
    return list({x.untyped_storage().data_ptr(): x for x in maps if x.numel()}.values())


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_launches_touch_the_lists_only_where_they_are_one_map(
    simt: Any, place: str, accumulate: bool
) -> None:
    """What is gathered, and where gradients are handed out, is not for a launch to see."""
    case, cut = make_lists(2, (5, 7)), PLACES[place]
    moved = case["features"].numel() * 8
    for wanted in ((1, 1, 1), (1, 0, 1)):
        lists = {"x": cut(case["features"]), "grad": some(cut(case["grad_features"]), wanted)}
        simt.forget()
        watched = {f"{name}{i}": x for name in lists for i, x in enumerate(of_storages(lists[name]))}
        for name, x in watched.items():
            simt.watch(name, x)
        run_lists(simt, case, lists["x"], lists["grad"], accumulate)
        in_place = place == "side by side"
        grads_in_place = in_place and all(wanted)
        bytes_ = {name: simt.watched(name)[1::2] for name in watched}
        loads = 2 * moved if in_place else 0  # forward and backward
        assert [sum(b) for b in zip(*(bytes_[n] for n in bytes_ if n[0] == "x"), strict=True)] == [loads, 0]
        expected = [moved * grads_in_place * accumulate, moved * grads_in_place]
        assert [sum(b) for b in zip(*(bytes_[n] for n in bytes_ if n[0] == "g"), strict=True)] == expected


def test_in_place_or_gathered_is_the_same_to_the_bit(simt: Any) -> None:
    case = make_lists(2, (5, 7))
    every = [
        run_lists(simt, case, cut(case["features"]), cut(case["grad_features"]), False)
        for cut in (side_by_side, backwards)
    ]
    assert all(map(torch.equal, *every))


def test_maps_of_one_pixel_that_are_neighbours_in_memory(simt: Any) -> None:
    """One image: nothing tells where the next pixel would be. Two: windows that slide over a buffer overlap."""
    for images in (1, 2):
        case = make_case((images, (1, 1), (4, 4, 4), 20))
        memory = torch.randn(4 * (images + 2), dtype=torch.float64)
        features = [memory[4 * i :][: 4 * images].view(images, 4, 1, 1) for i in range(3)]
        grads = [channels_last(g) for g in case["grad_features"]]
        got = run_lists(simt, case, features, [g.clone() for g in grads], True)
        expected = run_lists(reference, case, [f.clone() for f in features], [g.clone() for g in grads], True)
        torch.testing.assert_close(got, expected)
