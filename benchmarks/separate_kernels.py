"""The fewest bytes that a training step of plain PyTorch can move, where every module is a kernel of its own.

Counted by hand for torchvision's DenseNet ("naive") and with `memory_efficient=True` ("checkpoint"): every operand is read once
and every result written once, by every kernel, and batch normalisation makes two passes. Not counted, here and in
effdense: convolutions larger than 1x1, the classifier, and what a copy into another layout would add.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from benchmarks import models

BYTES = 2  # of a number: half precision
INDEX_BYTES = 8  # of a max pool's index


class Map(NamedTuple):
    """How large a map is: channels by pixels, of all images."""

    channels: int
    pixels: int

    @property
    def bytes(self) -> int:
        return self.channels * self.pixels * BYTES


def bn_relu(x: Map, passes: int = 2, again: bool = False) -> Counter[str]:
    """BN and ReLU and their backwards; `again`: the forward a second time. `passes`: 1 where BN's second finds x in a cache."""
    size, forwards = x.bytes, 2 if again else 1
    return Counter(
        {
            "norm, statistics": forwards * (passes - 1) * size,  # reads x
            "norm, apply": forwards * 2 * size,  # reads x, writes z
            "relu": forwards * 2 * size,  # in place: reads z, writes z
            "relu backward": 3 * size,  # reads the gradient and z, writes a gradient
            "norm backward, sums": (passes - 1) * 2 * size,  # reads the gradient and x
            "norm backward, apply": 3 * size,  # reads the gradient and x, writes a gradient
        }
    )


def conv1x1(x: Map, out_channels: int) -> Counter[str]:
    """A 1x1 convolution and its backward, which is two kernels. The weight is read once: caches hold it."""
    y, weight = Map(out_channels, x.pixels), out_channels * x.channels * BYTES
    return Counter(
        {
            "conv1x1": x.bytes + weight + y.bytes,  # reads x and the weight, writes y
            "conv1x1 backward, of x": y.bytes + weight + x.bytes,  # reads grad_y, weight; writes grad_x
            "conv1x1 backward, of the weight": y.bytes + x.bytes + weight,  # reads grad_y, x; writes it
        }
    )


def dense_layer(x: Map, width: int, passes: int = 2, checkpoint: bool = False) -> Counter[str]:
    """All of a layer but its 3x3 convolution. `width`: channels of the bottleneck."""
    total = Counter(
        {"cat": (2 if checkpoint else 1) * 2 * x.bytes}
    )  # reads the features, writes them together
    total += bn_relu(x, passes, checkpoint)
    # A checkpoint stops when it has what the backward asks for: conv1x1 is not run again.
    total += conv1x1(x, width)
    total += bn_relu(Map(width, x.pixels), passes)
    # cat's backward is views. But every feature has one gradient for each of its readers; each but the first is added:
    # reads two, writes one. One of the readers is the cat at the block's end, which counts as the first.
    total["sum of gradients"] += 3 * x.bytes
    return total


def transition(x: Map, out_channels: int, passes: int = 2) -> Counter[str]:
    """BN, ReLU, 1x1 convolution and average pool of 2x2."""
    y, pooled = Map(out_channels, x.pixels), Map(out_channels, x.pixels // 4)
    pool = {"pool": y.bytes + pooled.bytes, "pool backward": pooled.bytes + y.bytes}
    return bn_relu(x, passes) + conv1x1(x, out_channels) + Counter(pool)


def head(x: Map, images: int, passes: int = 2) -> Counter[str]:
    """BN, ReLU and the average of every image."""
    pooled = Map(x.channels, images).bytes
    return bn_relu(x, passes) + Counter({"pool": x.bytes + pooled, "pool backward": pooled + x.bytes})


def stem(x: Map, passes: int = 2) -> Counter[str]:
    """BN, ReLU and max pool of 3x3, two pixels apart, behind the first convolution."""
    pooled = Map(x.channels, x.pixels // 4)
    indices = pooled.bytes // BYTES * INDEX_BYTES
    # both: reads or writes x, and the pooled map with its indices
    pool = {"pool": x.bytes + pooled.bytes + indices, "pool backward": pooled.bytes + indices + x.bytes}
    return bn_relu(x, passes) + Counter(pool)


def step(name: str, images: int, image_size: int, checkpoint: bool = False, passes: int = 2) -> Counter[str]:
    """The bytes of one training step of a model by name, by what moves them."""
    spec = models._spec(name)
    assert spec.bn_size is not None, "there is no formula for plain layers"
    growth_rate, width, channels = spec.growth_rate, spec.bn_size * spec.growth_rate, spec.num_init_features
    total: Counter[str] = Counter()
    if not spec.small_inputs:
        total += stem(Map(channels, images * (image_size // 2) ** 2), passes)
        image_size //= 4
    for i, layers in enumerate(spec.block_config, start=1):
        pixels = images * image_size**2
        for _ in range(layers):
            total += dense_layer(Map(channels, pixels), width, passes, checkpoint)
            channels += growth_rate
        block = Map(channels, pixels)
        total["cat"] += 2 * block.bytes  # of the block's output
        if i < len(spec.block_config):
            channels, image_size = int(spec.compression * channels), image_size // 2
            total += transition(block, channels, passes)
        else:
            total += head(block, images, passes)
    return total
