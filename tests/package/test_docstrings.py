"""The examples in the docstrings of what docs/api.md names run and give what they show; so does a user's script.

Type checkers read that script in `make lint`.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from tests.package import _user_script

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
# The same constructor with other sizes: "See densenet121."
AS_DENSENET121 = {f"effdense.models.densenet{n}" for n in (161, 169, 201, 264)}
# Its example would build DenseNet-169; densenet_d2l's shows the same.
AS_OTHERS = {"effdense.models.densenet169_tutorial"}


def find(name: str) -> Any:
    value: Any = effdense
    for part in name.split(".")[1:]:
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(name)
    return value


def examples_of(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(find(name)) or "")


CALLABLE = [name for name in NAMES if not inspect.ismodule(find(name))]


def run_examples(name: str, text: str) -> None:
    """Runs a docstring's examples, with the names that a reader has: effdense, torch, and the library that is named."""
    given: dict[str, Any] = {"effdense": effdense, "torch": torch}
    for library in ("timm", "torchvision"):
        if f"{library}." in text:
            given[library] = pytest.importorskip(library)
    found = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    printed: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=printed.append)
    if printed:
        raise AssertionError("".join(printed))


@pytest.mark.parametrize("name", CALLABLE)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(name, inspect.getdoc(find(name)) or "")


def test_every_public_name_has_an_example() -> None:
    assert len(CALLABLE) > 20
    without = {name for name in CALLABLE if not examples_of(name)}
    assert without == AS_DENSENET121 | AS_OTHERS


def test_a_wrong_example_is_found() -> None:
    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        run_examples("a name", ">>> 1 + 1\n3\n")
    with pytest.raises(AssertionError, match="AttributeError"):
        run_examples("a name", ">>> effdense.conver\n")


def test_dir_shows_public_names_only() -> None:
    assert dir(effdense) == sorted(effdense.__all__)
    assert all(hasattr(effdense, name) for name in dir(effdense))


def test_user_script() -> None:
    _user_script.main()
