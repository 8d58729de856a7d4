"""MONAI's tutorial for volumes, small: its cached data set, its DataLoader, its net, Adam, before and after convert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import nets
from tests._conversions import library
from tests._stages import MEMORY

SIZE, IMAGES, BATCH = 32, 4, 2


def make_net() -> nn.Module:
    """DenseNet121's blocks, narrower."""
    torch.manual_seed(0)
    small = {"init_features": 8, "growth_rate": 4, "block_config": (6, 12, 24, 16)}
    return library("monai.networks.nets").DenseNet(3, 1, 2, **small).double()


def make_loader() -> Any:
    """Volumes of random numbers, scaled, resized and rotated as in the tutorial; always the same."""
    torch.manual_seed(1)  # of which the loader makes the transforms' seed
    data, transforms = library("monai.data"), library("monai.transforms")
    volumes = torch.randn(IMAGES, 1, 40, 40, 40)
    files = [{"img": volume, "label": i % 2} for i, volume in enumerate(volumes)]
    steps = transforms.Compose(
        [
            transforms.EnsureTyped("img", track_meta=True),
            transforms.ScaleIntensityd("img"),
            transforms.Resized("img", spatial_size=(SIZE,) * 3),
            transforms.RandRotate90d("img", prob=0.8, spatial_axes=(0, 2)),
            transforms.EnsureTyped("img", dtype=torch.float64),
        ]
    )
    dataset = data.CacheDataset(files, steps, progress=False)
    return data.DataLoader(dataset, batch_size=BATCH, shuffle=False)


def train(model: nn.Module, loader: Any, epochs: int = 2) -> tuple[list[float], list[Tensor]]:
    """Losses of all steps, and what the trained net says of the volumes, as the tutorial's loops get them."""
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            assert type(batch["img"]).__name__ == "MetaTensor"
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["img"]), batch["label"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        outputs = [model(batch["img"]) for batch in loader]
    return losses, outputs


@pytest.mark.parametrize("memory", MEMORY)
def test_the_tutorial_trains_as_before(memory: str) -> None:
    naive = make_net()
    fused = effdense.convert(copy.deepcopy(naive), memory=memory)
    report = effdense.report(fused)
    assert sum(e.kind == "DenseBlock" and e.converted and e.reason is None for e in report) == 4, report
    expected, outputs = train(naive, make_loader())
    losses, own_outputs = train(fused, make_loader())
    assert len(set(losses)) == len(losses) == 2 * IMAGES // BATCH  # it learns, from other images each time
    assert losses == pytest.approx(expected, rel=1e-9)
    for a, b in zip(own_outputs, outputs, strict=True):
        assert type(a) is type(b) and a.meta.keys() == b.meta.keys()  # type: ignore[attr-defined]
        torch.testing.assert_close(a.as_tensor(), b.as_tensor(), rtol=1e-7, atol=1e-7)  # type: ignore[attr-defined]


def test_the_benchmark_measures_metatensors() -> None:
    library("monai.data")
    images = torch.randn(2, 1, 5, 5, 5)
    batch = nets.load("monai:tutorial-3d", images)
    assert type(batch).__name__ == "MetaTensor"
    assert torch.equal(batch.as_tensor(), images)  # type: ignore[attr-defined]
    assert nets.load("monai:densenet121-3d", images) is images
    assert nets.load("densenet121", images) is images
