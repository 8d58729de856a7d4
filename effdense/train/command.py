"""The command line of `effdense train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from effdense.train.settings import (
    AMP,
    AUGMENTATIONS,
    DATA,
    DROP_RATE,
    IMPLS,
    OPTIMIZERS,
    RECIPES,
    Recipe,
    RunConfig,
)

STOPPED = 130  # a shell's status for Ctrl-C


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more was expected, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**32 - 1 was expected, got {text!r}")
    return int(text)


def _at_least_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of 0 or more was expected, got {text!r}")
    return value


def _size(text: str) -> int | None:
    return None if text == "none" else _positive(text)


def _drops(text: str) -> tuple[float, ...]:
    drops = tuple(_at_least_zero(part) for part in text.split(",") if part)
    if any(part >= 1 for part in drops):
        raise argparse.ArgumentTypeError(
            f"parts of the run between 0 and 1 were expected, such as 0.5,0.75, got {text!r}"
        )
    return drops


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `effdense train` takes."""
    add = command.add_argument
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
    add("--data-root", type=Path, metavar="DIR", help="where the data are, or are downloaded to (data)")
    add("--out", required=True, type=Path, metavar="DIR", help="for checkpoints and metrics")
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
        "--weights", type=Path, metavar="FILE", help="begin with these (of torch.save); the classifier is new"
    )
    add("--freeze-features", action="store_true", help="train the classifier alone; statistics stay, too")
    add(
        "--limit-train", type=_positive, metavar="N", help="train on the first N images; the test stays whole"
    )
    add("--accumulate", type=_positive, default=1, metavar="N", help="compute each batch in N parts (1)")
    add("--amp", choices=tuple(AMP), default="off", help="automatic mixed precision (off)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of weights and images (float32)")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--channels-last", action="store_true", help="keep weights and images in that layout")
    add("--sync-bn", action="store_true", help="batch norm over the images of all processes")
    add("--seed", type=_seed, default=0, help="of weights, order, augmentation and dropout (0)")
    add("--device", default=None, help="cpu, cuda or cuda:N (cuda where there is one)")
    add(
        "--workers",
        type=_positive,
        default=2,
        metavar="N",
        help="threads per process that read a folder's images (2)",
    )
    add("--resume", action="store_true", help="go on from DIR/last.pt, with the same settings")
    add("--save-steps", type=_positive, metavar="N", help="also save every N steps")
    add(
        "--save-seconds",
        type=_at_least_zero,
        default=600.0,
        metavar="S",
        help="also save every S seconds (600)",
    )
    add(
        "--log-every", type=_positive, default=50, metavar="N", help="steps between lines of metrics.csv (50)"
    )
    recipe = command.add_argument_group("the recipe, and its values, each of which can be set")
    told = "; ".join(
        f"{name}: {r.epochs} epochs, {r.optimizer}, batch {r.batch_size}, lr {r.lr}"
        for name, r in RECIPES.items()
    )
    recipe.add_argument("--recipe", choices=tuple(RECIPES), default="cifar", help=f"{told} (cifar)")

    def value(name: str, help: str, **form: Any) -> None:
        recipe.add_argument(name, default=argparse.SUPPRESS, help=help, **form)

    value("--epochs", "passes over the training images", type=_positive, metavar="N")
    value(
        "--batch-size", "images per optimizer step, over all processes and parts", type=_positive, metavar="N"
    )
    value("--optimizer", "stochastic gradient descent, or Adam", choices=OPTIMIZERS)
    value("--lr", "learning rate at the start", type=_at_least_zero)
    value("--momentum", "of sgd", type=_at_least_zero)
    value("--nesterov", "Nesterov's momentum", action=argparse.BooleanOptionalAction)
    value("--weight-decay", "factor of the L2 penalty", type=_at_least_zero)
    value("--drops", "fractions of the run after which the learning rate drops: 0.5,0.75", type=_drops)
    value("--drop-factor", "factor of each drop (0.1)", type=_at_least_zero)
    value(
        "--augment",
        "crop-flip: a border of 4, a random crop, half mirrored; resized-crop: 8 to 100%% of the area, resized, half mirrored",
        choices=AUGMENTATIONS,
    )
    value("--drop-rate", "dropout (0; cifar with --augment none: 0.2)", type=_at_least_zero)
    value("--resize", "resize images to NxN; none: leave them", type=_size, metavar="N")
    value("--pad", "pad images with zeros to NxN, before all else; none: do not", type=_size, metavar="N")


def read_settings(arguments: argparse.Namespace) -> RunConfig:
    """The run that a command line describes."""
    given = dict(vars(arguments))
    name = given["recipe"]
    changed = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    recipe = dataclasses.replace(RECIPES[name], **changed)
    if recipe.augment == "none" and "drop_rate" not in given:
        recipe = dataclasses.replace(recipe, drop_rate=DROP_RATE.get(name, recipe.drop_rate))
    if recipe.nesterov and not recipe.momentum:
        raise ValueError("--nesterov needs --momentum above 0")
    given["device"] = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    others = {f.name: given[f.name] for f in dataclasses.fields(RunConfig) if f.name in given}
    return RunConfig(**(others | {"recipe_name": name, "recipe": recipe}))


def _train(settings: RunConfig) -> None:
    from effdense.train.loop import Training
    from effdense.train.processes import Processes

    processes = Processes(settings.device)
    try:
        Training(settings, processes).run()
    finally:
        processes.leave()


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
        return STOPPED
    except FloatingPointError as error:
        print(f"effdense train: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"effdense train: {error}", file=sys.stderr)
        return 2
    return 0
