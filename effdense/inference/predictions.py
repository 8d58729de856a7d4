"""Predictions as rows of CSV: file, predicted class, and the probabilities."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from torch import Tensor

from effdense.inference.measures import probabilities


def header(names: Sequence[str], top: int | None, labelled: bool = False) -> list[str]:
    """The columns' names; `top`: only so many classes, the likeliest first; `labelled`: with the class that is right."""
    start = ["file", "class"] if labelled else ["file"]
    if top is None:
        return [*start, "predicted", *(f"p({name})" for name in names)]
    return [*start, *(column for i in range(1, top + 1) for column in (f"predicted {i}", f"p {i}"))]


def row(start: Sequence[str], scores: Tensor, names: Sequence[str], top: int | None) -> list[str]:
    """An image's: what it begins with, and the rest from its scores [classes]. Where scores are equal the first is predicted."""
    p = probabilities(scores.unsqueeze(0))[0]
    if top is None:
        return [*start, names[int(scores.argmax())], *(f"{value:.6g}" for value in p.tolist())]
    order = scores.double().sort(descending=True, stable=True).indices[:top].tolist()
    return [*start, *(cell for i in order for cell in (names[i], f"{p[i].item():.6g}"))]


def as_text(cells: Sequence[object]) -> str:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def as_bytes(cells: Sequence[object]) -> bytes:
    """A line of CSV for a file, in which names of files are as the system has them."""
    return as_text(cells).encode("utf-8", "surrogateescape")
