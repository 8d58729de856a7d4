"""What of a net `effdense.convert` has made run fused: blocks, transitions, the stem and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import effdense
from benchmarks.nets import Parts


def fused(model: nn.Module, images: Tensor) -> Parts:
    """Count what of a converted net runs fused.

    Blocks and transitions are the report's. A report has no lines for stems and heads: these are seen in a forward, in which each
    is one call of a compiled operator. Without compiled operators there are none.
    """
    report = effdense.report(model)
    kinds = [entry.kind for entry in report if entry.converted and entry.reason is None]
    calls = _calls(model, images)
    stems = sum(name == "effdense::bn_relu_max_pool" for name, _, _ in calls)
    heads = sum(
        name == "effdense::bn_relu_avg_pool" and list(shapes[0][2:]) == list(inputs[3])
        for name, shapes, inputs in calls
    )
    return Parts(kinds.count("DenseBlock"), kinds.count("Transition"), stems, heads)


def _calls(model: nn.Module, images: Tensor) -> list[tuple[str, Any, Any]]:
    """Effdense's operators in a forward: names, shapes of the arguments, arguments that are no tensors."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(images)
    events = profiler.events() or []
    return [
        (event.name, event.input_shapes, event.concrete_inputs)
        for event in events
        if event.name.startswith("effdense::")
    ]
