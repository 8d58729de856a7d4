"""What a run says before it begins: the model, the machine, the data, and what is strange about them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from effdense.train import listing, results
from effdense.train.images import DataSet, Folder
from effdense.train.settings import Recipe, RunConfig
from effdense.train.split import Parts

NAMED = 20  # classes, in a line
UNEQUAL = 1.5  # how many times the smallest class the largest may be without a word


def lines(
    settings: RunConfig, data: DataSet, parts: Parts, steps: int, model: nn.Module, device: torch.device
) -> Iterator[str]:
    """The lines; `parts`: of the data set, `steps`: in an epoch."""
    recipe, machine = settings.recipe, results.machine(device)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, wanted in sizes if wanted)
    some = "" if trained == total else f", {trained:,} of them trained"
    how = {"naive": "plain PyTorch", "checkpoint": "checkpointed"}.get(
        settings.impl, f"effdense, memory {settings.memory}"
    )
    threads = f", {machine['threads']} threads" if device.type == "cpu" else ""
    yield f"model: {settings.model} ({how}), {total:,} parameters{some}"
    yield f"device: {device}, {machine['device']}{threads}"
    yield from _data(settings, data, parts)
    yield (
        f"recipe {settings.recipe_name}: {recipe.epochs} epochs of {steps} steps of {recipe.batch_size} images, "
        f"{recipe.optimizer}, learning rate {recipe.lr:g}{''.join(f', {words}' for words in _more(recipe))}"
    )


def _more(recipe: Recipe) -> Iterator[str]:
    """What not every recipe has."""
    if recipe.schedule == "cosine":
        yield "cosine"
    for name, value in {
        "warm-up of {:g} epochs": recipe.warmup_epochs,
        "label smoothing {:g}": recipe.label_smoothing,
        "gradients' norm up to {:g}": recipe.clip_norm,
        "average of the weights with {:g}": recipe.ema_decay,
        "mixup {:g}": recipe.mixup,
        "ends after {:g} epochs that were not the best": recipe.early_stop,
    }.items():
        if value:
            yield name.format(value)
    if recipe.class_weights is not None:
        yield "weighted classes"


def _data(settings: RunConfig, data: DataSet, parts: Parts) -> Iterator[str]:
    root = f" in {settings.data_root}" if settings.data_root else ""
    there, count = len(data.train.labels), len(parts.train.labels)
    part = f"{count} of {there}" if count < there else f"{count}"
    kept = f"{len(parts.watched.labels)} for validation, " if parts.watched_name == "val" else ""
    yield (
        f"data: {settings.data}{root}, {part} training images, {kept}{len(data.test.labels)} test images, "
        f"{data.classes} classes"
    )
    trained, tested = (
        labels.bincount(minlength=data.classes) for labels in (parts.train.labels, data.test.labels)
    )
    named = list(zip(data.class_names, trained.tolist(), strict=True))
    if len(named) > NAMED:
        named = [named[trained.argmin()], named[trained.argmax()]]
    yield f"classes: {'; '.join(f'{name} {n}' for name, n in named)}"
    if missing := [name for name, n in zip(data.class_names, trained.tolist(), strict=True) if not n]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        yield f"no training images of {', '.join(missing[:5])}{more}"
    elif trained.max() > UNEQUAL * trained.min():
        largest = int(trained.argmax())
        guessing = tested[largest] / tested.sum()
        yield (
            f"unequal classes: the largest has {trained.max() / trained.min():.3g} times the images of the smallest; "
            f"whoever always says {data.class_names[largest]} is right in {guessing:.1%} of the test"
        )
    for name, images in (("training", data.train), ("test", data.test)):
        if isinstance(images, Folder):
            yield from _files(name, images)


def _files(name: str, images: Folder) -> Iterator[str]:
    looked_at, kinds = images.kinds()
    if kinds:
        yield f"{name} images, of {looked_at} looked at: " + "; ".join(
            f"{n} {kind}" for kind, n in kinds.most_common()
        )
    if images.left_out:
        yield f"{name} files left out: {listing.in_words(images.left_out)}"
