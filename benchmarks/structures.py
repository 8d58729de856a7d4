"""Dense blocks and nets as they are written elsewhere: gpleiss's repository, d2l, tutorials, an own 1D one. Small by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _bn_function_factory(norm: nn.Module, relu: nn.Module, conv: nn.Module) -> Callable[..., Tensor]:
    def bn_function(*inputs: Tensor) -> Tensor:
        return conv(relu(norm(torch.cat(inputs, 1))))

    return bn_function


class StarLayer(nn.Module):
    """gpleiss/efficient_densenet_pytorch: called with all features as arguments."""

    def __init__(
        self, channels: int, growth_rate: int, bn_size: int, drop_rate: float, efficient: bool
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, width, kernel_size=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(width))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False))
        self.drop_rate = drop_rate
        self.efficient = efficient

    def forward(self, *prev_features: Tensor) -> Tensor:
        bn_function = _bn_function_factory(self.norm1, self.relu1, self.conv1)
        if self.efficient and any(x.requires_grad for x in prev_features):
            y = checkpoint(bn_function, *prev_features, use_reentrant=False)
        else:
            y = bn_function(*prev_features)
        new_features = self.conv2(self.relu2(self.norm2(y)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class StarBlock(nn.Module):
    def __init__(self, num_layers: int, channels: int, growth_rate: int, *layer: Any) -> None:
        super().__init__()
        for i in range(num_layers):
            self.add_module(f"denselayer{i + 1}", StarLayer(channels + i * growth_rate, growth_rate, *layer))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.named_children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class StarTransition(nn.Sequential):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(channels, width, kernel_size=1, bias=False))
        self.add_module("pool", nn.AvgPool2d(kernel_size=2, stride=2))


class StarNet(nn.Module):
    """gpleiss's DenseNet for small images."""

    def __init__(
        self,
        drop_rate: float = 0.0,
        efficient: bool = False,
        growth_rate: int = 4,
        block_config: Sequence[int] = (3, 3),
        num_init_features: int = 6,
        bn_size: int = 3,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        channels = num_init_features
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False))
        for i, num_layers in enumerate(block_config):
            block = StarBlock(num_layers, channels, growth_rate, bn_size, drop_rate, efficient)
            self.features.add_module(f"denseblock{i + 1}", block)
            channels += num_layers * growth_rate
            if i != len(block_config) - 1:
                self.features.add_module(f"transition{i + 1}", StarTransition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm_final", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


def conv_block(channels: int, growth_rate: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth_rate, kernel_size=3, padding=1)
    )


class NetBlock(nn.Module):
    """ "Dive into Deep Learning", section 8.7: plain layers with biases in `net`; the forward concatenates."""

    def __init__(self, num_convs: int, channels: int, growth_rate: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(conv_block(channels + i * growth_rate, growth_rate) for i in range(num_convs))
        )

    def forward(self, x: Tensor) -> Tensor:
        for blk in self.net:
            y = blk(x)
            x = torch.cat((x, y), dim=1)
        return x


def d2l_net(
    growth_rate: int = 4,
    block_config: Sequence[int] = (3, 3),
    channels: int = 6,
    in_channels: int = 3,
    num_classes: int = 5,
) -> nn.Module:
    stem = nn.Sequential(
        nn.Conv2d(in_channels, channels, 7, stride=2, padding=3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    blocks: list[nn.Module] = []
    for i, num_convs in enumerate(block_config):
        blocks.append(NetBlock(num_convs, channels, growth_rate))
        channels += num_convs * growth_rate
        if i != len(block_config) - 1:
            parts = nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, kernel_size=1)
            blocks.append(nn.Sequential(*parts, nn.AvgPool2d(kernel_size=2, stride=2)))
            channels //= 2
    head = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, num_classes)
    return nn.Sequential(stem, *blocks, nn.BatchNorm2d(channels), nn.ReLU(), *head)


class bn_relu_conv(nn.Module):
    """The tutorial form: dropout after every convolution."""

    def __init__(self, channels: int, width: int, kernel: int, drop_rate: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(self.relu(self.bn(x))))


class dense_layer(nn.Module):
    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = bn_relu_conv(channels, 4 * growth_rate, 1, drop_rate)
        self.conv2 = bn_relu_conv(4 * growth_rate, growth_rate, 3, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.conv1(x))], 1)


class dense_block(nn.Module):
    def __init__(self, num_layers: int, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        layers = (dense_layer(channels + i * growth_rate, growth_rate, drop_rate) for i in range(num_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tutorial_net(
    drop_rate: float = 0.2,
    growth_rate: int = 4,
    block_config: Sequence[int] = (3, 3),
    channels: int = 6,
    num_classes: int = 5,
) -> nn.Module:
    """A norm on the image, biases, dropout behind the transitions' convolutions too, no final norm."""
    parts: list[nn.Module] = [nn.BatchNorm2d(3), nn.Conv2d(3, channels, 7, stride=2, padding=3)]
    parts.append(nn.MaxPool2d(3, 2, 1))
    for i, num_layers in enumerate(block_config):
        parts.append(dense_block(num_layers, channels, growth_rate, drop_rate))
        channels += num_layers * growth_rate
        if i != len(block_config) - 1:
            conv = bn_relu_conv(channels, channels // 2, 1, drop_rate)
            parts.append(nn.Sequential(conv, nn.AvgPool2d(2)))
            channels //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class RateLayer(nn.Module):
    """No modules for ReLU and dropout; one rate for both convolutions; own names; 1D."""

    def __init__(self, channels: int, growth_rate: int, droprate: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm1d(channels), nn.Conv1d(channels, 8, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm1d(8), nn.Conv1d(8, growth_rate, 3, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(F.relu(self.bn2(out)))
        out = F.dropout(out, p=self.droprate, training=self.training)
        return torch.cat([x, out], 1)


def rate_net(droprate: float = 0.2) -> nn.Module:
    block = nn.Sequential(*(RateLayer(6 + 4 * i, 4, droprate) for i in range(3)))
    return nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), block, nn.BatchNorm1d(18), nn.ReLU())


class GrowingLayer(nn.Sequential):
    """torchxrayvision's: a sequence that returns the concatenation."""

    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, 12, kernel_size=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(12))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(12, growth_rate, kernel_size=3, padding=1, bias=False))
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new_features = super().forward(x)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return torch.cat([x, new_features], 1)


class GrowingBlock(nn.Sequential):
    def __init__(self, num_layers: int, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = GrowingLayer(channels + i * growth_rate, growth_rate, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)


def growing_net(drop_rate: float = 0.0) -> nn.Module:
    parts: Sequence[nn.Module] = (
        nn.Conv2d(3, 6, 3, padding=1),
        GrowingBlock(3, 6, 4, drop_rate),
        StarTransition(18, 9),
        GrowingBlock(2, 9, 4, drop_rate),
    )
    return nn.Sequential(*parts)
