"""DenseLayer, PlainDenseLayer, DenseBlock, Transition: what a DenseNet repeats."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.engine import pool, single_layer
from effdense.engine.autograd import dropout_scale
from effdense.engine.batch_norm import read_module, update_modules
from effdense.engine.inputs import takes, through
from effdense.engine.validation import (
    check_memory,
    check_spatial_dims,
)
from effdense.nn.looks import look
from effdense.nn.modules import kind_of
from effdense.nn.obstacles import (
    AVG_POOLS,
    CONVS,
    NORMS,
    PROCESSES,
    chain_obstacle,
    global_obstacle,
    module_obstacle,
    plain_avg_pool,
    refuse_scripting,
    same_processes,
    transition_obstacle,
)
from effdense.nn.stage_run import Chains, dimensions_of, draw_mask, run_stage
from effdense.nn.structure import NO_DROP, Chain, Drop


def _as_list(inputs: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """The three call forms of a dense layer: layer(list), layer(tensor), layer(*features)."""
    if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)):
        return list(inputs[0])
    return list(inputs)  # type: ignore[arg-type]


class _Layer(nn.Module):
    """What both kinds of layer have."""

    parts: ClassVar[Mapping[str, int | None]] = {}  # the chain of submodules; see chain_obstacle
    drop_rate: float
    __prepare_scriptable__ = refuse_scripting

    @property
    def memory(self) -> str:
        """What is kept for the backward: "balanced" or "minimal"."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
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
        memory: str = "balanced",
        bias: bool = False,
        dropout_after_bottleneck: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
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
        if fused and features and all(takes(x, self.conv1.weight.dim()) for x in features):
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


def _chain(name: str, layer: Any) -> Chain:
    """One of our own layers for run_stage."""
    drop = Drop(layer.drop_rate if layer.training else 0.0)
    if not isinstance(layer, DenseLayer):
        return Chain(name, [layer.norm1], [layer.conv1], [drop])
    inside = drop if layer.dropout_after_bottleneck else NO_DROP
    return Chain(name, [layer.norm1, layer.norm2], [layer.conv1, layer.conv2], [inside, drop])


class PlainDenseLayer(_Layer):
    """norm1-relu1-conv1(3x3) of all features before it: the layer without a bottleneck.

    Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), section 3, the composite function. It
    runs fused as part of a DenseBlock; by itself it calls its submodules.

    Args:
        num_input_features, growth_rate, drop_rate, memory, spatial_dims: see DenseLayer.
        bias: whether the convolution has a bias.
    """

    parts: ClassVar[Mapping[str, int | None]] = {"norm1": None, "relu1": None, "conv1": 3}

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        bias: bool = False,
        memory: str = "balanced",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
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


_LAYERS = (DenseLayer, PlainDenseLayer)


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the input and all layers before it; drop-in for torchvision's `_DenseBlock`.

    Args:
        num_layers: how many layers, named denselayer1, denselayer2, …
        num_input_features: channels of the block's input.
        bn_size: see DenseLayer; None: the layers are PlainDenseLayers.
        growth_rate, drop_rate, memory_efficient, memory, bias, dropout_after_bottleneck, spatial_dims: see DenseLayer.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: str = "balanced",
        bias: bool = False,
        dropout_after_bottleneck: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        form: dict[str, Any] = {"memory": memory, "bias": bias, "spatial_dims": spatial_dims}
        inside: dict[str, Any] = {"dropout_after_bottleneck": dropout_after_bottleneck}
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            self[f"denselayer{i + 1}"] = (
                PlainDenseLayer(channels, growth_rate, drop_rate, **form)
                if bn_size is None
                else DenseLayer(channels, growth_rate, bn_size, drop_rate, memory_efficient, **inside, **form)
            )

    def obstacle(self) -> str | None:
        """Why the block runs its layers one by one at the moment, or None where it runs as a whole."""
        if (reason := global_obstacle()) is not None:
            return reason
        layers: list[Any] = list(self.values())
        if not layers:
            return "it has no layers"
        kind = kind_of(layers[0]) if kind_of(layers[0]) in _LAYERS else DenseLayer
        for name, layer in zip(self, layers, strict=True):
            reason = module_obstacle(name, layer, (kind,))
            if reason is None and (inner := layer.obstacle()) is not None:
                reason = f"{name}: {inner}"
            if reason is None and layer._memory != layers[0]._memory:
                reason = (
                    f"{name}.memory is {layer._memory!r}, not {layers[0]._memory!r} like the first layer's"
                )
            if reason is None and not same_processes((layers[0].norm1, layer.norm1)):
                reason = f"{name}: {PROCESSES}"
            if reason is not None:
                return reason
        return None

    def chains(self) -> tuple[list[Chain], str] | None:
        """What run_stage takes of it; None where there is an obstacle."""
        return None if global_obstacle() is not None else look(self, self._chains)

    def _chains(self) -> tuple[list[Chain], str] | None:
        if self.obstacle() is not None:
            return None
        layers: list[Any] = list(self.values())
        chains = Chains(_chain(name, layer) for name, layer in zip(self, layers, strict=True))
        return chains, layers[0]._memory

    def forward(self, init_features: Tensor) -> Tensor:
        """[N, num_input_features, *spatial] -> [N, num_input_features + num_layers * growth_rate, *spatial].

        Fused, the output is the block's feature buffer, in channels-last layout.
        """
        stage = self.chains() if isinstance(init_features, Tensor) else None
        if stage is not None and takes(init_features, dimensions_of(stage[0])):
            return run_stage(*stage, init_features)
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


NAMES = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "conv.weight", "conv.bias")


class Transition(nn.Sequential):
    """norm-relu-conv(1x1)-pool(2x2 average); drop-in for torchvision's `_Transition`.

    Args:
        num_input_features: channels of the input.
        num_output_features: channels of the output.
        bias: whether the convolution has a bias.
        spatial_dims: 1, 2 or 3.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, num_input_features: int, num_output_features: int, *, bias: bool = False, spatial_dims: int = 2
    ) -> None:
        place = check_spatial_dims("Transition", spatial_dims)
        conv = CONVS[place]
        super().__init__(
            OrderedDict(
                norm=NORMS[place](num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=conv(num_input_features, num_output_features, kernel_size=1, stride=1, bias=bias),
                pool=AVG_POOLS[place](kernel_size=2, stride=2),
            )
        )

    def obstacle(self) -> str | None:
        """Why the transition runs its submodules one by one at the moment, or None where it runs fused."""
        return transition_obstacle(self._modules)

    def passage(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """The norm, the pool's kernel size and the convolution, where the pool can be taken first (an average: they commute)."""
        if self.obstacle() is not None:
            return None
        kernel = plain_avg_pool(self._modules["pool"], self._modules["norm"])
        return None if kernel is None or not fits(x, kernel) else (self.norm, kernel, self.conv)

    def _takes(self, x: Tensor) -> bool:
        conv: Any = self.conv
        return takes(x, conv.weight.dim())

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_input_features, *spatial] -> [N, num_output_features, *spatial / 2]."""
        if not isinstance(x, Tensor) or self.obstacle() is not None or not self._takes(x):
            return super().forward(x)
        if (passage := self.passage(x)) is not None:
            return run_transition(x, *passage)
        last: Any = self._modules["pool"]
        result: Tensor = last(run_unpooled(x, self.norm, self.conv))
        return result


def fits(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether a pool finds at least one window."""
    return all(n >= k for n, k in zip(x.shape[2:], kernel, strict=False))


def run_unpooled(x: Tensor, norm: Any, conv: Any) -> Tensor:
    """A transition's BN-ReLU-convolution, for a pool that cannot come first; `x`: what `takes` agrees to."""

    def fused(x: Tensor) -> Tensor:
        weights = conv.weight, conv.bias
        y, mean, var = single_layer.bottleneck("Transition", NAMES, [x], read_module(norm), *weights)
        update_modules([(norm, mean, var)], x.numel() // x.shape[1])
        return y

    return through(x, fused)


def run_transition(x: Tensor, norm: Any, kernel: tuple[int, ...], conv: Any) -> Tensor:
    """A transition by itself: BN-ReLU-average-pool, then the convolution; `x`: what `takes` agrees to."""

    def fused(x: Tensor) -> Tensor:
        y, mean, var = pool.bn_relu_avg_pool("Transition", NAMES[:4], x, read_module(norm), kernel)
        update_modules([(norm, mean, var)], x.numel() // x.shape[1])
        result: Tensor = conv(y)
        return result

    return through(x, fused)
