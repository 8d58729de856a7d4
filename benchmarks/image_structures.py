"""DenseNets for large images as they are written elsewhere: mmpretrain's, DenseASPP, FC-DenseNet, and a net on a backbone's maps.

Written here from descriptions, with their submodules' names. Small by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SharedActLayer(nn.Module):
    """mmpretrain's: a list of all features in, the new ones out; one activation for both norms."""

    def __init__(
        self, channels: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.act = nn.ReLU()
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def bottleneck_fn(self, xs: Sequence[Tensor]) -> Tensor:
        return self.conv1(self.act(self.norm1(torch.cat(xs, 1))))

    def forward(self, x: list[Tensor]) -> Tensor:
        assert isinstance(x, list)
        if self.memory_efficient and any(t.requires_grad for t in x):
            y = checkpoint(lambda *xs: self.bottleneck_fn(xs), *x, use_reentrant=False)
        else:
            y = self.bottleneck_fn(x)
        new_features = self.conv2(self.act(self.norm2(y)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class SharedActBlock(nn.Module):
    """mmpretrain's: the layers in a list, `block`."""

    def __init__(self, num_layers: int, channels: int, growth_rate: int, *layer: Any) -> None:
        super().__init__()
        layers = (SharedActLayer(channels + i * growth_rate, growth_rate, *layer) for i in range(num_layers))
        self.block = nn.ModuleList(layers)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.block:
            features.append(layer(features))
        return torch.cat(features, 1)


class ActTransition(nn.Sequential):
    """`act` for torchvision's `relu`, and no pool where the image keeps its size."""

    def __init__(self, channels: int, out_channels: int, act: str = "act", stride: int = 2) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module(act, nn.ReLU(inplace=act == "relu"))
        self.add_module("conv", nn.Conv2d(channels, out_channels, kernel_size=1, bias=False))
        if stride > 1:
            self.add_module("pool", nn.AvgPool2d(kernel_size=stride, stride=stride))


class MmpretrainNet(nn.Module):
    """mmpretrain's backbone, which walks two lists and returns chosen maps, with a global average and a classifier.

    The norm and activation behind the last block are the last of the "transitions"; that activation is the stem's too.
    """

    def __init__(
        self,
        block_config: Sequence[int] = (2, 3, 2),
        growth_rate: int = 4,
        channels: int = 8,
        bn_size: int = 4,
        num_classes: int = 10,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.out_indices = [len(block_config) - 1]
        conv0 = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
        pool0 = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stem = nn.Sequential(conv0, nn.BatchNorm2d(channels), self.act, pool0)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, num_layers in enumerate(block_config):
            stage = SharedActBlock(num_layers, channels, growth_rate, bn_size, 0.0, memory_efficient)
            self.stages.append(stage)
            channels += num_layers * growth_rate
            if i < len(block_config) - 1:
                self.transitions.append(ActTransition(channels, channels // 2))
                channels //= 2
            else:
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(channels), self.act))
        self.gap = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)

    def backbone(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        outs = []
        for i, (stage, transition) in enumerate(zip(self.stages, self.transitions, strict=True)):
            x = transition(stage(x))
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gap(self.backbone(x)[-1])
        return self.fc(x.view(x.size(0), -1))


class DilatedLayer(nn.Sequential):
    """DenseASPP's: torchxrayvision's form with a dilation."""

    def __init__(
        self, channels: int, growth_rate: int, bn_size: int, drop_rate: float, dilation: int
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.add_module("norm_1", nn.BatchNorm2d(channels))
        self.add_module("relu_1", nn.ReLU(inplace=True))
        self.add_module("conv_1", nn.Conv2d(channels, width, kernel_size=1, bias=False))
        self.add_module("norm_2", nn.BatchNorm2d(width))
        self.add_module("relu_2", nn.ReLU(inplace=True))
        conv = nn.Conv2d(width, growth_rate, kernel_size=3, dilation=dilation, padding=dilation, bias=False)
        self.add_module("conv_2", conv)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new_features = super().forward(x)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return torch.cat([x, new_features], 1)


class DilatedBlock(nn.Sequential):
    def __init__(self, num_layers: int, channels: int, growth_rate: int, bn_size: int, dilation: int) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = DilatedLayer(channels + i * growth_rate, growth_rate, bn_size, 0.0, dilation)
            self.add_module(f"denselayer{i + 1}", layer)


class AsppLayer(nn.Sequential):
    """One of DenseASPP's last five layers: biases, whole channels dropped, the new features alone; the first has no norm in front."""

    def __init__(
        self, channels: int, width: int, growth_rate: int, dilation: int, drop_rate: float, norm: bool
    ) -> None:
        super().__init__()
        if norm:
            self.add_module("norm_1", nn.BatchNorm2d(channels, momentum=0.0003))
        self.add_module("relu_1", nn.ReLU(inplace=True))
        self.add_module("conv_1", nn.Conv2d(channels, width, kernel_size=1))
        self.add_module("norm_2", nn.BatchNorm2d(width, momentum=0.0003))
        self.add_module("relu_2", nn.ReLU(inplace=True))
        conv = nn.Conv2d(width, growth_rate, kernel_size=3, dilation=dilation, padding=dilation)
        self.add_module("conv_2", conv)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        feature = super().forward(x)
        if self.drop_rate > 0:
            feature = F.dropout2d(feature, p=self.drop_rate, training=self.training)
        return feature


ASPP_DILATIONS = (3, 6, 12, 18, 24)


class DenseAspp(nn.Module):
    """DenseASPP at output stride 8: a dilated DenseNet, then a dense block whose layers are the net's own submodules."""

    def __init__(
        self,
        block_config: Sequence[int] = (2, 3, 2, 2),
        growth_rate: int = 4,
        channels: int = 8,
        bn_size: int = 4,
        aspp: tuple[int, int] = (8, 4),  # width, growth rate
        num_classes: int = 5,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        conv0 = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.features.add_module("conv0", conv0)
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        for i, (num_layers, dilation) in enumerate(zip(block_config, (1, 1, 2, 4), strict=True)):
            block = DilatedBlock(num_layers, channels, growth_rate, bn_size, dilation)
            channels += num_layers * growth_rate
            transition = ActTransition(channels, channels // 2, "relu", 2 if i == 0 else 1)
            self.features.add_module(f"denseblock{i + 1}", block)
            self.features.add_module(f"transition{i + 1}", transition)
            channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        width, growth = aspp
        for i, dilation in enumerate(ASPP_DILATIONS):
            layer = AsppLayer(channels, width, growth, dilation, drop_rate, norm=i > 0)
            setattr(self, f"ASPP_{dilation}", layer)
            channels += growth
        self.classification = nn.Sequential(
            nn.Dropout2d(p=drop_rate),
            nn.Conv2d(channels, num_classes, kernel_size=1),
            nn.Upsample(scale_factor=8, mode="bilinear"),
        )

    def forward(self, x: Tensor) -> Tensor:
        feature = self.features(x)
        feature = torch.cat((self.ASPP_3(feature), feature), dim=1)
        feature = torch.cat((self.ASPP_6(feature), feature), dim=1)
        feature = torch.cat((self.ASPP_12(feature), feature), dim=1)
        feature = torch.cat((self.ASPP_18(feature), feature), dim=1)
        feature = torch.cat((self.ASPP_24(feature), feature), dim=1)
        return self.classification(feature)


class TiramisuLayer(nn.Sequential):
    """FC-DenseNet's: a plain layer with a bias and whole channels dropped."""

    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(channels, growth_rate, kernel_size=3, padding=1))
        self.add_module("drop", nn.Dropout2d(0.2))


class TiramisuBlock(nn.Module):
    """FC-DenseNet's: with `upsample` it returns the new features alone."""

    def __init__(self, channels: int, growth_rate: int, num_layers: int, upsample: bool = False) -> None:
        super().__init__()
        self.upsample = upsample
        layers = (TiramisuLayer(channels + i * growth_rate, growth_rate) for i in range(num_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            new_features = []
            for layer in self.layers:
                out = layer(x)
                x = torch.cat([x, out], 1)
                new_features.append(out)
            return torch.cat(new_features, 1)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class TiramisuDown(nn.Sequential):
    """A transition of as many channels, with dropout and a max pool."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(channels, channels, kernel_size=1))
        self.add_module("drop", nn.Dropout2d(0.2))
        self.add_module("maxpool", nn.MaxPool2d(2))


class TiramisuUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convTrans = nn.ConvTranspose2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out = self.convTrans(x)
        height, width = skip.shape[2:]
        top, left = (out.shape[2] - height) // 2, (out.shape[3] - width) // 2
        return torch.cat([out[:, :, top : top + height, left : left + width], skip], 1)


class FcDenseNet(nn.Module):
    """FC-DenseNet ("The One Hundred Layers Tiramisu"): the bottom and all blocks on the way up but the last return new features alone."""

    def __init__(
        self,
        num_layers: int = 2,
        levels: int = 2,
        growth_rate: int = 4,
        channels: int = 8,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        self.firstconv = nn.Conv2d(3, channels, kernel_size=3, padding=1)
        self.denseBlocksDown, self.transDownBlocks = nn.ModuleList(), nn.ModuleList()
        self.transUpBlocks, self.denseBlocksUp = nn.ModuleList(), nn.ModuleList()
        skips, added = [], num_layers * growth_rate
        for _ in range(levels):
            self.denseBlocksDown.append(TiramisuBlock(channels, growth_rate, num_layers))
            channels += added
            skips.append(channels)
            self.transDownBlocks.append(TiramisuDown(channels))
        bottom = TiramisuBlock(channels, growth_rate, num_layers, upsample=True)
        self.bottleneck = nn.Sequential()
        self.bottleneck.add_module("bottleneck", bottom)
        for i in range(levels):
            self.transUpBlocks.append(TiramisuUp(added))
            channels = added + skips.pop()
            block = TiramisuBlock(channels, growth_rate, num_layers, upsample=i < levels - 1)
            self.denseBlocksUp.append(block)
        self.finalConv = nn.Conv2d(channels + added, num_classes, kernel_size=1)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.firstconv(x)
        skips = []
        for block, transition in zip(self.denseBlocksDown, self.transDownBlocks, strict=True):
            out = block(out)
            skips.append(out)
            out = transition(out)
        out = self.bottleneck(out)
        for up, block in zip(self.transUpBlocks, self.denseBlocksUp, strict=True):
            out = block(up(out, skips.pop()))
        return self.softmax(self.finalConv(out))


class OnMaps(nn.Module):
    """A classifier on the averages of all maps that a backbone returns, such as timm's with `features_only`."""

    def __init__(self, backbone: nn.Module, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(sum(channels), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        return self.classifier(torch.cat([m.mean((2, 3)) for m in maps], 1))
