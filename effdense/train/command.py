"""The command line of `effdense train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effdense import values
from effdense.train import config
from effdense.train.settings import (
    AMP,
    AUGMENTATIONS,
    DATA,
    DROP_RATE,
    IMPLS,
    OPTIMIZERS,
    RECIPES,
    SCHEDULES,
    Recipe,
    RunConfig,
)

STOPPED = 130  # a shell's status for Ctrl-C


def _size(text: str) -> int | None:
    return None if text == "none" else values.side(text)


def _drops(text: str) -> tuple[float, ...]:
    drops = tuple(values.number(part) for part in text.split(",") if part)
    if any(part >= 1 for part in drops):
        raise argparse.ArgumentTypeError(
            f"parts of the run between 0 and 1 were expected, such as 0.5,0.75, got {text!r}"
        )
    return drops


def _below_one(text: str) -> float:
    value = values.number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"a number of 0 or more and below 1 was expected, got {text!r}")
    return value


def _norm(text: str) -> float | None:
    if text == "none":
        return None
    value = values.number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"a number above 0 or none was expected, got {text!r}")
    return value


def _count(text: str) -> int | None:
    return None if text == "none" else values.count(text)


def _class_weights(text: str) -> str | tuple[float, ...] | None:
    if text in ("balanced", "none"):
        return None if text == "none" else text
    return tuple(values.number(part) for part in text.split(","))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `effdense train` takes."""
    add = command.add_argument

    def switch(name: str, help: str) -> None:
        add(name, action=argparse.BooleanOptionalAction, default=False, help=help)

    add(
        "--config",
        type=values.path,
        metavar="FILE",
        help="TOML with any of these options, which the command line overrides; a run's settings.toml is one",
    )
    add(
        "--model",
        required=True,
        help="densenet121, 161, 169, 201, 264; densenet_bc_DEPTH_GROWTH, densenet_DEPTH_GROWTH; densenet_d2l; "
        "densenet169_tutorial; torchvision:NAME, timm:NAME, which are converted",
    )
    add(
        "--data",
        required=True,
        choices=DATA,
        help="folder: your images, in DIR/train and DIR/val (or test), a folder per class",
    )
    add(
        "--data-root", type=values.path, metavar="DIR", help="where the data are, or are downloaded to (data)"
    )
    add(
        "--channels",
        type=int,
        choices=(1, 3),
        help="with which a folder's images are read: 1 is grey (3, grey ones repeated)",
    )
    add("--out", required=True, type=values.new_path, metavar="DIR", help="for checkpoints and metrics")
    add(
        "--impl",
        choices=IMPLS,
        default="effdense",
        help="naive: plain PyTorch; checkpoint: checkpointed (effdense)",
    )
    add(
        "--memory",
        choices=("balanced", "minimal"),
        default="balanced",
        help="minimal: less, a little slower (balanced)",
    )
    add(
        "--weights",
        type=values.path,
        metavar="FILE",
        help="begin with these (of torch.save); the classifier is new",
    )
    switch(
        "--keep-classifier", "with --weights: their classifier, too, for the same classes in the same order"
    )
    switch("--pretrained", "begin with the weights that the model's library has published (ImageNet)")
    switch("--freeze-features", "train the classifier alone; statistics stay, too")
    add(
        "--limit-train",
        type=values.count,
        metavar="N",
        help="train on the first N images; the test stays whole",
    )
    add("--accumulate", type=values.count, default=1, metavar="N", help="compute each batch in N parts (1)")
    add("--amp", choices=tuple(AMP), default="off", help="automatic mixed precision (off)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of weights and images (float32)")
    switch("--compile", "run the model through torch.compile")
    switch("--channels-last", "keep weights and images in that layout")
    switch("--sync-bn", "batch norm over the images of all processes")
    add(
        "--seed",
        type=values.whole(0, 2**32 - 1),
        default=0,
        help="of weights, order, augmentation and dropout (0)",
    )
    add("--device", default=None, help="cpu, cuda or cuda:N (cuda where there is one)")
    add(
        "--workers",
        type=values.whole(1, 1024),
        default=2,
        metavar="N",
        help="threads per process that read a folder's images (2)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from DIR/last.pt, with the same settings; to more --epochs, if they are given",
    )
    add("--save-steps", type=values.count, metavar="N", help="also save every N steps")
    add(
        "--save-seconds",
        type=values.number,
        default=600.0,
        metavar="S",
        help="also save every S seconds (600)",
    )
    add(
        "--log-every",
        type=values.count,
        default=50,
        metavar="N",
        help="steps between lines of metrics.csv (50)",
    )
    recipe = command.add_argument_group("the recipe, and its values, each of which can be set")
    told = "; ".join(
        f"{name}: {r.epochs} epochs, {r.optimizer}, batch {r.batch_size}, lr {r.lr}"
        for name, r in RECIPES.items()
    )
    recipe.add_argument("--recipe", choices=tuple(RECIPES), default="cifar", help=f"{told} (cifar)")

    def value(name: str, help: str, **form: Any) -> None:
        recipe.add_argument(name, default=argparse.SUPPRESS, help=help, **form)

    value("--epochs", "passes over the training images", type=values.count, metavar="N")
    value(
        "--batch-size",
        "images per optimizer step, over all processes and parts",
        type=values.count,
        metavar="N",
    )
    value("--optimizer", "stochastic gradient descent, Adam or AdamW", choices=OPTIMIZERS)
    value("--lr", "learning rate, before it drops or falls", type=values.number)
    value("--momentum", "of sgd", type=values.number)
    value("--nesterov", "Nesterov's momentum", action=argparse.BooleanOptionalAction)
    value(
        "--weight-decay", "factor of the L2 penalty; of adamw, of the weights themselves", type=values.number
    )
    value("--schedule", "of the learning rate: drops, or cosine down to 0", choices=SCHEDULES)
    value(
        "--warmup-epochs",
        "in which the learning rate rises from 0 in a line",
        type=values.number,
        metavar="N",
    )
    value("--drops", "fractions of the run after which the learning rate drops: 0.5,0.75", type=_drops)
    value("--drop-factor", "factor of each drop (0.1)", type=values.number)
    value(
        "--augment",
        "crop-flip: a border of 4, a random crop, half mirrored; resized-crop: 8 to 100%% of the area, resized, half mirrored",
        choices=AUGMENTATIONS,
    )
    value("--drop-rate", "dropout (0; cifar with --augment none: 0.2)", type=values.number)
    value("--resize", "resize images to NxN; none: leave them", type=_size, metavar="N")
    value("--pad", "pad images with zeros to NxN, before all else; none: do not", type=_size, metavar="N")
    value("--label-smoothing", "part of a label that is spread over all classes", type=_below_one)
    value(
        "--class-weights",
        "balanced (as often as they are rare), or one for each: 1,2.5; none",
        type=_class_weights,
    )
    value("--clip-norm", "the largest norm of all gradients together; none: any", type=_norm)
    value(
        "--ema-decay",
        "an exponential moving average of weights and statistics is tested and kept; its factor a step, 0: none",
        type=_below_one,
    )
    value(
        "--mixup", "mix pairs of images: torchvision's MixUp with this alpha; 0: do not", type=values.number
    )
    value(
        "--val-split",
        "set this part of every class's training images aside to pick the best epoch; the test then comes once, at the end",
        type=_below_one,
        metavar="PART",
    )
    value(
        "--early-stop",
        "end after N epochs in a row that were not the best; none: do not",
        type=_count,
        metavar="N",
    )


def with_config(words: Sequence[str]) -> Sequence[str]:
    """A command line with what its `--config` stands for, if it is one of `effdense train`."""
    if list(words[:1]) != ["train"]:
        return words
    command = argparse.ArgumentParser(prog="effdense train")
    add_arguments(command)
    return ["train", *config.expanded(command, words[1:])]


def read_settings(arguments: argparse.Namespace) -> RunConfig:
    """The run that a command line describes."""
    given = dict(vars(arguments))
    name = given["recipe"]
    changed = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    recipe = dataclasses.replace(RECIPES[name], **changed)
    if recipe.augment == "none" and "drop_rate" not in given:
        recipe = dataclasses.replace(recipe, drop_rate=DROP_RATE.get(name, recipe.drop_rate))
    if given["keep_classifier"] and given["weights"] is None:
        raise ValueError("--keep-classifier needs --weights, whose classifier it keeps")
    if given["pretrained"] and given["weights"] is not None:
        raise ValueError("--pretrained and --weights exclude each other: each is what the model begins with")
    if given["data"] == "folder" and given["data_root"] is not None:
        _check_outside(given["out"], given["data_root"])
    if recipe.nesterov and not recipe.momentum:
        raise ValueError("--nesterov needs --momentum above 0")
    if recipe.warmup_epochs >= recipe.epochs and recipe.warmup_epochs:
        if "warmup_epochs" in given:
            raise ValueError(
                f"--warmup-epochs {recipe.warmup_epochs:g} must be less than --epochs {recipe.epochs}"
            )
        recipe = dataclasses.replace(recipe, warmup_epochs=recipe.epochs / 2)
    if given["device"] is None:
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    others = {f.name: given[f.name] for f in dataclasses.fields(RunConfig) if f.name in given}
    return RunConfig(**(others | {"recipe_name": name, "recipe": recipe, "epochs_given": "epochs" in given}))


def _check_outside(out: Path, root: Path) -> None:
    """Refuses to put a run among the folders of the classes, of which it would become one."""
    for part in (root / name for name in ("train", "val", "test")):
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(part)):
            raise ValueError(
                f"--out {out} is in {part}, where every folder is a class: name one outside of it"
            )


def _train(settings: RunConfig) -> None:
    from effdense.train import folder
    from effdense.train.loop import Training
    from effdense.train.processes import Processes

    processes = Processes(settings.device)
    try:
        with folder.held(settings) if processes.first else contextlib.nullcontext():
            Training(settings, processes).run()
    finally:
        processes.leave()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step or a forward has failed for want of memory: PyTorch's CPU allocator has no class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run(arguments: argparse.Namespace) -> int:
    """Trains. Under torchrun its own record of the first process that fails is what it shows."""
    from effdense.train.interrupt import Stopped

    train: Any = _train
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        train = record(_train)
    try:
        train(read_settings(arguments))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"effdense train: stopped {stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("effdense train: stopped at once, nothing more is saved", file=sys.stderr)
        return STOPPED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "effdense train: there is not enough memory for this run: a smaller --batch-size, --accumulate, a smaller --resize or "
            f"--memory minimal need less, and effdense plan says how much ({str(error).partition(chr(10))[0]})",
            file=sys.stderr,
        )
        return 1
    except FloatingPointError as error:
        print(f"effdense train: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"effdense train: {error}", file=sys.stderr)
        return 2
    return 0
