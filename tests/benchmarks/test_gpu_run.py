"""`make gpu` without a GPU: the stages' command lines, failures, time limits, the budget, an interruption, the report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import processes, report
from benchmarks.gpu.runner import LOG_BYTES, Run
from benchmarks.gpu.stages import NAMES, PLAN, REST, Stage, command_line

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]
CANNED = json.loads((Path(__file__).parent / "canned" / "gpu_report.json").read_text())

COMMANDS = {
    "machine": "PYTHON -m benchmarks.gpu.machine --json F --device cuda:1",
    "build": "PYTHON -m benchmarks.gpu.build --json F --device cuda:1",
    "check": "PYTHON -m effdense check --device cuda:1",
    "tests": "PYTHON -m benchmarks.gpu.card_tests --json F --device cuda:1 --seconds 93",
    "operators": "PYTHON -m benchmarks.gpu.operators --json F --device cuda:1",
    "steps": "PYTHON -m benchmarks.gpu.steps --json F --device cuda:1 --seconds 93",
    "launchers": "PYTHON -m benchmarks.gpu.launchers --json F --device cuda:1 --seconds 93",
    "kernelbench": "PYTHON -m benchmarks.gpu.kernelbench --json F --device cuda:1",
    "counters": "PYTHON -m benchmarks.gpu.counters --json F --device cuda:1",
    "host": "PYTHON -m benchmarks.gpu.host --json F --device cuda:1",
    "compile": "PYTHON -m benchmarks.gpu.steps --json F --device cuda:1 --compile --seconds 93",
}


def python(code: str, name: str = "machine", seconds: int = 30, **more: Any) -> Stage:
    """A stage that runs `code`; `result` in it is where its result goes."""
    return Stage(name, f"runs {name}", seconds, ("{python}", "-c", code, "{json}"), **{"needs": (), **more})


SAVE = "import json, sys; json.dump({'finding': 'three', 'card': {'name': 'G', 'capability': '9.0'}}, open(sys.argv[1], 'w'))"
ROW = {"outcome": "ok", "reason": None, "seconds": 0.0, "finding": ""}


def run(
    folder: Path, *stages: Stage, budget: float = 60, **more: Any
) -> tuple[int, dict[str, dict[str, Any]], list[str]]:
    """The exit status, the report's rows by stage, and what was printed."""
    said: list[str] = []
    status = Run(stages, folder, budget, say=said.append, **more).all()
    document = json.loads((folder / "report.json").read_text())
    return status, {row["name"]: row for row in document["stages"]}, said


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the plan


def test_the_plan_fits_into_eight_minutes() -> None:
    limits = [stage.seconds for stage in PLAN]
    assert limits[-1] == REST and sum(limits[:-1]) <= 480 - 25
    for i, stage in enumerate(PLAN):
        assert set(stage.needs) <= set(NAMES[:i]), stage.name


def test_every_command_line() -> None:
    lines = {s.name: command_line(s, json="F", device="cuda:1", seconds=100, python="PYTHON") for s in PLAN}
    assert {name: " ".join(line) for name, line in lines.items()} == COMMANDS


@pytest.mark.parametrize("stage", [s for s in PLAN if s.command[2] != "effdense"], ids=lambda s: s.name)
def test_every_stage_takes_its_arguments(stage: Stage, tmp_path: Path, monkeypatch: Any) -> None:
    """Each module's own parser, up to the point where it would look for a card."""
    module = __import__(stage.command[2], fromlist=["main"])
    seen = []

    def stop(description: str, given: Any = None, **more: Any) -> None:
        seen.append(original(description, given, **more))
        raise KeyboardInterrupt

    original = module.results.arguments
    monkeypatch.setattr(module.results, "arguments", stop)
    line = command_line(stage, json=str(tmp_path / "f"), device="cuda:1", seconds=100)
    with pytest.raises(KeyboardInterrupt):
        module.main(line[3:])
    assert seen[0].device == "cuda:1" and seen[0].json == tmp_path / "f"


# --- what becomes of a stage


def test_a_result_and_the_log_are_kept(tmp_path: Path) -> None:
    status, rows, said = run(tmp_path, python(f"print('hello'); {SAVE}"))
    row = rows["machine"]
    assert status == 0 and row["outcome"] == "ok" and row["finding"] == "three" and row["result"]["card"]
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert said[0] == "machine: runs machine, at most 30 s" and said[1].endswith("three")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "report.json", "report.md"]


def test_after_a_failure_the_others_run(tmp_path: Path) -> None:
    stages = [
        python("import sys; print('what a pity'); sys.exit(3)", "build"),
        python("print('9 passed')", "tests"),
        python("", "steps", needs=("build",)),
        python("", "launchers", tools=("no-such-program",)),
        Stage("host", "", 5, ("/no/such/interpreter",), needs=()),
    ]
    status, rows, _ = run(tmp_path, *stages)
    assert status == 1
    assert [row["outcome"] for row in rows.values()] == ["failed", "ok", "skipped", "skipped", "failed"]
    assert rows["build"]["reason"] == "what a pity" and rows["tests"]["finding"] == "9 passed"
    assert rows["steps"]["reason"] == "build did not succeed"
    assert rows["launchers"]["reason"] == "no-such-program is not on the PATH"
    assert rows["host"]["reason"] == "/no/such/interpreter cannot be started: No such file or directory"


HANG = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", ignore])
other = subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
json.dump({"finding": "half of it", "pids": [os.getpid(), child.pid, other.pid]}, open(sys.argv[1], "w"))
time.sleep(600)
"""


def test_a_stage_that_takes_too_long_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    status, rows, _ = run(tmp_path, python(HANG, seconds=6), python("print('next')", "host"))
    row = rows["machine"]
    assert status == 1 and row["outcome"] == "timed out" and row["reason"] == "ended after its limit of 6 s"
    assert row["finding"] == "half of it" and len(row["result"]["pids"]) == 3
    assert not any(alive(pid) for pid in row["result"]["pids"])


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    """Its parent has ended: it is found because `make gpu` adopts it, which is set for a whole process, so in one of its own."""
    leave = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], start_new_session=True); print(p.pid)"
    )
    code = f"""
from pathlib import Path
from benchmarks.gpu import processes, runner, stages
processes.adopt_orphans()
stage = stages.Stage("host", "", 30, ("{{python}}", "-c", {leave!r}), needs=())
run = runner.Run([stage], Path({str(tmp_path)!r}), 60)
assert run.all() == 0
print(run.document["stages"][0]["finding"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not alive(int(done.stdout.splitlines()[-1]))


def test_the_budget_ends_everything(tmp_path: Path) -> None:
    stages = [
        python("import time; time.sleep(600)", "build"),
        python("", "tests"),
    ]
    start = time.monotonic()
    status, rows, _ = run(tmp_path, *stages, budget=4)
    assert time.monotonic() - start < 20 and status == 1
    assert rows["build"]["outcome"] == "timed out" and rows["build"]["limit_s"] <= 4
    assert rows["tests"]["reason"] == "the budget of 4 s is spent"


def test_a_long_log_keeps_its_beginning_and_end(tmp_path: Path) -> None:
    run(tmp_path, python(f"print('first'); print('x' * {2 * LOG_BYTES}); print('last')"))
    log = (tmp_path / "log.txt").read_text()
    assert LOG_BYTES < len(log) < 1.1 * LOG_BYTES and "first" in log and "last" in log
    assert re.search(r"\[\.\.\. \d+ bytes \.\.\.\]", log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reports_what_there_is(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import sys
from benchmarks.gpu import __main__ as gpu, stages
gpu.PLAN = (
    stages.Stage("machine", "", 30, ("{{python}}", "-c", {SAVE!r}, "{{json}}"), needs=()),
    stages.Stage("build", "", 60, ("sleep", "60"), needs=()),
    stages.Stage("host", "", 60, ("sleep", "60"), needs=()),
)
sys.exit(gpu.main(["--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while "build: " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    rows = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert process.returncode == 1 and "1 ok, 1 interrupted, 1 skipped" in out
    assert [row["outcome"] for row in rows] == ["ok", "interrupted", "skipped"]


def test_effdense_checks_the_card_by_itself_in_two_stages_only(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("EFFDENSE_SELF_CHECK", raising=False)
    show = "import os; print(os.environ.get('EFFDENSE_SELF_CHECK'))"
    _, rows, _ = run(tmp_path, python(show, "check", checked=True), python(show, "steps"))
    assert [row["finding"] for row in rows.values()] == ["None", "0"]
    assert [stage.name for stage in PLAN if stage.checked] == ["check", "tests"]


# --- the command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_a_dry_run_says_what_would_run(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "new" / "folder"), "--dry-run")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "new" / "folder" / "report.md").read_text()
    assert "Nothing was measured; this is what would run." in text
    for stage in PLAN:
        assert f"python {' '.join(stage.command[1:3])}" in text and f"{stage.name} " in done.stdout


def test_without_a_card_one_sentence_says_so(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path))
    assert done.returncode == 1
    rows = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert rows[0]["outcome"] == "failed" and rows[0]["reason"].startswith("cuda cannot be used: ")
    assert {row["reason"] for row in rows[1:]} == {"there is no GPU that torch can use"}
    assert rows[0]["result"]["software"]["torch"] in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "{}", "--stages", "build,chekc"], "unknown stage 'chekc'; there are machine, build, "),
        (
            ["--out", "{}", "--budget", "soon"],
            "must be a time such as 8m, 7m30s or 480 (seconds), got 'soon'",
        ),
        (["--out", "{}", "--budget", "0"], "must be a time such as"),
        (["--out", "{}", "--device", "cpu"], "must be cuda or cuda:N, got 'cpu'"),
        (["--out", "{}/file/folder"], "cannot be a folder"),
        ([], "--out"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        gpu.main([argument.format(tmp_path) for argument in arguments])
    assert message in capsys.readouterr().err


def test_times() -> None:
    assert [gpu.seconds(text) for text in ("8m", "480", "7m30s", "90s")] == [480, 480, 450, 90]


def test_make_gpu_is_the_same_command() -> None:
    line = ["make", "--no-print-directory", "-n", "gpu", "OUT=/x", "BUDGET=5m", "PYTHON=py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "py -m benchmarks.gpu --out /x --budget 5m"


# --- the report


def test_the_table_of_a_canned_report() -> None:
    lines = report.table(CANNED).splitlines()
    assert len(lines) == 2 + len(PLAN) + 1
    assert lines[-1] == "7 ok, 1 failed, 1 timed out, 2 skipped; 302 s of 480"
    assert re.search(
        r"tests +failed +41.0  pytest ended with status 1; first: .*; 810 passed, 1 failed", lines[5]
    )


@pytest.mark.parametrize(
    "line",
    [
        "# `make gpu`: A made-up GPU, compute capability 9.0",
        "| cuda/kernels/bottleneck.cu | 61.0 |",
        "| tests/ops/test_pool.py | 810 | 1 | 0 | 20 |",
        "- `tests/ops/test_pool.py::test_x`: assert 1 | 2 == 2",
        "**bfloat16**; ceilings: gemm 790 TFLOP/s, copy 3.00 TB/s",
        "| `bottleneck` | 1.40 (0.125) |",
        "| 121 b64 224² bf16 | naive+channels-last | 100 | 1.00x | 8192 | 1.00x |",
        "| 121 b64 224² bf16 | effdense-balanced+channels-last (its first loss is 7, naive's is 6.9) | 50.0 | 2.00x | 2048 | 0.25x |",
        "| 121 b64 224² bf16 | checkpoint+channels-last | failed | CUDA out of memory |  |  |",
        "| memcheck | 0 errors | 11.5 |",
        "| 13 transition 32 to 64 | 7.33 | 3.15 | 6.00 | 2.00 | 3.00x | 1.5e-04 (2.5e-04) |",
        "| 121 b64 224² bf16 | effdense-balanced+channels-last | 20.0 | 40.0 | 41.0 | 812 |",
        "| counters | the two GEMM kernels' counters | skipped | 0.0 | 25 | ncu is not on the PATH |",
    ],
)
def test_the_markdown_of_a_canned_report(line: str) -> None:
    assert line in report.markdown(CANNED).splitlines()


def test_a_result_that_is_not_whole_does_not_cost_the_report() -> None:
    stages = [{**row, "result": row["result"] and {"rows": [{"op": "bn_relu"}]}} for row in CANNED["stages"]]
    text = report.markdown({**CANNED, "stages": stages})
    assert text.count("Its result is not whole (KeyError: ") == sum(bool(row["result"]) for row in stages) - 1


def test_the_canned_report_has_the_form_of_a_real_one(tmp_path: Path) -> None:
    run(tmp_path, python(SAVE))
    real = json.loads((tmp_path / "report.json").read_text())
    assert real.keys() == CANNED.keys() and real["form"] == CANNED["form"]
    assert real["stages"][0].keys() == CANNED["stages"][0].keys()
    assert [row["name"] for row in CANNED["stages"]] == list(NAMES)
