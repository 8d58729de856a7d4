"""Packages that are not installed: every program says in one line which extra has what it needs, and the table of them is whole."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from effdense import cli, extras

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("effdense", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
# pytest is what benchmarks/gpu/sampling.py is a plugin of; typing_extensions, for type checkers alone, is a dependency of torch's.
OWN = {"torch", "effdense", "benchmarks", "harness", "tests", "_effdense", "pytest", "typing_extensions"}
SMALL = ["--model", "densenet_bc_10_4", "--batch", "1", "--threads", "1", "--repeats", "1"]

TRAIN = ["--model", "densenet_bc_10_4", "--data"]

# What a program is called with, and the extra that it then names where no package is there; None: it does without them.
PROGRAMS = {
    "benchmarks.compare": (SMALL, "bench"),
    "benchmarks.cuda_static": ([], "bench"),
    "benchmarks.cuda_traffic": ([], "bench"),
    "benchmarks.data.make_cut": ([], "bench"),
    "benchmarks.demo": ([], "bench"),
    "benchmarks.depth_sweep": ([], "bench"),
    "benchmarks.gpu": (["--help"], None),  # runs on a machine with torch and pytest alone
    "benchmarks.host": (["--rounds", "1"], "bench"),
    "benchmarks.isa": (["default"], None),
    "benchmarks.kernels": ([], "bench"),
    "benchmarks.libraries": ([], "bench"),
}
COMMANDS = {
    "check": ([], None),
    "plan": (["--model", "torchvision:densenet121", "--image-size", "32", "--batch", "1"], "vision"),
    "bench": (["torchvision:densenet121", "--image-size", "32"], "vision"),
    "summary": (["timm:densenet121", "--image-size", "32"], "peers"),
    "export": (["x.pt", "-o", "x.onnx"], "export"),
    "reuse": (["x.pt"], "train"),
    "plot": (["x"], "train"),
    "evaluate": (["x.pt"], "train"),
    "predict": (["x.pt", "x.png"], "train"),
    "train": ([*TRAIN, "cifar10", "--data-root", "FOLDER", "--out", "FOLDER/out"], "vision"),
}
# One package alone is missing, from what needs it in some cases only.
SOME = [
    ("matplotlib", ["benchmarks.compare", *SMALL, "--plot", "x.png"], "bench"),
    ("matplotlib", ["benchmarks.depth_sweep", "--plot", "x.png"], "bench"),
    ("matplotlib", ["benchmarks.demo"], "bench"),
    ("numpy", ["benchmarks.compare", *SMALL, "--data", "fashion-mnist"], "bench"),
    ("numpy", ["benchmarks.depth_sweep", "--budget", "1GiB"], "bench"),
    ("torchvision", ["benchmarks.compare", "--model", "torchvision:densenet121"], "vision"),
    (
        "PIL",
        ["effdense", "train", *TRAIN, "folder", "--data-root", "FOLDER", "--out", "FOLDER/out"],
        "train",
    ),
]


def run_without(hidden: str, programs: list[list[str]]) -> list[dict]:
    command = [sys.executable, "-m", "tests._run_without", hidden, json.dumps(programs)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_names(extra: str | None, result: dict, what: object) -> None:
    lines = result["stderr"].strip().splitlines()
    if extra is None:
        assert result["status"] == 0 and not lines, (what, result)
        return
    assert result["status"] == 2, (what, result)
    # argparse writes the usage before its line.
    assert f"pip install 'effdense[{extra}]'" in lines[-1], (what, result)
    assert "Traceback" not in result["stderr"] and (len(lines) == 1 or lines[0].startswith("usage:")), result


def test_every_program_is_here() -> None:
    """Those with a command line: a new one must say what it is called with."""
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in SOURCES
        if "__main__" in (text := path.read_text())
        and "ArgumentParser" in text
        and "effdense/" not in str(path.relative_to(ROOT))
    }
    assert set(PROGRAMS) == programs


def test_every_command_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    listed = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert listed and set(COMMANDS) == set(listed[1].split(","))


def test_programs_without_any_package(tmp_path: Path) -> None:
    calls = {name: [name, *arguments] for name, (arguments, _) in PROGRAMS.items()}
    calls |= {name: ["effdense", name, *arguments] for name, (arguments, _) in COMMANDS.items()}
    calls = {name: [part.replace("FOLDER", str(tmp_path)) for part in call] for name, call in calls.items()}
    results = run_without(",".join(extras.PACKAGES), list(calls.values()))
    for (name, call), result in zip(calls.items(), results, strict=True):
        assert_names((PROGRAMS | COMMANDS)[name][1], result, call)


@pytest.mark.parametrize("hidden", sorted({package for package, _, _ in SOME}))
def test_programs_without_one_package(hidden: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "x.png").touch()
    cases = [(call, extra) for package, call, extra in SOME if package == hidden]
    calls = [[part.replace("FOLDER", str(tmp_path)) for part in call] for call, _ in cases]
    for (call, extra), result in zip(cases, run_without(hidden, calls), strict=True):
        assert_names(extra, result, call)
        assert extras.PACKAGES[hidden].name in result["stderr"].splitlines()[-1]


def test_measuring_needs_no_package() -> None:
    """Nothing is imported with a module: `benchmarks.compare.run` works on a machine with torch alone."""
    for path in SOURCES:
        outside = {name for name in imported(ast.parse(path.read_text()).body) if extras.has(name)}
        assert not outside or path.name == "plots.py", (path, outside)


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """The modules that statements import when they run, those of type checking apart."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            yield statement.module or ""


def test_every_package_is_in_the_table() -> None:
    for path in SOURCES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
        roots = {name.partition(".")[0] for name in imported(nodes)}
        assert not (unknown := {r for r in roots - sys.stdlib_module_names - OWN if not extras.has(r)}), (
            path,
            unknown,
        )


def test_the_table_agrees_with_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    del declared["test"]
    for extra, names in declared.items():
        listed = {package.name for package in extras.PACKAGES.values() if extra in package.extras}
        assert listed == {name.partition(";")[0] for name in names}, extra
    assert {extra for package in extras.PACKAGES.values() for extra in package.extras} == set(declared)
