"""`make demo`: the same training on real images, plain and converted, for far less memory.

    python -m benchmarks.demo

It trains a small DenseNet-BC plainly and converted, from the same weights on the same batches, and compares
the losses; then it measures what a step of a deeper one costs in each implementation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import compare, data, models
from benchmarks.program import reports_missing_packages
from benchmarks.worker import WorkerConfig

if TYPE_CHECKING:
    from rich.console import Console

TRAINED, STEPS, BATCH = "densenet_bc_40_12", 24, 16
MEASURED, MEASURED_BATCH, REPEATS = "densenet_bc_100_12", 64, 3
FLOAT64_TOLERANCE = 1e-9
SEED = 0


def train(
    impl: str, images: Tensor, labels: Tensor, dtype: torch.dtype, on_step: Callable[[], None]
) -> list[float]:
    """Return the losses of `STEPS` training steps of model `TRAINED`, built as `impl`.

    "naive, perturbed" is naive with every weight moved up by one unit in the last place. The recipe is the
    paper's (arXiv:1608.06993, section 4.2), its learning rate scaled to the smaller batch.
    """
    torch.manual_seed(SEED)
    model = models.build(TRAINED, impl.partition(",")[0], image_channels=1).model.to(dtype)
    if impl.endswith("perturbed"):
        _move_up_one_ulp(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1 * BATCH / 64, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    batches = torch.Generator().manual_seed(SEED)
    losses = []
    for _ in range(STEPS):
        on_step()
        chosen = torch.randint(len(images), (BATCH,), generator=batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen].to(dtype)), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _move_up_one_ulp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the largest difference between two loss curves, NaN where one has become NaN."""
    return (
        (torch.tensor(losses, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64))
        .abs()
        .max()
        .item()
    )


def _trainings(fused: Sequence[str]) -> list[tuple[torch.dtype, str]]:
    return [
        (torch.float64, "naive"),
        *((torch.float64, impl) for impl in fused),
        (torch.float32, "naive"),
        (torch.float32, "naive, perturbed"),
        (torch.float32, fused[0]),
    ]


def _show_agreement(
    console: Console, losses: dict[tuple[torch.dtype, str], list[float]], fused: Sequence[str]
) -> bool:
    """Print how far the losses are apart; return whether float64 agrees."""
    agree = True
    console.print("[bold]1. The same training?[/bold] Largest difference between loss curves, naive against")
    for impl in fused:
        difference = largest_difference(losses[torch.float64, "naive"], losses[torch.float64, impl])
        good = difference <= FLOAT64_TOLERANCE
        agree = agree and good
        verdict = "[green]agrees[/green]" if good else "[red]differs[/red]"
        console.print(
            f"   float64  {impl:<28} {difference:8.1e}  {verdict} (at most {FLOAT64_TOLERANCE:.0e})"
        )
    for impl, remark in (
        (fused[0], ""),
        ("naive, perturbed", "by one unit in the last place: float32 is chaotic"),
    ):
        difference = largest_difference(losses[torch.float32, "naive"], losses[torch.float32, impl])
        console.print(f"   float32  {impl:<28} {difference:8.1e}  {remark}")
    return agree


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--picture", type=Path, default=Path("out/demo.png"), help="where to draw it (out/demo.png)"
    )
    parser.add_argument(
        "--data-root",
        help="folder with Fashion-MNIST's gz files ($EFFDENSE_DATA); without, the cut kept here",
    )
    return parser.parse_args(arguments)


@reports_missing_packages
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; return the exit status: 1 when float64 differs or an implementation failed."""
    parsed = _parse(arguments)
    import numpy  # noqa: F401 (before the training, as the next: what is missing must not cost it)

    from benchmarks import plots

    console, quiet = compare.console(), compare.console(stderr=True)
    try:
        import effdense

        full = parsed.data_root or os.environ.get("EFFDENSE_DATA")
        arrays = data.load_fashion_mnist("train", full) if full else data.load_cut()
        parsed.picture.parent.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        print(f"benchmarks.demo: {error}", file=sys.stderr)
        return 2
    images, labels = data.to_tensors(*arrays)
    fused = list(models.EFFDENSE)
    if not effdense.build_info()["compiled"]:
        fused = [f"{impl}-fallback" for impl in fused]
        console.print(
            "[yellow]effdense's C++ is not built here: this shows its plain PyTorch fallback.[/yellow]"
        )

    console.print(f"{TRAINED} on {len(images)} Fashion-MNIST images, {STEPS} steps of {BATCH}\n")
    trainings = _trainings(fused)
    losses = {}
    with compare.progress(STEPS * len(trainings), quiet) as on_progress:
        for dtype, impl in trainings:
            name = f"training {impl} in {str(dtype).removeprefix('torch.')}"
            losses[dtype, impl] = train(impl, images, labels, dtype, lambda name=name: on_progress(name))  # type: ignore[misc]
    agree = _show_agreement(console, losses, fused)

    settings = WorkerConfig(model=MEASURED, batch=MEASURED_BATCH, image_size=32, data="fashion-mnist")
    impls = ["naive", "checkpoint", *fused]
    with compare.progress((REPEATS + 2) * len(impls), quiet) as on_progress:
        result = compare.run(settings, impls, REPEATS, on_progress)
    console.print("\n[bold]2. What does a step cost?[/bold]")
    console.print(compare.table(result, compare.title(settings)))

    curves = {impl: losses[torch.float64, impl] for impl in ("naive", *fused)}
    plots.demonstration(curves, result["rows"], TRAINED, compare.title(settings), parsed.picture)
    console.print(f"\nThe picture: {parsed.picture}")
    return int(not agree or any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
