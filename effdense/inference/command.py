"""The command lines of `effdense evaluate` and `effdense predict`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effdense import extras, files, values
from effdense.inference import labelled, measures, predictions, sources, trained
from effdense.inference.scores import batch_size, scored
from effdense.progress import Progress
from effdense.train import listing
from effdense.train.command import is_out_of_memory
from effdense.train.settings import AMP, DATA

BUDGET = "1GiB"
UNREAD = 1  # the exit status where images were left out


def _add_common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    add(
        "--impl",
        choices=trained.IMPLS,
        default="effdense",
        help="naive: plain PyTorch (effdense); other libraries' models are converted",
    )
    add("--amp", choices=tuple(AMP), help="automatic mixed precision (as the run had it)")
    add(
        "--budget",
        type=values.size,
        default=values.size(BUDGET),
        metavar="SIZE",
        help=f"memory for the model and a batch, beside what PyTorch takes itself: 512MiB, 4GiB ({BUDGET})",
    )
    add("--batch", type=values.count, metavar="N", help="images in a batch (as --budget allows, 256 at most)")
    add("--workers", type=values.whole(1, 1024), default=2, metavar="N", help="threads that read images (2)")
    add(
        "--ignore-unreadable",
        action="store_true",
        help="images that cannot be read are named and left out in any case; with this the exit status is 0 all the same",
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint",
        type=values.path,
        metavar="RUN",
        help="folder of effdense train --out, of which best.pt is taken; or a checkpoint",
    )


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """What `effdense evaluate` takes."""
    _add_checkpoint(command)
    add = command.add_argument
    sets = ", ".join(name for name in DATA if name != "folder")
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help=f"a folder with a folder per class (or with such a folder named val or test); {sets}: their test images; "
        "left out: what the run was tested on",
    )
    add("--data-root", type=values.path, metavar="DIR", help="where a data set is, as for train")
    add(
        "--csv",
        type=values.new_file,
        metavar="FILE",
        help="write the classes' figures and the confusion matrix there",
    )
    add("--json", type=values.new_file, metavar="FILE", help="write all figures there")
    add(
        "--plot",
        type=values.new_file,
        metavar="FILE",
        help="draw confusion matrix and ROC curves there (PNG, PDF, SVG)",
    )
    add(
        "--predictions",
        type=values.new_file,
        metavar="FILE",
        help="write every image's probabilities there, as CSV",
    )
    _add_common(command)
    command.set_defaults(run=run_evaluate)


def add_predict(command: argparse.ArgumentParser) -> None:
    """What `effdense predict` takes."""
    _add_checkpoint(command)
    add = command.add_argument
    add(
        "images",
        nargs="+",
        type=values.path,
        metavar="IMAGE",
        help="image files, and folders with all below them",
    )
    add("--csv", type=values.new_file, metavar="FILE", help="write the table there, not to standard output")
    add(
        "--top",
        type=values.count,
        metavar="K",
        help="only the K likeliest classes of an image, the likeliest first, not the probabilities of all",
    )
    _add_common(command)
    command.set_defaults(run=run_predict)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Evaluates, with the exit status."""
    return _run("evaluate", _evaluate, arguments)


def run_predict(arguments: argparse.Namespace) -> int:
    """Predicts, with the exit status."""
    return _run("predict", _predict, arguments)


def _run(name: str, command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return command(arguments)
    except BrokenPipeError:
        raise
    except (ImportError, OSError, ValueError) as error:
        print(f"effdense {name}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        print(
            f"effdense {name}: there is not enough memory: a smaller --budget or --batch needs less ({reason})",
            file=sys.stderr,
        )
        return 1


class _Work:
    """A model over images: the scores of those that can be read, a word about the others, and how far it is."""

    def __init__(self, arguments: argparse.Namespace, model: trained.Trained, source: sources.Source) -> None:
        self._name = f"effdense {arguments.command}"
        self._model, self._source, self._ignore = model, source, arguments.ignore_unreadable
        self.batch = arguments.batch or batch_size(model, source, arguments.budget)
        self.unread = self.done = 0
        self.progress = Progress(len(source), self._say)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # which is above the bar

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Every image's number and its scores."""
        start = time.monotonic()
        for part in scored(self._model, self._source, self.batch):
            for reason in part.unread:
                self._say(f"{self._name}: {reason}")
            self.unread += len(part.unread)
            self.done += len(part.numbers)
            yield from zip(part.numbers, part.scores, strict=True)
            self._show(time.monotonic() - start)

    def _show(self, seconds: float) -> None:
        done, total = self.done + self.unread, len(self._source)
        rate = f"{done / max(seconds, 1e-9):.1f} images/s"
        self.progress.show("images", done, total, [rate], f"{done} of {total} images, {rate}")

    def status(self) -> int:
        """The exit status, after a line about what was left out."""
        if not self.unread:
            return 0
        self._say(f"{self._name}: {self.unread} of {len(self._source)} images left out")
        return 0 if self._ignore and self.done else UNREAD


def _load(arguments: argparse.Namespace) -> trained.Trained:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.load(arguments.checkpoint, values.device(device), arguments.impl, arguments.amp)
    if arguments.impl == "effdense" and not model.fused:
        print(
            f"effdense {arguments.command}: nothing in model {model.name!r} can be converted, it runs as it is",
            file=sys.stderr,
        )
    return model


def _say_left_out(command: str, left_out: Any) -> None:
    if left_out:
        print(f"effdense {command}: left out: {listing.in_words(left_out)}", file=sys.stderr)


def _evaluate(arguments: argparse.Namespace) -> int:
    measures.sklearn()
    plots = extras.load("effdense.tools.plots", "--plot", "train") if arguments.plot else None
    if plots is not None:
        plots.check_format(arguments.plot)
    model = _load(arguments)
    data = labelled.load(model, arguments.data, arguments.data_root, arguments.workers)
    epoch = f", epoch {model.epoch}" if model.epoch is not None else ""
    print(f"model: {model.name}, {model.path}{epoch}")
    print(
        f"data: {data.where}, {len(data.labels)} images{', of the run' if data.of_the_run else ''}",
        flush=True,
    )
    _say_left_out("evaluate", data.left_out)
    work, numbers, scores = _Work(arguments, model, data.source), [], []
    with contextlib.closing(work.progress):
        for number, found in work:
            numbers.append(number)
            scores.append(found)
    if not numbers:
        raise ValueError("none of the images can be read")
    all_scores, labels = torch.stack(scores), data.labels[numbers]
    if not all_scores.isfinite().all():
        raise ValueError(f"{model.path}: the scores of some images are not finite")
    result = measures.measure(all_scores, labels, model.class_names)
    print()
    for line in measures.lines(result):
        print(line)
    reported = model.reported if data.of_the_run else None
    if reported:
        print(f"\nreported by the run: accuracy {reported.accuracy:.4f}, loss {reported.loss:.4f}")
    if arguments.csv:
        with files.replacing(arguments.csv) as file:
            file.writelines(map(predictions.as_bytes, measures.table(result)))
    if arguments.json:
        about = {"model": model.name, "checkpoint": str(model.path), "epoch": model.epoch, "data": data.where}
        more = {"left out": work.unread, "reported by the run": reported and reported._asdict()}
        files.write_json({**about, **measures.as_dict(result), **more}, arguments.json)
    if arguments.predictions:
        names = model.class_names
        with files.replacing(arguments.predictions) as file:
            file.write(predictions.as_bytes(predictions.header(names, None, labelled=True)))
            for number, label, found in zip(numbers, labels.tolist(), all_scores, strict=True):
                start = [data.source.name(number), names[label]]
                file.write(predictions.as_bytes(predictions.row(start, found, names, None)))
    if plots is not None:
        curves = measures.roc_curves(all_scores, labels, result, len(plots.CURVES))
        rows = [(c.name, c.images, c.precision, c.recall, c.auc) for c in result.classes]
        title = f"{model.path} on {data.where}: accuracy {result.accuracy:.4f}"
        plots.evaluation_picture(rows, result.confusion, curves, title, arguments.plot)
    return work.status()


def _predict(arguments: argparse.Namespace) -> int:
    extras.load("PIL.Image", "effdense predict", "train")
    model = _load(arguments)
    names = model.class_names
    top = None if arguments.top is None else min(arguments.top, len(names))
    paths, left_out = sources.named(arguments.images)
    _say_left_out("predict", left_out)
    work = _Work(arguments, model, sources.Files(paths, model.prepare, arguments.workers))
    with (
        contextlib.closing(work.progress) as progress,
        files.replacing(arguments.csv) if arguments.csv else contextlib.nullcontext() as file,
    ):

        def write(cells: list[str]) -> None:
            if file is None:
                progress.print(predictions.as_text(cells).removesuffix("\n"))
            else:
                file.write(predictions.as_bytes(cells))

        write(predictions.header(names, top))
        for number, found in work:
            write(predictions.row([paths[number]], found, names, top))
    return work.status()
