"""DenseBlock and Transition, the two modules that a DenseNet repeats."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdense.engine import pool, single_layer
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
from effdense.nn.chain import NO_DROP, Chain, Drop
from effdense.nn.kinds import AVG_POOLS, CONVS, NORMS
from effdense.nn.layers import DenseLayer, PlainDenseLayer
from effdense.nn.looks import look
from effdense.nn.modules import kind_of
from effdense.nn.obstacles import (
    PROCESSES,
    global_obstacle,
    module_obstacle,
    plain_avg_pool,
    refuse_scripting,
    same_processes,
    transition_obstacle,
)
from effdense.nn.stage_run import Chains, dimensions_of, run_stage


def _chain(name: str, layer: Any) -> Chain:
    """One of our own layers for run_stage."""
    drop = Drop(layer.drop_rate if layer.training else 0.0)
    if not isinstance(layer, DenseLayer):
        return Chain(name, [layer.norm1], [layer.conv1], [drop])
    inside = drop if layer.dropout_after_bottleneck else NO_DROP
    return Chain(name, [layer.norm1, layer.norm2], [layer.conv1, layer.conv2], [inside, drop])


_LAYERS = (DenseLayer, PlainDenseLayer)


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the input and all layers before it; drop-in for torchvision's `_DenseBlock`.

    Args:
        num_layers: how many layers, named denselayer1, denselayer2, …
        num_input_features: channels of the block's input.
        bn_size: see DenseLayer; None: the layers are PlainDenseLayers.
        growth_rate, drop_rate, memory_efficient, memory, bias, dropout_after_bottleneck, spatial_dims: see DenseLayer.

    Raises:
        TypeError, ValueError: an argument makes no sense; the message says which.

    Examples:
        >>> block = effdense.nn.DenseBlock(6, 16, bn_size=4, growth_rate=12, drop_rate=0.0)
        >>> block(torch.rand(2, 16, 8, 8)).shape  # 16 + 6 * 12 channels
        torch.Size([2, 88, 8, 8])
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
        memory: Memory = "balanced",
        bias: bool = False,
        dropout_after_bottleneck: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        counts = {"num_layers": num_layers, "num_input_features": num_input_features}
        counts |= {"growth_rate": growth_rate} | ({} if bn_size is None else {"bn_size": bn_size})
        for name, value in counts.items():
            check_count("DenseBlock", name, value)
        flags = {"memory_efficient": memory_efficient, "bias": bias}
        for name, flag in {**flags, "dropout_after_bottleneck": dropout_after_bottleneck}.items():
            check_flag("DenseBlock", name, flag)
        check_probability("DenseBlock", "drop_rate", drop_rate)
        check_memory("DenseBlock", memory)
        check_spatial_dims("DenseBlock", spatial_dims)
        if dropout_after_bottleneck and bn_size is None:
            raise ValueError("DenseBlock: dropout_after_bottleneck needs bottlenecks, but bn_size is None")
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
        if stage is not None and accepts(init_features, dimensions_of(stage[0])):
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

    Raises:
        TypeError, ValueError: an argument makes no sense; the message says which.

    Examples:
        >>> transition = effdense.nn.Transition(88, 44)
        >>> transition(torch.rand(2, 88, 8, 8)).shape
        torch.Size([2, 44, 4, 4])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, num_input_features: int, num_output_features: int, *, bias: bool = False, spatial_dims: int = 2
    ) -> None:
        check_count("Transition", "num_input_features", num_input_features)
        check_count("Transition", "num_output_features", num_output_features)
        check_flag("Transition", "bias", bias)
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

    def pool_first(self, x: Tensor) -> tuple[Any, tuple[int, ...], Any] | None:
        """The norm, the pool's kernel size and the convolution, where the pool can be taken first (an average: they commute)."""
        if self.obstacle() is not None:
            return None
        kernel = plain_avg_pool(self._modules["pool"], self._modules["norm"])
        return None if kernel is None or not fits(x, kernel) else (self.norm, kernel, self.conv)

    def _takes(self, x: Tensor) -> bool:
        conv: Any = self.conv
        return accepts(x, conv.weight.dim())

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_input_features, *spatial] -> [N, num_output_features, *spatial / 2]."""
        if not isinstance(x, Tensor) or self.obstacle() is not None or not self._takes(x):
            return super().forward(x)
        if (parts := self.pool_first(x)) is not None:
            return run_transition(x, *parts)
        last: Any = self._modules["pool"]
        result: Tensor = last(run_unpooled(x, self.norm, self.conv))
        return result


def fits(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether a pool finds at least one window."""
    return all(n >= k for n, k in zip(x.shape[2:], kernel, strict=False))


def run_unpooled(x: Tensor, norm: Any, conv: Any) -> Tensor:
    """A transition's BN-ReLU-convolution, for a pool that cannot come first; `x`: what `accepts` agrees to."""

    def fused(x: Tensor) -> Tensor:
        weights = conv.weight, conv.bias
        y, mean, var = single_layer.bottleneck("Transition", NAMES, [x], read_module(norm), *weights)
        update_modules([(norm, mean, var)], x.numel() // x.shape[1])
        return y

    return through(x, fused)


def run_transition(x: Tensor, norm: Any, kernel: tuple[int, ...], conv: Any) -> Tensor:
    """A transition by itself: BN-ReLU-average-pool, then the convolution; `x`: what `accepts` agrees to."""

    def fused(x: Tensor) -> Tensor:
        y, mean, var = pool.bn_relu_avg_pool("Transition", NAMES[:4], x, read_module(norm), kernel)
        result: Tensor = conv(y)
        # last: what is raised has changed nothing
        update_modules([(norm, mean, var)], x.numel() // x.shape[1])
        return result

    return through(x, fused)
