"""What a user's forward does beside computing: convert must not leave it behind, and no fused forward leave it out."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import densenet, structures
from tests._conversions import images_for, randomised

CALLS: list[str] = []
COUNT = {"calls": 0}


class Appending(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append("block")
        return super().forward(x)


class Counting(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        COUNT["calls"] += 1
        return super().forward(x)


class CountingInClass(structures.NetBlock):
    calls: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x)


class Keeping(structures.NetBlock):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.skips: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.skips.append(x.detach())
        return super().forward(x)


class KeepingIn(structures.NetBlock):
    """Counts in a container of a kind that is no list or dict itself."""

    kind: ClassVar[Any] = collections.Counter

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.stats: Any = self.kind()
        self.stats["calls"] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.stats["calls"] += 1
        return super().forward(x)


class KeepingByDefault(KeepingIn):
    kind = functools.partial(collections.defaultdict, int)


class KeepingInOrder(KeepingIn):
    kind = type("Ordered", (collections.OrderedDict,), {})


class KeepingInList(KeepingIn):
    kind = type("Named", (list,), {"__setitem__": lambda self, _, value: self[:].append(value)})

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.stats.seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.stats.seen.append(1)
        self.stats.append(1)
        return structures.NetBlock.forward(self, x)


def by_default() -> Any:
    calls: list[int] = []

    class Defaulting(structures.NetBlock):
        seen = property(lambda self: calls)

        def forward(self, x: Tensor, *, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return super().forward(x)

    return Defaulting


class Setting(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.act = super().forward(x)
        return self.act


class SettingByName(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        setattr(self, "act", y)  # noqa: B010
        return y


class Printing(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return super().forward(x)


class Chancy(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if random.random() < 2 else y + 1


class Writer:
    lines: ClassVar[list[str]] = []

    def add(self, line: str) -> None:
        self.lines.append(line)


class Writing(structures.NetBlock):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.writer = Writer()

    def forward(self, x: Tensor) -> Tensor:
        self.writer.add("forward")
        return super().forward(x)


def in_closure() -> Any:
    calls: list[int] = []

    class Closing(structures.NetBlock):
        seen = property(lambda self: calls)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    return Closing


def note() -> None:
    CALLS.append("note")


class Calling(structures.NetBlock):
    def forward(self, x: Tensor) -> Tensor:
        note()
        return super().forward(x)


class Outer(structures.NetBlock):
    """Its layers have a method of their own that counts."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        for i, layer in enumerate(self.net):
            self.net[i] = Telling(*layer)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = torch.cat((x, layer.told(x)), 1)
        return x


class Telling(nn.Sequential):
    def told(self, x: Tensor) -> Tensor:
        CALLS.append("told")
        return self(x)


VISIBLE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a global list": (lambda: Appending, lambda _: list(CALLS)),
    "a global dict": (lambda: Counting, lambda _: dict(COUNT)),
    "a list of the class": (lambda: CountingInClass, lambda m: list(m.calls)),
    "a list of its own": (lambda: Keeping, lambda m: len(m.skips)),
    "a Counter": (lambda: KeepingIn, lambda m: dict(m.stats)),
    "a defaultdict": (lambda: KeepingByDefault, lambda m: dict(m.stats)),
    "a dict's subclass": (lambda: KeepingInOrder, lambda m: dict(m.stats)),
    "a list's subclass": (lambda: KeepingInList, lambda m: (list(m.stats), list(m.stats.seen))),
    "a default argument": (by_default, lambda m: list(m.seen)),
    "an attribute": (lambda: Setting, lambda m: hasattr(m, "act")),
    "an attribute by name": (lambda: SettingByName, lambda m: hasattr(m, "act")),
    "random": (lambda: Chancy, lambda _: random.getstate()),
    "another object": (lambda: Writing, lambda m: list(m.writer.lines)),
    "a closure": (in_closure, lambda m: list(m.seen)),
    "a function": (lambda: Calling, lambda _: list(CALLS)),
    "a layer's method": (lambda: Outer, lambda _: list(CALLS)),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_what_a_blocks_forward_does_beside_computing_is_done_when_it_is_called_only(name: str) -> None:
    make_class, seen = VISIBLE[name]
    block = randomised(make_class()(3, 6, 4))
    before, attributes = seen(block), set(vars(block))
    effdense.convert(block)
    effdense.report(block)
    assert seen(block) == before and set(vars(block)) == attributes
    block(images_for(block, size=5, channels=6))
    assert seen(block) != before
    (entry,) = [e for e in effdense.report(block) if e.kind == "DenseBlock"]
    assert not entry.converted and entry.reason is not None and len(entry.reason) > 20


def test_what_is_printed_is_not_printed_by_convert(capsys: pytest.CaptureFixture[str]) -> None:
    block = effdense.convert(Printing(3, 6, 4))
    assert capsys.readouterr().out == ""
    block(torch.randn(2, 6, 5, 5))
    assert capsys.readouterr().out == "forward\n"


class Watchful(densenet.DenseNet):
    """Every method that convert might call notes it."""

    def __getattribute__(self, name: str) -> Any:
        if name in (
            "modules",
            "named_modules",
            "parameters",
            "train",
            "eval",
            "double",
            "forward",
            "children",
        ):
            CALLS.append(name)
        return super().__getattribute__(name)


def test_convert_calls_no_method_of_a_users() -> None:
    model = Watchful(4, (2, 3), 6, num_classes=5)
    CALLS.clear()
    effdense.convert(model)
    effdense.report(model)
    effdense.revert(model)
    assert CALLS == []
