"""Counts the parts of a converted net that run fused: blocks, transitions, stem and head."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

import effdense
from benchmarks.nets import Parts
from effdense.engine import node, pool


def fused(model: nn.Module, images: Tensor) -> Parts:
    """Count what of a converted net runs fused.

    Blocks and transitions are the report's. A report has no lines for stems and heads: these are seen in a forward, a stem as a
    fused max pool, a head as a stage whose pool takes the whole image.
    """
    report = effdense.report(model)
    kinds = [entry.kind for entry in report if entry.converted and entry.reason is None]
    with (
        torch.no_grad(),
        mock.patch.object(node, "run", wraps=node.run) as stages,
        mock.patch.object(pool, "bn_relu_max_pool", wraps=pool.bn_relu_max_pool) as stems,
    ):
        model(images)
    arguments = [call.args[:2] for call in stages.call_args_list]
    heads = sum(list(settings.pool) == list(x.shape[2:]) for settings, x in arguments)
    return Parts(kinds.count("DenseBlock"), kinds.count("Transition"), stems.call_count, heads)
