"""Many steps with changing shapes: resident memory stays flat. `python -m tests.engine._faults.soak --steps 2000` prints it as it goes."""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

import effdense

# One after the other, over and over: what the second round takes, the hundredth may.
SHAPES = [
    (2, 3, 32, 32),
    (3, 3, 32, 48),
    (1, 3, 64, 32),
    (4, 3, 40, 40),
    (2, 3, 33, 47),
    (5, 3, 32, 32),
    (1, 3, 96, 64),
]
WARM = 8 * len(SHAPES)  # steps until everything has been met with


def resident() -> int:
    """Bytes of this process that are in memory, less what the C library could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(steps: int, note: Callable[[int, int], None] = lambda step, size: None) -> int:
    """By how many bytes the process has grown behind the first WARM of so many steps; training, tests and memory modes in turns."""
    torch.manual_seed(0)
    nets = [
        effdense.models.DenseNet(
            growth_rate=8, block_config=(3, 2), num_init_features=8, bn_size=2, num_classes=5, memory=memory
        )
        for memory in ("balanced", "minimal")
    ]
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9) for net in nets]
    first = 0
    for step in range(steps):
        net, optimizer = nets[step // len(SHAPES) % 2], optimizers[step // len(SHAPES) % 2]
        x = torch.randn(SHAPES[step % len(SHAPES)])
        if step // (2 * len(SHAPES)) % 4 == 3:
            with torch.no_grad():
                net.eval()(x)
        else:
            optimizer.zero_grad()
            net.train()(x).square().mean().backward()
            optimizer.step()
        if step % (2 * WARM) == WARM - 1:
            size = resident()
            first = first or size
            note(step + 1, size)
    return resident() - first


def main() -> None:
    """Prints the size now and then."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine._faults.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="how many (default: 2000)")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    grown = soak(steps, lambda step, size: print(f"step {step}: {size / 2**20:.1f} MiB", flush=True))
    print(f"{steps} steps: {grown / 2**20:+.1f} MiB behind the first {WARM}")


if __name__ == "__main__":
    main()
