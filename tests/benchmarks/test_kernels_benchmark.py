"""The benchmark of the operators: every one is measured, against floors that are counted right."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels

pytestmark = pytest.mark.tools

TINY = ("--shape", "2,8,8,24,16,4", "--repeats", "1", "--threads", "1")
ROW = {
    *(
        "op",
        "shape",
        "batch",
        "height",
        "width",
        "channels",
        "buffer_channels",
        "out_channels",
        "growth_rate",
    ),
    *(
        "pool",
        "dtype",
        "device",
        "bytes",
        "flops",
        "times_ms",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "gflops_per_s",
    ),
    *("gbytes_per_s", "floor_ms", "bound", "time_to_floor", "isa", "cpu_capability"),
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setattr(kernels, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(kernels, "COPY_BYTES", 2**12)


def test_every_compiled_operator_is_measured():
    compiled = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = {name.removeprefix("effdense::") for name in compiled if name.startswith("effdense::")}
    names -= {
        "fold",
        "accumulate_correction",
        "update_running_statistics",
        "update_from_vectors",
        "count_batches",
    }  # one number per channel or less: no work to speak of
    names = {name for name in names if not name.startswith("stage_")}  # which call the others
    assert names | {"conv3x3", "conv3x3_backward"} == set(kernels.OPERATORS)
    assert set(kernels.least(kernels.SHAPES["bc"][0], torch.float32)) == set(kernels.OPERATORS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_end_to_end(dtype, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert kernels.main([*TINY, "--dtype", dtype, "--json", str(out)]) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result.keys() == {"environment", "ceilings", "rows"} and result["environment"]["threads"] == 1
    gemm, copy = result["ceilings"]["gemm"], result["ceilings"]["copy"]
    assert gemm["flops"] == 2 * 32**3 and gemm["gflops_per_s"] > 0
    assert copy["bytes"] == 2 * 2**12 and copy["gbytes_per_s"] > 0
    assert [row["op"] for row in result["rows"]] == list(kernels.OPERATORS)
    for row in result["rows"]:
        assert row.keys() == ROW and row["op"] in shown and row["dtype"] == dtype
        assert len(row["times_ms"]) == 1 and row["times_ms"][0] == row["median_ms"] > 0
        assert row["bytes"] > 0 and row["gbytes_per_s"] > 0 and row["time_to_floor"] > 0
        has_flops = row["op"].startswith(("bottleneck", "bn_relu_conv3x3", "conv3x3"))
        assert (row["flops"] > 0) == (row["gflops_per_s"] > 0) == has_flops
        floors = [row["flops"] / gemm["gflops_per_s"] / 1e6, row["bytes"] / copy["gbytes_per_s"] / 1e6]
        assert row["floor_ms"] == max(floors) == pytest.approx(row["median_ms"] / row["time_to_floor"])
        assert row["bound"] == ("gemm" if floors[0] > floors[1] else "copy")


def test_least_is_what_the_tensors_hold():
    """By hand, for 2 images of 4x4 pixels: 32 pixels, 3 channels of 8, to 5, to 2."""
    shape = kernels.Shape(2, 4, 4, 3, 8, 5, 2)
    assert kernels.least(shape, torch.float32) == {
        "bottleneck": (4 * (96 + 15 + 160), 2 * 32 * 15),
        "bn_relu_conv3x3": (4 * (160 + 90 + 64), 2 * 32 * 90),
        "bn_relu": (4 * (160 + 160), 0),
        "conv3x3": (4 * (160 + 90 + 64), 2 * 32 * 90),
        "append_features": (4 * (64 + 64), 0),
        "apply_correction": (4 * (64 + 64 + 64), 0),
        "bn_relu_conv3x3_backward": (4 * (64 + 160 + 90 + 160 + 90), 4 * 32 * 90),
        "conv3x3_backward": (4 * (64 + 160 + 90 + 160 + 90), 4 * 32 * 90),
        "bn_relu_backward_sums": (4 * (160 + 160 + 160), 0),
        "bn_relu_backward": (4 * (160 + 160 + 160), 0),
        "bottleneck_backward": (4 * (96 + 160 + 160 + 15 + 96 + 96 + 15), 4 * 32 * 15),
        "channel_statistics": (4 * 96, 0),
        "bn_relu_backward_accumulate": (4 * (96 + 96 + 96 + 96), 0),
        "bn_relu_avg_pool": (4 * (256 + 64), 0),
        "bn_relu_avg_pool_backward": (4 * (64 + 256 + 256), 0),
        "bn_relu_max_pool": (4 * (96 + 24) + 24, 0),
        "max_pool_backward": (4 * (24 + 96) + 24, 0),
    }
    half = kernels.least(shape, torch.bfloat16)
    assert half["bottleneck"] == (2 * (96 + 15 + 160), 2 * 32 * 15)
    # the weights' gradients are sums
    assert half["bottleneck_backward"][0] == 2 * (96 + 160 + 160 + 15 + 96 + 96) + 4 * 15
    assert half["bn_relu_conv3x3_backward"][0] == 2 * (64 + 160 + 90 + 160) + 4 * 90


def test_operators_can_be_chosen_and_shapes_without_them_are_left_out():
    parsed = kernels._parse(["--op", "max_pool_backward,apply_correction", "--shape", "121"])
    assert parsed.op == ["max_pool_backward", "apply_correction"] and parsed.shape == kernels.SHAPES["121"]
    assert kernels._parse(["--op", "max_pool_backward"]).shape == kernels.SHAPES["121"][-1:]
    tiny = kernels.Shape(1, 4, 4, 3, 8, 5, 2)
    stem = tiny._replace(out_channels=0, growth_rate=0, operators=kernels.STEM)
    rows = kernels.run([tiny, stem], parsed.op, repeats=2)["rows"]
    assert [row["op"] for row in rows] == ["apply_correction", "max_pool_backward"]
    assert all(len(row["times_ms"]) == 2 for row in rows)


@pytest.mark.parametrize("sizes", ["1,1,1,1,1,1", "1,3,5,7,3,1"])
def test_odd_shapes(sizes):
    rows = kernels.run(kernels._parse(["--shape", sizes]).shape, dtype="bfloat16", repeats=1)["rows"]
    assert len(rows) == len(kernels.OPERATORS) and all(row["median_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "bottlneck"], "argument --op: unknown operator 'bottlneck', did you mean 'bottleneck'?"),
        (["--op", "bn_relu,zzz"], "unknown operator 'zzz', did you mean '"),
        (["--op", ""], "unknown operator ''"),
        (["--op", "bn_relu_max_pool", "--shape", "bc"], "no shape of --shape has bn_relu_max_pool"),
        (
            ["--shape", "169"],
            "must be bc, 121, all, or N,H,W,C,O,K, six whole numbers of 1 or more, got '169'",
        ),
        (["--shape", "1,2,3,4,5,0"], "six whole numbers of 1 or more, got '1,2,3,4,5,0'"),
        (["--dtype", "float16"], "--dtype float16 needs --device cuda"),
        (["--isa", "sse"], "argument --isa: there is no 'sse'"),
        (["--repeats", "0"], "argument --repeats: must be a whole number of 1 or more, got '0'"),
        (["--json", "/nowhere/out.json"], "cannot write a file at '/nowhere/out.json'"),
    ],
)
def test_mistakes_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_refuses_the_fallback(monkeypatch, capsys):
    fallback = {"compiled": False, "reason": "EFFDENSE_FORCE_REFERENCE is set"}
    monkeypatch.setattr(kernels.effdense, "build_info", lambda: fallback)
    with pytest.raises(SystemExit, match="2"):
        kernels.main([*TINY])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "operators are not compiled, there is nothing to time: EFFDENSE_FORCE_REFERENCE is set" in error


def test_operators_of_another_instruction_set(tmp_path):
    """They are measured in a process that was started with it."""
    out = tmp_path / "out.json"
    arguments = ["--isa", "default", "--shape", "1,4,4,8,8,4", "--repeats", "1", "--op", "bn_relu"]
    assert kernels.main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    for said in (result["environment"], *result["rows"]):
        assert (said["isa"], said["cpu_capability"]) == ("default", "DEFAULT")
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        with pytest.raises(RuntimeError, match="isa: default was asked for, and this process runs on"):
            kernels.run([kernels.SHAPES["bc"][0]], isa_name="default")
