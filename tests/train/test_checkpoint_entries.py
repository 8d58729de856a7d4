"""Checkpoints with entries that are missing, too many or of another kind: one line names the file and the entry, for every command that reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense import cli, models
from tests._training import TEST, load, train

RUN = (
    "--epochs",
    "1",
    "--drops=",
    "--limit-train",
    "12",
    "--ema-decay",
    "0.9",
    "--val-split",
    "0.2",
    "--batch-size",
    "4",
)
# Places below an entry that are read; the rest are all entries that a run saves.
BELOW = [
    ("random", 0),
    ("random", 0, "torch"),
    ("random", 0, "python"),
    ("random", 0, "cuda"),
    ("ema", "steps"),
    ("ema", "trained"),
    ("ema", "trained", "classifier.bias"),
    ("optimizer", "state"),
    ("optimizer", "state", 0),
    ("optimizer", "state", 0, "momentum_buffer"),
    ("optimizer", "param_groups"),
    ("state_dict", "classifier.bias"),
    ("in_epoch", "loss"),
    ("in_row", "images"),
    ("preparation", "mean"),
    ("preparation", "std"),
    ("preparation", "channels"),
    ("preparation", "pad"),
    ("preparation", "resize"),
    ("preparation", "centre"),
    ("options", "num_classes"),
    ("options", "in_channels"),
    ("settings", "epochs"),
    ("settings", "model"),
    ("settings", "data"),
    ("settings", "lr"),
    ("settings", "amp"),
    ("settings", "augment"),
    ("settings", "resize"),
    ("settings", "pad"),
    ("settings", "class_weights"),
    ("settings", "data root"),
    ("settings", "test data"),
    ("class_names", 0),
]
OTHERS: dict[str, Any] = {
    "a list": [None, {}],
    "a dict": {"x": []},
    "text": "x",
    "a number": -7,
    "a fraction": 0.5,
    "nothing": None,
    "a tensor": torch.ones(3, 3),
}


@pytest.fixture(scope="module")
def saved(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with all that a run can have, and its last checkpoint."""
    out = tmp_path_factory.mktemp("entries") / "run"
    assert train(root, out, *RUN) == 0
    return out, load(out)


def changes(content: dict[str, Any], place: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A checkpoint without what is at a place, with a neighbour to it, and with other kinds of things there."""
    for name, value in {"missing": None, "surplus": None, **OTHERS}.items():
        changed = copy.deepcopy(content)
        holder: Any = changed
        for part in place[:-1]:
            holder = holder[part]
        if name == "missing":
            del holder[place[-1]]
        elif name == "surplus":
            if isinstance(holder[place[-1]], dict):
                holder[place[-1]]["of a later version"] = 1
            elif isinstance(holder, dict):
                holder["of a later version"] = 1
            else:
                continue
        else:
            holder[place[-1]] = value
        yield name, changed


def places(content: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [*((name,) for name in content), *BELOW]


def check(status: int, said: str, path: Path, place: tuple[Any, ...], what: str) -> None:
    """It has gone well, or one line names the file and the entry."""
    where = f"{'/'.join(map(str, place))}: {what}"
    lines = [line for line in said.splitlines() if "TensorBoard" not in line and "--epochs was" not in line]
    if status == 0:
        return
    assert status == 2, (where, said)
    assert len(lines) == 1 and str(path) in lines[0], (where, said)
    names = {place[0], *(str(part) for part in place if isinstance(part, str))}
    if place in (("settings",), ("state_dict",)) and what == "missing":
        names.add("is not a checkpoint of effdense train")
    assert any(name.replace("_", " ") in lines[0].replace("_", " ") for name in names), (where, lines[0])


# The runs that go on from what is still right: what no command needs, or what is as good.
FEWEST = {"resume": 300, "evaluate": 60, "load_checkpoint": 60}


def every(content: dict[str, Any], path: Path) -> Iterator[tuple[tuple[Any, ...], str]]:
    for place in places(content):
        for what, changed in changes(content, place):
            torch.save(changed, path)
            yield place, what


def test_resume(saved: Any, root: Path, tmp_path: Path, capsys: Any) -> None:
    out, content = saved
    refused = 0
    for place, what in every(content, out / "last.pt"):
        (out / "best.pt").unlink(missing_ok=True)
        status = train(root, out, *RUN, "--resume")
        check(status, capsys.readouterr().err, out / "last.pt", place, what)
        refused += status == 2
    assert refused > FEWEST["resume"]


def test_evaluate(saved: Any, root: Path, tmp_path: Path, capsys: Any) -> None:
    _, content = saved
    refused = 0
    pytest.importorskip("sklearn")
    for place, what in every(content, path := tmp_path / "x.pt"):
        status = cli.main(
            ["evaluate", str(path), "--device", "cpu", "--batch", str(TEST), "--data-root", str(root)]
        )
        check(status, capsys.readouterr().err, path, place, what)
        refused += status == 2
    assert refused > FEWEST["evaluate"]


def test_load_checkpoint(saved: Any, tmp_path: Path) -> None:
    """What is then prepared runs."""
    _, content = saved
    refused = 0
    for place, what in every(content, path := tmp_path / "x.pt"):
        try:
            model: Any = models.load_checkpoint(path)
        except ValueError as error:
            refused += 1
            check(2, str(error), path, place, what)
            continue
        if hasattr(model, "prepare"):
            model.eval()(model.prepare(torch.zeros(1, 28, 28, dtype=torch.uint8)))
    assert refused > FEWEST["load_checkpoint"]
