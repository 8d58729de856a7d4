"""A trained model with what its checkpoint says about its input, its classes and its run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense import tensor_files
from effdense.conversion import convert_parts
from effdense.conversion.class_swap import is_fused_kind
from effdense.models import Preparation
from effdense.models.checkpoints import restore
from effdense.nn.plain import run_plain
from effdense.train.command import is_out_of_memory
from effdense.train.folder import BEST, LAST
from effdense.train.settings import AMP

IMPLS = ("effdense", "naive")  # in inference nothing is checkpointed


class Reported(NamedTuple):
    """What the run's own test came to in the epoch of a checkpoint."""

    epoch: int
    loss: float
    accuracy: float


class Trained(NamedTuple):
    """A model in evaluation mode, on its device; `scores` runs it."""

    path: Path  # of the checkpoint
    name: str
    model: nn.Module
    prepare: Preparation
    class_names: list[str]
    settings: Mapping[str, Any]  # of the run, those that decide about the losses
    epoch: int | None
    reported: Reported | None
    amp: torch.dtype | None
    fused: bool

    @property
    def like(self) -> Tensor:
        """A tensor with the device and dtype of the model's input."""
        return next(self.model.parameters())

    @torch.no_grad()
    def scores(self, pixels: Sequence[Tensor]) -> Tensor:
        """What the model says of images of one size, [n, classes] on the CPU.

        Args:
            pixels: of every image as `Preparation.pixels` gives them, [channels, height, width].

        Raises:
            ValueError: the model does not run on images of that size.
        """
        exact = next((x.dtype for x in pixels if x.dtype != torch.uint8), torch.uint8)
        like = self.like
        x = torch.stack([image.to(exact) for image in pixels]).to(like.device)
        x = self.prepare.finish(x, like.dtype).contiguous()
        try:
            with torch.autocast(like.device.type, self.amp, enabled=self.amp is not None):
                return self.model(x).float().cpu() if like.dtype != torch.float64 else self.model(x).cpu()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            size = "x".join(map(str, x.shape[2:]))
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.name} does not run on images of {size} pixels: {reason}") from error


def find(path: Path) -> Path:
    """The checkpoint that is meant: of a run's folder the one of its best epoch.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}: a folder of effdense train --out was expected, or a checkpoint in it"
            )
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{path} has no {BEST} or {LAST}: a folder of effdense train --out was expected, or a checkpoint in it"
    )


def load(path: Path, device: torch.device, impl: str = "effdense", amp: str | None = None) -> Trained:
    """Reads a checkpoint of `effdense train`.

    Args:
        path: of the file, or of a run's folder.
        device: where the model is to run.
        impl: one of IMPLS.
        amp: one of train's; None: what the run had.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or something else.
    """
    path = find(path)
    content = tensor_files.load_tensors(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), str):
        raise ValueError(
            f"{path} does not say how images are prepared, nor what the classes are: a checkpoint of effdense train was expected, "
            "whose entry 'model' is a name"
        )
    model = restore(content, path)
    prepare, names = getattr(model, "prepare", None), getattr(model, "class_names", None)
    if prepare is None or names is None:
        raise ValueError(
            f"{path} does not say how images are prepared, or what the classes are (the entries 'preparation' and 'class_names')"
        )
    name: str = content["model"]
    if impl == "effdense":
        convert_parts(model, "balanced")
    elif ":" not in name:
        run_plain(model, checkpointed=False)
    fused = impl == "effdense" and any(is_fused_kind(module) for module in model.modules())
    settings, epoch, step = (content.get(key) for key in ("settings", "epoch", "step_in_epoch"))
    for key, is_right in {
        "settings": isinstance(settings, (Mapping, type(None))),
        "epoch": isinstance(epoch, (int, type(None))),
        "step_in_epoch": isinstance(step, (int, type(None))),
    }.items():
        if not is_right:
            raise ValueError(f"{path} is damaged: its entry {key!r} is of type {type(content[key]).__name__}")
    settings = settings or {}
    with_amp = settings.get("amp", "off") if amp is None else amp
    if not isinstance(with_amp, str) or with_amp not in AMP:
        raise ValueError(f"{path} is damaged: its entry 'settings' has amp {tensor_files.shortly(with_amp)}")
    ended = step == 0  # behind a test
    return Trained(
        path,
        name,
        model.to(device).eval().requires_grad_(False),
        prepare,
        [str(n) for n in names],
        settings,
        epoch if ended else None,
        _reported(path.parent / "metrics.csv", epoch) if ended and epoch else None,
        AMP[with_amp],
        fused,
    )


def _reported(metrics: Path, epoch: int) -> Reported | None:
    """The test of an epoch, if the file is there that the run has written."""
    try:
        with metrics.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if (r["split"], r["epoch"]) == ("test", str(epoch))]
        return Reported(epoch, float(rows[-1]["loss"]), float(rows[-1]["accuracy"])) if rows else None
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError, csv.Error):
        return None  # what is not needed
