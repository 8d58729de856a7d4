"""Data for the tests of a file, and a whole run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests._training import train, write_data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted, with a line for every step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(root, out) == 0
    return out
