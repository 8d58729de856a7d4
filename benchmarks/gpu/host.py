"""`make gpu`, stage host: the time that the host takes to launch a training step, and the time that the GPU computes.

`host_ms`: until the step's calls return, with images so small that the card never has the host wait. `device_ms`: the sum of all
kernels of a step, by torch.profiler. `step_ms`: a step from an idle card to an idle card.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import results

REPEATS, WARM_UP_STEPS = 8, 4
NETS = (
    ("BC-100 b64 32² bf16", "densenet_bc_100_12", 64, 32, 8),
    ("121 b64 224² bf16", "densenet121", 64, 224, 32),
)
IMPLS = ("naive+channels-last", "effdense-balanced+channels-last")


def kernel_times(step: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds of all kernels, copies and fills of a step, and how many they are."""
    from torch.autograd.profiler import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    on_card = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        # a range of the program's, such as the optimizer's step, has its kernels in it
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    return sum(event.time_range.elapsed_us() for event in on_card) / 1e3, len(on_card)


def measure(model: str, impl: str, batch: int, size: int, small: int, device: Any) -> dict[str, Any]:
    """One implementation; `small`: the image size at which the host is what counts."""
    import torch

    from benchmarks import models
    from benchmarks.worker import WorkerConfig, batch_for, training_step

    torch.manual_seed(0)
    built = models.build(model, impl, device=device.name, dtype="bfloat16")

    def synchronize() -> None:
        torch.cuda.synchronize(device.name)

    def step(images: int, pixels: int) -> Callable[[], Any]:
        settings = WorkerConfig(model, images, pixels, dtype="bfloat16", device=device.name)
        x, labels = (tensor.to(device.name) for tensor in batch_for(settings, built.model))
        x = x.contiguous(memory_format=torch.channels_last)
        return training_step(built.model, x, labels, "bfloat16")

    def host_ms(run: Callable[[], Any]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - start)
        synchronize()
        return took

    whole, tiny = step(batch, size), step(2, small)
    for _ in range(WARM_UP_STEPS):
        tiny(), whole()
    row = {
        "impl": impl,
        "host_ms": statistics.median(host_ms(tiny) for _ in range(REPEATS)),
        "step_ms": statistics.median(device.time_step(whole) for _ in range(REPEATS)),
    }
    row["device_ms"], row["kernels"] = kernel_times(whole, synchronize)
    return row


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    import torch

    from benchmarks import devices

    device = devices.find(options.device)
    device.use()
    parts = []
    for config, model, batch, size, small in NETS:
        for impl in IMPLS:
            row = {"config": config, **measure(model, impl, batch, size, small, device)}
            name = impl.partition("+")[0].removeprefix("effdense-")
            parts.append(
                f"{config}, {name}: host {row['host_ms']:.1f}, device {row['device_ms']:.1f}, step {row['step_ms']:.1f} ms"
            )
            result.add(row, "; ".join(parts))
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
