"""The CUDA kernels of bottleneck and bottleneck_backward, run on the CPU, against the float64 twin."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense import reference
from tests.simt.compiler import ROOT, compile_for_cpu, cuda_include

pytestmark = pytest.mark.skipif(cuda_include() is None, reason="needs the CUDA toolkit's headers")

DRIVER = ROOT / "tests" / "simt" / "samples" / "bottleneck_driver.cpp"
ORDERS = ["fwd", "rev", "20240229"]
F64 = torch.float64
MAPS = ("x", "grad_y", "deferred_y", "grad_x")

# arithmetic -> dtype, whether TF32 is permitted, the rounding of an operand
ARITHMETICS = {
    "half": (torch.float16, 0, 2.0**-11),
    "bfloat16": (torch.bfloat16, 0, 2.0**-8),
    "tf32": (torch.float32, 1, 2.0**-11),
    "float": (torch.float32, 0, 2.0**-24),
    "double": (torch.float64, 0, 2.0**-53),
}
# pixels, channels, out channels, where in wider buffers the maps lie: elements before, after
SHAPES = [
    (1, 1, 1, 0, 0),
    (7, 3, 5, 1, 2),  # single elements
    (130, 12, 48, 4, 4),  # pieces of 8 bytes in 16 bits
    (147, 300, 48, 0, 4),  # three images of 7x7; a step padded to 16 bytes
    (65, 24, 96, 8, 8),
    (129, 40, 160, 2, 2),  # pieces of 4 bytes in 16 bits
    (64, 72, 192, 0, 0),
    (50, 36, 200, 0, 0),  # more than one tile of out channels
    (1100, 20, 12, 0, 4),  # several blocks along the pixels, backward too
    (40, 150, 130, 3, 0),
]
NUMBERS = ["pixels", "channels", "out", "tf32", "accumulate"]
NUMBERS += ["x_step", "y_step", "grad_y_step", "deferred_y_step", "grad_x_step"]
POINTERS = ["x", "weight", "scale", "shift", "mean", "bias", "out_scale", "out_shift", "y", "y_mean", "y_var"]
POINTERS += ["grad_y", "deferred_y", "deferred_mean", "a", "b", "grad_x", "grad_weight", "sum_d", "sum_dx"]


class Case(ctypes.Structure):
    """That of the driver."""

    _fields_ = [(name, ctypes.c_int64) for name in NUMBERS] + [(name, ctypes.c_void_p) for name in POINTERS]


class Kernels:
    """The launchers over tensors; rows of maps may be slices of wider ones."""

    def __init__(self, library: Path) -> None:
        self.run_case = ctypes.CDLL(str(library)).run_case

    def __call__(self, op: str, dtype: torch.dtype, **values: Any) -> dict[str, list[int]]:
        """Returns bytes loaded and stored, by array."""
        case = Case()
        for name, value in values.items():
            setattr(case, name, value.data_ptr() if isinstance(value, Tensor) else value)
        text = ctypes.create_string_buffer(4096)
        name = str(dtype).removeprefix("torch.").encode()
        status = self.run_case(op.encode(), name, ctypes.byref(case), text, len(text))
        assert status == 0, text.value.decode()
        return json.loads(text.value)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    library = tmp_path_factory.mktemp("simt") / "bottleneck.so"
    return Kernels(compile_for_cpu([DRIVER], library, "-shared"))


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == F64 else torch.float32


def in_buffer(x: Tensor, before: int, after: int) -> Tensor:
    """x as columns of a wider matrix, NaN elsewhere, whose memory ends with x."""
    rows, columns = x.shape
    step = before + columns + after
    flat = x.new_full((rows * step - after,), float("nan"))
    return flat.as_strided((rows, columns), (step, 1), before).copy_(x)


def rest_is_untouched(x: Tensor) -> bool:
    flat = x._base
    return int(flat.isnan().sum()) == flat.numel() - x.numel() + int(x.isnan().sum())


def make_case(shape: tuple, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Numbers in float64 that `dtype` has as well; relu's argument keeps away from 0."""
    generator = torch.Generator().manual_seed(seed)
    pixels, channels, out = shape[:3]

    def randn(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=F64).to(of).to(F64)

    vector = accumulated(dtype)
    scale = (randn(channels).abs() + 0.2).to(vector).to(F64)
    scale[channels // 2] *= -1
    shift = randn(channels, of=vector)
    x = randn(pixels, channels)
    z = x * scale + shift
    x = torch.where(z.abs() < 0.01, ((0.1 - shift) / scale).expand_as(x), x).to(dtype).to(F64)
    return {
        "x": x,
        "weight": (randn(out, channels) / channels**0.5).to(dtype).to(F64),
        "scale": scale,
        "shift": shift,
        "mean": randn(channels, of=vector),
        "bias": randn(out, of=vector),
        "out_scale": randn(out, of=vector),
        "out_shift": randn(out, of=vector),
        "grad_y": randn(pixels, out),
        "y": randn(pixels, out),
        "y_mean": randn(out, of=vector),
        "a": randn(out, of=vector) / 8,
        "b": randn(out, of=vector) / 8,
        "grad_x": randn(pixels, channels),
    }


def as_map(x: Tensor) -> Tensor:
    """[pixels, channels] as the twin has it: [1, channels, pixels]."""
    return x.t()[None]


def as_matrix(x: Tensor) -> Tensor:
    return x[0].t()


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (actual.to(F64) - expected).abs()
    worst = (error / bound.clamp(min=1e-300)).max() if error.numel() else torch.tensor(0.0)
    assert not error.isnan().any()
    assert (error <= bound).all(), f"{float(worst)} times the bound"


def forward(
    kernels: Kernels,
    case: dict[str, Tensor],
    arithmetic: str,
    where: tuple[int, int],
    bias: bool = False,
    norm: bool = False,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, dict[str, list[int]]]:
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    vector = accumulated(dtype)
    pixels, channels = case["x"].shape
    out = case["weight"].shape[0]
    x = in_buffer(case["x"].to(dtype), *where)
    y = in_buffer(torch.zeros(pixels, out, dtype=dtype), *where)
    weight = case["weight"].to(dtype)
    vectors = {name: case[name].to(vector) for name in ("scale", "shift")}
    if bias:
        vectors["bias"] = case["bias"].to(vector)
    if norm:
        vectors |= {name: case[name].to(vector) for name in ("out_scale", "out_shift")}
    mean, var = torch.full((out,), 77, dtype=vector), torch.full((out,), 77, dtype=vector)
    if statistics:
        vectors |= {"y_mean": mean, "y_var": var}
    sizes = {"pixels": pixels, "channels": channels, "out": out, "tf32": tf32}
    steps = {"x_step": x.stride(0), "y_step": y.stride(0)}
    traffic = kernels("bottleneck", dtype, **sizes, **steps, x=x, y=y, weight=weight, **vectors)
    assert rest_is_untouched(y)
    return y, mean, var, traffic


def check_forward(
    kernels: Kernels, shape: tuple, arithmetic: str, bias: bool, norm: bool, statistics: bool
) -> None:
    dtype, _, unit = ARITHMETICS[arithmetic]
    case = make_case(shape, dtype)
    y, mean, var, _ = forward(kernels, case, arithmetic, shape[3:], bias, norm, statistics)
    expected = torch.empty(1, shape[2], shape[0], dtype=F64)
    vectors = [case["bias"] if bias else None] + [
        case[v] if norm else None for v in ("out_scale", "out_shift")
    ]
    args = [as_map(case["x"])], case["scale"], case["shift"], case["weight"], *vectors
    reference.bottleneck(*args, False, expected)
    magnitude = (case["x"] * case["scale"]).abs().add(case["shift"].abs()) @ case["weight"].abs().t()
    magnitude += case["bias"].abs() if bias else 0
    bound = magnitude * (2 * unit + 16 * min(unit, 2.0**-24))  # the operands, and the sums in float
    if norm:
        bound = bound * case["out_scale"].abs() + case["out_shift"].abs() * unit
    bound += as_matrix(expected).abs() * unit
    assert_close(y, as_matrix(expected), bound)
    if statistics:
        check_statistics(y, mean, var)
    else:
        assert (mean == 77).all() and (var == 77).all()


def check_statistics(y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Of y as it was stored."""
    exact = 1e-13 if mean.dtype == F64 else 1e-6
    wide = y.to(F64)
    true_var, true_mean = torch.var_mean(wide, 0, correction=0)
    assert_close(mean, true_mean, exact * wide.abs().amax(0))
    assert_close(var, true_var, exact * (4 * true_var + wide.abs().amax(0) ** 2 * 1e-6))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bottleneck_matches_the_float64_twin(kernels: Kernels, shape: tuple, arithmetic: str) -> None:
    check_forward(kernels, shape, arithmetic, bias=False, norm=False, statistics=True)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(
    "bias, norm, statistics", [(True, False, True), (False, True, False), (True, True, True)]
)
def test_bottleneck_epilogues(
    kernels: Kernels, arithmetic: str, bias: bool, norm: bool, statistics: bool
) -> None:
    check_forward(kernels, SHAPES[5], arithmetic, bias, norm, statistics)


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "float", "double"])
def test_statistics_survive_a_large_mean(kernels: Kernels, arithmetic: str) -> None:
    dtype = ARITHMETICS[arithmetic][0]
    case = make_case((300, 24, 48), dtype)
    case["bias"] = torch.full_like(case["bias"], 1000.0)
    y, mean, var, _ = forward(kernels, case, arithmetic, (0, 0), bias=True)
    check_statistics(y, mean, var)


def backward(
    kernels: Kernels,
    case: dict[str, Tensor],
    arithmetic: str,
    where: tuple[int, int],
    deferred: bool = False,
    accumulate: bool = True,
    need_features: bool = True,
    need_grad_x: bool = True,
    need_weight: bool = True,
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    vector = accumulated(dtype)
    pixels, channels = case["x"].shape
    out = case["weight"].shape[0]
    maps = {"x": case["x"], "grad_y": case["grad_y"]}
    if deferred:
        maps["deferred_y"] = case["y"]
    maps = {name: in_buffer(value.to(dtype), *where) for name, value in maps.items()}
    results = {}
    if need_features:
        results |= {name: torch.full((channels,), 77, dtype=vector) for name in ("sum_d", "sum_dx")}
    if need_features and need_grad_x:
        start = case["grad_x"] if accumulate else torch.zeros_like(case["grad_x"])
        results["grad_x"] = in_buffer(start.to(dtype), *where)
    if need_weight:
        results["grad_weight"] = torch.full((out, channels), 77, dtype=vector)
    vectors = {name: case[name].to(vector) for name in ("scale", "shift", "mean")}
    if deferred:
        vectors |= {"deferred_mean": case["y_mean"].to(vector), "a": case["a"].to(vector)}
        vectors |= {"b": case["b"].to(vector)}
    steps = {f"{name}_step": m.stride(0) for name, m in (maps | results).items() if name in MAPS}
    sizes = {"pixels": pixels, "channels": channels, "out": out, "tf32": tf32, "accumulate": int(accumulate)}
    weight = case["weight"].to(dtype)
    traffic = kernels(
        "bottleneck_backward", dtype, **sizes, **steps, **maps, **vectors, **results, weight=weight
    )
    if "grad_x" in results:
        assert rest_is_untouched(results["grad_x"])
    return results, traffic


def check_backward(kernels: Kernels, shape: tuple, arithmetic: str, **options: bool) -> None:
    dtype, _, unit = ARITHMETICS[arithmetic]
    case = make_case(shape, dtype, seed=1)
    results, _ = backward(kernels, case, arithmetic, shape[3:], **options)
    deferred = options.get("deferred", False)
    accumulate = options.get("accumulate", True)
    grad_x = as_map(case["grad_x"].clone())
    vectors = case["scale"], case["shift"], case["mean"]
    correction = [as_map(case["y"]), case["y_mean"], case["a"], case["b"]] if deferred else []
    args = [as_map(case["x"])], as_map(case["grad_y"]), *vectors, case["weight"], [grad_x]
    grad_weight, sum_d, sum_dx = reference.bottleneck_backward(*args, accumulate, True, True, correction)

    # How much there is to be rounded: of grad_y, of d, and of what becomes of them.
    grad = case["grad_y"].abs()
    if deferred:
        grad = grad + case["a"].abs() + case["b"].abs() * (case["y"] - case["y_mean"]).abs()
    z = (case["x"] * case["scale"]).abs() + case["shift"].abs()
    d = grad @ case["weight"].abs()
    sums = 64 * min(unit, 2.0**-24)
    launches = 4  # each rounds grad_x
    before = case["grad_x"].abs() if accumulate else 0
    after = as_matrix(grad_x).abs()
    bounds = {
        "grad_x": (2 * unit + sums) * d * case["scale"].abs()
        + (before + after + d * case["scale"].abs()) * unit * launches,
        "grad_weight": (3 * unit + sums) * (grad.t() @ z),
        "sum_d": (2 * unit + sums) * d.sum(0),
        "sum_dx": (2 * unit + sums) * (d * (case["x"].abs() + case["mean"].abs())).sum(0),
    }
    expected = {"grad_x": as_matrix(grad_x), "grad_weight": grad_weight, "sum_d": sum_d, "sum_dx": sum_dx}
    for name, result in results.items():
        assert_close(result, expected[name], bounds[name])


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bottleneck_backward_matches_the_float64_twin(
    kernels: Kernels, shape: tuple, deferred: bool, arithmetic: str
) -> None:
    check_backward(kernels, shape, arithmetic, deferred=deferred)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": False},
        {"need_grad_x": False},
        {"need_weight": False},
        {"need_features": False, "accumulate": False},
    ],
    ids=str,
)
def test_bottleneck_backward_of_what_is_wanted(kernels: Kernels, arithmetic: str, options: dict) -> None:
    check_backward(kernels, SHAPES[7], arithmetic, **options)
    check_backward(kernels, SHAPES[5], arithmetic, deferred=True, **options)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_order_of_threads_and_blocks_changes_no_bit(
    kernels: Kernels, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in (SHAPES[5], SHAPES[8]):
        case = make_case(shape, ARITHMETICS[arithmetic][0])
        outcomes = []
        for order in ORDERS:
            monkeypatch.setenv("SIMT_ORDER", order)
            results, _ = backward(kernels, case, arithmetic, shape[3:], deferred=True)
            outcomes.append([*forward(kernels, case, arithmetic, shape[3:])[:3], *results.values()])
        for other in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_no_pixels_launch_nothing(kernels: Kernels) -> None:
    case = make_case((0, 24, 48), torch.float16)
    empty = {"x": case["x"].half(), "weight": case["weight"].half(), "channels": 24, "out": 48}
    for op in ("bottleneck", "bottleneck_backward"):
        assert kernels(op, torch.float16, **empty)["weight"] == [0, 0]


@pytest.mark.parametrize("arithmetic", ["half", "tf32"])
def test_nan_and_infinity_come_through(kernels: Kernels, arithmetic: str) -> None:
    case = make_case((70, 24, 48), ARITHMETICS[arithmetic][0])
    case["x"][3, 5] = float("nan")
    y, *_ = forward(kernels, case, arithmetic, (0, 0))
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()
    results, _ = backward(kernels, case, arithmetic, (0, 0))
    assert results["grad_x"].isfinite().all()  # relu passes the gradient of NaN
    assert results["sum_d"].isfinite().all() and results["sum_dx"].isnan().nonzero().flatten().tolist() == [5]
    assert results["grad_weight"].isnan().any(0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", [(256, 128, 48, 0, 0), (1024, 64, 128, 0, 16)], ids=str)
def test_each_element_moves_once(kernels: Kernels, arithmetic: str, shape: tuple) -> None:
    dtype = ARITHMETICS[arithmetic][0]
    case = make_case(shape, dtype)
    pixels, channels, out = shape[:3]
    of_x, of_y = pixels * channels * dtype.itemsize, pixels * out * dtype.itemsize
    traffic = forward(kernels, case, arithmetic, shape[3:])[3]
    reads = -(-out // 64) if dtype == F64 else 1  # double has narrow tiles
    assert traffic["x"] == [of_x * reads, 0]
    assert traffic["y"] == [0, of_y]
    traffic = backward(kernels, case, arithmetic, shape[3:], deferred=True)[1]
    launches = -(-out // 64) if dtype == F64 else 1
    columns = channels // (64 if dtype.itemsize == 2 else 32)
    assert traffic["x"] == [of_x * launches, 0]
    assert traffic["grad_x"] == [of_x * launches, of_x * launches]
    assert traffic["grad_y"] == traffic["deferred_y"] == [of_y * columns, 0]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_ragged_shapes_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    flags = [f"-fsanitize={sanitizer}", "-g1", "-O1"]
    program = compile_for_cpu([DRIVER], tmp_path / sanitizer, *flags)
    for order in ORDERS if sanitizer == "address" else ORDERS[2:]:  # to the other one, order is no matter
        environment = {**os.environ, "SIMT_ORDER": order, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=1800)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
        assert len(done.stdout.splitlines()) == 35
