"""DenseNets for small images as they are written elsewhere: kuangliu's pytorch-cifar, weiaicunzai's pytorch-cifar100, bamos's, andreasveit's.

Written here from descriptions, with their submodules' names. Images of 32 x 32; small by default.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NewFirstLayer(nn.Module):
    """kuangliu's: the new features come first."""

    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__()
        width = 4 * growth_rate
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class NewLastLayer(NewFirstLayer):
    """bamos's: the same modules, the new features last."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat((x, out), 1)


class KuangliuTransition(nn.Module):
    """No ReLU module, no pool module."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class KuangliuNet(nn.Module):
    """kuangliu's DenseNet of four blocks, each a sequence of layers."""

    def __init__(
        self, block_config: Sequence[int] = (2, 3, 2, 2), growth_rate: int = 4, num_classes: int = 10
    ) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for i, num_layers in enumerate(block_config):
            layers = (NewFirstLayer(channels + j * growth_rate, growth_rate) for j in range(num_layers))
            setattr(self, f"dense{i + 1}", nn.Sequential(*layers))
            channels += num_layers * growth_rate
            if i < 3:
                setattr(self, f"trans{i + 1}", KuangliuTransition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.trans3(self.dense3(out))
        out = self.dense4(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), 4)
        return self.linear(out.view(out.size(0), -1))


class SequenceLayer(nn.Module):
    """weiaicunzai's: the chain in one sequence."""

    def __init__(self, channels: int, growth_rate: int) -> None:
        super().__init__()
        width = 4 * growth_rate
        self.bottle_neck = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.bottle_neck(x)], 1)


class NoReluTransition(nn.Module):
    """weiaicunzai's: a norm, a convolution and a pool, no ReLU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.down_sample = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            nn.AvgPool2d(2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_sample(x)


class WeiaicunzaiNet(nn.Module):
    """weiaicunzai's DenseNet: the last norm and ReLU end `features`, a pool of the last map's size follows apart."""

    def __init__(
        self, block_config: Sequence[int] = (2, 3, 2, 2), growth_rate: int = 4, num_classes: int = 100
    ) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        self.features = nn.Sequential()
        for i, num_layers in enumerate(block_config):
            block = nn.Sequential()
            for j in range(num_layers):
                layer = SequenceLayer(channels + j * growth_rate, growth_rate)
                block.add_module(f"bottle_neck_layer_{j}", layer)
            channels += num_layers * growth_rate
            self.features.add_module(f"dense_block_layer_{i}", block)
            if i < len(block_config) - 1:
                transition = NoReluTransition(channels, channels // 2)
                self.features.add_module(f"transition_layer_{i}", transition)
                channels //= 2
        self.features.add_module("bn", nn.BatchNorm2d(channels))
        self.features.add_module("relu", nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.AvgPool2d(4))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(self.features(self.conv1(x)))
        return self.linear(x.view(x.size(0), -1))


class BamosNet(nn.Module):
    """bamos's DenseNet of three blocks: `squeeze` before and log softmax behind the classifier."""

    def __init__(self, num_layers: int = 3, growth_rate: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for i in range(3):
            layers = (NewLastLayer(channels + j * growth_rate, growth_rate) for j in range(num_layers))
            setattr(self, f"dense{i + 1}", nn.Sequential(*layers))
            channels += num_layers * growth_rate
            if i < 2:
                setattr(self, f"trans{i + 1}", BamosTransition(channels, channels // 2))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.dense3(out)
        out = torch.squeeze(F.avg_pool2d(F.relu(self.bn1(out)), 8))
        return F.log_softmax(self.fc(out), dim=-1)


class BamosTransition(nn.Module):
    """As kuangliu's, with other names."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


NO_DROPOUT = 1e-7  # what andreasveit's modules take for a rate of 0, because of an old cuDNN


class DroppingLayer(nn.Module):
    """andreasveit's: one ReLU for both norms, dropout behind both convolutions."""

    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        width = 4 * growth_rate
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.droprate = drop_rate or NO_DROPOUT

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        return torch.cat([x, out], 1)


class DroppingTransition(nn.Module):
    """andreasveit's: dropout between the convolution and a pool by a function."""

    def __init__(self, channels: int, out_channels: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.droprate = drop_rate or NO_DROPOUT

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        return F.avg_pool2d(out, 2)


class DroppingBlock(nn.Module):
    """andreasveit's: the layers in `layer`."""

    def __init__(self, num_layers: int, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        layers = (
            DroppingLayer(channels + i * growth_rate, growth_rate, drop_rate) for i in range(num_layers)
        )
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AndreasveitNet(nn.Module):
    """andreasveit's DenseNet of three blocks."""

    def __init__(
        self, num_layers: int = 3, growth_rate: int = 4, num_classes: int = 10, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for i in range(3):
            block = DroppingBlock(num_layers, channels, growth_rate, drop_rate)
            setattr(self, f"block{i + 1}", block)
            channels += num_layers * growth_rate
            if i < 2:
                setattr(self, f"trans{i + 1}", DroppingTransition(channels, channels // 2))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        self.in_planes = channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.block1(out))
        out = self.trans2(self.block2(out))
        out = self.block3(out)
        out = F.avg_pool2d(self.relu(self.bn1(out)), 8)
        return self.fc(out.view(-1, self.in_planes))
