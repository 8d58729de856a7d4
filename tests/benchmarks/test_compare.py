"""benchmarks.compare: small comparisons, end to end, what is refused, and a worker that dies."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import compare, isa, measure, models, plots
from benchmarks.worker import ROOT, Worker, WorkerConfig, WorkerError

pytestmark = pytest.mark.tools
CONTRACT = {
    "impl",
    "device",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_bytes",
    "peak_rss_bytes",
    "memory",
    "mode",
}
TINY = ("--model", "densenet_bc_22_4", "--batch", "2", "--threads", "1", "--repeats", "2")


def test_compare_writes_the_contract(tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    impls = ["naive", "checkpoint", "effdense-minimal-fallback"]
    arguments = [*TINY, "--impl", ",".join(impls), "--json", str(out), "--plot", str(picture)]
    status = compare.main(arguments)
    result = json.loads(out.read_text())
    rows = {row["impl"]: row for row in result["rows"]}
    assert status == 0, result["rows"]
    assert list(rows) == impls
    assert [row["memory"] for row in rows.values()] == [None, None, "minimal"]
    for row in rows.values():
        assert row.keys() >= CONTRACT
        assert row["mode"] == "train" and row["compiled"] is False and "note" not in row
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 < row["peak_bytes"] < row["peak_rss_bytes"]
    assert rows["checkpoint"]["peak_bytes"] < rows["naive"]["peak_bytes"]
    assert result["environment"].keys() >= {"torch", "cpu", "cores", "threads", "effdense", "load_average"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "densenet_bc_22_4, training step, batch 2, 32x32, float32" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [out, picture]


def test_compare_measures_compiled_effdense():
    settings = WorkerConfig("densenet_bc_40_4", 4, 32, threads=1)
    naive, *fused = compare.run(settings, ["naive", "effdense-balanced", "effdense-minimal"], repeats=1)[
        "rows"
    ]
    for row, memory in zip(fused, ("balanced", "minimal"), strict=True):
        assert "error" not in row, row["error"]
        assert row["compiled"] is True and row["memory"] == memory and "note" not in row
        assert row["peak_bytes"] < naive["peak_bytes"] / 2


def test_compare_inference_on_real_images():
    settings = WorkerConfig("densenet_bc_22_4", 2, 32, mode="inference", data="fashion-mnist", threads=1)
    (row,) = compare.run(settings, ["naive+channels-last"], repeats=1)["rows"]
    assert row["mode"] == "inference" and row["channels_last"] and row["peak_bytes"] > 0


def test_a_failing_row_says_why_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setenv(models.FORCE_REFERENCE, "1")  # so that effdense is not compiled
    status = compare.main([*TINY, "--impl", "effdense-balanced,naive"])
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert "failed: effdense runs on its plain PyTorch fallback here" in shown
    assert "1.00x" in shown


def test_a_failing_batch_is_reported():
    settings = WorkerConfig("densenet_bc_22_4", 10**13, 32, threads=1)
    (row,) = compare.run(settings, ["naive"], repeats=1)["rows"]
    assert "allocate" in row["error"] and row["median_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "naiv"], "did you mean 'naive'"),
        (["--model", "densenet12"], "did you mean 'densenet121'"),
        (["--batch", "0"], "must be a whole number of 1 or more"),
        (["--json", "/nowhere/out.json"], "cannot write a file at '/nowhere/out.json'"),
        (["--impl", ","], "names no implementation"),
        (["--isa", "avx3"], "argument --isa: there is no 'avx3': this machine ("),
    ],
)
def test_compare_refuses_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_compare_writes_readmes_rows(tmp_path, monkeypatch, capsys):
    """Of a run with the baseline instruction set; ratios are those of what stands beside them."""
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    impls = ["naive", "checkpoint+channels-last", "effdense-minimal"]
    arguments = [*TINY, "--isa", "default", "--impl", ",".join(impls), "--json", str(out)]
    assert compare.main([*arguments, "--table", str(page)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert {(row["isa"], row["cpu_capability"]) for row in rows} == {("default", "DEFAULT")}
    environment = result["environment"]
    assert environment["isa"] == "default" and environment["isa_variables"]["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert environment["cpu_capability"] == environment["effdense"]["cpu_capability"] == "DEFAULT"
    assert "(DEFAULT, limited by --isa default)" in capsys.readouterr().out
    fastest = min(row["median_ms"] for row in rows[:2])
    assert [row["vs_fastest_peer"] for row in rows] == [fastest / row["median_ms"] for row in rows]
    heading, rule, what, *lines = page.read_text().splitlines()
    assert heading == "| | ms/step | vs fastest peer | peak MiB | vs naive |" and rule.count("---") == 5
    assert what == "| **DenseNet-BC-22-4, batch 2, 32x32, training, limited to DEFAULT, 1 thread** | | | | |"
    names = ["naive", "checkpoint, channels-last", 'effdense, `memory="minimal"`']
    for row, name, line in zip(rows, names, lines, strict=True):
        memory = row["peak_bytes"] / rows[0]["peak_bytes"]
        cells = [name, compare.milliseconds(row), f"{fastest / row['median_ms']:.2f}x as fast"]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{memory:.2f}x"]
        assert line == f"| {' | '.join(cells)} |"


def test_compiled_code_is_limited_too():
    """Its own processor would otherwise be what GCC writes scalar loops for."""
    settings = WorkerConfig("densenet_bc_10_4", 1, 32, threads=1, isa="default")
    (row,) = compare.run(settings, ["compile"], repeats=1)["rows"]
    assert "error" not in row, row["error"]
    assert row["cpu_capability"] == "DEFAULT"
    has_setting = hasattr(torch._inductor.config.cpp, "march")
    assert ("compiled for the machine" in row["label"]) == (not has_setting)


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(measure, "cpu_model", lambda: "AMD EPYC")
    message = r"avx512 is not there: this machine \(AMD EPYC\) has avx2, choose one of default, avx2"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        isa.argument("avx512")
    assert isa.variables("default")["MKL_CBWR"] == "COMPATIBLE"
    monkeypatch.setattr(measure, "cpu_model", lambda: "Intel(R) Xeon(R)")
    assert "MKL_CBWR" not in isa.variables("default")
    monkeypatch.setattr(isa.platform, "machine", lambda: "aarch64")
    with pytest.raises(argparse.ArgumentTypeError, match="is for x86-64 and this machine is aarch64"):
        isa.argument("default")


def test_an_instruction_set_is_checked_where_it_runs(monkeypatch):
    """A worker that does not run on it measures nothing, whatever the command line has found."""
    monkeypatch.setattr(isa, "variables", lambda name: {"ATEN_CPU_CAPABILITY": "default"})
    settings = WorkerConfig("densenet_bc_10_4", 1, 32, threads=1, isa="avx2")
    (row,) = compare.run(settings, ["naive"], repeats=1)["rows"]
    assert row["error"] == "isa: avx2 was asked for, and this process runs on default"


def test_differing_losses_are_noted():
    row = {"dtype": "float32", "impl": "naive", "first_loss": 2.0}
    rows = [
        row,
        {**row, "first_loss": 2.001},
        {**row, "first_loss": 2.1},
        {**row, "first_loss": float("nan")},
    ]
    compare._note_differing_losses(rows, 1e-3)
    assert ["note" in row for row in rows] == [False, False, True, True]


def test_plot_shows_failed_rows(tmp_path):
    numbers = {"peak_bytes": 2**20, "median_ms": 3.0, "p20_ms": 2.0, "p80_ms": 4.0}
    rows = [
        {"impl": "naive", **numbers},
        {"impl": "compile", **dict.fromkeys(numbers), "error": "no compiler"},
    ]
    plots.comparison(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_killed_worker_is_reported():
    worker = Worker("naive")
    worker._process.kill()
    with pytest.raises(WorkerError, match="killed by SIGKILL during build, probably out of memory"):
        worker.build(WorkerConfig("densenet_bc_22_4", 2, 32))
    worker.close()


def test_a_worker_leaves_when_its_parent_is_gone():
    command = [sys.executable, "-m", "benchmarks.worker"]
    subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, timeout=60, check=True)
