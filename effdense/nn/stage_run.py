"""Runs a dense block's layers, and the pool and convolution after the block, as one stage of the engine.

The modules' tensors and settings are gathered and checked once and then kept, for as long as the modules stay as they
were and inputs of the same kind come (looks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdense.engine import node
from effdense.engine.autograd import autocast_enabled, prepare, without_autocast
from effdense.engine.batch_norm import StageUpdate, read_module
from effdense.engine.inputs import through
from effdense.engine.norm import Norm
from effdense.engine.stage import Stage, StageConfig, in_pairs
from effdense.engine.validation import check_conv_weight, check_norm, check_vector
from effdense.nn.chain import Chain, Drop
from effdense.nn.looks import State, can_keep

_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Chains(list[Chain]):
    """A block's layers, and how they have been run, by what came in and what stands behind them."""

    def __init__(self, chains: Iterable[Chain]) -> None:
        super().__init__(chains)
        self.runs: dict[Any, _Run] = {}


class _Run(NamedTuple):
    """What the engine takes, but for the input."""

    settings: StageConfig
    parameters: list[Tensor | None]
    running: list[Tensor | None]
    dtype: torch.dtype | None  # of the result, under autocast
    update: StageUpdate  # of the running statistics
    returned: slice | None  # the channels of the buffer that the block gives back; None: all
    behind: State | None  # None: not to be kept


def draw_mask(drop: Drop, conv: Any, x: Tensor) -> Tensor | None:
    """Which of the values that conv makes dropout keeps, in bytes; None where it drops nothing.

    Drawn in the contiguous layout, so that on the CPU it is what F.dropout would draw.
    """
    if drop.rate <= 0:
        return None
    spatial = (1,) * (x.dim() - 2) if drop.channels else x.shape[2:]
    shape = (x.shape[0], conv.weight.shape[0], *spatial)
    if drop.rate >= 1:  # nothing is drawn, as by F.dropout
        return torch.zeros(shape, dtype=torch.bool, device=x.device)
    return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - drop.rate)


def _masks(chains: Sequence[Chain], x: Tensor) -> tuple[list[float], list[Tensor | None]]:
    """Dropout's probabilities and masks for the engine, two a layer: nothing at all where no layer drops."""
    masks = [
        [draw_mask(d, conv, x) for d, conv in zip(chain.drops, chain.convs, strict=True)] for chain in chains
    ]
    if all(mask is None for own in masks for mask in own):
        return [], []
    rates = [[drop.rate for drop in chain.drops] for chain in chains]
    return [p for own in rates for p in [0.0, *own][-2:]], [m for own in masks for m in [None, *own][-2:]]


def _check_layer(
    name: str, kernels: Sequence[int], norms: Sequence[Norm], convs: Sequence[Any], channels: int, x: Tensor
) -> None:
    """Checks one layer's tensors against the channels that reach it."""
    op = "DenseBlock"
    for i, (kernel, norm, (weight, bias)) in enumerate(zip(kernels, norms, convs, strict=True)):
        check_norm(op, [f"{name}.norm{i + 1}.{part}" for part in _TENSORS], norm, channels, x)
        check_conv_weight(op, f"{name}.conv{i + 1}.weight", weight, channels, kernel, x)
        channels = weight.shape[0]
        check_vector(op, f"{name}.conv{i + 1}.bias", bias, channels, x, "the convolution's output channels")


def dimensions_of(chains: Sequence[Chain]) -> int:
    """How many dimensions a block's input has."""
    count: int = chains[0].convs[0].weight.dim()
    return count


def run_stage(chains: Sequence[Chain], memory: str, x: Tensor, *behind: Any) -> Tensor:
    """Runs a block's layers, and the BN-ReLU-average-pool and 1x1 convolution behind it, as one stage.

    `x`: what `accepts` agrees to. `behind`: the pool's norm, its kernel size, and the convolution, or as much of it as there is;
    nothing where the block gives back new features only.
    """
    return through(x, lambda x: _run_stage(chains, memory, x, *behind))


def _run_stage(
    chains: Sequence[Chain],
    memory: str,
    x: Tensor,
    pool_norm: Any = None,
    kernel_size: Sequence[int] = (),
    conv: Any = None,
) -> Tensor:
    runs = chains.runs if isinstance(chains, Chains) and can_keep() else None
    key = (x.dtype, x.device, x.shape[1], *kernel_size, id(pool_norm), id(conv))
    run = None if runs is None else runs.get(key)
    values = x.shape[0] * x.shape[2:].numel()
    # What a batch of one value, an inference tensor or autocast ask for is seen to below.
    as_before = run is not None and values > 1 and not x.is_inference() and not autocast_enabled(x)
    if run is None or run.behind is None or not as_before or not run.behind.is_same():
        x, run = _prepare(chains, memory, x, pool_norm, kernel_size, conv)
        if runs is not None and run.behind is not None:
            if len(runs) >= _MOST_RUNS:
                runs.clear()
            runs[key] = run
    drop, masks = _masks(chains, x)
    settings = run.settings._replace(drop=drop) if drop else run.settings
    with without_autocast(x):
        out, vectors = node.run(settings, x, run.parameters, run.running, masks)
    run.update(vectors, values)
    if run.returned is not None:
        out = out[:, run.returned]
    return out if conv is None or run.dtype is None else out.to(run.dtype)


_MOST_RUNS = 16  # image sizes of a head, dtypes, devices


def _prepare(
    chains: Sequence[Chain], memory: str, x: Tensor, pool_norm: Any, kernel_size: Sequence[int], conv: Any
) -> tuple[Tensor, _Run]:
    """Checks everything: x as it runs, and the rest that the engine takes."""
    bottleneck = len(chains[0].convs) == 2
    convs = [c for chain in chains for c in chain.convs]
    convs += [] if conv is None else [conv]
    channels, (given,), weights, result = prepare(
        "DenseBlock", [x], [p for c in convs for p in (c.weight, c.bias)]
    )
    keep = can_keep() and given is x and not autocast_enabled(x)
    x, first = given, channels
    parameters: list[Tensor | None] = []
    norms: list[Norm] = []
    of_convs = iter(in_pairs(weights))
    for chain in chains:
        own = [read_module(m) for m in chain.norms]
        kernels = [conv.kernel_size[0] for conv in chain.convs]
        pairs = [next(of_convs) for _ in kernels]
        _check_layer(chain.name, kernels, own, pairs, channels, x)
        for norm, pair in zip(own, pairs, strict=True):
            parameters += [norm.weight, norm.bias, *pair]
        norms += own
        last, _ = pairs[-1]
        channels += last.shape[0]
    all_norms = [m for chain in chains for m in chain.norms]
    if pool_norm is not None:
        norm = read_module(pool_norm)
        check_norm("DenseBlock", [f"the following norm.{part}" for part in _TENSORS], norm, channels, x)
        weight, bias = (None, None) if conv is None else next(of_convs)
        if conv is not None:
            check_conv_weight("DenseBlock", "the following conv.weight", weight, channels, 1, x)
        parameters += [norm.weight, norm.bias, weight, bias]
        norms.append(norm)
        all_norms.append(pool_norm)
    dilation = [chain.convs[-1].dilation[0] for chain in chains]
    settings = StageConfig(
        bottleneck=bottleneck,
        memory=memory,
        lowest=-1,
        eps=[norm.eps for norm in norms],
        batch_statistics=[norm.batch_statistics for norm in norms],
        drop=[],
        pool=list(kernel_size),
        dilation=dilation if max(dilation) > 1 else [],
        newest_first=chains[0].newest_first,
        group=next((norm.group for norm in norms if norm.batch_statistics), ""),
    )
    running = [
        t for n in norms for t in ((None, None) if n.batch_statistics else (n.running_mean, n.running_var))
    ]
    stage = Stage(settings, first, parameters, [])
    update, returned = StageUpdate(stage, all_norms), stage.added() if chains[0].new_only else None
    # Over which processes a norm is synchronised, no module's state tells.
    keep = keep and not any(isinstance(m, torch.nn.SyncBatchNorm) for m in all_norms)
    state = State([m for m in (pool_norm, conv) if m is not None]) if keep else None
    return x, _Run(settings, parameters, running, result, update, returned, state)
