"""The CUDA bottleneck on the CPU: every arithmetic and tile, any order of threads, traffic, TF32.

test_bottleneck.py runs the same operators in float64, float32 and bfloat16, with few out channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from effdense.ops import reference
from tests._cases import CONVOLUTIONS, PRODUCTS, permit_tf32, rms
from tests.harness.test_simt_harness import ORDERS
from tests.ops.test_bottleneck import VECTORS

F64 = torch.float64


class Arithmetic(NamedTuple):
    dtype: torch.dtype
    unit: float  # the rounding of an operand


ARITHMETICS = {
    "half": Arithmetic(torch.float16, 2.0**-11),
    "bfloat16": Arithmetic(torch.bfloat16, 2.0**-8),
    "tf32": Arithmetic(torch.float32, 2.0**-11),
    "float": Arithmetic(torch.float32, 2.0**-24),
    "double": Arithmetic(F64, 2.0**-53),
}
# pixels, channels, out channels, where in wider buffers the maps lie: elements before, after
NARROW = [
    (1, 1, 1, 0, 0),
    (7, 3, 5, 1, 2),  # single elements
    (130, 12, 48, 4, 4),  # pieces of 8 bytes in 16 bits
    (147, 300, 48, 0, 4),  # three images of 7x7; a step padded to 16 bytes
    (1100, 20, 12, 0, 4),  # several blocks along the pixels, backward too
]
WIDE = [
    (65, 24, 96, 8, 8),
    (129, 40, 160, 2, 2),  # pieces of 4 bytes in 16 bits
    (64, 72, 192, 0, 0),
    (50, 36, 200, 0, 0),  # more than one tile of out channels
    (40, 150, 130, 3, 0),
    (1200, 8, 200, 0, 0),  # and several blocks along the pixels
]
# The narrow ones only in what test_bottleneck.py does not run.
CASES = [(a, s) for a in ARITHMETICS for s in ([*NARROW, *WIDE] if a in ("half", "tf32") else WIDE)]


# For cards of so many multiprocessors each of the tiles is the first that fills one, in some of the cases: 128
# pixels, 64, 32 and 16.
CARDS = [1, 3, 5, 132]
TILES = {
    128: None,
    64: 64,
    32: 64,
    16: 32,
}  # pixels of a block: its out channels; of 128 as many as there are, up to 192


@pytest.fixture
def on_card(simt: Any) -> Iterator[Any]:
    """Calls of it cut launches for a card of so many multiprocessors."""
    yield simt.override_multiprocessors
    simt.override_multiprocessors(0)


@pytest.fixture
def arithmetic(simt: Any, request: pytest.FixtureRequest) -> Arithmetic:
    """What `simt` computes in; the setting is taken back after every test."""
    permit_tf32(CONVOLUTIONS, request.param == "tf32")
    return ARITHMETICS[request.param]


in_every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, indirect=True)


def in_buffer(x: Tensor, before: int = 0, after: int = 0) -> Tensor:
    """The map [1, channels, pixels] of a matrix x, in a buffer that is wider by NaN and ends with x."""
    rows, columns = x.shape
    step = before + columns + after
    flat = x.new_full((max(0, rows * step - after),), float("nan"))
    return flat.as_strided((1, columns, rows), (rows * step, 1, step), before).copy_(x.t()[None])


def rest_is_untouched(x: Tensor) -> bool:
    flat = x._base
    assert flat is not None
    return int(flat.isnan().sum()) == flat.numel() - x.numel() + int(x.isnan().sum())


def make_case(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Numbers in float64 that `dtype` has as well; relu's argument keeps away from 0. Maps are [pixels, channels]."""
    generator = torch.Generator().manual_seed(seed)
    pixels, channels, out = shape[:3]
    vector = reference.accumulate_dtype(dtype)

    def randn(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=F64).to(of).to(F64)

    def norm_over(columns: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = (randn(columns).abs() + 0.2).to(vector).to(F64)
        scale[columns // 2] *= -1
        shift, x = randn(columns, of=vector), randn(pixels, columns)
        z = x * scale + shift
        return (
            torch.where(z.abs() < 0.01, ((0.1 - shift) / scale).expand_as(x), x).to(dtype).to(F64),
            scale,
            shift,
        )

    x, scale, shift = norm_over(channels)
    y, out_scale, out_shift = norm_over(out)
    return {
        "x": x,
        "weight": (randn(out, channels) / channels**0.5).to(dtype).to(F64),
        "scale": scale,
        "shift": shift,
        "mean": randn(channels, of=vector),
        "bias": randn(out, of=vector),
        "out_scale": out_scale,
        "out_shift": out_shift,
        "grad_y": randn(pixels, out),
        "y": y,
        "y_mean": randn(out, of=vector),
        "a": randn(out, of=vector) / 8,
        "b": randn(out, of=vector) / 8,
        "grad_x": randn(pixels, channels),
    }


MAPS = ("x", "grad_y", "y", "grad_x")
CORRECTION = ("y", "y_mean", "a", "b", "out_scale", "out_shift")


def as_arguments(case: dict[str, Tensor], arithmetic: Arithmetic, where: Sequence[int]) -> dict[str, Tensor]:
    """What the operators take: maps in buffers."""
    dtype, vector = arithmetic.dtype, reference.accumulate_dtype(arithmetic.dtype)
    c = {name: value.to(vector if value.dim() == 1 else dtype) for name, value in case.items()}
    return c | {name: in_buffer(c[name], *where) for name in MAPS}


def as_matrix(x: Tensor) -> Tensor:
    """[pixels, channels] of a map [1, channels, pixels]."""
    return x[0].t()


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (actual.to(F64) - expected).abs()
    worst = (error / bound.clamp(min=1e-300)).max() if error.numel() else torch.tensor(0.0)
    assert not error.isnan().any()
    assert (error <= bound).all(), f"{float(worst)} times the bound"


def forward(
    simt: Any,
    case: dict[str, Tensor],
    arithmetic: Arithmetic,
    where: Sequence[int] = (0, 0),
    bias: bool = False,
    norm: bool = False,
    statistics: bool = True,
) -> list[Tensor]:
    """y, its mean and variance."""
    c = as_arguments(case, arithmetic, where)
    y = in_buffer(torch.zeros_like(as_matrix(c["y"])), *where)
    watch(simt, x=c["x"], y=y)
    of_out = [
        c["bias"] if bias else None,
        *(c[name] if norm else None for name in ("out_scale", "out_shift")),
    ]
    result = simt.bottleneck([c["x"]], c["scale"], c["shift"], c["weight"], *of_out, statistics, y)
    assert rest_is_untouched(y)
    return [y, *result]


def watch(simt: Any, **maps: Tensor) -> None:
    simt.forget()
    for name, x in maps.items():
        if x.numel():
            simt.watch(name, x)


@pytest.fixture(autouse=True)
def _forget(simt: Any) -> Iterator[None]:
    yield
    simt.forget()


def check_forward(
    simt: Any, shape: Sequence[int], arithmetic: Arithmetic, bias: bool, norm: bool, statistics: bool
) -> None:
    dtype, unit = arithmetic
    case = make_case(shape, dtype)
    got, *of_y = forward(simt, case, arithmetic, shape[3:], bias, norm, statistics)
    expected = torch.empty(1, shape[2], shape[0], dtype=F64)
    vectors = [case["bias"] if bias else None]
    vectors += [case[v] if norm else None for v in ("out_scale", "out_shift")]
    args: Any = [case["x"].t()[None]], case["scale"], case["shift"], case["weight"], *vectors
    reference.bottleneck(*args, False, expected)
    y = as_matrix(expected)
    magnitude = (case["x"] * case["scale"]).abs().add(case["shift"].abs()) @ case["weight"].abs().t()
    magnitude += case["bias"].abs() if bias else 0
    bound = magnitude * (2 * unit + 16 * min(unit, 2.0**-24))  # the operands, and the sums in float
    if norm:
        bound = bound * case["out_scale"].abs() + case["out_shift"].abs() * unit
    assert_close(as_matrix(got), y, bound + y.abs() * unit)
    if statistics:
        check_statistics(got, *of_y)
    else:
        assert [x.numel() for x in of_y] == [0, 0]


def check_statistics(y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Of y as it was stored."""
    exact = 1e-13 if mean.dtype == F64 else 1e-6
    wide = as_matrix(y).to(F64)
    true_var, true_mean = torch.var_mean(wide, 0, correction=0)
    assert_close(mean, true_mean, exact * wide.abs().amax(0))
    assert_close(var, true_var, exact * (4 * true_var + wide.abs().amax(0) ** 2 * 1e-6))


@pytest.mark.parametrize("arithmetic, shape", CASES, indirect=["arithmetic"])
@pytest.mark.parametrize("multiprocessors", CARDS)
def test_forward_in_every_tile(
    simt: Any, on_card: Any, shape: tuple, arithmetic: Arithmetic, multiprocessors: int
) -> None:
    on_card(multiprocessors)
    check_forward(simt, shape, arithmetic, bias=False, norm=False, statistics=True)


def launched(simt: Any, shape: Sequence[int], arithmetic: Arithmetic) -> dict[str, list[int]]:
    """The grid of the first launch each way: (pixels, out channels), and (channels, pixels)."""
    case = make_case(shape, arithmetic.dtype)
    grids = {}
    for direction, run in (("forward", forward), ("backward", backward)):
        simt.plan()
        try:
            run(simt, case, arithmetic)
        finally:
            grids[direction] = list(simt.take_plan()[1:3])
    return grids


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "double"], indirect=True)
def test_the_largest_tile_that_fills_the_card_is_launched(
    simt: Any, on_card: Any, arithmetic: Arithmetic
) -> None:
    seen = set()
    for pixels, channels, out in [(shape[:3]) for shape in NARROW + WIDE] + [(784, 8, 128)]:
        for multiprocessors in (1, 132) if arithmetic.dtype == F64 else (*CARDS, 20):
            on_card(multiprocessors)
            grid = launched(simt, (pixels, channels, out), arithmetic)["forward"]
            grids = {
                tile: [-(-pixels // tile), -(-out // (width or (64 if arithmetic.dtype == F64 else 192)))]
                for tile, width in TILES.items()
            }
            if arithmetic.dtype == F64:
                assert grid == grids[128]
                continue
            enough = [tile for tile, (x, y) in grids.items() if x * y >= -(-4 * multiprocessors // 5)]
            chosen = max(enough, default=16)
            assert grid == grids[chosen], (pixels, out, multiprocessors)
            seen.add(chosen)
    assert seen == (set() if arithmetic.dtype == F64 else set(TILES))


@pytest.mark.parametrize("arithmetic", ["half", "tf32"], indirect=True)
def test_the_backward_fills_the_card_where_pixels_suffice(
    simt: Any, on_card: Any, arithmetic: Arithmetic
) -> None:
    """It takes no more blocks than that: 512 pixels each, where these fill the card."""
    wide = 64 if arithmetic.dtype == torch.half else 32
    for pixels, columns, multiprocessors in [
        (784, 8, 132),
        (784, 4, 132),
        (40, 1, 132),
        (20000, 1, 20),
        (64, 1, 1),
    ]:
        on_card(multiprocessors)
        case = pixels, columns * wide, 48
        assert launched(simt, case, arithmetic)["backward"][0] == columns
        blocks, tiles = launched(simt, case, arithmetic)["backward"][1], -(-pixels // 32)
        enough = -(-4 * multiprocessors // 5)
        assert blocks * columns >= min(enough, tiles * columns)
        if pixels == 20000:  # two a multiprocessor, of 512 pixels and more: 625 tiles, 17 a block
            assert blocks == 37
        if pixels == 64:
            assert blocks == 1


@in_every_arithmetic
@pytest.mark.parametrize(
    "bias, norm, statistics", [(True, False, True), (False, True, False), (True, True, True)]
)
def test_epilogues(simt: Any, arithmetic: Arithmetic, bias: bool, norm: bool, statistics: bool) -> None:
    check_forward(simt, WIDE[1], arithmetic, bias, norm, statistics)


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "double"], indirect=True)
@pytest.mark.parametrize("multiprocessors", CARDS)
def test_statistics_survive_a_large_mean(
    simt: Any, on_card: Any, arithmetic: Arithmetic, multiprocessors: int
) -> None:
    on_card(multiprocessors)
    case = make_case((300, 24, 48), arithmetic.dtype)
    case["bias"] = torch.full_like(case["bias"], 1000.0)
    check_statistics(*forward(simt, case, arithmetic, bias=True))


@pytest.mark.parametrize("arithmetic", ["float"], indirect=True)
def test_the_mean_where_one_pixel_is_far_from_it(simt: Any, arithmetic: Arithmetic) -> None:
    """Zeros behind relu, and one large value first: at most a few roundings of 1/32 of it, 4 times its block's mean."""
    case = make_case((1100, 24, 48), arithmetic.dtype)
    case["x"].fill_(0)
    case["x"][0] = case["scale"].sign() * 100
    case["shift"].fill_(-1)
    y, mean, _ = forward(simt, case, arithmetic)
    exact = as_matrix(y).to(F64).mean(0)
    assert_close(mean, exact, 16 * 2.0**-24 * exact.abs())


def backward(
    simt: Any,
    case: dict[str, Tensor],
    arithmetic: Arithmetic,
    where: Sequence[int] = (0, 0),
    correction: int = 0,
    accumulate: bool = True,
    need_features: bool = True,
    need_grad_x: bool = True,
    need_weight: bool = True,
) -> dict[str, Tensor]:
    """What is wanted of grad_x, grad_weight and the sums."""
    c = as_arguments(case, arithmetic, where)
    grad_x = c["grad_x"] if accumulate else in_buffer(torch.zeros_like(as_matrix(c["x"])), *where)
    if not need_grad_x:
        grad_x = grad_x.new_empty(0)
    before = grad_x.clone()
    watch(simt, x=c["x"], grad_y=c["grad_y"], y=c["y"], grad_x=grad_x)
    grad_weight, sum_d, sum_dx = simt.bottleneck_backward(
        [c["x"]],
        c["grad_y"],
        *(c[name] for name in (*VECTORS, "weight")),
        [grad_x],
        accumulate,
        need_features,
        need_weight,
        [c[name] for name in CORRECTION[:correction]],
    )
    results = {"grad_weight": grad_weight} if need_weight else {}
    if need_features:
        results |= {"sum_d": sum_d, "sum_dx": sum_dx}
    if need_grad_x:
        assert rest_is_untouched(grad_x) and (need_features or torch.equal(grad_x, before))
        results |= {"grad_x": as_matrix(grad_x)} if need_features else {}
    return results


def check_backward(simt: Any, shape: Sequence[int], arithmetic: Arithmetic, **options: Any) -> None:
    dtype, unit = arithmetic
    case = make_case(shape, dtype, seed=1)
    results = backward(simt, case, arithmetic, shape[3:], **options)
    correction = options.get("correction", 0)
    accumulate = options.get("accumulate", True)
    grad_x = case["grad_x"].clone().t()[None]
    vectors = case["scale"], case["shift"], case["mean"]
    tensors = [case["y"].t()[None], *(case[name] for name in CORRECTION[1:])][:correction]
    args: Any = [case["x"].t()[None]], case["grad_y"].t()[None], *vectors, case["weight"], [grad_x]
    grad_weight, sum_d, sum_dx = reference.bottleneck_backward(*args, accumulate, True, True, tensors)

    # How much there is to be rounded: of grad_y, of d, and of what becomes of them.
    grad = case["grad_y"].abs()
    if correction == 6:
        grad = grad * case["out_scale"].abs()
    if correction:
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


@pytest.mark.parametrize("arithmetic, shape", CASES, indirect=["arithmetic"])
@pytest.mark.parametrize("correction", [0, 4, 6])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_backward_in_every_tile(
    simt: Any, on_card: Any, shape: tuple, correction: int, arithmetic: Arithmetic, multiprocessors: int
) -> None:
    on_card(multiprocessors)
    check_backward(simt, shape, arithmetic, correction=correction)


@in_every_arithmetic
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
def test_backward_of_what_is_wanted(simt: Any, arithmetic: Arithmetic, options: dict) -> None:
    check_backward(simt, WIDE[3], arithmetic, **options)
    check_backward(simt, WIDE[1], arithmetic, correction=6, **options)


@in_every_arithmetic
@pytest.mark.parametrize("multiprocessors", CARDS)
def test_the_order_of_threads_and_blocks_changes_no_bit(
    simt: Any, on_card: Any, arithmetic: Arithmetic, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card(multiprocessors)
    for shape in (WIDE[1], NARROW[4]) if multiprocessors == 1 else (NARROW[2],):
        case = make_case(shape, arithmetic.dtype)
        outcomes = []
        for order in ORDERS:
            monkeypatch.setenv("SIMT_ORDER", order)
            results = backward(simt, case, arithmetic, shape[3:], correction=6)
            outcomes.append([*forward(simt, case, arithmetic, shape[3:]), *results.values()])
        for other in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("arithmetic", ["half", "tf32"], indirect=True)
def test_no_pixels_launch_nothing(simt: Any, arithmetic: Arithmetic) -> None:
    case = make_case((0, 24, 48), arithmetic.dtype)
    forward(simt, case, arithmetic)
    assert simt.traffic() == [0, 0, 0, 0]
    backward(simt, case, arithmetic, correction=6)
    assert simt.traffic() == [0, 0, 0, 0]


@pytest.mark.parametrize("arithmetic", ["half", "tf32"], indirect=True)
def test_nan_comes_through(simt: Any, arithmetic: Arithmetic) -> None:
    case = make_case((70, 24, 48), arithmetic.dtype)
    case["x"][3, 5] = float("nan")
    y = as_matrix(forward(simt, case, arithmetic)[0])
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()
    results = backward(simt, case, arithmetic)
    assert results["grad_x"].isfinite().all()  # relu passes the gradient of NaN
    assert results["sum_d"].isfinite().all() and results["sum_dx"].isnan().nonzero().flatten().tolist() == [5]
    assert results["grad_weight"].isnan().any(0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("arithmetic", ["half", "tf32"], indirect=True)
def test_infinity_comes_through(simt: Any, arithmetic: Arithmetic) -> None:
    case = make_case((70, 24, 48), arithmetic.dtype)
    case["x"][3, 5] = float("inf") * case["scale"][5]
    y = as_matrix(forward(simt, case, arithmetic)[0])
    assert torch.equal(y[3].double(), case["weight"][:, 5] * float("inf"))
    assert y[:3].isfinite().all() and y[4:].isfinite().all()
    results = backward(simt, case, arithmetic)
    assert results["grad_x"].isfinite().all() and results["sum_d"].isfinite().all()
    assert results["grad_weight"].isfinite().all(0).logical_not().nonzero().flatten().tolist() == [5]


# ---- Traffic


def check_traffic(simt: Any, shape: tuple, arithmetic: Arithmetic, launches: int) -> None:
    """launches: of the backward, which walks over so many parts of the out channels.

    The forward reads x once for every tile of out channels.
    """
    dtype = arithmetic.dtype
    case = make_case(shape, dtype)
    pixels, channels, out = shape[:3]
    of_x, of_y = pixels * channels * dtype.itemsize, pixels * out * dtype.itemsize
    tiles = launched(simt, shape, arithmetic)["forward"][1]
    columns = channels // (64 if dtype.itemsize == 2 else 32)
    forward(simt, case, arithmetic, shape[3:])
    assert simt.watched("x") == [of_x * tiles // 16, of_x * tiles, 0, 0]  # by pieces of 16 bytes
    assert simt.watched("y") == [0, 0, of_y // 16, of_y]
    backward(simt, case, arithmetic, shape[3:], correction=6)
    assert simt.watched("x") == [of_x * launches // 16, of_x * launches, 0, 0]
    assert simt.watched("grad_x") == 2 * [of_x * launches // 16, of_x * launches]
    for name in ("grad_y", "y"):
        _, load_bytes, *stores = simt.watched(name)
        assert [load_bytes, *stores] == [of_y * columns, 0, 0]


# A multiple of every depth of a stage: what lies beyond the channels would be counted as loads of no bytes.
TRAFFIC = [(256, 128, 48, 0, 0), (1024, 128, 128, 0, 16)]


@in_every_arithmetic
@pytest.mark.parametrize("shape", TRAFFIC, ids=str)
@pytest.mark.parametrize("multiprocessors", CARDS)
def test_each_element_moves_once(
    simt: Any, on_card: Any, arithmetic: Arithmetic, shape: tuple, multiprocessors: int
) -> None:
    on_card(multiprocessors)
    launches = -(-shape[2] // 64) if arithmetic.dtype == F64 else 1
    check_traffic(simt, shape, arithmetic, launches)


# ---- TF32


@pytest.mark.parametrize("arithmetic", ["float"], indirect=True)
def test_tf32_is_what_pytorch_permits(simt: Any, arithmetic: Arithmetic) -> None:
    """The setting of convolutions decides, not that of matrix products."""
    case = make_case(WIDE[0], torch.float32)
    results = {}

    def run(arithmetic: Arithmetic) -> list[Tensor]:
        return [forward(simt, case, arithmetic)[0], *backward(simt, case, arithmetic).values()]

    exact = run(ARITHMETICS["double"])
    for of_convolutions, of_products in ((False, False), (False, True), (True, False)):
        permit_tf32(CONVOLUTIONS, of_convolutions)
        set_back = permit_tf32(PRODUCTS, of_products)
        try:
            results[of_convolutions, of_products] = run(arithmetic)
        finally:
            set_back()
    for i, x in enumerate(exact):
        ieee, same, tf32 = (result[i] for result in results.values())
        assert torch.equal(ieee, same)
        error = rms(ieee.double() - x) / rms(x)
        assert 0 < error < 1e-6 and 1e-5 < rms(tf32.double() - x) / rms(x) < 1e-3
