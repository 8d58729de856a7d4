"""`make gpu`: what its stages build and check, without a GPU: the offline build, the sample of tests, the launchers' program."""

from __future__ import annotations

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

from benchmarks.gpu import (
    build,
    card_tests,
    launchers,
    results,
    sampling,
)
from harness.simt.compiler import KERNELS, _object, cuda_include

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]


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
        sampling.pytest_collection_modifyitems(copy_)
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
    assert {"tests/test_gpu.py", "tests/ops/test_bottleneck.py", "tests/engine/test_dense_block.py"} <= wanted


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


FAKE_SANITIZER = """#!/bin/sh
case $2 in
memcheck) echo '========= ERROR SUMMARY: 0 errors';;
racecheck) echo '========= Error: Race reported'; echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'; exit 9;;
*) exec sleep 600;;
esac
"""


def test_the_sanitizers_run_side_by_side_until_the_limit(tmp_path: Path) -> None:
    (tmp_path / "compute-sanitizer").write_text(FAKE_SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    result = results.Result(tmp_path / "result.json")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        rows = launchers._run_tools(result, time.monotonic() + 5, {**os.environ, "PATH": path})
    assert {row["tool"]: row["outcome"] for row in rows} == {
        "memcheck": "0 errors",
        "racecheck": "FAILED: 1 hazard displayed (1 error, 0 warnings); Error: Race reported",
        "synccheck": "not finished in the time limit",
        "initcheck": "not finished in the time limit",
    }
    assert "memcheck: 0 errors" in result.values["finding"]
