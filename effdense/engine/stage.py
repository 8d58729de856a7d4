"""The layout of a dense stage: its settings, its layers' tensors, and the places of its parts in flat tensors.

The engine in Python (passes.py), the fake operators (node.py) and layers that run alone (single_layer.py) read it from here.
csrc/stage_layout.h is the same in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from effdense.engine.batch_norm import Folded, fold
from effdense.engine.convolution import fuses

Vectors = list[tuple[Tensor, Tensor]]
Parameters = Sequence[Tensor | None]


class StageConfig(NamedTuple):
    """What a stage is made of, beside its tensors. Flat, because operators' schemas are."""

    bottleneck: bool  # BN-ReLU-conv1x1-BN-ReLU-conv3x3, else BN-ReLU-conv3x3
    memory: str  # "balanced" keeps every y, "minimal" none; "inference": no backward will come
    lowest: int  # the first layer with parameters that need gradients; -1: the input does
    eps: list[float]  # of every norm: the layers' in order, then the pool's
    batch_statistics: list[
        bool
    ]  # per norm: normalise with the batch's statistics, else with the running ones
    drop: list[
        float
    ]  # per layer: dropout after the bottleneck's first convolution, and after the layer; or nothing
    pool: list[int]  # kernel size of the pool behind the block; empty: none
    dilation: list[int]  # of every layer's last convolution; or nothing: 1
    newest_first: (
        bool  # a layer's features come in front of what it has read, torch.cat([new, x], 1), else behind
    )
    group: str  # of processes whose batches are one batch for norms with the batch's statistics; see synchronize.py

    @property
    def parameters_per_layer(self) -> int:
        """How many parameters a layer has: weight and bias of every norm and convolution."""
        return 8 if self.bottleneck else 4


class ForwardInputs(NamedTuple):
    """What a stage's forward is given beside its settings. The operator `dense_stage` takes both, one after the other."""

    x: Tensor
    # Per layer norm1's weight and bias, conv1's weight and bias, norm2's, conv2's (plain: norm1's, conv2's), then the pool's
    # norm's, and those of a transition's 1x1 convolution, which comes after the pool (they commute, and there it has less to
    # do); None for a head.
    parameters: Parameters
    running: Parameters  # mean and variance of every norm that does not use the batch's, else None
    masks: Parameters  # of dropout, per layer y's and the new features' (bool, or None), or nothing


class BackwardInputs(NamedTuple):
    """What a stage's backward is given beside its settings, likewise for `dense_stage_backward`."""

    grad: Tensor  # of the stage's output
    channels: int  # of x
    features: Tensor  # these three are the forward's results
    saved: Tensor
    vectors: Tensor
    parameters: Parameters
    masks: Parameters
    needs: Sequence[bool]  # whether x, and every parameter, needs a gradient


Inputs = TypeVar("Inputs", ForwardInputs, BackwardInputs)


def split_arguments(kind: type[Inputs], arguments: Sequence[Any]) -> tuple[Inputs, StageConfig]:
    """An operator's arguments: its inputs and its settings."""
    count = len(kind._fields)
    return kind(*arguments[:count]), StageConfig(*arguments[count:])


class LayerParameters(NamedTuple):
    """Of a layer's parameters: the values, whether their gradients are needed, the gradients. None where there is none."""

    norm1_weight: Any = None
    norm1_bias: Any = None
    conv1_weight: Any = None  # conv1 and norm2 in bottleneck layers only
    conv1_bias: Any = None
    norm2_weight: Any = None
    norm2_bias: Any = None
    conv2_weight: Any = None
    conv2_bias: Any = None

    @classmethod
    def names(cls, bottleneck: bool) -> tuple[str, ...]:
        """Those that a kind of layer has, in the operators' order."""
        return cls._fields if bottleneck else (*cls._fields[:2], *cls._fields[6:])


class PoolParameters(NamedTuple):
    """The same of the pool behind a block: its norm, and the 1x1 convolution behind it."""

    norm_weight: Any = None
    norm_bias: Any = None
    conv_weight: Any = None
    conv_bias: Any = None


def by_name(settings: StageConfig, flat: Sequence[Any]) -> tuple[list[LayerParameters], PoolParameters]:
    """What the operators have in one list, one after the other: layer by layer, then the pool's."""
    names, behind = (
        LayerParameters.names(settings.bottleneck),
        len(PoolParameters._fields) if settings.pool else 0,
    )
    values = iter(flat)
    layers = [
        LayerParameters(**{name: next(values) for name in names})
        for _ in range((len(flat) - behind) // len(names))
    ]
    return layers, PoolParameters(*values)


def in_pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    """What the operators have in one list, two by two: a convolution's weight and bias, a norm's mean and variance."""
    return list(zip(flat[::2], flat[1::2], strict=True))


class Layer(NamedTuple):
    """One layer's parameters, and where it is."""

    position: int  # in the block
    channels: int  # that it reads
    growth: int  # that it adds
    width: int  # of the bottleneck; 0: plain
    norm1: int  # which of all norms; norm2 is the next
    parameters: LayerParameters
    masks: tuple[Tensor | None, Tensor | None]  # of dropout: y's, and the new features'
    keep: tuple[float, float]  # the probabilities that a value was kept
    dilation: int  # of conv2


class Stage:
    """A stage's tensors by layer, and the layout of its flat tensors.

    The vectors that norms normalise with: mean and variance of every channel of the buffer, of every norm2's input, and
    copies of the running ones for the norms that use those.
    """

    def __init__(
        self,
        settings: StageConfig,
        channels: int,
        parameters: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
    ) -> None:
        self.settings = settings
        of_layers, self.pool_parameters = by_name(settings, parameters)
        norms = settings.parameters_per_layer // 4
        self.layers: list[Layer] = []
        of_each = zip(
            of_layers,
            in_pairs(masks) or [(None, None)] * len(of_layers),
            in_pairs(settings.drop) or [(0.0, 0.0)] * len(of_layers),
            settings.dilation or [1] * len(of_layers),
            strict=True,
        )
        for i, (own, mask, (first, second), dilation) in enumerate(of_each):
            growth = own.conv2_weight.shape[0]
            width = own.conv1_weight.shape[0] if settings.bottleneck else 0
            keep = 1 - first, 1 - second
            self.layers.append(Layer(i, channels, growth, width, norms * i, own, mask, keep, dilation))
            channels += growth
        self.channels = channels
        self._sizes = [n for layer in self.layers for n in (layer.channels, layer.width)[:norms]]
        self._sizes += [channels] if settings.pool else []
        self._second = {layer.norm1 + 1 for layer in self.layers} if settings.bottleneck else set()

    def at(self, start: int, end: int) -> slice:
        """Where in the buffer the channels are that came as the start-th to the end-th: the input's, then the layers'."""
        if self.settings.newest_first:
            start, end = self.channels - end, self.channels - start
        return slice(start, end)

    def added(self) -> slice:
        """The channels that all layers add."""
        return self.at(self.layers[0].channels, self.channels)

    def read_by(self, layer: Layer) -> slice:
        """The channels that a layer reads."""
        return self.at(0, layer.channels)

    def made_by(self, layer: Layer) -> slice:
        """The channels that a layer adds."""
        return self.at(layer.channels, layer.channels + layer.growth)

    def _own_vectors(self) -> list[bool]:
        """Per norm: whether its statistics are its own, not a part of the buffer's."""
        batch = self.settings.batch_statistics
        return [i in self._second or not batch[i] for i in range(len(self._sizes))]

    def vector_size(self) -> int:
        """Elements of the flat vectors."""
        own = zip(self._sizes, self._own_vectors(), strict=True)
        return 2 * (self.channels + sum(n for n, is_own in own if is_own))

    def vector_places(self) -> list[tuple[int, int, int]]:
        """Where in the flat vectors each norm's are: the start of its mean, of its variance, and how many elements each has."""
        places: list[tuple[int, int, int]] = []
        used = 2 * self.channels
        for n, is_own in zip(self._sizes, self._own_vectors(), strict=True):
            if is_own:
                places.append((used, used + n, n))
                used += 2 * n
            else:
                start: int = self.at(0, n).start
                places.append((start, self.channels + start, n))
        return places

    def split_vectors(self, vectors: Tensor) -> tuple[tuple[Tensor, Tensor], Vectors]:
        """Views of the flat vectors: mean and variance of the buffer's channels, and those of every norm."""
        own = self._own_vectors()
        sizes = [self.channels, *(n for n, is_own in zip(self._sizes, own, strict=True) if is_own)]
        parts = iter(vectors.split([n for n in sizes for _ in range(2)]))
        mean, var = next(parts), next(parts)
        norms = [
            (next(parts), next(parts)) if is_own else (mean[self.at(0, n)], var[self.at(0, n)])
            for n, is_own in zip(self._sizes, own, strict=True)
        ]
        return (mean, var), norms

    def _fold(self, norm: int, weight: Tensor | None, bias: Tensor | None, norms: Vectors) -> Folded:
        s = self.settings
        batch = s.batch_statistics[norm]
        return fold(*norms[norm], s.eps[norm], weight, bias, batch, s.group if batch else "")

    def norm1(self, layer: Layer, norms: Vectors) -> Folded:
        """The layer's first norm, folded."""
        own = layer.parameters
        return self._fold(layer.norm1, own.norm1_weight, own.norm1_bias, norms)

    def norm2(self, layer: Layer, norms: Vectors) -> Folded:
        """The layer's second norm, folded."""
        own = layer.parameters
        return self._fold(layer.norm1 + 1, own.norm2_weight, own.norm2_bias, norms)

    def pool_norm(self, norms: Vectors) -> Folded:
        """The norm in front of the pool, folded."""
        own = self.pool_parameters
        return self._fold(len(norms) - 1, own.norm_weight, own.norm_bias, norms)

    def _is_saved(self, layer: Layer) -> bool:
        s = self.settings
        return s.memory == "balanced" and layer.width > 0 and layer.position >= s.lowest

    def saved_size(self, like: Tensor) -> int:
        """Elements of the flat tensor of every y that is kept; `like` has the batch and spatial sizes."""
        pixels = like.shape[0] * like.shape[2:].numel()
        return sum(pixels * layer.width for layer in self.layers if self._is_saved(layer))

    def split_saved(self, saved: Tensor, like: Tensor) -> dict[int, Tensor]:
        """Views of it: y [N, width, *spatial] by the layer's index, channels-last."""
        kept = [layer for layer in self.layers if self._is_saved(layer)]
        shape = (like.shape[0], *like.shape[2:])
        pixels = like.shape[0] * like.shape[2:].numel()
        parts = saved.split([pixels * layer.width for layer in kept]) if kept else ()
        return {
            layer.position: part.view(*shape, layer.width).movedim(-1, 1)
            for layer, part in zip(kept, parts, strict=True)
        }

    def straight_to_z(self, ops: Any, layer: Layer) -> bool:
        """Whether relu(norm2(y)) is made without y: nobody wants y, norm2 is known beforehand, and the convolution wants z."""
        s = self.settings
        known = s.memory == "inference" and layer.width > 0 and not s.batch_statistics[layer.norm1 + 1]
        return known and layer.masks[0] is None and not _fuses(ops, layer)

    def forward_scratch(self, ops: Any) -> list[int]:
        """Channels of the maps that a forward holds of the workspace at once: a y that is not kept, and a z."""
        made = [n.width for n in self.layers if not self._is_saved(n) and not self.straight_to_z(ops, n)]
        z = [n.width or n.channels for n in self.layers if not _fuses(ops, n)]
        return [max(made, default=0), max(z, default=0)]

    def backward_scratch(self, ops: Any) -> list[int]:
        """The same of a backward, where a z may be y's gradient, and there is the gradient of a layer's new features."""
        made = max((n.width for n in self.layers if not self._is_saved(n)), default=0)
        z = [n.width if _fuses(ops, n) else n.width or n.channels for n in self.layers]
        return [made, max(z, default=0), max((n.growth for n in self.layers), default=0)]


def _fuses(ops: Any, layer: Layer) -> bool:
    return fuses(ops, layer.parameters.conv2_weight, layer.dilation)
