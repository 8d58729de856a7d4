"""What surrounds the code agrees with it: versions, addresses, CI's stages, the API reference, and what a released wheel may be."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import effdense
from effdense import functional, models, nn, train
from effdense._torch_range import NEWEST_TESTED, OLDEST

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]
PUBLIC = (effdense, nn, functional, models, train)


def read(path: str) -> str:
    return (ROOT / path).read_text()


@pytest.fixture
def ci(tmp_path: Path) -> Path:
    """CI's script in a folder of its own: it removes and makes things beside itself."""
    (tmp_path / ".ci").mkdir()
    return Path(shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci"))


def listed_stages(ci: Path) -> list[str]:
    listed = subprocess.run([ci, "--list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines()]


def called_stages(workflow: str) -> set[str]:
    """The stages that a workflow's steps call, by name or from its matrix."""
    calls = re.findall(r"- run: \.ci/run ([\w -]+)$", workflow, re.MULTILINE)
    matrix = re.search(r"^ +stages:\n((?: +- [\w -]+\n)+)", workflow, re.MULTILINE)
    return set(" ".join([*calls, matrix[1].replace(" - ", " ") if matrix else ""]).split())


# ---- CI


def test_the_workflow_calls_every_stage_and_no_other(ci: Path) -> None:
    assert called_stages(read(".github/workflows/ci.yml")) == set(listed_stages(ci))


def test_a_stage_that_a_workflow_forgets_is_found(ci: Path) -> None:
    workflow = read(".github/workflows/ci.yml")
    assert called_stages(workflow.replace(" editable", "")) == {*listed_stages(ci)} - {"editable"}
    assert called_stages(workflow.replace("          - avx2\n", "")) == {*listed_stages(ci)} - {"avx2"}


def test_every_python_and_both_ends_of_torch_are_in_the_matrix() -> None:
    workflow = read(".github/workflows/ci.yml")
    pairs = re.findall(r'\{ python: "([\d.]+)", torch: "torch==(\d+)\.(\d+)\.\*" \}', workflow)
    pythons = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml")))
    assert {python for python, *_ in pairs} == pythons
    torches = sorted((int(major), int(minor)) for _, major, minor in pairs)
    assert (torches[0], torches[-1]) == (OLDEST, NEWEST_TESTED)


@pytest.mark.parametrize("names", ["", "tea", "lin", "--list lint", "lint tea"])
def test_an_unknown_stage_is_refused_before_anything_runs(ci: Path, names: str) -> None:
    refused = subprocess.run([ci, *names.split(" ")], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"there is no stage \S*; \.ci/run --list names them\n", refused.stderr)
    assert [*ci.parents[1].iterdir()] == [ci.parent]


@pytest.mark.parametrize("fails, passed", [(None, 2), ("lint", 0), ("test", 1)])
def test_stages_run_in_the_full_runs_order_until_one_fails(ci: Path, fails: str | None, passed: int) -> None:
    make = ci.parents[1] / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\necho "make $1"\n[ "$1" != {fails} ]\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}", "TORCH": "torch==2.9.1"}
    stages = subprocess.run([ci, "core", "lint"], env=environment, capture_output=True, text=True)
    assert stages.returncode == (fails is not None)
    done = ["=== lint", "make lint", "=== core suite, torch 2.9.1", "make test"][: 2 * passed + 2]
    assert [line for line in stages.stdout.splitlines() if re.match(r"make|=== (?!.* took)", line)] == done
    assert stages.stdout.endswith(f"its stages:\n{passed} passed, {int(passed < 2)} failed\n")


# ---- Versions and addresses


def test_the_newest_release_has_one_version_and_one_date() -> None:
    version, date = re.findall(
        r"^## \[(\d[\d.]*)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE
    )[0]
    assert version == effdense.__version__
    citation = read("CITATION.cff")
    assert f"\nversion: {version}\n" in citation and f'\ndate-released: "{date}"\n' in citation


def test_there_is_one_address() -> None:
    found = {
        address
        for path in ("pyproject.toml", "mkdocs.yml", "CITATION.cff")
        for address in re.findall(r"https://github\.com/[\w-]+/[\w-]+", read(path))
    }
    assert len(found) == 1


# ---- The API reference


def public_names(module: ModuleType) -> set[str]:
    """By the names under which users import them."""
    return {f"{module.__name__}.{name}" for name in getattr(module, "__all__", ())}


def test_the_api_reference_has_every_public_name() -> None:
    page = read("docs/api.md")
    entries = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    assert len(entries) == len(set(entries)), "a name stands there twice"
    public = {module.__name__ for module in PUBLIC[1:]}.union(*map(public_names, PUBLIC))
    assert public - set(entries) == {"effdense.__version__"} and "`effdense.__version__`" in page
    assert set(entries) <= public, "not a public name"


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` says so too, but needs tools that a test run has not."""
    navigation = set(re.findall(r"^ +- ([\w-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    outside = {"index.md", "contributing.md", "changelog.md"}
    assert navigation == {page.name for page in ROOT.glob("docs/*.md")} | outside


# ---- Wheels


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    return importlib.import_module("wheels")


MODULE = "_effdense.cpython-311-x86_64-linux-gnu.so"


@pytest.mark.parametrize(
    "name, files, problem",
    [
        ("0.1.0+pt213cpu-cp311-cp311-manylinux_2_34_x86_64", [MODULE], None),
        ("0.1.0+pt214cu130-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64", [MODULE], None),
        ("0.1.0+pt213cpu-cp311-cp311-linux_x86_64", [MODULE], "its name must be"),
        ("0.1.0-cp311-cp311-manylinux_2_34_x86_64", [MODULE], "its name must be"),
        ("0.1.0+pt213cpu-py3-none-any", [], "its name must be"),
        ("0.1.0+pt213cpu-cp311-cp311-manylinux_2_34_x86_64", ["effdense/cli.py"], "got none"),
        (
            "0.1.0+pt213cpu-cp311-cp311-manylinux_2_34_x86_64",
            [MODULE, "effdense.libs/libgomp-24e2ab19.so.1.0.0"],
            "got _effdense.cpython-311-x86_64-linux-gnu.so, effdense.libs/libgomp-24e2ab19.so.1.0.0",
        ),
    ],
)
def test_what_a_released_wheel_may_be(
    wheels: ModuleType, tmp_path: Path, name: str, files: list[str], problem: str | None
) -> None:
    wheel = tmp_path / f"effdense-{name}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    said = wheels.why_unfit(wheel)
    assert said is None if problem is None else problem in said


@pytest.mark.parametrize("label, version", [("1", r"\+pt{}{}(cpu|cu\d+)"), ("0", ""), (None, "")], ids=str)
def test_a_released_wheels_version_says_for_which_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str | None, version: str
) -> None:
    pytest.importorskip("setuptools")
    import torch

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.delenv("EFFDENSE_LABEL", raising=False)
    if label is not None:
        monkeypatch.setenv("EFFDENSE_LABEL", label)
    run = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", run, "dist_info", "--output-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (metadata,) = tmp_path.rglob("METADATA")
    expected = re.escape(effdense.__version__) + version.format(*torch.__version__.split(".")[:2])
    assert re.search(rf"^Version: {expected}$", metadata.read_text(), re.MULTILINE)


@pytest.mark.parametrize("failing, passed", [("false", False), ("true", True)])
def test_a_command_that_fails_stops_the_build(wheels: ModuleType, failing: str, passed: bool) -> None:
    if passed:
        wheels.run(failing)
    else:
        with pytest.raises(SystemExit, match="wheels: this ended with exit status 1: false"):
            wheels.run(failing)
