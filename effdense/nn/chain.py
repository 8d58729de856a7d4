"""`Chain`, a dense layer as its modules in order, and `Drop`, the dropout after a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple


class Drop(NamedTuple):
    """Dropout behind a convolution, as it would run now."""

    rate: float
    channels: bool = False  # whole channels


NO_DROP = Drop(0.0)


class Chain(NamedTuple):
    """A dense layer's modules: one norm and convolution each (plain) or two (bottleneck), and the dropouts behind these."""

    name: str
    norms: list[Any]
    convs: list[Any]
    drops: list[Drop]
    newest_first: bool = False  # its block puts new features in front of what they are made of
    new_only: bool = False  # its block gives back what its layers add, without its input

    @property
    def channels(self) -> int:
        """That the layer reads."""
        return int(self.norms[0].num_features)

    @property
    def growth(self) -> int:
        """Channels that the layer adds."""
        return int(self.convs[-1].out_channels)
