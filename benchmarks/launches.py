"""Launches of a training step on a GPU, counted on the CPU: those of effdense's kernels by the harness, PyTorch's by its profiler.

    python -m benchmarks.launches

From the repository's root; needs g++ and the CUDA toolkit's headers, no GPU. An operator of PyTorch's counts as one launch where
it computes anything (on a GPU some of them launch several kernels); convolutions, which are the same for everybody, stand apart.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import compare, cuda_traffic, densenet, models
from effdense import convert
from effdense.engine.validation import check_memory
from effdense.ops import dispatch

IMPLS = ("naive", "checkpoint", "balanced", "minimal")
# What computes nothing: views, allocations, what asks for something.
NO_LAUNCH = {
    *(
        "as_strided",
        "alias",
        "detach",
        "expand",
        "flatten",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
    ),
    *("split", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view", "movedim", "view_as"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "to"),
    *("result_type", "promote_types", "item"),
    *("_reshape_alias", "contiguous", "_local_scalar_dense", "is_nonzero", "lift_fresh", "split_with_sizes"),
}


class Launches(NamedTuple):
    """Of effdense's kernels, of PyTorch's operators, and of those its convolutions, forward or backward."""

    own: int
    others: int
    convolutions: int

    def __sub__(self, other: Launches) -> Launches:
        return Launches(*(a - b for a, b in zip(self, other, strict=True)))

    @property
    def beside_convolutions(self) -> int:
        """What a layer's count is about."""
        return self.own + self.others


def count(simt: Any, run: Callable[[], Any]) -> tuple[Any, Launches]:
    """Runs it; returns what it returns, and its launches."""
    simt.forget()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    found: Counter[str] = Counter()
    for event in profile.events():
        if event.cpu_parent is None:
            _visit(event, found)
    convolutions = found.pop("convolution", 0)
    return result, Launches(simt.launches(), found.total(), convolutions)


def _visit(event: Any, found: Counter[str]) -> None:
    name = event.name.removeprefix("aten::")
    if name in ("convolution", "convolution_backward"):
        found["convolution"] += 1
    else:
        children = [child for child in event.cpu_children if child.name.startswith("aten::")]
        if name in ("native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit"):
            children = []  # one operator on a GPU
        if any(not _is_free(child) for child in children) or not event.name.startswith("aten::"):
            for child in event.cpu_children:
                _visit(child, found)
        elif name not in NO_LAUNCH:
            found[name] += 1


def _is_free(event: Any) -> bool:
    return event.name.removeprefix("aten::") in NO_LAUNCH and not any(
        not _is_free(child) for child in event.cpu_children
    )


@contextmanager
def on_harness(simt: Any) -> Iterator[None]:
    """Makes the CPU run the CUDA operators."""
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with dispatch.override("cpu", simt, types):
        yield


def of_step(
    simt: Any, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Launches, Launches]:
    """Of the model's forward, and of its backward (of x too); the second time, when nothing is set up any more."""

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y: Tensor = model(x)
        return y

    with on_harness(simt):
        wanted = [x, *model.parameters()]
        y = forward()
        torch.autograd.grad(y, wanted, torch.ones_like(y))
        y, of_forward = count(simt, forward)
        grad = torch.ones_like(y)
        _, of_backward = count(simt, lambda: torch.autograd.grad(y, wanted, grad))
    return of_forward, of_backward


def make_block(impl: str, layers: int, channels: int = 24, growth_rate: int = 12) -> nn.Module:
    """A dense block of bottleneck layers."""
    torch.manual_seed(0)
    block: nn.Module = densenet._DenseBlock(layers, channels, 4, growth_rate, 0.0, impl == "checkpoint")
    return (
        block
        if impl in ("naive", "checkpoint")
        else convert(copy.deepcopy(block), memory=check_memory("--impl", impl))
    )


def per_layer(
    simt: Any,
    impl: str,
    size: int = 8,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    growth_rate: int = 12,
) -> tuple[Launches, Launches]:
    """What one more layer adds to a block of so many, forward and backward; images of size x size, two of them."""
    steps = []
    for n in (layers, layers + 1):
        x = torch.randn(2, 24, size, size).contiguous(memory_format=torch.channels_last)
        block = make_block(impl, n, growth_rate=growth_rate)
        steps.append(of_step(simt, block, x.requires_grad_(), dtype))
    (forward, backward), (forward_more, backward_more) = steps
    return forward_more - forward, backward_more - backward


def rows(simt: Any, layers: int = 3) -> list[dict[str, Any]]:
    """One row per implementation: launches of one more layer behind so many, beside convolutions."""
    found = []
    for impl in IMPLS:
        forward, backward = per_layer(simt, impl, layers=layers)
        found.append({"impl": impl, "forward": forward, "backward": backward})
    return found


def step_rows(simt: Any, name: str, size: int) -> list[dict[str, Any]]:
    """One row per implementation: launches of a training step of a model, two images of size x size."""
    found = []
    for impl in IMPLS:
        torch.manual_seed(0)
        built = models.build(name, impl if impl in ("naive", "checkpoint") else f"effdense-{impl}").model
        x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        forward, backward = of_step(simt, built, x)
        found.append({"impl": impl, "model": name, "forward": forward, "backward": backward})
    return found


STEPS = {"densenet_bc_100_12": 8, "densenet121": 32}  # and images so small that the harness takes a minute


def main() -> int:
    """Print the table of docs/cuda.md."""
    simt = cuda_traffic.load_harness()
    lines = ["| | implementation | forward | backward | effdense's own |", "|---|---|--:|--:|--:|"]
    cells = [(f"a layer behind {n} others", rows(simt, n)) for n in (3, 12)]
    cells += [(f"{name}, a step", step_rows(simt, name, size)) for name, size in STEPS.items()]
    for title, found in cells:
        for row in found:
            forward, backward = row["forward"], row["backward"]
            counted = f"{forward.beside_convolutions} | {backward.beside_convolutions}"
            lines.append(f"| {title} | {row['impl']} | {counted} | {forward.own + backward.own} |")
            title = ""
    compare.console().print("\n".join(lines), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
