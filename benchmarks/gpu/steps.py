"""`make gpu`, stages steps and compile: time and peak memory of a training step of every implementation, as benchmarks.compare does.

Each implementation has a process of its own (benchmarks/worker.py), which takes seconds to start: they start at the same time, and
then take turns, one step each. With --compile: torch.compile beside the eager net and effdense. All nets are compiled at the
same time, before anything is measured, since one takes a minute.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from benchmarks import devices
from benchmarks.gpu import results
from benchmarks.worker import Worker, WorkerConfig, WorkerError

REPEATS, WARM_UP_STEPS = 10, 5
IMPLS = ("naive", "checkpoint", "effdense-balanced", "effdense-minimal")
BESIDE_COMPILE = ("naive", "effdense-balanced")
TOGETHER_BYTES = 40 * 2**30  # free on the card: then all processes start at once; else those of one net
MEASURING_S = 15  # of one net, with what is compiled
LATE = "not measured: the time limit was reached"
CHANNELS_LAST = "+channels-last"


class Config(NamedTuple):
    """A net, and in which numbers and layout its steps run. float32 with TF32 products: PyTorch's default for convolutions."""

    name: str
    model: str
    batch: int
    image_size: int
    dtype: str = "float32"
    channels_last: bool = False

    def settings(self, device: str) -> WorkerConfig:
        """What a worker is told."""
        return WorkerConfig(self.model, self.batch, self.image_size, dtype=self.dtype, device=device)

    def impl(self, name: str) -> str:
        """The implementation's full name."""
        return name + CHANNELS_LAST * self.channels_last


HALF: dict[str, Any] = {"dtype": "bfloat16", "channels_last": True}
CONFIGS = (
    Config("BC-100 b64 32² TF32", "densenet_bc_100_12", 64, 32),
    Config("BC-100 b64 32² bf16", "densenet_bc_100_12", 64, 32, **HALF),
    Config("121 b64 224² TF32", "densenet121", 64, 224),
    Config("121 b64 224² bf16", "densenet121", 64, 224, **HALF),
    Config("3D 121 b4 96³ TF32", "densenet121_3d", 4, 96),
)


class Measured:
    """One implementation of one net: its process and its row of the result."""

    def __init__(self, config: Config, impl: str, device: str) -> None:
        self.config, self._device = config, device
        self.row: dict[str, Any] = {"config": config.name, "impl": config.impl(impl), **config._asdict()}
        del self.row["name"]
        self._times: list[float] = []
        self.worker = Worker(self.row["impl"])

    def start(self, *commands: str) -> None:
        """Builds the net in its process, and what else is asked for. May run beside others."""
        self.try_("build", self.config.settings(self._device))
        for command in commands:
            self.try_(command)

    def try_(self, command: str, *arguments: Any) -> None:
        """Has the process do something, unless something has failed."""
        if "error" in self.row:
            return
        try:
            answer = getattr(self.worker, command)(*arguments)
        except WorkerError as error:
            self.fail(str(error))
            return
        if command == "step":
            self._times.append(answer["ms"])
        else:
            answer.pop("first_loss", None) if "first_loss" in self.row else None
            self.row.update(answer)

    def fail(self, reason: str) -> None:
        """Gives the implementation up, and its memory back."""
        self.row.setdefault("error", reason)
        self.worker.kill()

    def finish(self) -> dict[str, Any]:
        """Counts a step's memory, ends the process, and returns the row."""
        self.try_("finish")
        if "error" not in self.row:
            self.row.update(median_ms=statistics.median(self._times), fastest_ms=min(self._times))
            self.worker.kill()
        return self.row


def measure(group: Sequence[Measured]) -> list[dict[str, Any]]:
    """Warms up and times implementations of one net, which have started; returns their rows."""
    for one in group:
        one.try_("warm_up", WARM_UP_STEPS)
    for _ in range(REPEATS):
        for one in group:
            one.try_("step")
    rows = [one.finish() for one in group]
    note_ratios(rows)
    return rows


def note_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `speed_to_naive`, `memory_to_naive`, and a note where the first loss differs: the same weights and images give the same."""
    naive = rows[0]
    tolerance = devices.Cuda.loss_tolerance[naive["dtype"]]
    for row in rows:
        if "error" in row or "error" in naive:
            continue
        row["speed_to_naive"] = naive["median_ms"] / row["median_ms"]
        row["memory_to_naive"] = row["peak_bytes"] / naive["peak_bytes"]
        loss, expected = row["first_loss"], naive["first_loss"]
        if not abs(loss - expected) <= tolerance * abs(expected):
            row["note"] = f"its first loss is {loss:.6g}, naive's is {expected:.6g}"


def finding(rows: Sequence[dict[str, Any]], impls: Sequence[str]) -> str:
    """For each net how much faster than naive, and which part of its memory; and what failed."""
    parts = []
    for config in dict.fromkeys(row["config"] for row in rows):
        of = {r["impl"].removesuffix(CHANNELS_LAST): r for r in rows if r["config"] == config}
        shown = [
            f"{name.removeprefix('effdense-')} {row['speed_to_naive']:.2f}x {row['memory_to_naive']:.2f}"
            for name in impls
            if "speed_to_naive" in (row := of.get(name, {}))
        ]
        parts += [f"{config}: {', '.join(shown)}"] if shown else []
    failed = sum("error" in row for row in rows)
    return "; ".join(["speed and peak to naive", *parts]) + (f"; {failed} not measured" if failed else "")


def free_bytes(device: str) -> int:
    """What is free on the card."""
    import torch

    return torch.cuda.mem_get_info(device)[0]


def eager(result: results.Result, device: str, end: float) -> None:
    """Every net without torch.compile, until `end`."""
    together = free_bytes(device) >= TOGETHER_BYTES
    with ThreadPoolExecutor(len(CONFIGS) * len(IMPLS)) as pool, contextlib.ExitStack() as stack:
        groups: list[list[Measured]] = []

        def start(config: Config) -> None:
            group = [Measured(config, impl, device) for impl in IMPLS]
            for one in group:
                stack.callback(one.worker.kill)
            starting = [pool.submit(one.start) for one in group]
            groups.append(group)
            started.append(starting)

        started: list[list[Future[None]]] = []
        for i in range(len(CONFIGS)):
            while len(groups) <= (len(CONFIGS) - 1 if together else i):
                start(CONFIGS[len(groups)])
            # of all: what starts would take time from what is measured
            wait(
                [future for starting in started for future in starting],
                timeout=max(0.0, end - time.monotonic()),
            )
            if time.monotonic() > end:
                for one in (one for group in groups[i:] for one in group):
                    one.fail(LATE)
                    result.add(one.row, finding([*result.values["rows"], one.row], IMPLS[1:]))
                return
            for row in measure(groups[i]):
                result.add(row, finding([*result.values["rows"], row], IMPLS[1:]))


def compiled(result: results.Result, device: str, end: float) -> None:
    """Every net under torch.compile, beside others, until `end`."""
    with ThreadPoolExecutor(len(CONFIGS) * 2) as pool, contextlib.ExitStack() as stack:
        nets = [Measured(config, "compile", device) for config in CONFIGS]
        for one in nets:
            stack.callback(one.worker.kill)
        compiling = [pool.submit(one.start, "prepare") for one in nets]
        begin = time.monotonic()
        # until all are compiled, or there is just time to measure those that are
        while not all(future.done() for future in compiling):
            ready = sum(future.done() for future in compiling)
            if time.monotonic() > end - MEASURING_S * max(1, ready):
                break
            time.sleep(0.2)
        seconds = time.monotonic() - begin
        for one, future in zip(nets, compiling, strict=True):
            if not future.done():
                one.fail(f"not compiled within {seconds:.0f} s")
        result.save(compiled_in_s=round(seconds, 1))
        for one in nets:
            if "error" in one.row or time.monotonic() > end:
                one.fail(LATE)
                result.add(
                    one.row, finding([*result.values["rows"], one.row], ["compile", *BESIDE_COMPILE[1:]])
                )
                continue
            beside = [Measured(one.config, impl, device) for impl in BESIDE_COMPILE]
            for other in beside:
                stack.callback(other.worker.kill)
            wait([pool.submit(other.start) for other in beside])
            for row in measure([*beside, one]):
                result.add(row, finding([*result.values["rows"], row], ["compile", *BESIDE_COMPILE[1:]]))


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status: 1 where nothing could be measured or an implementation failed."""
    options = results.arguments(__doc__, given, seconds=60.0, compile=False)
    end = time.monotonic() + options.seconds
    result = results.Result(options.json)
    result.save(repeats=REPEATS)
    (compiled if options.compile else eager)(result, options.device, end)
    rows = result.values["rows"]
    measured = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            print(f"{row['config']}, {row['impl']}: {row['error']}")
    broken = [row for row in rows if "error" in row and not row["error"].startswith("not ")]
    if broken or not measured:
        first = (
            broken[0] if broken else {"config": "no net", "impl": "", "error": "nothing was measured in time"}
        )
        return results.fail(f"{first['config']}, {first['impl']}: {first['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
