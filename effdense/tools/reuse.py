"""feature_reuse: how strongly each layer of a trained DenseNet reads the features of each layer before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense.conversion import convert, report
from effdense.nn import DenseBlock
from effdense.nn.foreign import ForeignBlock
from effdense.nn.kinds import CONVS
from effdense.nn.structure import Obstacle, read_block
from effdense.tools.planner import bare_copy


class BlockReuse(NamedTuple):
    """A dense block's weights.

    block: its name in model.named_modules().  sources: "input", then the layers' names.  targets: the layers' names, then the
    transition's or classifier's that reads the whole block, if there is one.  weights: [sources, targets] float64, NaN where a
    target does not read a source.
    """

    block: str
    sources: list[str]
    targets: list[str]
    weights: Tensor


def _reader(modules: dict[str, Any], block: str, channels: int) -> str | None:
    """The first convolution or linear map behind the block, if it has as many inputs as the block has outputs."""
    names = list(modules)
    behind = names[names.index(block) + 1 :]
    for name in behind:
        module = modules[name]
        if name.startswith(f"{block}.") or not isinstance(module, (*CONVS, nn.Linear)):
            continue
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        return name if inputs == channels else None
    return None


def _block_reuse(modules: dict[str, Any], block: str) -> BlockReuse:
    try:
        chains = read_block(modules[block], hooks=False)[0]
    except Obstacle as reason:
        raise ValueError(f"feature_reuse: {block}: {reason}") from None
    widths = [chains[0].channels, *(chain.growth for chain in chains)]
    behind = _reader(modules, block, sum(widths))
    readers = [chain.convs[0] for chain in chains] + ([modules[behind]] if behind else [])
    weights = torch.full((len(widths), len(readers)), torch.nan, dtype=torch.float64)
    for target, module in enumerate(readers):
        weight = module.weight.detach().abs().to("cpu", torch.float64)  # [out, in, *kernel]
        channels = weight.transpose(0, 1).flatten(1).mean(1)
        sources = channels.split(widths[: target + 1])
        weights[: target + 1, target] = torch.stack([source.mean() for source in sources])
    layers = [chain.name for chain in chains]
    last = [behind.removesuffix(".conv")] if behind else []
    return BlockReuse(block, ["input", *layers], [*layers, *last], weights)


def feature_reuse(model: nn.Module) -> list[BlockReuse]:
    """Mean absolute weight with which each layer reads each earlier layer's features, for every dense block.

    Huang et al. (arXiv 1608.06993), section 5 and figure 5: the weights between a source and a target are those of the
    target's first convolution (1x1 in a bottleneck, else 3x3) for the source's channels, their L1 norm divided by how many they
    are. The transition or classifier behind a block is its last target, the block's input its first source.

    Args:
        model: with dense blocks that `effdense.convert` converts, converted or not. It is not changed.

    Returns:
        One BlockReuse per block, in the model's order.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no such block; the message has the reasons of `effdense.report`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"feature_reuse: model must be a torch.nn.Module, got {type(model).__name__}")
    # Compared with effdense's forward: so the channels are in the order of the layers.
    known = convert(bare_copy(model))
    modules = dict(model.named_modules())
    blocks = [name for name, m in known.named_modules() if isinstance(m, (DenseBlock, ForeignBlock))]
    if not blocks:
        raise ValueError(
            f"feature_reuse: {type(model).__name__} has no dense block that effdense knows; {report(known)}"
        )
    return [_block_reuse(modules, name) for name in blocks]
