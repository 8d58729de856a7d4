"""benchmarks.libraries and the nets that it knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from benchmarks import cifar_structures, libraries, measure, models, nets
from benchmarks.worker import WorkerConfig, batch_for, loss_of

# PyTorch, and what is written in this repository.
STRUCTURES = [name for name, net in nets.NETS.items() if net.package is None]


def measured(settings: WorkerConfig, impls: Sequence[str], *_: Any) -> dict[str, Any]:
    """What compare.run returns, as far as it is used here."""
    rows = [
        {**dataclasses.asdict(settings), "impl": impl, "peak_bytes": size * 2**20, "median_ms": ms}
        for impl, size, ms in zip(impls, (1000, 250), (3000, 2000), strict=True)
    ]
    return {"environment": measure.environment(1), "rows": rows}


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = nets.NETS["d2l:densenet"]._replace(batch=2, image_size=64)
    monkeypatch.setitem(nets.NETS, "d2l:densenet", small)
    monkeypatch.setattr(libraries.compare, "run", measured)
    files = ["--json", str(tmp_path / "out.json"), "--table", str(tmp_path / "out.md")]
    assert libraries.main(["--only", "d2l", "--repeats", "1", "--threads", "1", *files]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    before, after = result["rows"]
    assert (before["impl"], after["impl"]) == libraries.IMPLS
    assert (after["batch"], after["image_size"]) == (small.batch, small.image_size)
    has = {"blocks": 4, "transitions": 3, "stems": 1, "heads": 1}
    assert (after["parts"], after["converted"]) == (has, has)
    assert max(after["output_error"], after["gradient_error"]) < 1e-12
    head, _, line = (tmp_path / "out.md").read_text().splitlines()
    assert head.count("|") == line.count("|") == len(libraries.HEADINGS) + 1
    assert line.startswith("| d2l: densenet | 2 x 64x64 | 4/4, 3/3, 1/1, 1/1 | ")
    assert line.endswith(" | 1,000 | 250 (0.25x) | 3,000 | 2,000 (1.50x as fast) |")
    assert "d2l: densenet" in capsys.readouterr().out


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_have_the_published_sizes(name: str) -> None:
    parameters = {
        "gpleiss": 769_162,
        "tutorial": 14_160_238,
        "kuangliu": 1_000_618,
        "bamos": 769_162,
        "andreasveit": 769_162,
        "mmpretrain": 7_978_856,
    }
    with torch.device("meta"):
        model = nets.build(name)
    count = sum(p.numel() for p in model.parameters())
    library = name.partition(":")[0]
    assert count == parameters.get(library, count)
    settings = dataclasses.replace(libraries.settings_of(name), batch=2)
    images, labels = batch_for(settings, model)
    assert images.shape[2:] == (settings.image_size,) * 2
    assert loss_of(model(images.to("meta")), labels.to("meta")).shape == ()


def test_the_loss_of_maps() -> None:
    labels = torch.tensor([0, 2])
    outputs = torch.randn(2, 3, 4, 4)
    expected = torch.nn.functional.cross_entropy(outputs.mean((2, 3)), labels)
    torch.testing.assert_close(loss_of(outputs, labels), expected)
    torch.testing.assert_close(loss_of(outputs.mean((2, 3)), labels), expected)


def test_differences_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            list(model.parameters())[-2].mul_(1.01)  # the classifier's weight
        return model

    monkeypatch.setattr(effdense, "convert", wrong)
    settings = dataclasses.replace(libraries.settings_of("d2l:densenet"), image_size=32)
    found = libraries.differences(settings)
    assert set(found["converted"].values()) == {0}
    assert min(found["output_error"], found["gradient_error"]) > 1e-6


def test_only_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert libraries._names("timm, d2l:densenet") == [
        "timm:densenet121",
        "timm:densenetblur121d",
        "timm:densenet121-features_only",
        "d2l:densenet",
    ]
    with pytest.raises(SystemExit):
        libraries.main(["--only", "keras"])
    assert "there is no 'keras'; there are torchvision:densenet121, " in capsys.readouterr().err


def test_what_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'d2l:densenet' is measured as it is: not checkpointed"):
        models.build("d2l:densenet", "checkpoint")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="'timm:densenet121' needs timm, which is not installed"):
        models.build("timm:densenet121", "naive")


@pytest.mark.compiled
def test_a_net_that_is_converted_in_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "weiaicunzai:densenet121"
    small = nets.NETS[name]._replace(make=lambda _: cifar_structures.WeiaicunzaiNet())
    monkeypatch.setitem(nets.NETS, name, small)
    built = models.build(name, "effdense-balanced")
    assert libraries.fused(built.model, torch.randn(2, 3, 32, 32)).blocks == 4
    monkeypatch.setattr(effdense, "convert", lambda model, **_: model)
    with pytest.raises(RuntimeError, match=r"effdense.convert left \d+ of the model's modules as they were"):
        models.build(name, "effdense-balanced")
