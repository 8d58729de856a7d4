"""torch.export of whole models, converted and reverted, in evaluation and training, and their programs in files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effdense
from benchmarks import structures
from effdense._torch_range import minor_version
from tests._stages import assert_close

pytestmark = pytest.mark.core


def own_net() -> nn.Module:
    return effdense.models.DenseNet(4, (1, 1), 6, num_classes=5).double()


def d2l_like() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), structures.NetBlock(2, 6, 4)).double()


def make_images(images: int = 2) -> Tensor:
    return torch.randn(images, 3, 32, 32, dtype=torch.float64)


def through_file(program: Any) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators_in(program: Any) -> set[str]:
    """Those of effdense."""
    names = (str(n.target) for n in program.graph.nodes if n.op == "call_function")
    return {name.split(".")[1] for name in names if name.startswith("effdense.")}


@pytest.mark.parametrize("make", [own_net, d2l_like])
@pytest.mark.parametrize("training, strict", [(False, False), (True, False), (False, True)])
def test_a_fused_model(make: Callable[[], nn.Module], training: bool, strict: bool) -> None:
    """For any batch size, and back from a file; in training statistics move and gradients flow. The program needs no effdense."""
    if strict and make is own_net and minor_version(torch.__version__) < (2, 11):
        pytest.skip(
            "strict export of torch 2.8 refuses modules with a dict, as DenseLayer is; 2.11 takes them"
        )
    fused = effdense.convert(make()).train(training)
    shapes = ({0: torch.export.Dim("images", min=2)},)
    program = torch.export.export(
        copy.deepcopy(fused), (make_images(),), dynamic_shapes=shapes, strict=strict
    )
    assert not operators_in(program)
    exported, x, results = through_file(program).module(), make_images(5), []
    for model in (exported, fused):
        y = model(x)
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(y.square().sum(), [named[k] for k in sorted(named)]) if training else ()
        buffers = dict(model.named_buffers()) if training else {}  # a program has those that it uses
        results.append([y.detach(), *grads, *(buffers[k] for k in sorted(buffers))])
    assert_close(*results, 1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_a_reverted_model(strict: bool) -> None:
    naive, x = d2l_like().eval(), make_images()
    model = effdense.revert(effdense.convert(copy.deepcopy(naive)))
    program = through_file(torch.export.export(model, (make_images(),), strict=strict))
    assert_close([program.module()(x)], [naive(x)])
