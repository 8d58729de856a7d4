"""effdense plot: what it reads of a run, what it draws of several, and what is no run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from effdense import cli
from effdense.tools import plots

HEAD = "epoch,step,split,loss,accuracy,lr,images_per_second,peak_bytes,seconds"


def write(folder: Path, *rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text("\n".join([HEAD, *rows, ""]))
    return folder


def test_epochs_are_read_and_steps_are_not(tmp_path: Path) -> None:
    rows = ("1,5,step,2.5,.1,.1,30,1048576,9", "1,9,train,2.0,.2,.1,30,2097152,19", "1,9,test,1.5,.4,,,,2")
    run = plots.read_run(write(tmp_path / "run", *rows))
    assert run["loss"] == {"train": {1.0: 2.0}, "test": {1.0: 1.5}}
    assert run["peak_bytes"] == {"train": {1.0: 2097152.0}}
    assert run == plots.read_run(tmp_path / "run" / "metrics.csv")


def test_the_command_draws_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", "1,9,train,2.0,.2,.1,30,1048576,400", "1,9,test,1.9,.3,,,,")
    two = write(tmp_path / "two", *(f"{i},{i},train,{3 - i},.5,.1,1,2,3" for i in range(3)))
    picture = tmp_path / "runs.png"
    assert cli.main(["plot", str(one), str(two), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"{picture}\n"


def test_more_runs_than_can_be_told_apart(tmp_path: Path) -> None:
    runs = {
        str(i): {c: {"train": {1.0: 1.0}} for c in ("loss", "accuracy", "peak_bytes", "seconds")}
        for i in range(7)
    }
    with pytest.raises(ValueError, match="at most 6 runs can be told apart in a picture, got 7"):
        plots.runs_picture(runs, tmp_path / "runs.png")
    assert not list(tmp_path.iterdir())


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*rows: str) -> str:
        assert cli.main(["plot", str(write(tmp_path / "run", *rows))]) == 2
        return capsys.readouterr().err

    assert "metrics.csv has no epochs yet" in said()
    assert "metrics.csv, line 2: numbers were expected, got {'epoch': '1', 'loss': 'x'}" in said(
        "1,2,train,x,.1,,,,"
    )
    assert "line 3: numbers were expected, got {'epoch': '2', 'loss': None}" in said(
        "1,2,train,1,,,,,", "2,3"
    )
    (tmp_path / "run" / "metrics.csv").write_text("epoch,loss\n1,2\n")
    assert cli.main(["plot", str(tmp_path / "run")]) == 2
    assert "has no column split, accuracy, peak_bytes, seconds" in capsys.readouterr().err
    assert cli.main(["plot", "/nowhere"]) == 2
    assert "effdense plot: /nowhere cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reuse", "plot"])
def test_without_matplotlib(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("effdense.tools.plots", "matplotlib.axes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(importlib.import_module("effdense.tools"), "plots", raising=False)
    assert cli.main([command, "x"]) == 2
    assert (
        f"effdense {command} needs matplotlib, which is not installed: pip install 'effdense[train]'"
        in capsys.readouterr().err
    )
