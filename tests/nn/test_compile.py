"""torch.compile of whole converted models: one node per block each way, one graph for every batch size, no more memory."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import effdense
from benchmarks import densenet, structures
from benchmarks.measure import peak_bytes
from effdense.nn import obstacles
from tests._stages import assert_close, fused_under_compile, step

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_net() -> nn.Module:
    return densenet.DenseNet(4, (1, 1), 6, num_classes=5).double()


def make_images(images: int = 4, size: int = 32) -> Tensor:
    return torch.randn(images, 3, size, size, dtype=torch.float64)


class Recorder:
    """A backend that runs graphs as they are and notes how often each calls which of effdense's operators."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, int]] = []
        self.backend = aot_autograd(fw_compiler=self._note, bw_compiler=self._note)

    def _note(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        fused = (n.split(".")[1] for n in names if n.startswith("effdense."))
        self.graphs.append(dict(collections.Counter(n for n in fused if n.startswith("dense_stage"))))
        return make_boxed_func(graph.forward)


def d2l_like() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), structures.NetBlock(2, 6, 4), structures.NetBlock(2, 14, 4))


NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision's structure": lambda: effdense.convert(small_net()),
    "d2l's": lambda: effdense.convert(d2l_like().double()),
}
VECTORS = (
    2 * 6 * 8
)  # bytes: two vectors of the stem's channels, which inductor frees a moment later than eager does
FORWARD, BACKWARD = {"dense_stage": 2}, {"dense_stage_backward": 2}


@fused_under_compile
@pytest.mark.parametrize("name", NETS)
def test_one_node_per_block_each_way_and_one_graph_for_every_batch_size(name: str) -> None:
    """The second size makes a graph with a symbol in its place; no other does."""
    fused, recorder = NETS[name](), Recorder()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend=recorder.backend)
    for images in (4, 2, 3):
        x = make_images(images)
        assert_close(step(compiled, x, False), step(fused, x, False), 1e-12)
    assert recorder.graphs == [FORWARD, BACKWARD] * 2
    recorder.graphs.clear()
    with torch.no_grad():
        assert_close([compiled.eval()(x)], [fused.eval()(x)], 1e-12)  # type: ignore[attr-defined]
    assert recorder.graphs == [FORWARD]


@fused_under_compile
def test_a_dynamic_batch_is_one_graph_from_the_start() -> None:
    fused, recorder = effdense.nn.DenseBlock(2, 3, 2, 2, 0.0).double(), Recorder()
    compiled = torch.compile(fused, fullgraph=True, backend=recorder.backend)
    for images in (4, 2, 5):
        x = make_images(images, 4)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
    assert len(recorder.graphs) == 2


@fused_under_compile
@pytest.mark.parametrize("training", [True, False])
def test_by_inductor_with_the_memory_of_eager(training: bool) -> None:
    fused = effdense.convert(small_net()).train(training)
    compiled, x = torch.compile(copy.deepcopy(fused), fullgraph=True), make_images()

    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            y = model(x)
        if training:
            y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if training), *model.buffers()]

    assert_close(run(compiled), run(fused), 1e-12)
    eager, peak = (peak_bytes(lambda model=model: run(model)) for model in (fused, compiled))
    assert peak <= eager + VECTORS, (peak, eager)


@fused_under_compile
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_convert_after_compile_is_not_stale(how: str) -> None:
    naive, recorder = d2l_like().double(), Recorder()
    model = copy.deepcopy(naive)
    if how == "in place":
        model.compile(fullgraph=True, backend=recorder.backend)
    else:
        model = torch.compile(model, fullgraph=True, backend=recorder.backend)  # type: ignore[assignment]
    x = make_images(2, 8)
    step(model, x, False), step(naive, x, False)
    assert recorder.graphs and not any(recorder.graphs)
    recorder.graphs.clear()
    assert effdense.convert(model) is model
    assert all(e.converted and e.reason is None for e in effdense.report(model))
    assert_close(step(model, x, False), step(naive, x, False))
    assert recorder.graphs[:2] == [FORWARD, BACKWARD]


def test_an_older_compiler_gets_pytorchs_own_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "FUSED_UNDER_COMPILE", (3, 0))
    fused, recorder = effdense.convert(small_net()), Recorder()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend=recorder.backend)
    x = make_images()
    with pytest.warns(RuntimeWarning, match=r"PyTorch's own operators under torch.compile .* use torch 3.0"):
        results = step(compiled, x, False)
    assert recorder.graphs and not any(recorder.graphs)
    assert_close(results, step(fused, x, False))
