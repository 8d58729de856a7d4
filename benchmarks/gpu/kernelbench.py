"""`make gpu`, stage kernelbench: the forward of KernelBench's level 3 problems 13 to 16, with plain PyTorch and with effdense.

As there: norms with the batch's statistics, no gradients, float32 with PyTorch's defaults (convolutions may round to TF32). The nets
are written from the suite's description: plain layers BN-ReLU-conv3x3-dropout(0), a concatenation after each, transitions
BN-ReLU-conv1x1-average pool. effdense's have the same weights. Published times are an H100's.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu import results

REPEATS = 20
IMAGENET = {"121": (6, 12, 24, 16), "201": (6, 12, 48, 32)}
GROWTH_RATE = 32


def _layer(channels: int, growth_rate: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, growth_rate, kernel_size=3, padding=1, bias=False),
        nn.Dropout(0.0),
    )


class DenseBlock(nn.Module):
    """Problem 14: `num_layers` plain layers, each of which reads the concatenation of all before it."""

    def __init__(self, num_layers: int, channels: int, growth_rate: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _layer(channels + i * growth_rate, growth_rate) for i in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(x))
            x = torch.cat(features, 1)
        return x


class TransitionLayer(nn.Module):
    """Problem 13: a transition that halves the image."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            nn.AvgPool2d(kernel_size=2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(x)


class Net(nn.Module):
    """Problems 15 and 16: stem, four blocks of plain layers with transitions between them, BN, ReLU, global pool, classifier."""

    def __init__(self, block_config: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        channels = 64
        self.dense_blocks, self.transition_layers = nn.ModuleList(), nn.ModuleList()
        for i, num_layers in enumerate(block_config):
            self.dense_blocks.append(DenseBlock(num_layers, channels, GROWTH_RATE))
            channels += num_layers * GROWTH_RATE
            if i < len(block_config) - 1:
                self.transition_layers.append(TransitionLayer(channels, channels // 2))
                channels //= 2
        self.final_bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for i, block in enumerate(self.dense_blocks):
            x = block(x)
            if i < len(self.transition_layers):
                x = self.transition_layers[i](x)
        x = nn.functional.relu(self.final_bn(x), inplace=True)
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class Problem(NamedTuple):
    """One of the suite's, with its published times."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    eager_ms: float
    compile_ms: float


PROBLEMS = (
    Problem("13 transition 32 to 64", lambda: TransitionLayer(32, 64), (128, 32, 256, 256), 7.33, 3.15),
    Problem("14 block of 6 layers", lambda: DenseBlock(6, 32, 32), (10, 32, 224, 224), 7.47, 4.62),
    Problem("15 DenseNet-121, plain layers", lambda: Net(IMAGENET["121"]), (10, 3, 224, 224), 6.68, 8.93),
    Problem("16 DenseNet-201, plain layers", lambda: Net(IMAGENET["201"]), (10, 3, 224, 224), 10.4, 21.8),
)


def with_effdense(module: Any) -> nn.Module:
    """The same of effdense's modules, with the same weights: blocks and transitions replaced one by one."""
    import effdense.nn as dense

    fused: Any
    layers: Any
    if isinstance(module, DenseBlock):
        layers = module.layers
        first, growth_rate = layers[0][0].num_features, layers[0][2].out_channels
        fused = dense.DenseBlock(len(layers), first, None, growth_rate, 0.0)
        for mine, layer in zip(fused.values(), layers, strict=True):
            mine.norm1.load_state_dict(layer[0].state_dict())
            mine.conv1.load_state_dict(layer[2].state_dict())
        return fused.train(module.training)
    if isinstance(module, TransitionLayer):
        layers = module.transition
        norm, _, conv, _ = layers
        fused = dense.Transition(norm.num_features, conv.out_channels)
        fused.norm.load_state_dict(norm.state_dict())
        fused.conv.load_state_dict(conv.state_dict())
        return fused.train(module.training)
    for name, child in list(module.named_children()):
        setattr(module, name, with_effdense(child))
    return module


def error(got: Tensor, exact: Tensor) -> float:
    """The error's norm relative to the result's."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def measure(problem: Problem, device: Any, repeats: int = REPEATS) -> dict[str, Any]:
    """Runs both on `device`, one of benchmarks.devices, in turns; errors are relative to float64's result."""
    torch.manual_seed(0)
    naive = problem.make().train()
    fused = problem.make().train()
    fused.load_state_dict(naive.state_dict())
    nets = {"naive": naive.to(device.name), "effdense": with_effdense(fused).to(device.name)}
    x = torch.randn(problem.shape, device=device.name)
    times: dict[str, list[float]] = {name: [] for name in nets}
    row: dict[str, Any] = {"problem": problem.name, "shape": list(problem.shape)}
    row |= {"published_eager_ms": problem.eager_ms, "published_compile_ms": problem.compile_ms}
    with torch.no_grad():
        few = x[: max(2, len(x) // 10)]  # float64 of everything would take longer than all else
        exact_net = problem.make().train()
        exact_net.load_state_dict(naive.state_dict())
        exact = exact_net.double().to(device.name)(few.double())
        row["naive_error"], row["error"] = (error(net(few), exact) for net in nets.values())
        del exact_net, exact
        for turn in range(repeats + 3):
            for name, net in nets.items():
                took = device.time_step(lambda net=net: net(x))
                times[name] += [took] * (turn >= 3)
    for name in nets:
        row[f"{name}_ms"] = statistics.median(times[name])
    return row


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    from benchmarks import devices

    device = devices.find(options.device)
    torch.cuda.set_device(device.name)
    parts: list[str] = []
    wrong: list[str] = []
    for problem in PROBLEMS:
        row = measure(problem, device)
        parts.append(f"{row['problem'][:2]}: {row['effdense_ms']:.2f} ms (naive {row['naive_ms']:.2f})")
        result.add(row, "; ".join(parts))
        if not row["error"] <= 2 * row["naive_error"] + 1e-3:
            wrong.append(f"{row['problem']}: error {row['error']:.1e}, naive's {row['naive_error']:.1e}")
        torch.cuda.empty_cache()
    return results.fail("; ".join(wrong)) if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
