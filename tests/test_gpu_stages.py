"""What the stages of `make gpu` do, as far as it can be seen without a GPU: builds, parsers, the steps' turns, KernelBench's nets."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from benchmarks import devices, models
from benchmarks.gpu import build, card_tests, counters, host, kernelbench, launchers, results, sampling, steps
from benchmarks.worker import WorkerError, _Session
from tests.simt.compiler import KERNELS, _object, cuda_include

ROOT = Path(__file__).parents[1]
TINY = steps.Config("tiny", "densenet_bc_10_4", 2, 8)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def test_nothing_needs_what_may_be_missing() -> None:
    """On a machine where nothing can be downloaded."""
    done = run(
        "import sys\n"
        "for name in 'rich', 'matplotlib', 'expecttest', 'hypothesis', 'monai', 'xdist': sys.modules[name] = None\n"
        "from benchmarks import compare, kernels\n"
        "from benchmarks.gpu import __main__, build, card_tests, counters, gemm_kernels, host, kernelbench, launchers, "
        "machine, operators, steps"
    )
    assert done.returncode == 0, done.stderr


def test_the_runner_needs_no_torch() -> None:
    assert run("import sys; sys.modules['torch'] = None; import benchmarks.gpu.__main__").returncode == 0


# --- (b) the build

STUB = """#!{python}
# Stands for g++: makes the files that it is asked for, and writes down its arguments.
import os, socket, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=2)
    except OSError as error:
        log.write(f"network: {{error}}\\n")
for option, file in zip(arguments, arguments[1:]):
    if option in ("-o", "-MF"):
        open(file, "w").write(f"{{arguments[arguments.index('-o') + 1]}}:\\n" if option == "-MF" else "")
if "-v" in arguments or "--version" in arguments:
    print("g++ (GCC) 13.2.0")
if any(a.startswith("-dump") for a in arguments):
    print("13.2.0")
"""


def namespace_without_network() -> list[str]:
    """A command that runs another where there is no network, not even one of this machine."""
    for line in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*line, "true"], capture_output=True).returncode == 0:
            return line
    pytest.skip("unshare cannot make a network namespace here")


def test_the_build_needs_no_network(tmp_path: Path) -> None:
    """All of setup.py and torch's build, with a stub for the compiler: the real one takes minutes."""
    stub, log = tmp_path / "stub-g++", tmp_path / "log"
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(0o755)
    folder = build.source_folder(tmp_path / "source")
    environment = {**build.environment(None), "CXX": str(stub), "CC": str(stub), "CCACHE_DISABLE": "1"}
    command = [*namespace_without_network(), *build.command(tmp_path / "library", tmp_path / "objects")]
    (tmp_path / "library").mkdir()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "library" / f"_effdense{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    lines = log.read_text().splitlines()
    sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    objects = [str(source.relative_to(ROOT).with_suffix(".o")) for source in sources]
    for file in objects:
        assert any(f"-o {tmp_path}/objects/{file}" in line for line in lines), file
    assert set(line for line in lines if line.startswith("network")) == {
        "network: [Errno 101] Network is unreachable"
    }
    assert {file["file"] for file in build.seconds_of_files(tmp_path / "objects" / ".ninja_log")} == {
        file.removeprefix("csrc/") for file in objects
    }


def test_setuptools_sees_no_project_file(tmp_path: Path) -> None:
    """Before 77 it refuses the licence line of pyproject.toml."""
    folder = build.source_folder(tmp_path)
    assert [file.name for file in folder.iterdir()] == ["csrc"]
    assert build.source_folder(tmp_path) == folder  # again


def test_the_build_is_for_one_card() -> None:
    cores = str(len(os.sched_getaffinity(0)))
    assert build.environment("9.0", {"A": "B"}) == {
        "A": "B",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "FORCE_CUDA": "1",
        "MAX_JOBS": cores,
    }
    line = build.command()
    assert line[1:4] == [str(ROOT / "setup.py"), "build_ext", "--build-lib"] and line[4] == str(ROOT)


# --- (d) the tests

MARK = "@pytest.mark." + "gpu"  # not as a line of this file: card_tests looks for it
SAMPLED = f"""
import pytest
{MARK}
@pytest.mark.parametrize("i", range(20))
def test_number(i):
    assert i != 7
{MARK}
def test_skipped():
    pytest.skip("for a reason")
def test_other():
    assert False
"""


def sample(tmp_path: Path, until: float, *arguments: str) -> dict[str, Any]:
    (tmp_path / "test_sampled.py").write_text(SAMPLED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    file = tmp_path / "lines"
    setting = json.dumps({"until": until, "file": str(file)})
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.gpu.sampling",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, sampling.VARIABLE: setting, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*line, *arguments, "."], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    return card_tests.summarize(file.read_text().splitlines())


@pytest.mark.parametrize("arguments", [[], ["-n", "2"]])
def test_a_sample_of_tests(tmp_path: Path, arguments: list[str]) -> None:
    found = sample(tmp_path, time.time() + 600, *arguments)
    assert found["total"] == {"passed": 19, "failed": 1, "skipped": 1, "not run": 0}
    assert found["failures"] == [{"test": "test_sampled.py::test_number[7]", "message": "assert 7 != 7"}]


def test_after_the_time_limit_tests_are_not_run(tmp_path: Path) -> None:
    found = sample(tmp_path, time.time() - 1)
    assert found["total"] == {"passed": 0, "failed": 0, "skipped": 0, "not run": 21}


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    found = sample(tmp_path, time.time() + 600, "--continue-on-collection-errors")
    assert found["total"]["passed"] == 19 and found["total"]["failed"] == 2
    assert "No module named 'no_such_module'" in found["failures"][0]["message"]


def test_the_order_is_random_and_the_same_in_every_process() -> None:
    items = [list(range(100)) for _ in range(2)]
    for copy_ in items:
        sampling.pytest_collection_modifyitems(copy_)  # type: ignore[arg-type]
    assert items[0] == items[1] != sorted(items[0])


PRETEND = """
import sys, torch, pytest
torch.cuda.is_available = lambda: True
class Files:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        print("FILES", *sorted({item.nodeid.partition("::")[0] for item in items}))
arguments = ["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*arguments, "--continue-on-collection-errors", "tests"], plugins=[Files()]))
"""


def test_every_file_with_a_test_for_the_card_is_found() -> None:
    """And two or three that have none: their operators may get CUDA kernels."""
    done = run(PRETEND)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FILES")]
    wanted, found = set(line.split()[1:]), set(card_tests.files())
    assert wanted <= found and len(found) <= len(wanted) + 4, (wanted, found)
    assert {"tests/test_gpu.py", "tests/test_bottleneck.py", "tests/test_dense_block.py"} <= wanted


# --- (e) the launchers' program


@pytest.mark.skipif(cuda_include() is None, reason="needs nvcc")
def test_the_launchers_program_is_cuda_and_finds_what_the_simt_kernels_have(tmp_path: Path) -> None:
    """nvcc compiles its main; what that leaves open is in the kernels' objects, here those of the harness: the names are the same."""
    main, link = launchers.build_commands("9.0", [Path("a.o"), Path("b.o")], tmp_path / "launchers")
    done = subprocess.run(main, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert link == [
        "nvcc",
        "-arch=sm_90",
        f"{tmp_path}/launchers.o",
        "a.o",
        "b.o",
        "-o",
        f"{tmp_path}/launchers",
    ]

    def names(*options: str) -> set[str]:
        lines = subprocess.run(["nm", *options], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        return {line.split()[-1] for line in lines if "effdense7kernels" in line}

    wanted = names("--undefined-only", f"{tmp_path}/launchers.o")
    assert len(wanted) > 40
    assert wanted <= names("--defined-only", *(str(_object(kernel)) for kernel in KERNELS))


@pytest.mark.parametrize(
    "status, text, outcome",
    [
        (
            0,
            "========= COMPUTE-SANITIZER\nevery launcher has run\n========= ERROR SUMMARY: 0 errors\n",
            "0 errors",
        ),
        (
            0,
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "0 hazards displayed (0 errors, 0 warnings)",
        ),
        (
            9,
            "========= Invalid __global__ read of size 4 bytes\n=========     at x\n========= ERROR SUMMARY: 3 errors\n",
            "FAILED: 3 errors; Invalid __global__ read of size 4 bytes",
        ),
        (1, "========= Error: Device not supported.\n", "FAILED: status 1: Error: Device not supported."),
        (
            2,
            "launch of x: oops\n========= ERROR SUMMARY: 0 errors\n",
            "FAILED: status 2: ERROR SUMMARY: 0 errors",
        ),
        (0, "", "FAILED: status 0: no output"),
        (None, "=========", "not finished in the time limit"),
    ],
)
def test_what_a_sanitizer_says(status: int | None, text: str, outcome: str) -> None:
    assert launchers.verdict("memcheck", status, text) == {"tool": "memcheck", "outcome": outcome}


def test_the_sanitizers_command() -> None:
    line = launchers.sanitizer_command("racecheck", Path("/p"))
    assert " ".join(line) == "compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 20 /p"


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
        ours = effdense.models.densenet121(spatial_dims=3, in_channels=1, num_classes=10)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert {key: value.shape for key, value in naive.state_dict().items()} == shapes


@pytest.mark.parametrize("efficient", [False, True])
def test_volumes_converted_are_the_same(efficient: bool) -> None:
    torch.manual_seed(0)
    form = {"num_classes": 3, "in_channels": 1, "spatial_dims": 3, "memory_efficient": efficient}
    naive = models.DenseNet(4, (2, 2), 8, **form).double()
    ours = effdense.convert(copy.deepcopy(naive))
    assert all(entry.converted for entry in effdense.report(ours) if entry.kind != "DenseNet")
    x = torch.randn(2, 1, 33, 40, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), naive(x))


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
