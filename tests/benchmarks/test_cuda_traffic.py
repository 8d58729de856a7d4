"""The bytes that the CUDA operators move, counted: little more than they must, and far fewer than separate kernels."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cuda_traffic, densenet, models, separate_kernels, traced
from benchmarks.separate_kernels import Map
from benchmarks.traced import Call
from effdense.ops import self_test
from tests import _stages as stages

pytestmark = pytest.mark.tools

TINY = "densenet_bc_16_4"  # two layers in each of three blocks


def sample(calls: list[Call]) -> list[Call]:
    """Of every operator and size of image one call, as often as there are such."""
    alike: dict[Any, list[Call]] = defaultdict(list)
    for call in calls:
        if call.space == "effdense":
            alike[call.op, traced.tensors(call.arguments)[0].shape[2:]].append(call)
    return [call for same in alike.values() for call in [same[len(same) // 2]] * len(same)]


@pytest.mark.parametrize("model", cuda_traffic.MODELS)
def test_every_operator_moves_little_more_than_it_must(simt: Any, model: str) -> None:
    calls = sample(traced.trace_model(model, "effdense-balanced", 1, cuda_traffic.MODELS[model]))
    card = cuda_traffic.MULTIPROCESSORS_PER_IMAGE
    counts = {call: cuda_traffic.count(simt, call, card) for call in set(calls)}
    rows = cuda_traffic.operator_rows(model, calls, counts)
    used = {row["op"] for row in rows}
    assert {"bottleneck", "bottleneck_backward", "bn_relu_avg_pool_backward", "apply_correction"} < used
    assert ("bn_relu_max_pool" in used) == (model != "densenet_bc_100_12")
    for row in rows:
        assert row["ratio"] <= cuda_traffic.GATE, row


@pytest.mark.parametrize("impl", cuda_traffic.IMPLS)
def test_only_operators_with_kernels_are_traced(impl: str) -> None:
    """So none that is opaque for torch.compile's sake, such as a stage or a stem."""
    calls = traced.trace_model("densenet121", impl, 1, 64)
    assert {call.op for call in calls if call.space == "effdense"} <= set(
        self_test.OPERATORS
    ) - traced.OPAQUE.keys()


@pytest.mark.parametrize("model", cuda_traffic.MODELS)
def test_partial_sums_of_many_images_are_little(simt: Any, model: str) -> None:
    rows = cuda_traffic.partial_rows(model, cuda_traffic.MODELS[model])
    assert 0 < rows[-1]["partial"] <= (cuda_traffic.GATE - 1) * rows[-1]["floor"]
    assert not cuda_traffic.is_too_much({"rows": [], "partial_sums": rows})
    assert cuda_traffic.is_too_much(
        {"rows": [], "partial_sums": [{"images": 256, "partial": 12, "floor": 100}]}
    )
    assert cuda_traffic.is_too_much({"rows": [{"ratio": 1.2}], "partial_sums": []})


def traced_call(op: str, *arguments: Any) -> Call:
    recorder = traced.Recorder()
    with recorder:
        getattr(torch.ops.effdense, op)(*arguments)
    return recorder.calls[-1]


def make_map(pixels: int, channels: int) -> torch.Tensor:
    return torch.empty(1, pixels, channels, dtype=torch.half, device="meta").movedim(-1, 1)


@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
@pytest.mark.parametrize("pixels, channels, out", [(2100, 70, 48), (1100, 134, 16), (30, 64, 48)])
def test_partial_sums_of_the_backward(
    simt: Any, pixels: int, channels: int, out: int, multiprocessors: int
) -> None:
    x, grad_y = make_map(pixels, channels), make_map(pixels, out)
    vectors = torch.empty(3, channels, device="meta")
    weight = torch.empty(out, channels, dtype=torch.half, device="meta")
    flags = True, True, True
    call = traced_call("bottleneck_backward", [x], grad_y, *vectors, weight, [x.clone()], *flags, [])
    expected = cuda_traffic.backward_partial_sums(call, multiprocessors)
    assert cuda_traffic.count(simt, call, multiprocessors).partial == expected
    # one block along the pixels needs none
    assert (expected == 0) == (pixels == 30 or multiprocessors == 1)


def test_a_kernel_that_leaves_something_out_is_found(simt: Any) -> None:
    call = traced_call("channel_statistics", [make_map(64, 4)])
    assert cuda_traffic.count(simt, call).again == 0

    class Lazy:
        forget, watch, watched, traffic = simt.forget, simt.watch, simt.watched, simt.traffic
        override_multiprocessors = simt.override_multiprocessors

        def channel_statistics(self, features: list[torch.Tensor]) -> None:
            simt.channel_statistics([features[0][:, :2]])

    with pytest.raises(RuntimeError, match="channel_statistics: operand 0 must be read 512 bytes"):
        cuda_traffic.count(Lazy(), call)


# ---- The formula of plain PyTorch


def test_a_layer_by_hand() -> None:
    """3 channels by 10 pixels: x has 60 bytes; 2 out channels: y has 40, the weight 12."""
    once = {
        "cat": 120,
        "norm, statistics": 60 + 40,
        "norm, apply": 120 + 80,
        "relu": 120 + 80,
        "conv1x1": 60 + 12 + 40,
        "relu backward": 180 + 120,
        "norm backward, sums": 120 + 80,
        "norm backward, apply": 180 + 120,
        "conv1x1 backward, of x": 40 + 12 + 60,
        "conv1x1 backward, of the weight": 40 + 60 + 12,
        "sum of gradients": 180,
    }
    assert separate_kernels.dense_layer(Map(3, 10), 2) == once
    cached = Counter(once | {"norm, statistics": 0, "norm backward, sums": 0})
    assert separate_kernels.dense_layer(Map(3, 10), 2, passes=1) == cached
    again = {"cat": 240, "norm, statistics": 120 + 40, "norm, apply": 240 + 80, "relu": 240 + 80}
    assert separate_kernels.dense_layer(Map(3, 10), 2, checkpoint=True) == once | again


@pytest.mark.parametrize("model, size", [(TINY, 8), ("densenet_tiny", 32)])
@pytest.mark.parametrize("impl", ["naive", "checkpoint"])
def test_the_formula_is_what_autograd_runs(
    model: str, size: int, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.IMAGENET_CONFIGS, "densenet_tiny", (4, (2, 1), 8))
    moved: Counter[str] = Counter()
    for call in traced.trace_model(model, impl, 2, size):
        maps = [like for like in traced.tensors((call.arguments, call.results)) if len(like.shape) == 4]
        if not call.op.startswith("convolution"):
            moved[call.op] += sum(like.bytes for like in maps)
        elif traced.tensors(call.arguments)[-1].shape[2:] == (1, 1):
            kernels = 2 if call.op == "convolution_backward" else 1
            moved[call.op] += sum(like.bytes for like in maps)
            moved[call.op] += (kernels - 1) * traced.tensors(call.arguments)[
                0
            ].bytes  # its gradient once more
    formula = separate_kernels.step(model, 2, size, impl == "checkpoint", passes=1)
    same = {
        "cat": "cat",
        "relu": "relu_",
        "relu backward": "threshold_backward",
        "norm, apply": "native_batch_norm",
        "norm backward, apply": "native_batch_norm_backward",
        "sum of gradients": "add",
        "conv1x1": "convolution",
    }
    assert {term: formula[term] for term in same} == {term: moved[op] for term, op in same.items()}
    backward = sum(size for term, size in formula.items() if term.startswith("conv1x1 backward"))
    assert backward == moved["convolution_backward"]


# ---- Both


@pytest.mark.parametrize("memory", stages.MEMORY)
def test_a_stage_moves_a_third(simt: Any, memory: str) -> None:
    """The last layers of a block of DenseNet-BC-100-12, and its transition."""
    channels, layers, images, size = 120, 8, 2, 32
    parts = densenet._DenseBlock(layers, channels, 4, 12, 0.0), densenet._Transition(channels + 96, 108)
    naive = nn.Sequential()
    naive.add_module("denseblock1", parts[0])
    naive.add_module("transition1", parts[1])
    x = torch.zeros(images, size, size, channels).movedim(-1, 1).requires_grad_()
    calls = traced.trace(stages.converted(naive, memory), x)
    fused = cuda_traffic.pytorch_bytes(calls)
    for call in calls:
        if call.space == "effdense":
            counted = cuda_traffic.count(simt, call, images * cuda_traffic.MULTIPROCESSORS_PER_IMAGE)
            fused += counted.floor + counted.partial
    pixels, theirs = images * size**2, Counter()  # type: ignore[var-annotated]
    for i in range(layers):
        theirs += separate_kernels.dense_layer(Map(channels + 12 * i, pixels), 48)
    theirs += separate_kernels.transition(Map(channels + 96, pixels), 108)
    assert sum(theirs.values()) >= (3 if memory == "balanced" else 2.5) * fused


def test_the_command_line(
    simt: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cuda_traffic, "MODELS", {TINY: 8})
    out = tmp_path / "out.json"
    status = cuda_traffic.main(["--images", "2", "--json", str(out)])
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result.keys() == {"environment", "images", "image_sizes", "rows", "steps", "partial_sums"}
    assert status == cuda_traffic.is_too_much(result)
    for row in result["rows"]:
        assert row["op"] in shown and row["bytes"] == row["floor"] + row["again"] + row["partial"]
    assert [row["impl"] for row in result["steps"]] == ["naive", "checkpoint", *cuda_traffic.IMPLS]
    assert all(row[f"{key}_bytes"] > 0 for row in result["steps"] for key in ("all", "memory", "cached"))
    assert [row["images"] for row in result["partial_sums"]] == list(cuda_traffic.BATCHES)
