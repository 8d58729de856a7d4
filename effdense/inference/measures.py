"""How good a model's scores are: scikit-learn's metrics, in one object, as a table, as rows of CSV and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from effdense import extras

SHOWN, WORST = 30, 20  # classes in a table; of more than that the worst
MATRIX, MISTAKES = 12, 10  # classes of a confusion matrix that is printed; of more the most frequent mistakes
WIDEST = 24  # characters of a class's name in a table


class ClassMeasures(NamedTuple):
    """One class against all others; None where that is not defined: nothing of it is there, or was said."""

    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None
    auc: float | None


class Evaluation(NamedTuple):
    """`mean` is of the classes that have images; `confusion[i][j]`: how many images of class i were taken for j."""

    images: int
    loss: float  # cross entropy in nats, as of a run's test
    accuracy: float
    mean: ClassMeasures  # its recall is the balanced accuracy
    classes: list[ClassMeasures]
    confusion: list[list[int]]


def sklearn() -> Any:
    """scikit-learn's metrics.

    Raises:
        ImportError: it is missing.
    """
    return extras.load("sklearn.metrics", "effdense evaluate", "train")


def probabilities(scores: Tensor) -> Tensor:
    """Of every class, float64: in float32 many would be exactly 1."""
    return scores.double().softmax(1)


def measure(scores: Tensor, labels: Tensor, names: Sequence[str]) -> Evaluation:
    """Measures scores [N, classes], with N of 1 or more, against labels [N]."""
    metrics, numbers = sklearn(), list(range(len(names)))
    true, said = labels.numpy(), scores.argmax(1).numpy()
    present = sorted(set(true.tolist()))
    nan = float("nan")
    rows = metrics.precision_recall_fscore_support(
        true, said, labels=numbers, average=None, zero_division=nan
    )
    of_class = probabilities(scores).numpy()
    auc = [_auc(metrics, true == i, of_class[:, i]) for i in numbers]
    classes = [
        ClassMeasures(name, int(n), _defined(precision), _defined(recall), _defined(f1), area)
        for name, precision, recall, f1, n, area in zip(names, *rows, auc, strict=True)
    ]
    means = metrics.precision_recall_fscore_support(
        true, said, labels=present, average="macro", zero_division=0.0
    )
    areas = [area for area in auc if area is not None]
    precision, recall, f1 = map(float, means[:3])
    area = sum(areas) / len(areas) if areas else None
    mean = ClassMeasures("mean", len(true), precision, recall, f1, area)
    return Evaluation(
        images=len(true),
        loss=F.cross_entropy(scores.double(), labels).item(),
        accuracy=float(metrics.accuracy_score(true, said)),
        mean=mean,
        classes=classes,
        confusion=metrics.confusion_matrix(true, said, labels=numbers).tolist(),
    )


def _auc(metrics: Any, is_class: Any, probability: Any) -> float | None:
    """The area under the ROC curve, which needs images of the class and others."""
    return float(metrics.roc_auc_score(is_class, probability)) if 0 < is_class.sum() < len(is_class) else None


def roc_curves(
    scores: Tensor, labels: Tensor, evaluation: Evaluation, most: int
) -> dict[str, tuple[Any, Any]]:
    """False and true positive rates by class, of those that have an area; of two classes the rarer one's only.

    None where there would be more than `most`, which are not drawn.
    """
    with_area = [i for i, c in enumerate(evaluation.classes) if c.auc is not None]
    if len(with_area) > most:
        return {}
    metrics, of_class, true = sklearn(), probabilities(scores).numpy(), labels.numpy()
    if len(evaluation.classes) == 2:
        with_area = sorted(with_area, key=lambda i: evaluation.classes[i].images)[:1]
    return {evaluation.classes[i].name: metrics.roc_curve(true == i, of_class[:, i])[:2] for i in with_area}


def _defined(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


# ---- in words and rows


def lines(evaluation: Evaluation) -> Iterator[str]:
    """A table of the classes, the figures of all, and what is taken for what."""
    rows = evaluation.classes
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: math.inf if row.recall is None else row.recall)[:WORST]
        yield f"the {WORST} classes of {len(evaluation.classes)} with the lowest recall (--csv has all):"
    width = max(len("class"), *(len(_short(row.name)) for row in (*rows, evaluation.mean)))
    yield f"{'class':<{width}}" + "".join(
        f"{name:>11}" for name in ("images", "precision", "recall", "F1", "AUC")
    )
    for row in (*rows, evaluation.mean):
        yield f"{_short(row.name):<{width}}{row.images:>11}" + "".join(f"{_number(v):>11}" for v in row[2:])
    right = sum(row[i] for i, row in enumerate(evaluation.confusion))
    yield ""
    yield (
        f"accuracy {evaluation.accuracy:.4f} ({right} of {evaluation.images} images), mean recall (balanced accuracy) "
        f"{_number(evaluation.mean.recall)}, loss {evaluation.loss:.4f}"
    )
    yield ""
    yield from _matrix(evaluation) if len(evaluation.classes) <= MATRIX else _mistakes(evaluation)


def _matrix(evaluation: Evaluation) -> Iterator[str]:
    names = [_short(row.name) for row in evaluation.classes]
    width = max(map(len, names))
    column = max(min(width, 12), *(len(str(n)) for row in evaluation.confusion for n in row)) + 2
    yield "confusion matrix; row: the class of the images, column: the class that is predicted"
    yield " " * width + "".join(f"{name[: column - 2]:>{column}}" for name in names)
    for name, row in zip(names, evaluation.confusion, strict=True):
        yield f"{name:<{width}}" + "".join(f"{n:>{column}}" for n in row)


def _mistakes(evaluation: Evaluation) -> Iterator[str]:
    names = [row.name for row in evaluation.classes]
    wrong = [
        (n, i, j) for i, row in enumerate(evaluation.confusion) for j, n in enumerate(row) if n and i != j
    ]
    yield "the most frequent mistakes (--csv and --json have all):" if wrong else "no mistakes"
    for n, i, j in sorted(wrong, key=lambda mistake: -mistake[0])[:MISTAKES]:
        yield f"{n:>6} of {sum(evaluation.confusion[i])} {names[i]} predicted as {names[j]}"


def _short(name: str) -> str:
    name = "".join(c if c.isprintable() else "?" for c in name)  # a line's end, or a terminal's commands
    return name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(evaluation: Evaluation) -> Iterator[list[Any]]:
    """Rows of CSV, the first with the columns' names: a class each, with its row of the confusion matrix."""
    yield [
        "class", *ClassMeasures._fields[1:], *(f"predicted as {row.name}" for row in evaluation.classes)
    ]  # fmt: skip
    for row, taken in zip(evaluation.classes, evaluation.confusion, strict=True):
        yield ["" if value is None else value for value in (*row, *taken)]


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """For JSON; what is not defined is null."""
    return {
        "images": evaluation.images,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "balanced accuracy": evaluation.mean.recall,
        "mean": {name: getattr(evaluation.mean, name) for name in ClassMeasures._fields[2:]},
        "classes": [row._asdict() for row in evaluation.classes],
        "confusion matrix": evaluation.confusion,
    }
