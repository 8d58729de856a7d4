"""The DenseNet in plain PyTorch: torchvision's, written again, with plain layers, a CIFAR stem and volumes too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# By spatial dimensions.
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


def small_stem(in_channels: int, num_init_features: int, bias: bool = False, dims: int = 2) -> nn.Module:
    """For images of about 32 pixels."""
    return CONV[dims](in_channels, num_init_features, kernel_size=3, padding=1, bias=bias)


def large_stem(in_channels: int, num_init_features: int, bias: bool = False, dims: int = 2) -> nn.Module:
    """The convolution of ImageNet's."""
    return CONV[dims](in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=bias)


class _DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3 of the concatenated features before it; returns only the new ones."""

    def __init__(
        self,
        in_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
        bias: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = BATCH_NORM[dims](in_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = CONV[dims](in_features, width, kernel_size=1, bias=bias)
        self.norm2 = BATCH_NORM[dims](width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = CONV[dims](width, growth_rate, kernel_size=3, padding=1, bias=bias)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        inputs = [features] if isinstance(features, Tensor) else list(features)
        if self.memory_efficient and any(x.requires_grad for x in inputs):
            y = checkpoint(self._bottleneck, *inputs, use_reentrant=False)
        else:
            y = self._bottleneck(*inputs)
        new_features = self.conv2(self.relu2(self.norm2(y)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features

    def _bottleneck(self, *inputs: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))


class _PlainLayer(nn.Module):
    """BN-ReLU-conv3x3 of the concatenated features before it, without bottleneck; returns only the new ones."""

    def __init__(
        self,
        in_features: int,
        growth_rate: int,
        drop_rate: float,
        bias: bool = False,
        memory_efficient: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.norm1 = BATCH_NORM[dims](in_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = CONV[dims](in_features, growth_rate, kernel_size=3, padding=1, bias=bias)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        inputs = [features] if isinstance(features, Tensor) else list(features)
        if self.memory_efficient and any(x.requires_grad for x in inputs):
            new_features = checkpoint(self._convolved, *inputs, use_reentrant=False)
        else:
            new_features = self._convolved(*inputs)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features

    def _convolved(self, *inputs: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))


class _DenseBlock(nn.ModuleDict):
    """Layers of which each reads the input and all layers before it; plain ones where `bn_size` is None."""

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        bias: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            width = in_features + i * growth_rate
            self[f"denselayer{i + 1}"] = (
                _PlainLayer(width, growth_rate, drop_rate, bias, memory_efficient, dims)
                if bn_size is None
                else _DenseLayer(width, growth_rate, bn_size, drop_rate, memory_efficient, bias, dims)
            )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, in_features: int, out_features: int, bias: bool = False, dims: int = 2) -> None:
        super().__init__()
        self.norm = BATCH_NORM[dims](in_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONV[dims](in_features, out_features, kernel_size=1, bias=bias)
        self.pool = AVG_POOL[dims](kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """DenseNet in plain PyTorch with torchvision's structure, names, state_dict keys and initialisation.

    `small_inputs` gives the CIFAR form: a 3x3 stem without normalisation and pooling. `bn_size=None` gives
    plain layers, `compression` is a transition's output channels per input channel, `bias` is for every
    convolution, `spatial_dims` 2 or 3. Input `[N, in_channels, *spatial]`, output `[N, num_classes]`. Paper: arXiv:1608.06993, sections
    3 and 4.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        small_inputs: bool = False,
        in_channels: int = 3,
        compression: float = 0.5,
        bias: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        dims = self._dims = spatial_dims
        if small_inputs:
            stem = {"conv0": small_stem(in_channels, num_init_features, bias, dims)}
        else:
            stem = {
                "conv0": large_stem(in_channels, num_init_features, bias, dims),
                "norm0": BATCH_NORM[dims](num_init_features),
                "relu0": nn.ReLU(inplace=True),
                "pool0": MAX_POOL[dims](kernel_size=3, stride=2, padding=1),
            }
        self.features = nn.Sequential(OrderedDict(stem))
        width = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            form = (bn_size, growth_rate, drop_rate, memory_efficient, bias, dims)
            block = _DenseBlock(num_layers, width, *form)
            self.features.add_module(f"denseblock{i}", block)
            width += num_layers * growth_rate
            if i < len(block_config):
                compressed = int(compression * width)
                self.features.add_module(f"transition{i}", _Transition(width, compressed, bias, dims))
                width = compressed
        self.features.add_module("norm5", BATCH_NORM[dims](width))
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        pool = F.adaptive_avg_pool2d if self._dims == 2 else F.adaptive_avg_pool3d
        return self.classifier(torch.flatten(pool(features, 1), 1))
