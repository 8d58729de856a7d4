"""The training loop: one object with all of a run's state, which is saved as a whole and resumed to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdense.train import checkpoint, config, header, images, limits, net, results
from effdense.train.batches import Batches, draw
from effdense.train.display import Display
from effdense.train.evaluation import evaluate
from effdense.train.folder import BEST, LAST
from effdense.train.images import Images
from effdense.train.interrupt import Interrupt, Stopped
from effdense.train.learner import Learner
from effdense.train.metrics import Metrics, Row, Sums, peak_bytes
from effdense.train.processes import Processes
from effdense.train.settings import UNSAID, RunConfig
from effdense.train.split import split


class Training:
    """A run: `Training(settings, processes).run()`.

    Raises:
        ImportError: the data set needs a library that is missing.
        OSError: a file cannot be read or written.
        ValueError: the settings make no sense, the data or the checkpoint are damaged.
    """

    _metrics: Metrics  # these two are the first process's
    _display: Display
    _interrupt: Interrupt
    _started: float
    _saved_at: float

    def __init__(self, settings: RunConfig, processes: Processes) -> None:
        self.settings, self.processes, recipe = settings, processes, settings.recipe
        here = settings.resume and processes.first
        saved = processes.from_first(checkpoint.load_latest(settings.out) if here else None)
        for turn in (True, False):  # the first process of a machine may have to fetch them
            if processes.first_here == turn:
                self.data = images.load(settings)
                torch.manual_seed(settings.seed)
                published = net.fetch(settings, self.data.channels)
            processes.sum([0.0])
        self.parts = split(settings, self.data)
        self.count = len(self.parts.train.labels)
        limits.check_sizes(settings, processes, self.count, self.data.channels)
        # In an epoch. The images that are left over are others in every epoch.
        self.steps = self.count // recipe.batch_size

        torch.manual_seed(settings.seed)
        self.model, self.options = net.build(settings, self.data.class_names, self.data.channels, published)
        self.model.to(processes.device)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._learner = Learner(settings, self.model, self.parts.train.labels, self.data.classes)
        torch.manual_seed(settings.seed + processes.rank)  # dropout is every process's own
        random.seed(settings.seed + processes.rank)

        self.epoch = self.step_in_epoch = self.step = 0  # done
        self.best, self.stale = -1.0, 0  # accuracy, and epochs in a row that were not the best
        self.tested: dict[str, Any] | None = None  # what the test at the end has come to, if there is one
        self.in_epoch, self.in_row = Sums(), Sums()
        self.seconds = 0.0  # of former parts of the run
        self._metrics_size = 0
        self._fixed = self._what_is_fixed()
        if saved is not None:
            self._restore(*saved)
        self._saved_step = self.step
        self._wrapped: Any = processes.wrap(self.model, settings.sync_bn)
        self._run: Any = torch.compile(self._wrapped) if settings.compile else self._wrapped
        like = next(self.model.parameters())
        self._prepare = dataclasses.replace(self.data.prepare, channels=net.input_channels(self.model))
        self._batches = Batches(self._prepare, like, settings.channels_last)

    # --- state

    def _sizes(self) -> dict[str, int]:
        return {
            "training images": self.count,
            "classes": self.data.classes,
            "processes": self.processes.count,
        }

    def _what_is_fixed(self) -> dict[str, Any]:
        """What must be the same where the run goes on."""
        return self.settings.fixed() | self._sizes() | self.data.fixed(self.settings.data_root)

    def _state(self) -> dict[str, Any]:
        cuda = self.processes.device.type == "cuda"
        chance = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state(self.processes.device) if cuda else None,
        }
        return {
            "model": self.settings.model,
            "options": self.options,
            "class_names": self.data.class_names,
            "in_channels": self._prepare.channels,
            "preparation": dataclasses.asdict(self._prepare),
            "recipe": {"name": self.settings.recipe_name, **dataclasses.asdict(self.settings.recipe)},
            "settings": self._fixed,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "tested": self.tested,
            "in_epoch": dataclasses.asdict(self.in_epoch),
            "in_row": dataclasses.asdict(self.in_row),
            "seconds": self._seconds(),
            "random": self.processes.gather(chance),
            **self._learner.state(),
        }

    def _restore(self, path: Path, saved: dict[str, Any]) -> None:
        before, epochs = UNSAID | saved["settings"], self.settings.recipe.epochs
        free = ["data root", *(["epochs"] if self.settings.epochs_given else [])]
        if before.get("data root") == self._fixed["data root"]:  # images there may be repaired
            free += ["file sizes", "test data"]
        named = {"class names": saved["class_names"], **before}  # earlier versions have them there only
        checkpoint.check_same(path, named, self._fixed, free)
        if before["epochs"] != epochs and self.processes.first:
            print(
                f"effdense train: --epochs was {before['epochs']} and is {epochs}, which the learning rate follows from now on",
                file=sys.stderr,
            )
        self._learner.restore(saved, path)
        for name in ("epoch", "step_in_epoch", "step", "best", "seconds", "stale", "tested"):
            setattr(self, name, saved[name])
        self.in_epoch, self.in_row = Sums(**saved["in_epoch"]), Sums(**saved["in_row"])
        self._metrics_size = saved["metrics_size"]
        with checkpoint.reading(path, "random"):
            chance = saved["random"][self.processes.rank]
            torch.set_rng_state(chance["torch"])
            random.setstate(chance["python"])
            if chance["cuda"] is not None and self.processes.device.type == "cuda":
                torch.cuda.set_rng_state(chance["cuda"], self.processes.device)

    def _save(self, *names: str) -> None:
        if not self._learner.is_finite():  # the loss is seen a step later
            what = "weights or running statistics are not finite after step"
            raise FloatingPointError(self._diverged(what, self.step))
        state = self._state()
        if self.processes.first:
            state["metrics_size"] = self._metrics.size()
            for name in names:
                checkpoint.save(state, self.settings.out / name)
        self._saved_at, self._saved_step = time.monotonic(), self.step

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._started

    # --- training

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Stopped: the user asked for an end, everything is saved.
            FloatingPointError: the loss is not finite.
        """
        self._started = self._saved_at = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._interrupt = stack.enter_context(Interrupt())
            if self.processes.first:
                self._metrics = stack.enter_context(
                    contextlib.closing(Metrics(self.settings.out, self._metrics_size, self.step))
                )
                self._display = stack.enter_context(
                    contextlib.closing(Display(self.settings.recipe, self.steps, self.parts.watched_name))
                )
                self._begin()
            try:
                while not self._is_over():
                    self._train_epoch()
                    self._finish_epoch()
                if self._has_to_test():
                    self._test_at_the_end()
            except ValueError:  # an image that cannot be read, before anything has come of it
                if self.processes.count == 1 and self.step > self._saved_step:
                    self._save(LAST)
                raise

    def _is_over(self) -> bool:
        recipe = self.settings.recipe
        stale = recipe.early_stop is not None and self.stale >= recipe.early_stop
        return self.epoch >= recipe.epochs or stale

    def _has_to_test(self) -> bool:
        """Whether the test at the end is still to come, once the run is over."""
        return self.parts.watched_name == "val" and self.tested is None

    def _begin(self) -> None:
        config.write(self.settings.out, self.settings)
        if not self._is_over():
            about = (self.data, self.parts, self.steps, self.model, self.processes.device)
            for line in header.lines(self.settings, *about):
                self._display.say(line)
            if self.step:
                self._display.say(f"going on after step {self.step}, in epoch {self.epoch + 1}")
        else:
            best = f"best {self.parts.watched_name} accuracy {self.best:.4f}"
            left = "the test is left" if self._has_to_test() else "nothing to do"
            self._display.say(f"epoch {self.epoch} was the last: {left}; {best}")
            self._write_results()

    def _train_epoch(self) -> None:
        self.tested = None
        self._run.train()
        if self.settings.freeze_features:
            features: Any = self.model.features
            features.eval()  # statistics stay, too
        parts = self._parts()
        while self.step_in_epoch < self.steps:
            stop, save = self._train_step(parts)
            if stop:
                self._save(LAST)
                raise Stopped(
                    f"after step {self.step}, in epoch {self.epoch + 1}; --resume goes on from there"
                )
            if save:
                self._save(LAST)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the epoch, for this process: `accumulate` parts for a step."""
        recipe = self.settings.recipe
        draws = draw(self.count, recipe.augment, self.settings.seed, self.epoch)
        steps = draws.order[: self.steps * recipe.batch_size].view(self.steps, self.settings.accumulate, -1)
        own = [self.processes.share(part) for step in steps[self.step_in_epoch :] for part in step]
        return self._batches.each(self.parts.train, own, draws)

    def _train_step(self, parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[bool, bool]:
        """One step of the optimizer; whether the run is to be stopped, or to be saved.

        All processes learn of loss, accuracy and these two in one exchange, before the weights move.
        """
        start, settings = time.monotonic(), self.settings
        self._learner.lr = settings.recipe.lr_at(self.step, self.steps)
        self._learner.optimizer.zero_grad(set_to_none=True)
        loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        batch = [next(parts) for _ in range(settings.accumulate)]
        for i, (x, labels) in enumerate(batch, 1):
            last = i == settings.accumulate
            alone = contextlib.nullcontext() if last or self.processes.count == 1 else self._wrapped.no_sync()
            with alone:
                loss, hits = self._loss(self._run, x, labels)
                self._learner.backward(loss / settings.accumulate)
            loss_sum += loss.detach() * len(labels)
            correct += hits
        total, hit, stop, save = self.processes.sum(
            [loss_sum, correct, float(self._interrupt.asked), float(self._save_is_due())]
        )
        count = settings.recipe.batch_size
        if not math.isfinite(total):
            raise FloatingPointError(self._diverged(f"the loss is {total / count} at step", self.step + 1))
        self._learner.step()
        self.step += 1
        self.step_in_epoch += 1
        for sums in (self.in_epoch, self.in_row):
            sums.add(total, hit, count, time.monotonic() - start)
        if self.processes.first:
            self._report()
        return stop > 0, save > 0

    def _save_is_due(self) -> bool:
        """Whether this process would save behind the present step."""
        every, late = self.settings.save_steps, time.monotonic() - self._saved_at > self.settings.save_seconds
        return late or (every is not None and (self.step + 1) % every == 0)

    def _loss(self, model: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._learner.loss(model, x, labels)

    def _diverged(self, what: str, step: int) -> str:
        last = f"{self.settings.out / LAST} (step {self._saved_step})"
        good = (
            f"the last good checkpoint is {last}"
            if self._saved_step
            else "no checkpoint has been written yet"
        )
        return f"{what} {step}; {good}"

    def _report(self) -> None:
        row = self._row("step", self.in_row)
        self._display.show(row, self.step_in_epoch)
        if self.step % self.settings.log_every == 0:
            self._metrics.write(row)
            self.in_row = Sums()

    def _row(self, split: str, sums: Sums) -> Row:
        return Row(
            epoch=self.epoch + 1,
            step=self.step,
            split=split,
            loss=sums.loss / sums.images,
            accuracy=sums.correct / sums.images,
            lr=self._learner.lr,
            images_per_second=sums.images / sums.seconds,
            peak_bytes=peak_bytes(self.processes.device),
            seconds=self._seconds(),
        )

    def _finish_epoch(self) -> None:
        """Tests, reports and saves."""
        name = self.parts.watched_name
        tested = self._test(self.parts.watched, name)
        if tested is None:
            self._save(LAST)
            raise Stopped(f"in the test of epoch {self.epoch + 1}; --resume goes on with that test")
        if not math.isfinite(tested.loss):
            what = f"the {name} loss is {tested.loss / tested.images} after step"
            raise FloatingPointError(self._diverged(what, self.step))
        better = tested.correct / tested.images > self.best
        peak = max(self.processes.gather(peak_bytes(self.processes.device)))
        if self.processes.first:
            train, test = (
                self._row(split, sums)._replace(peak_bytes=peak)
                for split, sums in (("train", self.in_epoch), (name, tested))
            )
            self._metrics.write(train)
            self._metrics.write(test)
            self._display.line(train, test)
        self.best = max(self.best, tested.correct / tested.images)
        self.stale = 0 if better else self.stale + 1
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.in_epoch, self.in_row = Sums(), Sums()  # no line is of two epochs
        self._save(*([BEST] if better else []), LAST)  # killed in between, the epoch's end comes again
        if self.processes.first:
            self._write_results()

    def _test_at_the_end(self) -> None:
        """Tests the weights of the best epoch, once, on the images that have decided about nothing."""
        first, model = self.processes.first, self._learner.tested
        best = self.processes.from_first(checkpoint.load_epoch(self.settings.out / BEST) if first else None)
        last = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with checkpoint.reading(self.settings.out / BEST, "state_dict"):
            checkpoint.check_tensors(best["state_dict"], last)
        model.load_state_dict(best["state_dict"])
        try:
            tested = self._test(self.data.test, "test")
        finally:
            model.load_state_dict(last)
        if tested is None:
            self._save(LAST)
            raise Stopped("in the test at the end; --resume goes on with that test")
        loss, accuracy = tested.loss / tested.images, tested.correct / tested.images
        self.tested = {"epoch": best["epoch"], "loss": loss, "accuracy": accuracy}
        if first:
            row = self._row("test", tested)
            self._metrics.write(row._replace(epoch=best["epoch"], step=best["step"]))
            self._display.say(
                f"test of epoch {best['epoch']}, the best: loss {loss:.4f}, accuracy {accuracy:.4f}"
            )
        self._save(LAST)
        if first:
            self._write_results()

    def _write_results(self) -> None:
        sizes, name = self._sizes(), self.parts.watched_name
        if name == "val":
            sizes["validation images"] = len(self.parts.watched.labels)
        sizes["test images"] = len(self.data.test.labels)
        sizes["parameters"] = sum(p.numel() for p in self.model.parameters())
        results.write(self.settings.out, self.settings, sizes, self.processes.device, name)

    def _test(self, images: Images, name: str) -> Sums | None:
        """Of all of these images, which the processes share; None: the user has asked for an end."""

        def look(done: int, batches: int) -> bool:
            stop = self._all_stop()
            if self.processes.first and not stop:
                self._display.show_test(self.epoch + (not self._is_over()), done, batches, name)
            return stop

        model = self._learner.tested
        self.processes.same_buffers(self.model)
        size = max(1, self.settings.recipe.batch_size // (self.settings.accumulate * self.processes.count))
        return evaluate(model, self._loss, images, self._batches, size, self.processes, look)

    def _all_stop(self) -> bool:
        """Whether one of the processes has been asked to stop."""
        if self.processes.count == 1:
            return self._interrupt.asked
        return self.processes.sum([float(self._interrupt.asked)])[0] > 0
