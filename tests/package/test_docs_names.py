"""Pages and comments name what there is: paths exist, functions are where a page says, every source file is on the map.

The map is the tables of docs/architecture.md with the columns `folder` and `files`. docs/log.md and CHANGELOG.md are left out: they
name files as they were on a day. The figures of docs/results.md are compared with the files that they come from.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from effdense.ops import reference

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted(ROOT.glob("docs/*.md")))]
PAGES.remove("docs/log.md")
ARCHITECTURE = "docs/architecture.md"
FOLDERS = ("effdense", "csrc", "harness", "benchmarks", "tests", "build_backend", "docs")
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".inc", ".c"}
# On the map file by file; all else at least by its folder.
BY_NAME = ("effdense/", "csrc/", "build_backend/")
OUTPUTS = {"report.md", "settings.toml", "tensorboard/"}  # of commands
# In comments: what is the CUDA toolkit's, or a command's output.
IN_COMMENT = re.compile(r"(?<![\w*./])\w[\w/.-]*\.(?:py|cpp|h|cu|cuh|inc|md)\b")
ELSEWHERE = {"cuda_occupancy.h", "cuda_bf16.h", "cuda_fp16.h", "report.md", "script.py", "out.md"}
PATH = re.compile(r"(?!.*//)[\w.-]*[\w/.-]*(/|\.(py|cpp|h|cu|cuh|inc|c|md|toml|sh|so))")


def all_files() -> frozenset[str]:
    """Of the repository, as far as pages name them, from its root."""
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    found |= {path for path in ROOT.glob("*") if path.is_file()}
    return frozenset(f"{path.relative_to(ROOT)}" for path in found if "__pycache__" not in path.parts)


FILES = all_files()


class Line(NamedTuple):
    """A line of a page, outside of code."""

    number: int
    text: str
    cells: list[str]  # of a table's row, else none
    header: list[str]  # of the table

    def names(self, text: str | None = None) -> list[str]:
        """What stands between backticks."""
        return re.findall(r"`([^`]+)`", self.text if text is None else text)


def lines_of(text: str) -> Iterator[Line]:
    inside, header = False, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        inside ^= line.lstrip().startswith("```")
        if inside or line.startswith("    "):
            continue
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if line.startswith("|") else []
        header = (header or cells) if cells else []
        yield Line(number, line, cells, header)


def folder_of(line: Line) -> str:
    """The folder whose files a row of the map names, else nothing."""
    names = line.names(line.cells[0]) if line.header == ["folder", "files"] else []
    return names[0] if names and line.cells[1] not in ("files", "---") else ""


@functools.cache
def by_ending(files: frozenset[str]) -> dict[str, list[str]]:
    """Files and folders by every ending that a page may name them with."""
    folders = {f"{'/'.join(f.split('/')[:i])}/" for f in files for i in range(1, f.count("/") + 1)}
    found: dict[str, list[str]] = {}
    for path in sorted(files | folders):
        parts = path.split("/")
        for i in range(len(parts) - path.endswith("/")):
            found.setdefault("/".join(parts[i:]), []).append(path)
    return found


def find(name: str, files: frozenset[str], folder: str = "") -> list[str]:
    """The files, or folders, that a name may stand for: of a row of the map those in its folder, else any that end so."""
    found = by_ending(files).get(name, [])
    if folder and "/" not in name and name not in files:
        return [path for path in found if path == f"{folder}{name}"]
    return found


def missing_paths(page: str, text: str, files: frozenset[str]) -> list[str]:
    """Every path between backticks that is not there."""
    missing = []
    for line in lines_of(text):
        for name in line.names():
            known = "://" in name or name in OUTPUTS or name.startswith(("docs/results/gpu/", "build/"))
            if PATH.fullmatch(name) and not known and not find(name, files, folder_of(line)):
                missing.append(f"{page}:{line.number}: {name}")
    return missing


def missing_names(page: str, text: str, files: frozenset[str]) -> list[str]:
    """Every name that is said to be in a file (`name` in `path`, or a row `file | function`) and is not."""
    missing = []
    for line in lines_of(text):
        said = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in (`[\w./]+`)", line.text)
        if line.header[:2] == ["file", "function"] and line.names(line.cells[0]):
            said.append((line.cells[1], line.cells[0]))
        for names, path in said:
            found = find(line.names(path)[0], files)
            texts = [(ROOT / file).read_text() for file in found if (ROOT / file).is_file()]
            for name in line.names(names):
                if not any(all(re.search(rf"\b{p}\b", t) for p in name.split(".")) for t in texts):
                    missing.append(f"{page}:{line.number}: {name} in {path.strip('`')}")
    return missing


def off_the_map(text: str, files: frozenset[str]) -> list[str]:
    """The source files that the map does not have."""
    named, folders = set[str](), set[str]()
    for line in lines_of(text):
        if folder := folder_of(line):
            of_row = line.names(line.cells[0])
            folders.update(of_row)
            named |= {f"{folder}{name}" for name in line.names(line.cells[1])}
    left_out = []
    for file in sorted(files):
        folder, _, name = file.rpartition("/")
        above = [f"{'/'.join(folder.split('/')[:i])}/" for i in range(2, folder.count("/") + 2)]
        by_folder = f"{folder}/" in folders or any(f in folders for f in above)
        by_name = file.startswith(BY_NAME)
        is_source = "." + name.rpartition(".")[2] in SOURCES and name != "__init__.py" and folder
        if is_source and not (file in named if by_name else by_folder):
            left_out.append(file)
    return left_out


def anchors(text: str) -> set[str]:
    """What a link to a heading may end with, as GitHub makes it of the heading."""
    headings = [line.text.lstrip("# ") for line in lines_of(text) if line.text.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_anchors(page: str, text: str) -> list[str]:
    """Every link to a heading that is not there; whether pages are there, test_docs.py asks."""
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in target:
            file = (ROOT / page).parent / target if target else ROOT / page
            if anchor not in anchors(file.read_text()):
                dead.append(f"{page}: {target}#{anchor}")
    return dead


def comments_of(file: str, text: str) -> Iterator[str]:
    """Comments, and the docstrings of a Python file."""
    if not file.endswith(".py"):
        yield from (line.partition("//")[2] for line in text.splitlines())
        return
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def unknown_in_comments(file: str, text: str, files: frozenset[str]) -> list[str]:
    """Files that comments name and that are not there."""
    unknown = {name for name in IN_COMMENT.findall(text) if name not in ELSEWHERE and not find(name, files)}
    if not unknown:  # nor in code, so that most files need not be parsed
        return []
    named = (name for comment in comments_of(file, text) for name in IN_COMMENT.findall(comment))
    return [f"{file}: {name}" for name in named if name in unknown]


def test_comments_name_files_that_are_there() -> None:
    sources = [file for file in sorted(FILES) if Path(file).suffix in SOURCES]
    assert not [u for f in sources for u in unknown_in_comments(f, (ROOT / f).read_text(), FILES)]
    python = '"""See engine/node.py."""\n# and no_such.py\n'
    assert unknown_in_comments("x.py", python, FILES) == ["x.py: no_such.py"]
    assert unknown_in_comments("x.h", "// csrc/cpu/rows.h, no/rows.h\n", FILES) == ["x.h: no/rows.h"]


@pytest.mark.parametrize("page", [*PAGES, "docs/log.md"])
def test_headings_exist(page: str) -> None:
    assert not dead_anchors(page, (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    assert not missing_paths(page, (ROOT / page).read_text(), FILES)


@pytest.mark.parametrize("page", PAGES)
def test_names_are_where_a_page_says(page: str) -> None:
    assert not missing_names(page, (ROOT / page).read_text(), FILES)


def test_every_source_file_is_on_the_map() -> None:
    assert not off_the_map((ROOT / ARCHITECTURE).read_text(), FILES)


def test_what_is_wrong_is_found() -> None:
    text = (ROOT / ARCHITECTURE).read_text()
    missing = missing_paths("page", text, FILES)
    for wrong in ("effdense/engine/no_such.py", "no_such.cuh", "effdense/no_such/"):
        (found,) = set(missing_paths("page", f"{text}\nsee `{wrong}`\n", FILES)) - set(missing)
        assert found.endswith(f": {wrong}")
    row = "| folder | files |\n|---|---|\n| `effdense/ops/` | `stage.py` |\n"  # which is in another folder
    assert missing_paths("page", row, FILES) == ["page:3: stage.py"]
    chain = (
        "| file | function | what |\n|---|---|---|\n| `csrc/stage_forward.cpp` | `Forward`, `no_such` | |\n"
    )
    assert missing_names("page", chain, FILES) == ["page:3: no_such in csrc/stage_forward.cpp"]
    said = "`run_stage` and `no_such` in `effdense/nn/stage_run.py`"
    assert missing_names("page", said, FILES) == ["page:1: no_such in effdense/nn/stage_run.py"]
    links = "[a](architecture.md#the-map) [b](architecture.md#no-such) [c](#no-such)"
    dead = ["docs/results.md: architecture.md#no-such", "docs/results.md: #no-such"]
    assert dead_anchors("docs/results.md", links) == dead
    new = {"effdense/engine/new.py", "csrc/cpu/new.inc", "benchmarks/new/program.py", "tests/new/test_new.py"}
    assert set(off_the_map(text, FILES | new)) - set(off_the_map(text, FILES)) == new
    covered = {"tests/test_new.py", "harness/simt/samples/new.cu", "docs/x.png"}
    assert not set(off_the_map(text, FILES | covered)) & covered
    assert "csrc/stage_forward.cpp" in off_the_map(text.replace("`stage_forward.cpp`", "a file"), FILES)


def test_results_name_operators_that_are_there() -> None:
    convolutions = {"conv3x3", "conv3x3_backward"}  # PyTorch's, beside them
    for file in ("cuda-traffic", "cpu-kernels", "cpu-avx2-kernels"):
        rows = json.loads((ROOT / f"docs/results/{file}.json").read_text())["rows"]
        assert not [r["op"] for r in rows if not hasattr(reference, r["op"]) and r["op"] not in convolutions]


# ---- Figures

IMPLEMENTATIONS = {
    "naive": "naive",
    "naive, channels-last": "naive+channels-last",
    "checkpoint": "checkpoint",
    "checkpoint, channels-last": "checkpoint+channels-last",
    "compile": "compile",
    "compile, channels-last": "compile+channels-last",
    "effdense, balanced": "effdense-balanced",
    "effdense": "effdense-balanced",
    "effdense, minimal": "effdense-minimal",
}
FILE_OF = {
    "DenseNet-BC-100-12, batch 64, 32x32, training": "densenet_bc_100_12-train-2-threads",
    "DenseNet-BC-100-12, batch 64, 32x32, inference": "densenet_bc_100_12-inference-2-threads",
    "DenseNet-121, batch 8, 224x224, training": "densenet121-train-2-threads",
    "DenseNet-121, batch 8, 224x224, inference": "densenet121-inference-2-threads",
}
# Counted on a later day, and said so on the page.
COUNTED_LATER = {("DenseNet-121, batch 8, 224x224, training", "effdense, minimal"): "89 MiB, 0.09x"}


def measured(name: str) -> dict[str, Any]:
    """Rows of a file of docs/results, by implementation."""
    return {r["impl"]: r for r in json.loads((ROOT / f"docs/results/cpu-{name}.json").read_text())["rows"]}


def cell(rows: dict[str, Any], impl: str) -> str:
    """A time, and how many times as fast that is as the fastest plain PyTorch."""
    if impl not in rows:
        return "-"
    fastest = min(r["median_ms"] for i, r in rows.items() if not i.startswith("effdense"))
    return f"{rows[impl]['median_ms']:.0f} ms, {fastest / rows[impl]['median_ms']:.2f}x"


def wrong_figures(text: str) -> list[str]:
    """The rows of the first tables of docs/results.md that are not what their files say."""
    wrong, seen, title = [], 0, ""
    for line in lines_of(text):
        if line.text.startswith("#"):
            title = line.text.lstrip("# ")
        name = line.cells[0].strip("* ") if line.cells else ""
        if title not in FILE_OF or name not in IMPLEMENTATIONS:
            continue
        file, impl = FILE_OF[title], IMPLEMENTATIONS[name]
        avx2, avx512 = measured(f"avx2-{file}"), measured(file)
        peak = avx2[impl]["peak_bytes"]
        memory = f"{peak / 2**20:.0f} MiB, {peak / avx2['naive']['peak_bytes']:.2f}x"
        right = [cell(avx2, impl), cell(avx512, impl), COUNTED_LATER.get((title, name), memory)]
        seen += 1
        if line.cells[1:] != right:
            wrong.append(f"{title}, {name}: {line.cells[1:]} must be {right}")
    assert seen == 2 * (8 + 5)
    return wrong


def test_results_are_those_of_their_files() -> None:
    text = (ROOT / "docs/results.md").read_text()
    assert not wrong_figures(text)
    (one,) = wrong_figures(text.replace("2045 ms, 2.26x", "2044 ms, 2.26x"))
    assert "effdense, balanced" in one


def test_readme_has_the_results_figures() -> None:
    results = (ROOT / "docs/results.md").read_text()
    figures = re.findall(r"\d+ ms|\d+ MiB", (ROOT / "README.md").read_text())
    assert len(figures) >= 24 and not [f for f in figures if f not in results]
