"""The parts of effdense, and the folders beside it, import in one direction: tables, checked against every import, the lazy ones
inside functions too. And every operator's schema stands where the rule says.
"""

from __future__ import annotations

import ast
import collections
import graphlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from effdense.ops import reference, schemas

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "effdense"

# Files that import nothing else of effdense but one another; everyone may import them.
GROUND = {
    "_program",
    "_torch_range",
    "_version",
    "extras",
    "files",
    "machine",
    "progress",
    "tensor_files",
    "values",
}
# ops <- engine <- nn <- models, conversion <- tools, train <- inference <- cli: what each folder or file may import besides itself.
MODULES = {"ops", "engine", "nn"}
WHOLE_NETS = MODULES | {"models", "conversion"}
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "engine": {"ops"},
    "functional": {"ops", "engine"},
    "nn": {"ops", "engine"},
    "models": MODULES,
    "conversion": MODULES,
    "tools": WHOLE_NETS,
    "train": WHOLE_NETS,
    "inference": WHOLE_NETS | {"tools", "train"},
    "cli": WHOLE_NETS | {"tools", "train", "inference"},
    "__main__": WHOLE_NETS | {"tools", "train", "inference", "cli"},
    "__init__": WHOLE_NETS | {"functional", "tools"},
}


def modules_of(package: Path) -> dict[str, Path]:
    """Every module's file, by its dotted name within the package; a folder's __init__.py by the folder's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of the package that a file imports, wherever in it, or names in a string, and the line."""

    def resolve(parts: list[str]) -> str:
        """The longest part of a dotted name that is a module: the rest is what is in it."""
        while parts and ".".join(parts) not in modules:
            parts = parts[:-1]
        return ".".join(parts) or "__init__"

    own_folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        wanted: list[list[str]] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["effdense", *own_folder[: len(own_folder) - node.level + 1], *base]
            wanted = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("effdense.tools.plots") and the like
            first, *rest = node.value.split(".")
            wanted = [[first, *rest]] if rest and ".".join(rest) in modules else []
        for first, *rest in wanted:
            if first == "effdense":
                yield resolve(rest), getattr(node, "lineno", 0)


def wrong_imports(package: Path) -> list[str]:
    """Every import that the table does not allow, in words."""
    modules, wrong = modules_of(package), []
    for name, path in modules.items():
        room = name.split(".")[0]
        allowed = set() if room in GROUND else ALLOWED[room] | {room}
        for imported, line in imports_of(name, path, modules):
            if imported.split(".")[0] not in allowed | GROUND:
                wrong.append(f"effdense/{path.relative_to(package)}:{line} imports {imported}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


def test_every_file_has_its_place_in_the_table() -> None:
    assert {name.split(".")[0] for name in modules_of(PACKAGE)} == GROUND | ALLOWED.keys()
    # What a row allows may import no more than the row does: so the rows are floors, and the table has no circle.
    for room, allowed in ALLOWED.items():
        for lower in allowed:
            assert ALLOWED[lower] < allowed, (room, lower)


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = modules_of(PACKAGE)
    graph = {name: {m for m, _ in imports_of(name, path, modules)} - {name} for name, path in modules.items()}
    graph.pop("ops")  # hands the self-test to the dispatcher
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "name, above", [("ops.dispatch", "ops.gpu_check"), ("engine.validation", "engine.batch_norm")]
)
def test_within_a_folder(name: str, above: str) -> None:
    """The dispatcher does not know the self-test, by which cards are checked; nor messages the computation."""
    modules = modules_of(PACKAGE)
    assert above in modules
    assert above not in {m for m, _ in imports_of(name, modules[name], modules)}


@pytest.mark.parametrize(
    "file, line, imported",
    [
        ("ops/reference.py", "from effdense.engine import passes", "engine.passes"),
        ("engine/pool.py", "import effdense.nn.layers", "nn.layers"),
        ("nn/layers.py", "def lazy(): from effdense.conversion import convert", "conversion"),
        ("nn/plain.py", "from ..models import names", "models.names"),
        ("models/names.py", "from effdense import conversion", "conversion"),
        ("models/names.py", "from effdense import convert", "__init__"),
        ("conversion/probe.py", "if TYPE_CHECKING: from effdense.models import build", "models"),
        ("tools/plots.py", "import effdense.train.loop as loop", "train.loop"),
        ("train/loop.py", "m = importlib.import_module('effdense.tools.plots')", "tools.plots"),
        ("files.py", "from effdense import functional", "functional"),
    ],
)
def test_a_planted_import_is_found(file: str, line: str, imported: str, tmp_path: Path) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "effdense", ignore=shutil.ignore_patterns("__pycache__"))
    path = package / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, line]))
    assert wrong_imports(package) == [f"effdense/{file}:{len(lines) + 1} imports {imported}"]


# ---- Beside the package: harness <- benchmarks <- tests

BESIDE = {
    "effdense": set[str](),
    "harness": {"effdense"},
    "benchmarks": {"effdense", "harness"},
    "tests": {"effdense", "harness", "benchmarks"},
}


def folders_imported(path: Path) -> Iterator[tuple[str, int]]:
    """Which of these folders' modules a file imports, or names in a string ("benchmarks.worker"), and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+", str(node.value)):
            found = ROOT / str(node.value).replace(".", "/")
            names = [str(node.value)] if found.is_dir() or found.with_suffix(".py").exists() else []
        for name in names:
            if (folder := name.partition(".")[0]) in BESIDE:
                yield folder, getattr(node, "lineno", 0)


def wrong_beside(root: Path, folders: Iterator[str] | list[str]) -> list[str]:
    """Every import from one of the folders that the table does not allow, in words."""
    wrong = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            for imported, line in folders_imported(path):
                if imported not in BESIDE[folder] | {folder}:
                    wrong.append(f"{path.relative_to(root)}:{line} imports {imported}")
    return wrong


def test_the_folders_beside_the_package_import_one_way() -> None:
    assert wrong_beside(ROOT, list(BESIDE)) == []


@pytest.mark.parametrize(
    "file, line, imported",
    [
        ("harness/simt/compiler.py", "from tests._cases import SHAPES", "tests"),
        ("harness/ptx/interpreter.py", "def lazy(): import benchmarks.nets as nets", "benchmarks"),
        ("benchmarks/nets.py", "from tests import _stages", "tests"),
        ("benchmarks/measure.py", "run([sys.executable, '-m', 'tests._run_without'])", "tests"),
        ("effdense/cli.py", "from harness.simt import compiler", "harness"),
    ],
)
def test_a_planted_import_beside_the_package_is_found(
    file: str, line: str, imported: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    lines = (ROOT / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join([*lines, line]))
    wrong = wrong_beside(tmp_path, [file.partition("/")[0]])
    assert wrong == [f"{file}:{len(lines) + 1} imports {imported}"]


# ---- Where schemas stand: docs/architecture.md, "To add an operator"


def schemas_by_file(root: Path) -> dict[str, list[str]]:
    """The operators that each file defines: by m.def("name(...") in C++, as a string of the form "name(...) -> ..." in Python."""
    found = collections.defaultdict[str, list[str]](list)
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            found[f"{path.relative_to(root)}"] += re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())
    for path in sorted((root / "effdense").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Constant, ast.JoinedStr)) else ""
            found[f"{path.relative_to(root)}"] += re.findall(r"""^f?['"](\w+)\([^\n]*\) -> """, text)
    return {file: names for file, names in found.items() if names}


def implemented_in_python(root: Path) -> dict[str, str]:
    """Every operator whose plain implementation Python registers, and the file."""
    pattern = re.compile(r'library\.impl\(\s*library,\s*"(\w+)",\s*"CompositeExplicitAutograd"')
    files = sorted((root / "effdense" / "engine").glob("*.py"))
    return {name: file.name for file in files for name in pattern.findall(file.read_text())}


def files_named_above(path: Path) -> dict[str, str]:
    """Every operator of schemas.py, and the file that the comment above it names."""
    found, file = dict[str, str](), ""
    for line in path.read_text().splitlines():
        if comment := re.match(r"\s*# engine/(\w+\.py)", line):
            file = comment[1]
        elif schema := re.match(r"""\s+f?"([a-z]\w*)\(""", line):
            found[schema[1]] = file
    return found


def test_schemas_stand_where_the_rule_says() -> None:
    of = schemas_by_file(ROOT)
    switches = of.pop("csrc/cuda/bottleneck.cpp")
    assert of.keys() == {"csrc/schemas.h", "csrc/stage.h", "effdense/ops/schemas.py"}
    assert len(names := [name for every in of.values() for name in every]) == len(set(names))
    # Kernels: each has its reference, which runs without the extension.
    assert [name for name in of["csrc/schemas.h"] if not hasattr(reference, name)] == []
    # The stage in C++ and its companions, whose Python is the engine.
    assert {name.partition("_")[0] for name in of["csrc/stage.h"]} == {"stage"}
    # For checks on a GPU, of its bindings alone: they compute nothing.
    assert {name.partition("_")[0] for name in switches} == {"override"}
    # What Python calls by torch.ops, whether the extension is there or not: it is implemented in the engine.
    python = of["effdense/ops/schemas.py"]
    assert len(python) == len(schemas.SCHEMAS)
    assert implemented_in_python(ROOT) == files_named_above(PACKAGE / "ops" / "schemas.py")
    assert implemented_in_python(ROOT).keys() == set(python)
    called = {
        name
        for file in PACKAGE.rglob("*.py")
        for name in re.findall(r"torch\.ops\.effdense\.(\w+)", file.read_text())
    }
    assert called <= set(python)


@pytest.mark.parametrize(
    "file, line",
    [
        ("csrc/ops.cpp", 'void f() { m.def(\n      "forgotten(Tensor x) -> ()"); }'),
        ("csrc/cuda/bindings.h", 'void f() { m.def("forgotten(Tensor x) -> ()"); }'),
        ("effdense/engine/pool.py", "library.define('forgotten(Tensor x) -> ()')"),
    ],
)
def test_a_schema_elsewhere_is_found(file: str, line: str, tmp_path: Path) -> None:
    for folder in ("csrc", "effdense"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert schemas_by_file(tmp_path)[file] == ["forgotten"]
