"""effdense plot: what it reads of a run, what it draws of several, and what is no run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

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


Figures = list[Any]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Figures:
    """What is drawn, instead of the files."""
    drawn: Figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def run_of(epochs: int) -> plots.Run:
    columns = ("loss", "accuracy", "peak_bytes", "seconds")
    curve = {float(i): 1.0 / i for i in range(1, epochs + 1)}
    return {column: {"train": curve, "test": curve} for column in columns}


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_one_epoch(figures: Figures) -> None:
    plots.runs_picture({"run": run_of(1)}, "runs.png")
    for axes in figures[0].axes:
        assert axes.get_xlim() == (0.5, 1.5)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1"]
    accuracy = next(axes for axes in figures[0].axes if axes.get_title(loc="left") == "accuracy")
    assert accuracy.get_ylim() == pytest.approx((99, 101))
    training = figures[0].legends[0].legend_handles[1]
    assert training.get_marker() == "s" and legend_of(figures[0]) == ["run", "training", "test"]


def test_a_validation_with_one_test_at_the_end(figures: Figures) -> None:
    run = {c: {"train": curves["train"], "val": curves["test"]} for c, curves in run_of(3).items()}
    for column in ("loss", "accuracy"):
        run[column]["test"] = {2.0: 0.5}
    plots.runs_picture({"run": run}, "runs.png")
    assert legend_of(figures[0]) == ["run", "training", "validation", "test, once"]
    points = [line for line in figures[0].axes[0].lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in points] == [[2.0]]


def test_several_epochs_have_whole_numbers(figures: Figures) -> None:
    for epochs in (2, 3, 300):
        plots.runs_picture({"run": run_of(epochs)}, "runs.png")
        figures[-1].canvas.draw()
        for axes in figures[-1].axes:
            assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_every_run_has_a_look_of_its_own(figures: Figures) -> None:
    plots.runs_picture({str(i): run_of(3) for i in range(6)}, "runs.png")
    lines = figures[0].legends[0].legend_handles[:6]
    assert len({line.get_color() for line in lines}) == 6
    assert max(line.get_linewidth() for line in lines) < 3  # a band would be taken for a range
    solid = [line.get_linewidth() for line in lines if line.get_linestyle() == "-"]
    assert solid == sorted(solid, reverse=True) and len(set(solid)) == len(solid)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_long_names_stay_within_the_picture(count: int, figures: Figures) -> None:
    runs = {f"/data/experiments/{'densenet-' * 12}{i}/{'W' * 60}": run_of(2) for i in range(count)}
    plots.runs_picture(runs, "runs.png")
    figure = figures[0]
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len(set(legend_of(figure))) == count + 2


@pytest.mark.parametrize(
    "runs, names",
    [
        (["runs/a"], ["runs/a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["/x/runs/a/1", "/x/runs/b/1"], ["a/1", "b/1"]),
        (["runs", "runs/b"], ["runs", "runs/b"]),
        (["a/run", "run"], ["a/run", "run"]),
        (["x" * 70], ["x" * 29 + " … " + "x" * 28]),
        (["r/" + "x" * 70, "r/" + "x" * 71], [f"{i}: " + "x" * 29 + " … " + "x" * 28 for i in (1, 2)]),
    ],
)
def test_names_are_what_tells_runs_apart(runs: list[str], names: list[str]) -> None:
    assert plots.short_names(runs) == names


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
