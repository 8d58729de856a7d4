"""DenseLayer and PlainDenseLayer, the layers of a dense block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.engine import single_layer
from effdense.engine.autograd import dropout_scale
from effdense.engine.batch_norm import read_module, update_modules
from effdense.engine.inputs import accepts, through
from effdense.engine.validation import (
    Memory,
    check_count,
    check_flag,
    check_memory,
    check_probability,
    check_spatial_dims,
)
from effdense.nn.chain import Drop
from effdense.nn.kinds import CONVS, NORMS
from effdense.nn.obstacles import chain_obstacle, refuse_scripting
from effdense.nn.stage_run import draw_mask


def _as_list(inputs: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """The three call forms of a dense layer: layer(list), layer(tensor), layer(*features)."""
    if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)):
        return list(inputs[0])
    return list(inputs)  # type: ignore[arg-type]


def _check(op: str, drop_rate: float, flags: Mapping[str, bool], **counts: int) -> None:
    for name, value in counts.items():
        check_count(op, name, value)
    for name, flag in flags.items():
        check_flag(op, name, flag)
    check_probability(op, "drop_rate", drop_rate)


class _Layer(nn.Module):
    """What both kinds of layer have."""

    parts: ClassVar[Mapping[str, int | None]] = {}  # the chain of submodules; see chain_obstacle
    drop_rate: float
    __prepare_scriptable__ = refuse_scripting

    @property
    def memory(self) -> Memory:
        """What is kept for the backward: "balanced" or "minimal"."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._memory = check_memory(type(self).__name__, memory)

    def obstacle(self) -> str | None:
        """Why the layer runs its submodules one by one at the moment, or None where it runs fused."""
        return chain_obstacle(self._modules, self.parts)


class DenseLayer(_Layer):
    """norm1-relu1-conv1(1x1)-norm2-relu2-conv2(3x3) of all features before it; drop-in for torchvision's `_DenseLayer`.

    Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), section 3, the bottleneck layer.

    Args:
        num_input_features: channels of all features together.
        growth_rate: channels that the layer adds (k).
        bn_size: the bottleneck has bn_size * growth_rate channels.
        drop_rate: probability of dropping a value of the new features while training.
        memory_efficient: accepted for torchvision's sake; `memory` is what counts here.
        memory: "balanced" keeps the bottleneck's output for the backward, "minimal" computes it again.
        bias: whether the convolutions have biases.
        dropout_after_bottleneck: whether drop_rate counts behind the 1x1 convolution too, as in the paper's Lua code.
        spatial_dims: 1, 2 or 3.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message says which.

    Examples:
        >>> layer = effdense.nn.DenseLayer(24, growth_rate=12, bn_size=4, drop_rate=0.0)
        >>> layer([torch.rand(2, 16, 8, 8), torch.rand(2, 8, 8, 8)]).shape
        torch.Size([2, 12, 8, 8])
    """

    parts: ClassVar[Mapping[str, int | None]] = {
        "norm1": None,
        "relu1": None,
        "conv1": 1,
        "norm2": None,
        "relu2": None,
        "conv2": 3,
    }
    dropout_after_bottleneck = False

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: Memory = "balanced",
        bias: bool = False,
        dropout_after_bottleneck: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        _check(
            "DenseLayer",
            drop_rate,
            {
                "memory_efficient": memory_efficient,
                "bias": bias,
                "dropout_after_bottleneck": dropout_after_bottleneck,
            },
            num_input_features=num_input_features,
            growth_rate=growth_rate,
            bn_size=bn_size,
        )
        place, width = check_spatial_dims("DenseLayer", spatial_dims), bn_size * growth_rate
        norm, conv = NORMS[place], CONVS[place]
        self.norm1 = norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(num_input_features, width, kernel_size=1, stride=1, bias=bias)
        self.norm2 = norm(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, growth_rate, kernel_size=3, stride=1, padding=1, bias=bias)
        self.drop_rate = float(drop_rate)
        self.dropout_after_bottleneck = dropout_after_bottleneck
        self.memory_efficient = memory_efficient
        self.memory = memory

    def forward(self, *inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Features [N, C_i, *spatial], as a list, as one tensor or as arguments -> [N, growth_rate, *spatial]."""
        features = _as_list(inputs)
        fused = self.obstacle() is None and not self._drops_inside()
        if fused and features and all(accepts(x, self.conv1.weight.dim()) for x in features):
            drop = Drop(self.drop_rate if self.training else 0.0)
            new, mask = self._fused(features), draw_mask(drop, self.conv2, features[0])
            return new if mask is None else new * mask * dropout_scale(1 - self.drop_rate)
        new = self._one_by_one(features)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new

    def _one_by_one(self, features: list[Tensor]) -> Tensor:
        y = self._bottleneck(*features)
        if self._drops_inside():
            y = F.dropout(y, p=self.drop_rate)
        new: Tensor = self.conv2(self.relu2(self.norm2(y)))
        return new

    def _bottleneck(self, *features: Tensor) -> Tensor:
        y: Tensor = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return y

    def _drops_inside(self) -> bool:
        return self.training and self.dropout_after_bottleneck and self.drop_rate > 0

    def _fused(self, features: list[Tensor]) -> Tensor:
        return through(features, self._on_plain)

    def _on_plain(self, features: list[Tensor]) -> Tensor:
        new, statistics1, statistics2 = single_layer.dense_layer(
            self._memory, features, read_module(self.norm1), self.conv1, read_module(self.norm2), self.conv2
        )
        count = new.numel() // new.shape[1]
        update_modules([(self.norm1, *statistics1), (self.norm2, *statistics2)], count)
        return new


class PlainDenseLayer(_Layer):
    """norm1-relu1-conv1(3x3) of all features before it: the layer without a bottleneck.

    Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), section 3, the composite function. It
    runs fused as part of a DenseBlock; by itself it calls its submodules.

    Args:
        num_input_features, growth_rate, drop_rate, memory, spatial_dims: see DenseLayer.
        bias: whether the convolution has a bias.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message says which.

    Examples:
        >>> layer = effdense.nn.PlainDenseLayer(24, growth_rate=12)
        >>> layer(torch.rand(2, 24, 8, 8)).shape
        torch.Size([2, 12, 8, 8])
    """

    parts: ClassVar[Mapping[str, int | None]] = {"norm1": None, "relu1": None, "conv1": 3}

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        bias: bool = False,
        memory: Memory = "balanced",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        counts = {"num_input_features": num_input_features, "growth_rate": growth_rate}
        _check("PlainDenseLayer", drop_rate, {"bias": bias}, **counts)
        place = check_spatial_dims("PlainDenseLayer", spatial_dims)
        self.norm1 = NORMS[place](num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = CONVS[place](
            num_input_features, growth_rate, kernel_size=3, stride=1, padding=1, bias=bias
        )
        self.drop_rate = float(drop_rate)
        self.memory = memory

    def forward(self, *inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Features [N, C_i, *spatial], as a list, as one tensor or as arguments -> [N, growth_rate, *spatial]."""
        features = _as_list(inputs)
        x = features[0] if len(features) == 1 else torch.cat(features, 1)
        new: Tensor = self.conv1(self.relu1(self.norm1(x)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new
