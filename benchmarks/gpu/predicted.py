"""Predicted times (benchmarks/cuda_model.py) beside the times that the stages operators and steps measured.

The predictions are a file, written where the kernels are read (benchmarks.cuda_static --predict): on the card's machine there is no
time to compile what they need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu import results

FILE = results.ROOT / "docs" / "results" / "cuda-prediction.json"
# Names of devices, and which card of the model each is. Other variants have other clocks and memory.
DEVICES = {
    "H100": r"H100 (80GB HBM3|SXM)",
    "A100": r"A100-SXM4-80GB",
    "RTX 4090": r"RTX 4090$",
    "T4": r"\bT4$",
}


def card_of(name: str) -> str | None:
    """The model's name of a device, None where it has none."""
    return next((card for card, pattern in DEVICES.items() if re.search(pattern, name)), None)


def numbers_of(numbers: str, card: str) -> str:
    """Whose predictions are those of other numbers: bfloat16 has float16's tiles and rates, but on 7.5."""
    return "float16" if numbers == "bfloat16" and card != "T4" else numbers


def load() -> dict[str, Any]:
    """The file; without it, nothing is predicted."""
    try:
        return json.loads(FILE.read_text())
    except (OSError, ValueError):
        return {"operators": [], "steps": []}


def section(row: Mapping[str, Any], device: str) -> list[list[str]]:
    """Rows of a table for a stage: what, measured ms, predicted ms, measured / predicted; none where nothing is predicted."""
    card = card_of(device)
    result = row.get("result")
    if card is None or not result:
        return []
    if row["name"] == "operators":
        return _operators(result["rows"], card)
    return _steps(result["rows"], card) if row["name"] == "steps" else []


def _operators(rows: Iterable[Mapping[str, Any]], card: str) -> list[list[str]]:
    of = {(r["numbers"], r["shape"], r["op"]): r["ms"] for r in load()["operators"] if r["card"] == card}
    found = []
    for part in rows:
        numbers = numbers_of(part["numbers"], card)
        for r in part["rows"]:
            if predicted := of.get((numbers, r["shape"], r["op"])):
                found.append(
                    _cells(f"`{r['op']}`, {r['shape']}, {part['numbers']}", r["median_ms"], predicted)
                )
    return found


def _steps(rows: Iterable[Mapping[str, Any]], card: str) -> list[list[str]]:
    of = {(r["numbers"], r["model"], r["images"]): r["ms"] for r in load()["steps"] if r["card"] == card}
    found = []
    for r in rows:
        numbers = numbers_of("TF32" if r["dtype"] == "float32" else r["dtype"], card)
        predicted = of.get((numbers, r["model"], r["batch"]))
        if predicted and r["impl"].startswith("effdense-balanced") and "error" not in r:
            found.append(_cells(f"step of {r['config']}", r["median_ms"], predicted))
    return found


def _cells(what: str, measured: float, predicted: float) -> list[str]:
    return [what, f"{measured:.3f}", f"{predicted:.3f}", f"{measured / predicted:.2f}"]


def without_a_card() -> list[list[str]]:
    """What a dry run shows: card and numbers, net and images, launches, predicted ms of a step."""
    return [
        [f"{r['card']}, {r['numbers']}", f"{r['model']}, {r['images']}", str(r["launches"]), f"{r['ms']:.2f}"]
        for r in load()["steps"]
    ]
