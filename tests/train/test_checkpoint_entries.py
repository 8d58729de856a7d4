"""Checkpoints with entries that are missing, too many or of another kind: one line names the file and the entry, for every command that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense import cli
from effdense.inference import labelled, trained
from effdense.train import checkpoint, command
from effdense.train.loop import Training
from effdense.train.processes import Processes
from tests._training import arguments, load, train

RUN = (
    *("--epochs", "1", "--drops=", "--limit-train", "12", "--batch-size", "4", "--impl", "naive"),
    *("--ema-decay", "0.9", "--val-split", "0.2"),
)
Place = tuple[Any, ...]  # keys, from the outermost on
# What --resume reads.
RESUMED: list[Place] = [
    *((name,) for name in ("settings", "class_names", "state_dict", "ema", "optimizer", "scaler", "random")),
    *((name,) for name in ("epoch", "step_in_epoch", "step", "best", "seconds", "metrics_size")),
    *((name,) for name in ("stale", "tested", "in_epoch", "in_row")),
    *(("random", 0), ("random", 0, "torch"), ("random", 0, "python"), ("random", 0, "cuda")),
    *(("ema", "steps"), ("ema", "trained"), ("ema", "trained", "classifier.bias")),
    *(("optimizer", "state"), ("optimizer", "state", 0), ("optimizer", "state", 0, "momentum_buffer")),
    *(("optimizer", "param_groups"), ("state_dict", "classifier.bias"), ("class_names", 0)),
    *(("in_epoch", "loss"), ("in_row", "images")),
    *(("settings", name) for name in ("epochs", "model", "lr", "drops", "class_weights", "data root")),
]
# What evaluate and predict read.
USED: list[Place] = [
    *((name,) for name in ("model", "options", "class_names", "preparation", "state_dict")),
    *((name,) for name in ("settings", "epoch", "step_in_epoch")),
    *(("preparation", name) for name in ("mean", "std", "channels", "pad", "resize", "centre")),
    *(("options", "num_classes"), ("options", "in_channels")),
    *(("state_dict", "classifier.bias"), ("state_dict", "features.norm5.running_mean"), ("class_names", 0)),
    *(
        ("settings", name)
        for name in ("data", "amp", "augment", "resize", "pad", "channels", "data root", "test data")
    ),
]
OTHERS: dict[str, Any] = {
    "a list": [None, {}],
    "a dict": {"x": []},
    "text": "x",
    "a fraction": -0.5,
    "nothing": None,
    "a tensor": torch.ones(3, 3),
}


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a run can have."""
    out = tmp_path_factory.mktemp("entries") / "run"
    assert train(root, out, *RUN) == 0
    return out


def with_other(holder: Any, place: Place, change: Any) -> Any:
    """A copy in which `change` has been at what holds the last key."""
    copied = holder.copy()
    if len(place) == 1:
        change(copied, place[0])
    else:
        copied[place[0]] = with_other(copied[place[0]], place[1:], change)
    return copied


def changed(content: dict[str, Any], places: list[Place]) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    """Without what is at a place, with a neighbour to it, and with other kinds of things there."""

    def surplus(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder["of a later version"] = 1

    for place in places:
        yield place, "missing", with_other(content, place, lambda holder, key: holder.pop(key))
        yield place, "surplus", with_other(content, place, surplus)
        for what, value in OTHERS.items():
            yield place, what, with_other(content, place, lambda holder, key: holder.__setitem__(key, value))  # noqa: B023


def fault(error: Exception, path: Path, place: Place, what: str) -> list[str]:
    """What is wrong with a message: it is one line that names the file and the entry."""
    said = str(error).replace("_", " ")
    named = any(str(key).replace("_", " ") in said for key in place if isinstance(key, str))
    named = named or (place[0] == "class_names" and "has classes that" in said)
    no_checkpoint = what == "missing" and place in (("settings",), ("state_dict",))
    is_right = isinstance(error, ValueError) and "\n" not in said and str(path).replace("_", " ") in said
    return (
        [] if is_right and (named or no_checkpoint) else [f"{place}, {what}: {type(error).__name__}: {error}"]
    )


def test_to_go_on_from(run: Path, root: Path, tmp_path: Path) -> None:
    """All of it is read into one run, which keeps nothing of what is refused but tensors."""
    given = command.read_settings(cli._parser().parse_args(arguments(root, tmp_path, *RUN)))
    training, content, refused = Training(given, Processes("cpu")), load(run), 0
    faults: list[str] = []
    torch.save(content, path := tmp_path / "last.pt")
    training._restore(*checkpoint.load_latest(tmp_path))
    count = 0
    for place, what, other in changed(content, RESUMED):
        torch.save(other, path)
        count += 1
        try:
            training._restore(*checkpoint.load_latest(tmp_path))
        except Exception as error:
            faults += fault(error, path, place, what)
            refused += 1
    assert not faults, "\n".join(faults)
    assert count == len(RESUMED) * (len(OTHERS) + 2) and refused > count / 2


def test_to_use(run: Path, root: Path, tmp_path: Path) -> None:
    """What is not refused runs on the images of the run's test."""
    content, count, refused = load(run), 0, 0
    faults: list[str] = []
    for place, what, other in changed(content, USED):
        torch.save(other, path := tmp_path / "x.pt")
        count += 1
        try:
            model = trained.load(path, torch.device("cpu"), "naive")
            images = labelled.load(model, None, root, 1)
            model.scores(images.source.read([0, 1]))
        except Exception as error:
            faults += fault(error, path, place, what)
            refused += 1
    assert not faults, "\n".join(faults)
    assert count == len(USED) * (len(OTHERS) + 2) and refused > count / 2


def test_by_the_commands(run: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    content = load(run)
    del content["step"]
    content["preparation"]["mean"] = "grey"
    for folder in (run, tmp_path):
        torch.save(content, folder / "last.pt")
    (run / "best.pt").unlink()
    assert train(root, run, *RUN, "--resume") == 2
    assert (
        f"{run}/last.pt is damaged: its entry 'step' must be a whole number of 0 or more, it is missing\n"
        in (capsys.readouterr().err)
    )
    for words in (["evaluate", str(tmp_path)], ["predict", str(tmp_path), __file__]):
        assert cli.main([*words, "--device", "cpu"]) == 2
        assert f"{tmp_path}/last.pt is damaged: its entry 'preparation'" in capsys.readouterr().err
