"""The parts of effdense import in one direction: one table, checked against every import, the lazy ones inside functions too."""

from __future__ import annotations

import ast
import graphlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "effdense"

# Files that import nothing else of effdense but one another; everyone may import them.
GROUND = {"_torch_range", "_version", "extras", "files", "tensor_files", "values"}
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
        for below in allowed:
            assert ALLOWED[below] < allowed, (room, below)


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
