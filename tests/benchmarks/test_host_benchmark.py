"""benchmarks.host: rows of every implementation that takes turns, and their table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host

pytestmark = pytest.mark.tools


def test_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "SIZES", {"densenet_bc_10_4": (2, 4)})
    monkeypatch.setenv("COLUMNS", "150")
    out = tmp_path / "out.json"
    impls = ["naive", "checkpoint", "effdense-minimal"]
    assert (
        host.main(["--model", "densenet_bc_10_4", "--impl", *impls, "--rounds", "2", "--json", str(out)]) == 0
    )
    result = json.loads(out.read_text())
    assert result["rounds"] == 2 and result["environment"]["threads"] == 1
    assert [row["impl"] for row in result["rows"]] == impls
    for row in result["rows"]:
        assert row["training_ms"] > 0 and ("inference_ms" in row) == (row["impl"] != "checkpoint")
    assert next(cells[3] for cells in host.lines(result)) == "1.00"
    assert "effdense-minimal" in capsys.readouterr().out


def test_the_rounds_are_interleaved() -> None:
    order: list[str] = []
    times = host._take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)  # type: ignore[misc]
    assert order == [*"ababab"] and set(times) == {"a", "b"}
