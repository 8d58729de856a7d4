"""`effdense evaluate`: the figures that the run reported, those of every class, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from effdense import cli
from effdense.inference import scores, trained
from effdense.models import load_checkpoint
from tests._training import load, train, write_data
from tests.inference._runs import CLASSES, VAL, evaluate, read_csv, refused, reported, train_on, write_images

pytest.importorskip("sklearn", reason="scikit-learn's metrics are what is shown")
from effdense.inference import measures


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the recipe that crops what it learns from."""
    return train_on(images, tmp_path_factory.mktemp("run") / "run", "--lr", "0.02")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data in memory, and a run on them."""
    root = write_data(tmp_path_factory.mktemp("fashion"))
    out = tmp_path_factory.mktemp("fashion-run") / "run"
    assert train(root, out, "--limit-train", "24") == 0
    return root, out


def assert_reported(result: dict[str, Any], out: Path) -> None:
    expected = reported(out)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    said = result["reported by the run"]
    assert (said["loss"], said["accuracy"]) == (expected["loss"], expected["accuracy"])


@pytest.mark.parametrize("more", [(), ("--batch", "3"), ("--impl", "naive"), ("--budget", "20MiB")])
def test_a_folder_gives_what_the_run_reported(more: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    result = evaluate(run / "last.pt", tmp_path, *more)
    assert_reported(result, run)
    assert result["images"] == sum(VAL) and result["epoch"] == 1 and result["left out"] == 0
    matrix = result["confusion matrix"]
    assert [sum(row) for row in matrix] == list(VAL)
    assert sum(matrix[i][i] for i in range(2)) / sum(VAL) == pytest.approx(result["accuracy"])


def test_images_in_memory_give_it_too(
    fashion: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = fashion
    monkeypatch.chdir(tmp_path)
    assert_reported(evaluate(out / "last.pt", tmp_path), out)
    assert_reported(evaluate(out / "last.pt", tmp_path, "fashion-mnist", "--data-root", str(root)), out)


def test_mixed_precision_and_another_dtype_are_the_runs(fashion: tuple[Path, Path], tmp_path: Path) -> None:
    root = fashion[0]
    for name, more in (("bf16", ("--amp", "bf16")), ("float64", ("--dtype", "float64"))):
        assert train(root, tmp_path / name, "--limit-train", "12", "--epochs", "1", *more) == 0
        assert_reported(evaluate(tmp_path / name, tmp_path), tmp_path / name)


def test_a_run_that_was_moved_with_its_data(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is told by its files' names; other files are not those that the run reported of."""
    for where in (images, images / "val"):
        assert_reported(evaluate(run / "last.pt", tmp_path, str(where)), run)
    assert ", of the run" in capsys.readouterr().out
    result = evaluate(run / "last.pt", tmp_path, str(images / "train"))
    assert result["reported by the run"] is None
    assert ", of the run" not in capsys.readouterr().out


def test_the_tables(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, predicted, picture = (tmp_path / name for name in ("table.csv", "predicted.csv", "picture.png"))
    more = ("--csv", str(table), "--predictions", str(predicted), "--plot", str(picture))
    result = evaluate(run, tmp_path, *more)
    shown = capsys.readouterr().out
    assert f"accuracy {result['accuracy']:.4f} (" in shown and "reported by the run: accuracy" in shown
    for row, of_class in zip(read_csv(table), result["classes"], strict=True):
        assert row["class"] == of_class["name"] and int(row["images"]) == of_class["images"]
        assert float(row["recall"]) == of_class["recall"] and float(row["auc"]) == of_class["auc"]
        assert f"{of_class['name']:<7}" in shown
    assert [int(row["predicted as sick"]) for row in read_csv(table)] == [
        row[1] for row in result["confusion matrix"]
    ]
    found = read_csv(predicted)
    right = sum(row["class"] == row["predicted"] for row in found)
    assert right / len(found) == pytest.approx(result["accuracy"])
    assert [Path(row["file"]).parent.name for row in found] == [row["class"] for row in found]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measures_by_hand() -> None:
    """Four classes, one without images, one never predicted."""
    said = torch.tensor([0, 0, 1, 1, 0, 3])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    raw = F.one_hot(said, 4).float() * 2 + torch.arange(6).view(-1, 1) / 10 * torch.tensor([1.0, 0, 0, 0])
    result = measures.measure(raw, labels, list("abcd"))
    assert result.confusion == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    a, b, c, d = result.classes
    assert a.images == 3 and [a.precision, a.recall, a.f1] == pytest.approx([2 / 3] * 3)
    assert (b.images, b.precision, b.recall) == (2, 0.5, 0.5)
    assert (c.images, c.precision, c.recall, c.f1) == (1, None, 0.0, 0.0)
    assert (d.images, d.precision, d.recall, d.auc) == (0, 0.0, None, None)
    assert result.accuracy == 0.5 and result.mean.recall == pytest.approx((2 / 3 + 0.5) / 3)
    assert result.loss == pytest.approx(F.cross_entropy(raw, labels).item())
    p = raw.softmax(1)[:, 0]
    pairs = [(x > y).item() + 0.5 * (x == y).item() for x in p[labels == 0] for y in p[labels != 0]]
    assert a.auc == pytest.approx(sum(pairs) / len(pairs))
    text = "\n".join(measures.lines(result))
    assert "d              0     0.0000          -" in text and "accuracy 0.5000 (3 of 6 images)" in text
    assert measures.as_dict(result)["classes"][3]["recall"] is None


def test_confident_scores_keep_their_order() -> None:
    """Which in float32 are all the probability 1."""
    raw = torch.tensor([[30.0, 0], [31.0, 0], [32.0, 0], [33.0, 0]])
    assert raw.softmax(1)[:, 0].unique().numel() == 1
    assert measures.measure(raw, torch.tensor([1, 1, 0, 0]), ["a", "b"]).classes[0].auc == 1


def test_many_classes_are_shortened() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"class {i} with a name that is long" for i in range(40)]
    labels = torch.arange(400) % 40
    text = list(measures.lines(measures.measure(torch.rand(400, 40, generator=generator), labels, names)))
    assert len(text) < 40 and text[0].startswith("the 20 classes of 40 with the lowest recall")
    assert any(line.endswith(names[3]) or "predicted as" in line for line in text)
    assert max(map(len, text[:23])) < 81


def link_classes(root: Path, names: dict[str, Path]) -> Path:
    root.mkdir()
    for name, folder in names.items():
        (root / name).symlink_to(folder)
    return root


def test_classes_are_told_by_their_names(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = images / "val"
    command = [
        "evaluate",
        run,
        link_classes(tmp_path / "a", {"ill": val / "sick", "healthy": val / "healthy"}),
    ]
    message = refused(command, capsys)
    assert (
        "has classes that" in message
        and "does not know: ill, and there is no sick; the model's are healthy, sick" in message
    )
    one = link_classes(tmp_path / "b", {"sick": val / "sick"})
    (one / "healthy").mkdir()
    result = evaluate(run / "last.pt", tmp_path, str(one))
    healthy, sick = result["classes"]
    assert (healthy["images"], sick["images"]) == (0, VAL[1])
    assert healthy["recall"] is None and sick["auc"] is None and result["mean"]["auc"] is None
    assert result["reported by the run"] is None
    assert "does not know: 0, 1, 2" in refused(
        ["evaluate", run, "fashion-mnist", "--data-root", write_data(tmp_path)], capsys
    )


def test_images_that_cannot_be_read(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (images / "val" / name).iterdir():
            (tmp_path / "data" / name / path.name).symlink_to(path)
    (tmp_path / "data" / "sick" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "data" / "sick" / "notes.txt").touch()
    result = evaluate(run, tmp_path, str(tmp_path / "data"), status=1)
    assert result["images"] == sum(VAL) and result["left out"] == 1
    message = capsys.readouterr().err
    assert "broken.png cannot be read" in message and f"1 of {sum(VAL) + 1} images left out" in message
    assert "left out: 1 .txt" in message
    evaluate(run, tmp_path, str(tmp_path / "data"), "--ignore-unreadable", status=0)


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no /nowhere: a folder of effdense train" in refused(["evaluate", "/nowhere"], capsys)
    assert "has no best.pt or last.pt" in refused(["evaluate", tmp_path], capsys)
    assert "there is no folder /nowhere: DATA is fashion-mnist, cifar10" in refused(
        ["evaluate", run, "/nowhere"], capsys
    )
    (tmp_path / "empty").mkdir()
    assert "folders of classes were expected, found none" in refused(
        ["evaluate", run, tmp_path / "empty"], capsys
    )
    torch.save(load(run)["state_dict"], tmp_path / "weights.pt")
    assert "does not say how images are prepared" in refused(["evaluate", tmp_path / "weights.pt"], capsys)
    assert "no folder" in refused(["evaluate", run, "--json", tmp_path / "no" / "x.json"], capsys)
    assert "take more than 0 MiB; --batch 1 tries it" in refused(
        ["evaluate", run, "--budget", "1000"], capsys
    )
    moved = load(run)
    moved["settings"]["data root"] = str(tmp_path / "moved")
    torch.save(moved, tmp_path / "moved.pt")
    assert "the data of the run's test are not where they were" in refused(
        ["evaluate", tmp_path / "moved.pt"], capsys
    )


def test_batches_fit_the_budget(run: Path) -> None:
    model = trained.load(run, torch.device("cpu"))
    pixels = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)

    class Many:
        def __len__(self) -> int:
            return len(pixels)

    sizes = [scores.batch_size(model, Many(), budget) for budget in (2**20, 2**22, 2**30)]
    assert 0 < sizes[0] < sizes[1] < sizes[2] == scores.MOST


def test_a_model_that_learned_nothing_finite(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load(run)
    saved["state_dict"]["classifier.bias"].fill_(math.nan)
    torch.save(saved, tmp_path / "nan.pt")
    assert "the scores of some images are not finite" in refused(["evaluate", tmp_path / "nan.pt"], capsys)


def test_another_librarys_model(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    out = train_on(images, tmp_path / "run", "--model", "torchvision:densenet121", "--resize", "32")
    assert_reported(evaluate(out, tmp_path), out)
    assert trained.load(out, torch.device("cpu")).fused


def test_python_and_the_command_agree(images: Path, run: Path, tmp_path: Path) -> None:
    model: Any = load_checkpoint(run / "last.pt").eval()
    predicted = tmp_path / "p.csv"
    assert (
        cli.main(["evaluate", str(run / "last.pt"), "--device", "cpu", "--predictions", str(predicted)]) == 0
    )
    for row in read_csv(predicted):
        with torch.no_grad():
            p = model(model.prepare(row["file"])).softmax(1)[0]
        assert [float(row[f"p({name})"]) for name in CLASSES] == pytest.approx(p.tolist(), rel=1e-4)
