"""`make gpu`: what its stages measure, as far as it can be tested without a GPU: operators, steps, KernelBench's nets, counters."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from benchmarks import densenet, devices, kernels, models
from benchmarks.gpu import counters, host, kernelbench, operators, report, results, steps
from benchmarks.worker import WorkerError, _Session

pytestmark = pytest.mark.tools

TINY = steps.Config("tiny", "densenet_bc_10_4", 2, 8)


# --- (f) the operators


def test_operators(tmp_path: Path, monkeypatch: Any) -> None:
    """All of the stage, with a CPU in the card's place."""
    small = kernels.Shape(2, 4, 4, 6, 10, 8, 4, operators=kernels.OPERATORS)
    monkeypatch.setattr(kernels, "SHAPES", {"all": [small]})
    monkeypatch.setattr(kernels, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(kernels, "COPY_BYTES", 2**12)
    monkeypatch.setattr(operators, "REPEATS", 1)
    before = torch.backends.cudnn.allow_tf32
    assert operators.main(["--json", str(tmp_path / "f"), "--device", "cpu"]) == 0
    torch.backends.cudnn.allow_tf32 = before
    result = json.loads((tmp_path / "f").read_text())
    assert [row["numbers"] for row in result["rows"]] == list(operators.NUMBERS)
    assert all({"bottleneck", "conv3x3"} <= {r["op"] for r in row["rows"]} for row in result["rows"])
    assert result["finding"].count("TB/s; to floor ") == 3
    row = {"name": "operators", "title": "t", "result": result}
    assert "| `bottleneck` | " in "\n".join(report._body(row))


# --- (g) the steps


class FakeWorker:
    """Steps of 10 ms, effdense's of 5; the implementation `checkpoint` has no memory."""

    def __init__(self, impl: str) -> None:
        self.impl, self.killed = impl, 0

    def build(self, settings: Any) -> dict[str, Any]:
        if self.impl.startswith("checkpoint"):
            raise WorkerError("CUDA out of memory")
        return {"label": self.impl}

    def warm_up(self, count: int) -> dict[str, Any]:
        return {"first_loss": 7.5 if "minimal" in self.impl else 7.0}

    def prepare(self) -> dict[str, Any]:
        return {"first_loss": 7.0}

    def step(self) -> dict[str, Any]:
        return {"ms": 5.0 if self.impl.startswith("effdense") else 10.0}

    def finish(self) -> dict[str, Any]:
        return {"peak_bytes": 250 if self.impl.startswith("effdense") else 1000}

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def result(monkeypatch: Any, tmp_path: Path) -> results.Result:
    monkeypatch.setattr(steps, "Worker", FakeWorker)
    monkeypatch.setattr(steps, "CONFIGS", (TINY, TINY._replace(name="other", **steps.HALF)))
    return results.Result(tmp_path / "result.json")


@pytest.mark.parametrize("free", [0, 2**40])
def test_steps(result: results.Result, monkeypatch: Any, tmp_path: Path, free: int) -> None:
    monkeypatch.setattr(steps, "free_bytes", lambda device: free)
    steps.eager(result, "cuda", time.monotonic() + 60)
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["impl"] for row in rows[4:]] == [f"{impl}+channels-last" for impl in steps.IMPLS]
    naive, checkpoint, balanced, minimal = rows[:4]
    assert naive["speed_to_naive"] == 1 and checkpoint["error"] == "CUDA out of memory"
    assert (balanced["median_ms"], balanced["speed_to_naive"], balanced["memory_to_naive"]) == (
        5.0,
        2.0,
        0.25,
    )
    assert "note" not in balanced and minimal["note"] == "its first loss is 7.5, naive's is 7"
    finding = (
        "speed and peak to naive; tiny: balanced 2.00x 0.25, minimal 2.00x 0.25; other: balanced 2.00x 0.25, "
    )
    assert result.values["finding"] == finding + "minimal 2.00x 0.25; 2 not measured"


def test_steps_after_the_time_limit(result: results.Result, monkeypatch: Any) -> None:
    monkeypatch.setattr(steps, "free_bytes", lambda device: 0)
    steps.eager(result, "cuda", time.monotonic() - 1)
    assert {row["error"] for row in result.values["rows"]} >= {steps.LATE}


def test_compiled_steps(result: results.Result) -> None:
    steps.compiled(result, "cuda", time.monotonic() + 60)
    rows = result.values["rows"]
    assert [row["impl"] for row in rows[:3]] == ["naive", "effdense-balanced", "compile"]
    assert [row["speed_to_naive"] for row in rows] == [1, 2, 1] * 2 and not any("note" in row for row in rows)


def test_a_net_that_is_not_compiled_in_time(result: results.Result, monkeypatch: Any) -> None:
    def prepare(worker: FakeWorker) -> dict[str, Any]:
        while not worker.killed:
            time.sleep(0.01)
        raise WorkerError("killed by SIGKILL")

    monkeypatch.setattr(FakeWorker, "prepare", prepare)
    steps.compiled(result, "cuda", time.monotonic() + steps.MEASURING_S + 0.5)
    assert [row["error"] for row in result.values["rows"]] == ["not compiled within 0 s"] * 2 or [
        row["error"] for row in result.values["rows"]
    ] == ["not compiled within 1 s"] * 2


def test_a_compiled_net_is_prepared_without_a_search(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    session = _Session()
    session.build("naive", {"model": TINY.model, "batch": 2, "image_size": 8})
    seen = []
    step = session._step
    session._step = lambda: seen.append(torch.backends.cudnn.benchmark) or step()
    assert session.prepare()["first_loss"] > 0
    assert seen == [False] and torch.backends.cudnn.benchmark


def test_the_net_for_volumes_is_densenet121_in_three_dimensions() -> None:
    with torch.device("meta"):
        naive = models.build("densenet121_3d", "naive").model
        fused = effdense.models.densenet121(spatial_dims=3, in_channels=1, num_classes=10)
    shapes = {key: value.shape for key, value in fused.state_dict().items()}
    assert {key: value.shape for key, value in naive.state_dict().items()} == shapes


@pytest.mark.parametrize("efficient", [False, True])
def test_volumes_converted_are_the_same(efficient: bool) -> None:
    torch.manual_seed(0)
    form = {"num_classes": 3, "in_channels": 1, "spatial_dims": 3, "memory_efficient": efficient}
    naive = densenet.DenseNet(4, (2, 2), 8, **form).double()
    fused = effdense.convert(copy.deepcopy(naive))
    assert all(entry.converted for entry in effdense.report(fused) if entry.kind != "DenseNet")
    x = torch.randn(2, 1, 33, 40, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), naive(x))


# --- (h) KernelBench


@pytest.mark.parametrize("problem", kernelbench.PROBLEMS, ids=lambda p: p.name[:2])
def test_kernelbench_problems(problem: kernelbench.Problem) -> None:
    small = problem._replace(shape=(2, problem.shape[1], *(n // 4 for n in problem.shape[2:])))
    row = kernelbench.measure(small, devices.find("cpu"), repeats=1)
    assert row["error"] <= 2 * row["naive_error"] + 1e-5 and row["naive_ms"] > 0 and row["effdense_ms"] > 0


# --- (i) counters

METRICS = {
    "ID": ("", "0", "1"),
    "Kernel Name": (
        "",
        "void effdense::kernels::(anonymous namespace)::bottleneck_kernel<TensorCore<__half>, (int)128>(A<T1>)",
        "void effdense::kernels::(anonymous namespace)::bottleneck_kernel<TensorCore<__half>, (int)128>(A<T1>)",
    ),
    "Block Size": ("", "(256, 1, 1)", "(256, 1, 1)"),
    "Grid Size": ("", "(9, 1, 1)", "(9, 1, 1)"),
    "gpu__time_duration.sum": ("ns", "9,000", "125,000"),
    "dram__bytes.sum.per_second": ("byte/s", "1", "2,500,000,000,000"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "1", "83.5"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "1", "41"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "1", "24.75"),
    "launch__registers_per_thread": ("register/thread", "1", "122"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "1", "4.5"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1", "0.5"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1", "n/a"),
}


def test_the_csv_of_ncu() -> None:
    lines = ["==PROF== Connected to process 1", "a print", ",".join(f'"{name}"' for name in METRICS)]
    lines += [",".join(f'"{values[i]}"' for values in METRICS.values()) for i in range(3)]
    (row,) = counters.parse("\n".join([*lines, "==PROF== Disconnected"]))
    assert row["kernel"] == "bottleneck_kernel<TensorCore<__half>, 128>" and row["grid"] == "(9, 1, 1)"
    assert (row["us"], row["memory_gbytes_per_s"], row["memory_percent"]) == (125.0, 2500.0, 83.5)
    assert (row["occupancy_percent"], row["registers"]) == (24.75, 122)
    assert row["stalls"] == [{"reason": "long_scoreboard", "warps": 4.5}, {"reason": "barrier", "warps": 0.5}]
    wanted = "bottleneck_kernel<TensorCore<__half>, 128>: 84 % of memory, 41 % of compute, occupancy 25 %, long_scoreboard"
    assert counters.finding([row]) == wanted


def test_the_command_of_ncu_leaves_the_clocks_alone() -> None:
    line = counters.command("cuda:1")
    assert line[:3] == ["ncu", "--clock-control", "none"]
    assert line[-3:] == ["-m", "benchmarks.gpu.gemm_kernels", "cuda:1"]


@pytest.mark.parametrize(
    "said, reason",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", counters.NO_PERMISSION),
        (
            "==ERROR== Failed to initialize the profiler\n",
            "ncu ended with status 1: Failed to initialize the profiler",
        ),
        ("", "ncu ended with status 1: it has seen no kernel"),
    ],
)
def test_why_there_are_no_counters(
    said: str, reason: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    line = [sys.executable, "-c", f"import sys; print({said!r}); sys.exit(1)"]
    monkeypatch.setattr(counters, "command", lambda device: line)
    assert counters.main(["--json", str(tmp_path / "f")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == reason


# --- (j) host and device


def test_host_and_device_time(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    row = host.measure(TINY.model, "naive+channels-last", 2, 16, 8, devices.find("cpu"))
    assert row["host_ms"] > 0 and row["step_ms"] > 0 and (row["device_ms"], row["kernels"]) == (0, 0)
