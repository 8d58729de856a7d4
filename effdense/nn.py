"""Drop-in modules: DenseLayer, DenseBlock, Transition, with torchvision's constructors and parameter names.

They hold ordinary submodules (norm1, relu1, conv1, …) and run them fused. Before every forward they look whether that
is still the same thing: a hook, a wrapped or replaced submodule, a changed convolution, and the submodules are called
one by one instead (`obstacle` says why).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense import dense_block
from effdense.batch_norm import read_module, update_module
from effdense.checks import check_memory

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACTIVATIONS = (nn.ReLU,)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRANSITION = {"norm": None, "relu": None, "conv": 1}


def _module_obstacle(name: str, module: Any, kinds: tuple[type, ...], ignore_hooks: bool) -> str | None:
    """Why calling `module` could do something else than its class says, or None."""
    if type(module) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        return f"{name} is {type(module).__name__}, not {wanted}"
    state = module.__dict__
    if not ignore_hooks and any(state[hooks] for hooks in _HOOKS):
        return f"{name} has hooks"
    if "forward" in state:
        return f"{name}.forward was replaced"
    for parameter in () if kinds is _ACTIVATIONS else ("weight", "bias"):
        # Weight norm, pruning and the like put a tensor in its place; quantisation a subclass.
        tensor = state["_parameters"].get(parameter, module)
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"{name}.{parameter} is not a plain parameter"
    return None


@functools.cache
def _plain_conv(kernel: int, spatial: int) -> dict[str, Any]:
    return {
        "kernel_size": (kernel,) * spatial,
        "stride": (1,) * spatial,
        "padding": (kernel // 2,) * spatial,
        "dilation": (1,) * spatial,
        "groups": 1,
        "padding_mode": "zeros",
    }


def _conv_obstacle(name: str, conv: Any, kernel: int) -> str | None:
    """Why a convolution is not the plain one of this kernel size with padding that keeps the image's size, or None."""
    for attribute, value in _plain_conv(kernel, len(conv.kernel_size)).items():
        got = getattr(conv, attribute)
        if got != value:
            return f"{name}.{attribute} is {got}, not {value}"
    return None


def obstacle(
    children: Mapping[str, nn.Module | None], parts: Mapping[str, int | None], ignore_hooks: bool = False
) -> str | None:
    """Why a chain of submodules must be called one by one, or None.

    `parts` names the chain: each norm, relu (None) and convolution (its kernel size), by the name's beginning.
    """
    if not ignore_hooks and nn.modules.module._has_any_global_hook():
        return "a global module hook is registered"
    dimensions = {}
    for name, kernel in parts.items():
        kinds = _CONVS if kernel else _NORMS if name.startswith("norm") else _ACTIVATIONS
        module = children.get(name)
        reason = _module_obstacle(name, module, kinds, ignore_hooks)
        if reason is None and kernel:
            reason = _conv_obstacle(name, module, kernel)
        if reason is not None:
            return reason
        if kinds is not _ACTIVATIONS:
            dimensions[name] = kinds.index(type(module)) + 1
    if len(set(dimensions.values())) > 1:
        return f"its submodules have different numbers of spatial dimensions: {dimensions}"
    return None


def transition_obstacle(children: Mapping[str, nn.Module | None], ignore_hooks: bool = False) -> str | None:
    """Why norm, relu, conv, pool must be called one by one, or None; the pool always is."""
    order = [*_TRANSITION, "pool"]
    if list(children) != order:
        return f"the submodules are {list(children)}, not {order}"
    return obstacle(children, _TRANSITION, ignore_hooks)


def _as_list(inputs: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """The three call forms of a dense layer: layer(list), layer(tensor), layer(*features)."""
    if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)):
        return list(inputs[0])
    return list(inputs)  # type: ignore[arg-type]


class DenseLayer(nn.Module):
    """norm1-relu1-conv1(1x1)-norm2-relu2-conv2(3x3) of all features before it; drop-in for torchvision's `_DenseLayer`.

    Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), section 3, the bottleneck layer.

    Args:
        num_input_features: channels of all features together.
        growth_rate: channels that the layer adds (k).
        bn_size: the bottleneck has bn_size * growth_rate channels.
        drop_rate: probability of dropping a value of the new features while training.
        memory_efficient: accepted for torchvision's sake; `memory` is what counts here.
        memory: "balanced" keeps the bottleneck's output for the backward, "minimal" computes it again.
    """

    parts: ClassVar[Mapping[str, int | None]] = {
        "norm1": None,
        "relu1": None,
        "conv1": 1,
        "norm2": None,
        "relu2": None,
        "conv2": 3,
    }

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: str = "balanced",
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, stride=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(
            bn_size * growth_rate, growth_rate, kernel_size=3, stride=1, padding=1, bias=False
        )
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient
        self.memory = memory

    @property
    def memory(self) -> str:
        """What is kept for the backward: "balanced" or "minimal"."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self._memory = check_memory("DenseLayer", memory)

    def obstacle(self) -> str | None:
        """Why the layer runs its submodules one by one at the moment, or None where it runs fused."""
        return obstacle(self._modules, self.parts)

    def forward(self, *inputs: Tensor | Sequence[Tensor]) -> Tensor:
        """Features [N, C_i, *spatial], as a list, as one tensor or as arguments -> [N, growth_rate, *spatial]."""
        features = _as_list(inputs)
        new = self._fused(features) if self.obstacle() is None else self._one_by_one(features)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new

    def _one_by_one(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        new: Tensor = self.conv2(self.relu2(self.norm2(y)))
        return new

    def _fused(self, features: list[Tensor]) -> Tensor:
        new, statistics1, statistics2 = dense_block.dense_layer(
            self.memory, features, read_module(self.norm1), self.conv1, read_module(self.norm2), self.conv2
        )
        count = new.numel() // new.shape[1]
        update_module(self.norm1, *statistics1, count)
        update_module(self.norm2, *statistics2, count)
        return new


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the input and all layers before it; drop-in for torchvision's `_DenseBlock`.

    Args:
        num_layers: how many layers, named denselayer1, denselayer2, …
        num_input_features: channels of the block's input.
        bn_size, growth_rate, drop_rate, memory_efficient, memory: see DenseLayer.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: str = "balanced",
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                memory_efficient,
                memory=memory,
            )

    def obstacle(self) -> str | None:
        """Why no layer of the block runs fused at the moment, or None where one does."""
        fused = any(isinstance(layer, DenseLayer) and layer.obstacle() is None for layer in self.values())
        return None if fused else "none of its layers runs fused"

    def forward(self, init_features: Tensor) -> Tensor:
        """[N, num_input_features, *spatial] -> [N, num_input_features + num_layers * growth_rate, *spatial]."""
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """norm-relu-conv(1x1)-pool(2x2 average); drop-in for torchvision's `_Transition`.

    Args:
        num_input_features: channels of the input.
        num_output_features: channels of the output.
    """

    names = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "conv.weight", "conv.bias")

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(num_input_features, num_output_features, kernel_size=1, stride=1, bias=False),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )

    def obstacle(self) -> str | None:
        """Why the transition runs its submodules one by one at the moment, or None where it runs fused."""
        return transition_obstacle(self._modules)

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_input_features, *spatial] -> [N, num_output_features, *spatial / 2]."""
        if self.obstacle() is not None:
            return super().forward(x)
        conv: Any = self.conv
        y, mean, var = dense_block.bottleneck(
            "Transition", self.names, [x], read_module(self.norm), conv.weight, conv.bias
        )
        update_module(self.norm, mean, var, y.numel() // y.shape[1])
        pooled: Tensor = self.get_submodule("pool")(y)
        return pooled


__all__ = ["DenseBlock", "DenseLayer", "Transition"]
