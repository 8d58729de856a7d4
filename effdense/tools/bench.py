"""Is it faster here? Times and counts a step of a model on this machine, as it is, checkpointed and with effdense."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effdense import machine, models
from effdense.conversion import convert
from effdense.conversion.class_swap import is_fused_kind
from effdense.engine.workspace import empty_cache
from effdense.models.densenet import IMAGENET
from effdense.models.names import without_memory
from effdense.nn.kinds import CONVS
from effdense.nn.plain import run_plain
from effdense.ops import reference
from effdense.ops.dispatch import operators
from effdense.ops.extension import build_info
from effdense.tools import measure
from effdense.tools.planner import plan

MOST_ROUNDS, WANTED_ROUNDS = 25, 3
COUNTED = 1.5  # a step under the profiler takes so many times as long, at most
MOST_THREADS = 1024
TRAIN, INFERENCE = ("naive", "checkpoint", "balanced", "minimal"), ("naive", "effdense")


class Settings(NamedTuple):
    """What is measured. Batch and image size: None for the model's usual ones, the batch smaller where the time asks for it."""

    model: str
    batch: int | None = None
    image_size: int | None = None
    train: bool = True
    threads: int | None = None
    device: torch.device = torch.device("cpu")
    seconds: int = 60


class Result(NamedTuple):
    """What was found; rows as dicts, naive's first."""

    settings: Settings
    rows: list[dict[str, Any]]
    rounds: int
    seconds: float
    notes: list[str]
    environment: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as benchmarks/compare.py writes it."""
        settings = {**self.settings._asdict(), "device": str(self.settings.device)}
        measured = {"rounds": self.rounds, "measured_seconds": round(self.seconds, 1), "notes": self.notes}
        return {
            "environment": self.environment,
            "settings": settings,
            **measured,
            "rows": self.rows,
            "answer": self.answer(),
        }

    def _machine(self) -> str:
        on = self.settings.device
        gpu = f"{torch.cuda.get_device_name(on)}, " if on.type == "cuda" else ""
        threads = self.environment["threads"]
        return f"{gpu}{self.environment['cpu']}, {threads} thread{'s' * (threads > 1)}"

    def _what(self) -> str:
        s = self.settings
        step = "a training step" if s.train else "inference"
        images = f"{s.batch} image{'s' * (s.batch != 1)} of {s.image_size}x{s.image_size}"
        return f"{step} of {s.model} with {images}"

    def _best(self) -> dict[str, Any]:
        """effdense's faster way."""
        return min(self.rows[1:], key=lambda row: (row["impl"] == "checkpoint", row["ratio_median"]))

    def answer(self) -> str:
        """One sentence: what of plain PyTorch's time and memory it takes here."""
        best = self._best()
        name = "" if best["impl"] == "effdense" else f' (memory="{best["impl"]}")'
        memory = best["peak_bytes"] / max(1, self.rows[0]["peak_bytes"])
        low, high = best["ratio_p20"], best["ratio_p80"]
        unsure = ", which is no difference beyond the noise," if low < 1 < high else ""
        return (
            f"On this machine ({self._machine()}) {self._what()} takes {best['ratio_median']:.2f} of plain PyTorch's time"
            f"{unsure} and {memory:.2f} of its memory{name}."
        )

    def __str__(self) -> str:
        lines = [f"{self._what()}, float32, on {self._machine()}", ""]
        lines.append(
            f"{'':<12}{'ms/step':>10}{'20 to 80 %':>18}{'of naive':>10}{'peak MiB':>11}{'of naive':>10}"
        )
        for row in self.rows:
            spread = f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}"
            memory = row["peak_bytes"] / max(1, self.rows[0]["peak_bytes"])
            lines.append(
                f"{row['impl']:<12}{row['median_ms']:>10.1f}{spread:>18}{row['ratio_median']:>10.2f}"
                f"{row['peak_bytes'] / 2**20:>11.1f}{memory:>10.2f}"
            )
        best, rounds = self._best(), f"{self.rounds} round{'s' * (self.rounds != 1)}"
        noise = f"in the middle 60 % of them {best['impl']} took {best['ratio_p20']:.2f} to {best['ratio_p80']:.2f} of naive's time"
        lines += ["", f"Medians of {rounds} in turn, {self.seconds:.0f} s in all; {noise}."]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes), "", self.answer()])


def usual_sizes(name: str) -> tuple[int, int]:
    """Batch and image size of a model where nobody says them."""
    if name == "densenet_d2l":
        return 32, 96
    return (8, 224) if name in IMAGENET or name == "densenet169_tutorial" or ":" in name else (64, 32)


class _Step:
    """A step of one implementation, on weights of its own."""

    def __init__(self, impl: str, model: nn.Module, images: Tensor, train: bool) -> None:
        self.impl, self._model, self._images = impl, model.train(train), images
        self._labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) if train else None

    def __call__(self) -> float:
        if self._optimizer is None:
            with torch.inference_mode():
                return self._loss().item()
        self._optimizer.zero_grad(set_to_none=False)  # the gradients stay, as the optimizer's state does
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def _loss(self) -> Tensor:
        outputs = [y for y in tree_leaves(self._model(self._images)) if isinstance(y, Tensor)]
        if len(outputs) == 1 and outputs[0].dim() == 2:
            return F.cross_entropy(outputs[0], self._labels)
        return torch.stack([y.float().square().mean() for y in outputs]).sum()

    def milliseconds(self) -> float:
        """Of a step that begins with an idle device."""
        gc.collect()
        if self._images.is_cuda:
            torch.cuda.synchronize(self._images.device)
            return measure.cuda_milliseconds(self)
        start = time.perf_counter()
        self()
        return 1e3 * (time.perf_counter() - start)

    def peak_bytes(self) -> int:
        """Of a counted step, above the model, its gradients and the optimizer's state."""
        empty_cache()  # the workspace counts
        if self._images.is_cuda:
            return measure.cuda_peaks(self, self._images.device)["peak_bytes"]
        return measure.peak_bytes(self)


def _implementations(settings: Settings) -> dict[str, nn.Module]:
    """The same model by implementation, with the same weights, on the CPU."""
    torch.manual_seed(0)
    library = ":" in settings.model
    naive = models.build(settings.model)
    nets: dict[str, nn.Module] = {}
    for impl in TRAIN if settings.train else INFERENCE:
        net = copy.deepcopy(naive)
        if impl == "checkpoint" and library:
            try:
                net = models.build(settings.model, memory_efficient=True)
            except TypeError:  # the library has no such option for it
                continue
            net.load_state_dict(naive.state_dict())
        elif impl in ("naive", "checkpoint"):
            if not library:
                run_plain(net, checkpointed=impl == "checkpoint")
        else:
            convert(net, memory="minimal" if impl == "minimal" else "balanced")
            if not any(is_fused_kind(module) for module in net.modules()):
                raise ValueError(
                    f"nothing in model {settings.model!r} can be converted, so nothing can be compared"
                )
        nets[impl] = net
    return nets


def _images(settings: Settings, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch or 1, channels, settings.image_size or 1, settings.image_size or 1)
    return torch.randn(shape, generator=generator).to(settings.device)


def _check_memory(settings: Settings, shape: tuple[int, ...]) -> None:
    """Refuses what plain PyTorch cannot do in the memory that there is."""
    cuda = settings.device.type == "cuda"
    free = torch.cuda.mem_get_info(settings.device)[0] if cuda else machine.available_bytes()
    needed = (
        plan(without_memory(settings.model), shape, memory="naive").everything
        if settings.train
        else 4 * math.prod(shape)
    )
    if needed > free:
        raise ValueError(
            f"plain PyTorch needs about {needed / 2**30:.1f} GiB for a step with {shape[0]} images of {shape[2]}x{shape[3]}, and "
            f"{free / 2**30:.1f} GiB are free here; take a smaller --batch, or effdense plan, which runs nothing"
        )


def _channels(model: nn.Module, name: str) -> int:
    conv = next((m for m in model.modules() if isinstance(m, CONVS)), None)
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(
            f"model {name!r} is not one of images: its first convolution is {type(conv).__name__}"
        )
    return conv.in_channels


def _smaller(batch: int, first_ms: float, count: int, left: float) -> int:
    """The batch of which every implementation's first step, counted step and wanted rounds fit into the time that is left."""
    share = left / (first_ms / 1e3 * (count * (1 + COUNTED + WANTED_ROUNDS)))
    return batch if share >= 1 else max(1, 2 ** math.floor(math.log2(max(1.0, batch * share))))


def _notes_on(environment: dict[str, Any], device: torch.device) -> list[str]:
    notes = []
    if operators(torch.empty(0, device=device)) is reference:
        reason = build_info().get("reason") or f"there are no compiled operators for {device}"
        notes.append(
            f"effdense runs on plain PyTorch here, slower and with more memory than its compiled operators, because {reason}."
        )
    if environment["load_average"] > 0.25 * environment["cores"]:
        notes.append(
            f"other programs were running (load {environment['load_average']:.1f} with {environment['cores']} cores); times are "
            "better taken on an idle machine."
        )
    return notes


def run(settings: Settings, on_progress: Callable[[str], None] = lambda what: None) -> Result:
    """Measures in about `settings.seconds`: one round at least, the implementations in turn.

    Raises:
        ImportError: the model's library is not installed.
        ValueError: there is no such model, it is not one of images, nothing of it can be converted, or plain PyTorch needs
            more memory for it than there is.
    """
    start, before = time.perf_counter(), torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return _measured(settings, start, on_progress)
    finally:
        torch.set_num_threads(before)


def _measured(settings: Settings, start: float, on_progress: Callable[[str], None]) -> Result:
    batch, size = usual_sizes(settings.model)
    given = settings.batch is not None
    settings = settings._replace(batch=settings.batch or batch, image_size=settings.image_size or size)
    left = lambda: settings.seconds - (time.perf_counter() - start)  # noqa: E731
    on_progress(f"building {settings.model} …")
    channels = _channels(without_memory(settings.model), settings.model)
    _check_memory(settings, (settings.batch or batch, channels, size := settings.image_size or size, size))
    environment = machine.environment(settings.threads, build_info())
    notes = _notes_on(environment, settings.device)
    nets = {impl: net.to(settings.device) for impl, net in _implementations(settings).items()}
    steps: list[Any] = []
    losses: list[Any] = []
    for impl, net in nets.items():
        on_progress(f"{impl}: first step …")
        if not steps and not given:  # on plain PyTorch's word
            step = _Step(impl, copy.deepcopy(net), _images(settings, channels), settings.train)
            fitting = _smaller(batch, step.milliseconds(), len(nets), left())
            if fitting < batch:  # the first step of a process takes longer
                fitting = _smaller(batch, step.milliseconds(), len(nets), left())
            del step
            if fitting < batch:
                notes.append(
                    f"{fitting} image{'s' * (fitting != 1)} instead of {batch}, so that it ends in {settings.seconds} s; --batch says how many."
                )
            settings = settings._replace(batch=fitting)
        steps.append(_Step(impl, net, _images(settings, channels), settings.train))
        losses.append(steps[-1]())
    for step, loss in zip(steps, losses, strict=True):
        if not abs(loss - losses[0]) <= 1e-3 * abs(losses[0]):
            notes.append(
                f"{step.impl}'s first loss is {loss:.6g}, naive's is {losses[0]:.6g}: it computes something else."
            )
    rows = _in_turn(steps, left, on_progress)
    rounds = len(rows[0]["times_ms"])
    if rounds < WANTED_ROUNDS:
        notes.append(
            f"{rounds} round{'s' * (rounds != 1)} fitted into {settings.seconds} s: too few to say how noisy it is."
        )
    return Result(settings, rows, rounds, time.perf_counter() - start, notes, environment)


def _in_turn(
    steps: list[_Step], left: Callable[[], float], on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Counts a step of each, then times them one after the other for as long as there is time."""
    peaks = []
    for step in steps:
        on_progress(f"{step.impl}: counting bytes …")
        peaks.append(step.peak_bytes())
    times: list[list[float]] = [[] for _ in steps]
    longest = 0.0
    while not times[0] or (len(times[0]) < MOST_ROUNDS and left() > longest):
        begin = left()
        for step, own in zip(steps, times, strict=True):
            on_progress(f"round {len(own) + 1}: {step.impl} …")
            own.append(step.milliseconds())
        longest = max(longest, begin - left())
    rows = []
    for step, own, peak in zip(steps, times, peaks, strict=True):
        ratios = measure.time_statistics([mine / naive for mine, naive in zip(own, times[0], strict=True)])
        of_naive = {f"ratio_{key.removesuffix('_ms')}": value for key, value in ratios.items()}
        rows.append(
            {
                "impl": step.impl,
                **measure.time_statistics(own),
                **of_naive,
                "peak_bytes": peak,
                "times_ms": own,
            }
        )
    return rows
