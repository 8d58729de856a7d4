"""`make gpu` beside the predictions: which card they are for, and what the report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import predicted, report

pytestmark = pytest.mark.tools


@pytest.mark.parametrize(
    "device, card",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", "T4"),
        ("", None),
    ],
)
def test_which_card(device: str, card: str | None) -> None:
    assert predicted.card_of(device) == card


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Predictions of 2 ms for a step, and of 0.5 ms for an operator."""
    step = {
        "card": "H100",
        "numbers": "float16",
        "model": "densenet121",
        "images": 64,
        "ms": 2.0,
        "launches": 7,
    }
    operator = {"card": "H100", "numbers": "TF32", "shape": "s", "op": "bottleneck", "ms": 0.5}
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"steps": [step], "operators": [operator]}))
    monkeypatch.setattr(predicted, "FILE", path)
    return path


OPERATORS = {
    "name": "operators",
    "title": "operators",
    "result": {"rows": [{"numbers": "TF32", "rows": [{"op": "bottleneck", "shape": "s", "median_ms": 0.6}]}]},
}
STEP = {"config": "121", "model": "densenet121", "batch": 64, "dtype": "bfloat16", "median_ms": 5.0}


def test_measured_beside_predicted(file: Path) -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert predicted.section(OPERATORS, h100) == [["`bottleneck`, s, TF32", "0.600", "0.500", "1.20"]]
    rows = [STEP | {"impl": impl} for impl in ("naive+channels-last", "effdense-balanced+channels-last")]
    steps = {"name": "steps", "title": "steps", "result": {"rows": rows}}
    assert predicted.section(steps, h100) == [["step of 121", "5.000", "2.000", "2.50"]]
    rows[1]["dtype"] = "float32"  # TF32, for which nothing is predicted
    assert predicted.section(steps, h100) == []
    assert predicted.section(OPERATORS, "Tesla T4") == predicted.section(OPERATORS, "another") == []
    assert predicted.section({"name": "operators", "result": None}, h100) == []


def test_bfloat16_is_float16_but_on_turing() -> None:
    assert predicted.numbers_of("bfloat16", "A100") == "float16"
    assert predicted.numbers_of("bfloat16", "T4") == "bfloat16"


def test_without_the_file_nothing_is_predicted(file: Path) -> None:
    file.unlink()
    assert predicted.section(OPERATORS, "NVIDIA H100 80GB HBM3") == predicted.without_a_card() == []


def document(**changed: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {
        **OPERATORS,
        "outcome": "ok",
        "seconds": 1.0,
        "limit_s": 2.0,
        "reason": "",
        "finding": "",
        "command": [],
    }
    stage["result"]["rows"][0]["ceilings"] = {}
    stage["result"]["rows"][0]["rows"][0]["time_to_floor"] = 1.5
    whole = {"card": {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}, "date": "d", "commit": "c"}
    return {**whole, "dry_run": False, "stages": [stage], "spent_s": 1.0, "budget_s": 2.0, **changed}


def test_the_report(file: Path) -> None:
    text = report.markdown(document())
    assert "| `bottleneck`, s, TF32 | 0.600 | 0.500 | 1.20 |" in text and "## Predicted" not in text
    dry = report.markdown(document(dry_run=True, card=None))
    assert "| H100, float16 | densenet121, 64 | 7 | 2.00 |" in dry and report.NOT_MEASURED in dry


def test_the_file_that_is_there_has_every_card() -> None:
    found = predicted.load()
    assert found["measured"] is False
    assert {row["card"] for row in found["steps"]} == set(predicted.DEVICES)
    assert {row["card"] for row in found["operators"]} == set(predicted.DEVICES)
