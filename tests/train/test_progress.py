"""What `effdense train` shows and writes while it goes, and that it stops where it is asked to."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from effdense import progress
from effdense.train import display, loop
from effdense.train.interrupt import Interrupt
from effdense.train.metrics import Row
from effdense.train.settings import RECIPES
from tests._training import STEPS, Terminal, assert_same_end, load, rows, train

ROW = Row(12, 1234, "step", 2.31163, 0.0417, 0.1, 1234.5, 332 * 2**20, 99.0)


def steps_of(out: Path) -> dict[int, dict[str, Any]]:
    return {int(row["step"]): row for row in rows(out) if row["split"] == "step"}


def test_no_line_is_of_two_epochs(whole: Path, root: Path, tmp_path: Path) -> None:
    assert train(root, tmp_path, "--log-every", "3") == 0
    single, found = steps_of(whole), steps_of(tmp_path)
    assert list(found) == [3, 6, 9] and STEPS == 5
    for step, own in {3: (1, 2, 3), 6: (6,), 9: (7, 8, 9)}.items():
        for name in ("loss", "accuracy"):
            mean = sum(single[i][name] for i in own) / len(own)
            assert found[step][name] == pytest.approx(mean, rel=1e-12)


def test_a_line_is_whole_where_the_run_went_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(root, tmp_path / "whole", "--log-every", "4") == 0
    with monkeypatch.context() as patch:
        stop_after_losses(patch, 2)
        assert train(root, tmp_path / "parts", "--log-every", "4") == 130
    assert train(root, tmp_path / "parts", "--log-every", "4", "--resume") == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def stop_after_losses(monkeypatch: pytest.MonkeyPatch, count: int) -> list[bool]:
    """Ctrl-C at the count-th batch; the list has for every batch whether it was the training's."""
    original, seen = loop.Training._loss, list[bool]()

    def loss(self: Any, *arguments: Any) -> Any:
        seen.append(self.model.training)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(loop.Training, "_loss", loss)
    return seen


def test_stopped_in_the_test(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After a batch, not after all of them; the test comes again, and nothing else does."""
    with monkeypatch.context() as patch:
        seen = stop_after_losses(patch, STEPS + 1)
        assert train(root, tmp_path) == 130
    assert seen == [True] * STEPS + [False]
    assert "stopped in the test of epoch 1; --resume goes on with that test" in capsys.readouterr().err
    assert (load(tmp_path)["step"], load(tmp_path)["epoch"]) == (STEPS, 0)
    assert [row["split"] for row in rows(tmp_path)] == ["step"] * STEPS
    with monkeypatch.context() as patch:
        seen = stop_after_losses(patch, 99)
        assert train(root, tmp_path, "--resume") == 0
    assert seen[:3] == [False, False, True]
    assert_same_end(tmp_path, whole)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal's handler must not fail where it says what it does."""

    def write(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", write)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked


# --- the first lines


def test_the_header(tmp_path: Path, capsys: Any) -> None:
    for split, counts in (("train", (6, 3)), ("val", (3, 1))):
        for name, count in zip(("blue", "red [x]"), counts, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (16, 16), i).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "blue" / "a.gif").touch()
    os.mkfifo(tmp_path / "val" / "blue" / "pipe.png")
    run = ("--data", "folder", "--recipe", "d2l", "--resize", "16", "--batch-size", "4", "--epochs", "1")
    assert train(tmp_path, tmp_path / "run", *run) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].startswith("model: densenet_bc_10_4 (effdense, memory balanced), ")
        and "parameters" in said[0]
    )
    assert said[1].startswith("device: cpu, ") and said[1].endswith(", 1 threads")
    assert said[2:-1] == [
        f"data: folder in {tmp_path}, 9 training images, 4 test images, 2 classes",
        "classes: blue 6; red [x] 3",
        "unequal classes: the largest has 2 times the images of the smallest; whoever always says blue is right in 75.0% of the test",
        "training images, of 9 looked at: 9 grey, repeated to 3 channels",
        "training files left out: 1 .gif",
        "test images, of 4 looked at: 4 grey, repeated to 3 channels",
        "test files left out: 1 pipes, sockets or devices",
        "recipe d2l: 1 epochs of 2 steps of 4 images, sgd, learning rate 0.1",
    ]
    assert said[-1].startswith("epoch 1/1: loss ")


def test_the_header_of_a_part(whole: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    weights = ("--weights", str(whole / "last.pt"), "--freeze-features", "--limit-train", "12")
    assert train(root, tmp_path, *weights, "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "of them trained\n" in said and "12 of 60 training images, 20 test images, 10 classes" in said
    counts = dict(part.split(" ") for part in said.partition("classes: ")[2].partition("\n")[0].split("; "))
    missing = [name for name, count in counts.items() if count == "0"]
    assert sum(map(int, counts.values())) == 12 and missing
    assert f"no training images of {', '.join(missing[:5])}" in said and "unequal" not in said


# --- while it goes


def test_lines_where_there_is_no_terminal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert train(root, tmp_path, "--epochs", "1") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(said) == STEPS + 2 + 1
    assert said[0].startswith("epoch 1/1, step 1 of 5: loss ") and said[0].endswith(" left of it")
    assert said[STEPS:-1] == ["epoch 1/1, test, batch 0 of 2", "epoch 1/1, test, batch 1 of 2"]


def test_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = display.Display(RECIPES["cifar"], 5000)
    lines = []
    for second in range(0, 200):
        now = float(second)
        shown.show(ROW, second)
        lines += [second] * capsys.readouterr().out.count("\n")
    assert lines == [10, 70, 130, 190]


@pytest.mark.parametrize("seconds, words", [(0.4, "0:00:00"), (59.6, "0:01:00"), (36_061, "10:01:01")])
def test_durations(seconds: float, words: str) -> None:
    assert display._duration(seconds) == words


@pytest.mark.parametrize(
    "columns, words",
    [
        (120, "loss 2.3116, accuracy 0.0417, 1234.5 images/s, peak 332 MiB"),
        (80, "loss 2.31, accuracy 0.042"),
        (60, "loss 2.31"),
        (48, ""),
    ],
)
def test_the_bar_is_not_cut_off(columns: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all the time that is left."""
    console = pytest.importorskip("rich.console")
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = display.Display(RECIPES["cifar"], 1500)
    bar = shown._progress._bar
    try:
        shown.show(ROW, 1234)
        paper = io.StringIO()
        console.Console(file=paper, width=columns).print(bar.get_renderable())
        (line,) = paper.getvalue().splitlines()
        assert "epoch 12/300" in line and "1234/1500" in line and line.rstrip().endswith(words or "-:--:--")
        assert len(line) <= columns and "…" not in line and "-:--:--" in line
        shown.show_test(12, 3, 20)
        assert bar.tasks[0].fields["now"] == "test" and bar.tasks[0].total == 20
    finally:
        shown.close()


# --- output that is not taken


def broken(kind: str) -> Any:
    if kind == "full":
        return open("/dev/full", "w")
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("kind, reason", [("full", "No space left on device"), ("unread", "Broken pipe")])
def test_a_run_outlives_its_reader(
    kind: str, reason: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch, broken(kind) as out:
        patch.setattr(sys, "stdout", out)
        assert train(root, tmp_path) == 0
    assert f"standard output takes nothing more ({reason}); the run goes on" in capsys.readouterr().err
    assert load(tmp_path)["epoch"] == 2 and len(rows(tmp_path)) == 2 * (STEPS + 2)


def test_names_that_the_terminal_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for name in ("Föhre", "Kiefer"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (16, 16)).save(tmp_path / split / name / f"{i}.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        run = ("--data", "folder", "--recipe", "d2l", "--resize", "16", "--batch-size", "4", "--epochs", "1")
        assert train(tmp_path, tmp_path / "run", *run) == 0
    assert b"classes: F\\xf6hre 2; Kiefer 2" in out.buffer.getvalue()
