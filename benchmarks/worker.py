"""One implementation in a process of its own: `Worker` is the parent's end, `main` the process's.

They exchange one JSON object a line. Commands: build, prepare, warm_up, step, finish; whatever goes wrong in the
process comes back as the answer's "error". A worker works only while it answers, so workers can take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, MOMENTUM = 0.01, 0.9


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What is measured; the same for every implementation in a comparison."""

    model: str
    batch: int
    image_size: int
    mode: str = "train"  # or inference
    dtype: str = "float32"  # or bfloat16, float16: autocast, parameters stay float32
    data: str = "synthetic"  # or fashion-mnist: images of the cut, one channel, ten classes
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"  # or cuda, cuda:N
    isa: str | None = None  # the largest instruction set that may be used, of isa.ISAS; None: the machine's


class WorkerError(Exception):
    """The implementation failed; the message is one for the user."""


class Worker:
    """A process that measures one implementation."""

    def __init__(self, impl: str, force_reference: bool = False, isa: str | None = None) -> None:
        from benchmarks.isa import variables
        from benchmarks.models import FORCE_REFERENCE

        environment = {**os.environ, **({FORCE_REFERENCE: "1"} if force_reference else {})}
        environment |= variables(isa) if isa else {}
        self._impl = impl
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._to, self._from = self._process.stdin, self._process.stdout

    def build(self, settings: WorkerConfig) -> dict[str, Any]:
        return self._ask("build", impl=self._impl, settings=dataclasses.asdict(settings))

    def warm_up(self, steps: int) -> dict[str, Any]:
        return self._ask("warm_up", steps=steps)

    def prepare(self) -> dict[str, Any]:
        return self._ask("prepare")

    def step(self) -> dict[str, Any]:
        return self._ask("step")

    def finish(self) -> dict[str, Any]:
        return self._ask("finish")

    def kill(self) -> None:
        """Closes without waiting for the process to end by itself."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()
        self._log.close()

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        try:
            self._to.write(json.dumps({"command": command, **arguments}) + "\n")
            self._to.flush()
            answer = self._from.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerError(self._epitaph(command))
        result = json.loads(answer)
        if "error" in result:
            raise WorkerError(result["error"])
        return result

    def _epitaph(self, command: str) -> str:
        status = self._process.wait()
        if status < 0:
            guess = ", probably out of memory" if status == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-status).name} during {command}{guess}"
        self._log.seek(0)
        last = [line.strip() for line in self._log if line.strip()][-1:]
        return f"ended with status {status} during {command}" + (f": {last[0]}" if last else "")


class _Session:
    """The measured model in its own process."""

    def build(self, impl: str, settings: dict[str, Any]) -> dict[str, Any]:
        import torch

        from benchmarks import devices, isa, measure, models

        wanted = WorkerConfig(**settings)
        if wanted.isa:
            isa.check_active(wanted.isa)
        self._device = devices.find(wanted.device)
        self._device.use()
        if wanted.threads:
            torch.set_num_threads(wanted.threads)
        compiles = models.parse_impl(impl).base == "compile"
        unlimited = isa.limit_compiler(wanted.isa) if wanted.isa and compiles else ""
        real = wanted.data != "synthetic"
        torch.manual_seed(wanted.seed)
        built = models.build(
            wanted.model,
            impl,
            image_channels=1 if real else None,
            num_classes=10 if real else None,
            device=self._device.name,
            dtype=wanted.dtype,
        )
        images, labels = (tensor.to(self._device.name) for tensor in batch_for(wanted, built.model))
        if models.parse_impl(impl).channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        step = _train_step if wanted.mode == "train" else _inference_step
        self._step: Callable[[], float] = step(built.model, images, labels, wanted.dtype)
        self._first_loss: float | None = None
        return {
            "label": built.label + (f", {unlimited}" if unlimited else ""),
            **isa.record(wanted.isa),
            "memory": built.memory,
            "compiled": built.compiled,
            "parameters": sum(p.numel() for p in built.model.parameters()),
            "threads": torch.get_num_threads(),
            "built_rss_bytes": measure.peak_rss_bytes(),
        }

    def warm_up(self, steps: int) -> dict[str, Any]:
        losses = [self._step() for _ in range(steps)]
        return {"first_loss": losses[0]}

    def prepare(self) -> dict[str, Any]:
        """One step in which torch.compile compiles and cuDNN does not try its algorithms: beside others that do the same."""
        import torch

        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False
        try:
            return {"first_loss": self._step()}
        finally:
            torch.backends.cudnn.benchmark = before

    def step(self) -> dict[str, Any]:
        gc.collect()
        return {"ms": self._device.time_step(self._step)}

    def finish(self) -> dict[str, Any]:
        """The process's peak first: it must not contain what the profiler of the counted step needs."""
        import effdense
        from benchmarks import measure

        peak_rss_bytes = measure.peak_rss_bytes()
        effdense.empty_cache()  # the workspace counts
        return {"peak_rss_bytes": peak_rss_bytes, **self._device.count(self._step)}


def batch_for(settings: WorkerConfig, model: Any) -> tuple[Any, Any]:
    """Return images and labels that suit the model."""
    import torch

    from benchmarks import data, nets

    if settings.data == "fashion-mnist":
        images, labels = data.load_cut()
        if settings.batch > len(labels):
            raise ValueError(
                f"batch {settings.batch} is too large: the cut of Fashion-MNIST has {len(labels)} images"
            )
        return data.to_tensors(images[: settings.batch], labels[: settings.batch], settings.image_size)
    stem = next(p for p in model.parameters() if p.dim() > 2)  # its first convolution's weight
    classes = list(model.parameters())[-1].shape[0]  # the classifier's bias, or the last convolution's weight
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, stem.shape[1], *(settings.image_size,) * (stem.dim() - 2))
    noise = torch.randn(shape, generator=generator)
    classes_of = torch.randint(classes, (settings.batch,), generator=generator)
    return nets.load(settings.model, noise), classes_of


def loss_of(outputs: Any, labels: Any) -> Any:
    """Return the cross entropy; of a model that says something of every pixel, that of the averages."""
    import torch

    logits = outputs if outputs.dim() == 2 else outputs.flatten(2).mean(2)
    return torch.nn.functional.cross_entropy(logits, labels)


def _train_step(model: Any, images: Any, labels: Any, dtype: str) -> Callable[[], float]:
    step = training_step(model, images, labels, dtype)
    return lambda: step().item()


def training_step(model: Any, images: Any, labels: Any, dtype: str) -> Callable[[], Any]:
    """Return a step of SGD with momentum, which returns the loss without waiting for it."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == "float16")
    model.train()

    def step() -> Any:
        optimizer.zero_grad(set_to_none=False)  # the gradients stay, as the optimizer's state does
        with _autocast(images, dtype):
            loss = loss_of(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def _inference_step(model: Any, images: Any, labels: Any, dtype: str) -> Callable[[], float]:
    import torch

    model.eval()

    def step() -> float:
        with torch.inference_mode(), _autocast(images, dtype):
            return loss_of(model(images), labels).item()

    return step


def _autocast(images: Any, dtype: str) -> Any:
    import torch

    half = dtype != "float32"
    return torch.autocast(images.device.type, getattr(torch, dtype) if half else None, enabled=half)


def _message(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = lines[0][:400]
    return (
        text if text and isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"
    )


def main() -> None:
    """Answer commands until stdin closes. Stray prints of libraries go to stderr, not into the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = _Session()
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            result = getattr(session, arguments.pop("command"))(**arguments)
        except Exception as error:
            traceback.print_exc()
            result = {"error": _message(error)}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
