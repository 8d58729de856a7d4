"""`effdense bench`: its table and answer on a small net, and what it makes of times, noise and too little time or memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from effdense import cli, models
from effdense.ops import reference
from effdense.tools import bench, measure

SMALL = ["bench", "densenet_bc_22_12", "--batch", "4", "--image-size", "16", "--seconds", "1"]


@pytest.mark.parametrize("kind, impls", [("--train", bench.TRAIN), ("--inference", bench.INFERENCE)])
def test_command(
    kind: str, impls: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, threads = tmp_path / "bench.json", torch.get_num_threads()
    assert cli.main([*SMALL, kind, "--threads", "1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    found = json.loads(file.read_text())
    assert tuple(row["impl"] for row in found["rows"]) == impls
    assert tuple(line.split()[0] for line in out.splitlines()[3 : 3 + len(impls)]) == impls
    for row in found["rows"]:
        assert row["peak_bytes"] > 0 and len(row["times_ms"]) == found["rounds"] >= 1
    assert found["rows"][0]["ratio_median"] == 1
    assert found["environment"]["threads"] == 1
    what = "a training step" if kind == "--train" else "inference"
    answer = rf"On this machine \(.+, 1 thread\) {what} of densenet_bc_22_12 with 4 images of 16x16 takes \d+\.\d\d of plain"
    assert re.match(answer, out.splitlines()[-1]) and out.splitlines()[-1] == found["answer"]
    assert not any("computes something else" in note for note in found["notes"])


def test_bytes_are_those_of_the_plan() -> None:
    """Two ways to the same number: counted here, predicted there."""
    result = bench.run(bench.Settings("densenet_bc_22_12", 16, 32, seconds=1))
    for row in result.rows:
        plan = effdense.plan(models.build("densenet_bc_22_12"), (16, 3, 32, 32), memory=row["impl"])
        assert row["peak_bytes"] == pytest.approx(plan.total, rel=0.05), row["impl"]


class _Fake:
    """A step that takes as long as it is told, on a clock of the test's."""

    def __init__(self, impl: str, clock: list[float], times_ms: Iterator[float]) -> None:
        self.impl, self._clock, self._times = impl, clock, times_ms

    def peak_bytes(self) -> int:
        return 7

    def milliseconds(self) -> float:
        taken = next(self._times)
        self._clock[0] += taken / 1e3
        return taken


def _in_turn(seconds: float, *times_ms: Callable[[int], float]) -> list[dict[str, Any]]:
    clock = [0.0]
    steps = [_Fake(f"impl{i}", clock, map(every, range(100))) for i, every in enumerate(times_ms)]
    return bench._in_turn(steps, lambda: seconds - clock[0], lambda _: None)


@pytest.mark.parametrize("seconds, rounds", [(0.0, 1), (3.5, 2), (10.0, 6), (1e3, bench.MOST_ROUNDS)])
def test_there_are_as_many_rounds_as_there_is_time_for(seconds: float, rounds: int) -> None:
    rows = _in_turn(seconds, lambda n: 1000.0, lambda n: 500.0)
    assert [len(row["times_ms"]) for row in rows] == [rounds, rounds]


def test_a_ratio_is_that_of_the_same_round() -> None:
    """While another program runs, both take longer: the ratio is what it was."""
    rows = _in_turn(1e3, lambda n: 1000.0 * (1 + n % 2), lambda n: 700.0 * (1 + n % 2))
    assert rows[1]["ratio_p20"] == rows[1]["ratio_median"] == rows[1]["ratio_p80"] == 0.7
    assert rows[1]["p20_ms"] < rows[1]["p80_ms"]


@pytest.mark.parametrize(
    "batch, first_ms, left, expected",
    [(8, 100.0, 60.0, 8), (8, 10e3, 60.0, 2), (64, 10e3, 60.0, 16), (8, 1e6, 60.0, 1), (8, 10.0, -5.0, 1)],
)
def test_the_batch_fits_into_the_time(batch: int, first_ms: float, left: float, expected: int) -> None:
    assert bench._smaller(batch, first_ms, 4, left) == expected


def _result(low: float, median: float, high: float) -> bench.Result:
    rows = [
        {"impl": impl, "ratio_p20": a, "ratio_median": b, "ratio_p80": c, "peak_bytes": peak}
        for impl, a, b, c, peak in (
            ("naive", 1.0, 1.0, 1.0, 100),
            ("checkpoint", 0.5, 0.5, 0.5, 50),
            ("balanced", low, median, high, 22),
            ("minimal", 2.0, 2.0, 2.0, 10),
        )
    ]
    settings = bench.Settings("densenet121", 8, 224, threads=2)
    return bench.Result(settings, rows, 7, 58.0, [], {"cpu": "AMD EPYC", "threads": 2})


def test_the_answer() -> None:
    """effdense's faster mode; checkpointing is what it is compared with."""
    assert _result(0.66, 0.69, 0.72).answer() == (
        "On this machine (AMD EPYC, 2 threads) a training step of densenet121 with 8 images of 224x224 takes 0.69 of plain "
        'PyTorch\'s time and 0.22 of its memory (memory="balanced").'
    )
    assert "no difference beyond the noise" in _result(0.9, 0.98, 1.1).answer()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "1e20"], "a whole number"),
        (["--batch", "0"], "a whole number"),
        (["--image-size", "1000000000"], "from 1 to 65535"),
        (["--threads", "1000000000"], "from 1 to 1024"),
        (["--seconds", "0"], "from 1 to 86400"),
        (["--train", "--inference"], "not allowed with"),
    ],
)
def test_absurd_values_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*SMALL, *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "resnet50"], "unknown model 'resnet50'"),
        ([*SMALL, "--device", "meta"], "device 'meta' cannot be used here"),
        (
            ["bench", "densenet121", "--image-size", "8", "--seconds", "1"],
            "does not run on an input of shape",
        ),
        ([*SMALL, "--batch", "2000000000"], "GiB are free here"),
        (["bench", "densenet_bc_1000000000_12"], "a name stands for at most"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("effdense bench: ") and message in error and error.count("\n") == 1


def test_a_model_without_dense_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "without_memory", lambda name: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="nothing in this model can be converted"):
        bench.run(bench.Settings("timm:other", 2, 8, seconds=1))


def test_it_says_that_plain_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "operators", lambda x: reference)
    environment = {"load_average": 9.0, "cores": 2}
    plain, busy = bench._notes_on(environment, torch.device("cpu"))
    assert plain.startswith("effdense runs on plain PyTorch here")
    assert "load 9.0 with 2 cores" in busy
    monkeypatch.undo()
    assert bench._notes_on({"load_average": 0.1, "cores": 2}, torch.device("cpu")) == []


def test_a_step_is_counted_as_elsewhere() -> None:
    """peak_bytes is the one function that benchmarks/ and the planner's tests count with."""
    from benchmarks import measure as theirs

    assert Path(theirs._steps.__file__).samefile(measure.__file__)


def test_marks_for_other_programs_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch's profiler writes them where it starts and stops; errors are passed on."""
    assert measure.peak_bytes(lambda: torch.empty(1000)) >= 4000
    with measure._without_marks():
        os.write(2, b"USDT:a mark\nan error\nhalf a line")
    assert capfd.readouterr().err == "an error\nhalf a line"
