"""Shared by the operator tests: shapes, data, layouts, wrong arguments, and the bound "as exact as plain PyTorch"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effdense.ops import reference

# The settings of TF32. torch 2.8 has one for everything that cuDNN does.
_TF32 = "fp32_precision" if hasattr(torch.backends.cudnn, "conv") else "allow_tf32"
CONVOLUTIONS: Any = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
PRODUCTS: Any = torch.backends.cuda.matmul

# The operators' implementations that stand beside the twin. All must be there: a run without would prove nothing.
# simt: the CUDA kernels, run on the CPU. A test file whose operators not all of them have says so in its own BACKENDS.
BACKENDS = {"cpu": torch.ops.effdense, "simt": torch.ops.effdense_simt}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EPS = 0.1  # of batch norms: keeps a channel of one pixel, which has no variance, well conditioned

# Calls an operator of a namespace on data of a dtype; returns all that it makes.
Run = Callable[[Any, torch.dtype], list[Tensor]]

# images, spatial sizes, channels of each feature, output channels
SHAPES = [
    (2, (5, 7), (3, 5, 2), 6),  # several odd features
    (1, (1, 1), (1,), 1),  # one pixel, one channel
    (3, (1, 1), (24, 13), 21),  # one pixel an image
    (2, (33,), (13,), 3),  # 1D
    (2, (4, 3, 5), (2, 7), 4),  # 3D
    (37, (7, 7), (24, 12, 12), 48),  # many small images share a tile
    (2, (40, 41), (24, 12, 12), 48),  # an image is cut into several tiles
    (0, (4, 4), (3, 2), 4),  # empty batch
    (2, (0, 4), (3, 2), 4),  # empty image
]

# what opcheck sees: it looks at shapes, dtypes and strides, and is slow
OPCHECKS = list(zip([SHAPES[0], SHAPES[3], SHAPES[4]], DTYPES, strict=True))


def make_features(images: int, spatial: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    """Features in float64, each a slice of a larger tensor (so that images do not lie side by side)."""
    wide = [torch.randn(images, c + 2, *spatial, dtype=torch.float64) * 2 + 0.5 for c in channels]
    return [x[:, 1:-1] for x in wide]


def make_map(shape: tuple) -> Tensor:
    """All features of a shape as one map in float64."""
    return torch.cat(make_features(*shape[:3]), 1)


def channels_last(x: Tensor) -> Tensor:
    """x as the operators want what they write; the formula of effdense.reference."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _poison(x: Tensor) -> float:
    """What nobody may read: NaN, and 255 among bytes."""
    return float("nan") if x.is_floating_point() else 255


def _inside(x: Tensor, dim: int, before: int, after: int, last: bool, fill: float | None = None) -> Tensor:
    """x as a piece of a tensor that is wider in `dim`, channels-last or not."""
    fill = _poison(x) if fill is None else fill
    shape = list(x.shape)
    shape[dim] += before + after
    order = [0, *range(2, x.dim()), 1] if last else list(range(x.dim()))
    wide = x.new_full([shape[d] for d in order], fill)
    if last:
        wide = wide.movedim(-1, 1)
    return wide.narrow(dim, before, x.shape[dim]).copy_(x)


def in_buffer(x: Tensor) -> Tensor:
    """x as channels of a wider channels-last buffer, which holds 77 elsewhere; see `rest_is_untouched`."""
    return _inside(x, 1, 1, 2, True, 77)


def rest_is_untouched(out: Tensor) -> bool:
    """Whether the buffer of `in_buffer` holds what it held beside `out`."""
    buffer = out._base
    assert buffer is not None
    return bool((buffer[..., :1] == 77).all() and (buffer[..., -2:] == 77).all())


# How a map that is read may lie in memory: poison is all around it.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "slice": lambda x: _inside(x, 1, 1, 2, False),
    "channels-last": channels_last,
    "channels-last prefix": lambda x: _inside(x, 1, 0, 3, True),
    "channels-last slice": lambda x: _inside(x, 1, 2, 1, True),
    "every other pixel": lambda x: torch.stack([x, torch.full_like(x, _poison(x))], -1)[..., 0],
    "cropped": lambda x: _inside(x, -1, 0, 1, False),
    "channels-last cropped": lambda x: _inside(x, -1, 1, 0, True),
}


# images, channels, spatial sizes at which layouts may be told apart wrongly
IN_EVERY_LAYOUT = [
    (2, 3, (5, 7)),
    (3, 2, (9,)),
    (2, 3, (2, 3, 4)),
    (3, 4, (1, 1)),
    (3, 1, (4, 5)),
    (1, 5, (3, 4)),
    (1, 13, (1, 1)),
    (3, 1, (1,)),
    (1, 1, (6, 1)),
    (2, 3, (1, 6)),
]


def lay_out(features: Sequence[Tensor], first: int = 0) -> list[Tensor]:
    """Every feature in another layout, in the order of LAYOUTS from the `first` on."""
    every = list(LAYOUTS.values())
    return [every[(first + i) % len(every)](x) for i, x in enumerate(features)]


def random_scale(rstd: Tensor) -> Tensor:
    """A batch norm's scale of either sign, not close to zero."""
    weight = torch.randn_like(rstd)
    return (weight.sign() * 0.25 + weight) * rstd


def column(vector: Tensor, like: Tensor) -> Tensor:
    """[C] shaped so that it broadcasts over [N, C, *spatial]."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def over_channels(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def away_from_the_kink(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """x as `dtype` has it, without values that scale * x + shift takes so close to 0 that rounding decides on the mask."""
    scale, shift = column(scale, x), column(shift, x)
    x = x.to(dtype).double()
    return torch.where((scale * x + shift).abs() < 0.01, (0.5 - shift) / scale, x).to(dtype).double()


def make_norm_case(shape: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """One map x, as `dtype` has it, and the vectors of a batch norm over it; float64."""
    x, wide = make_map(shape).to(dtype).double(), reference.accumulate_dtype(dtype)
    mean, var = reference.channel_statistics([x])
    rstd = (var + EPS).rsqrt()
    scale = random_scale(rstd)
    shift = torch.randn_like(mean) - mean * scale
    vectors = {"scale": scale, "shift": shift, "mean": mean, "rstd": rstd}
    vectors = {k: v.to(wide).double() for k, v in vectors.items()}
    return {"x": away_from_the_kink(x, vectors["scale"], vectors["shift"], dtype), **vectors}


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Float64 test data in another dtype, in a list or a dict or alone; vectors become the dtype that sums are kept in."""
    if isinstance(value, dict):
        return {k: to_dtype(v, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [to_dtype(v, dtype) for v in value]
    return value.to(reference.accumulate_dtype(dtype) if value.dim() == 1 else dtype)


def assert_as_exact(
    run: Callable[[Any, torch.dtype], Sequence[Tensor]], ops: Any, dtype: torch.dtype
) -> None:
    """Runs on `ops` in `dtype`; errors against the float64 twin at most twice the twin's own in that dtype.

    Errors are root mean squares over a result. One rounding is granted on top; in float64, where the twin is itself the
    oracle, 100 of them. Whole numbers are the twin's.
    """
    oracle = run(reference, torch.float64)
    twin = run(reference, dtype)
    for got, same_dtype, exact in zip(run(ops, dtype), twin, oracle, strict=True):
        assert got.dtype == same_dtype.dtype and got.shape == same_dtype.shape
        if exact.numel() == 0:
            continue
        if not exact.is_floating_point():
            assert torch.equal(got, same_dtype)
            continue
        roundings = 100 if dtype == torch.float64 else 1
        allowed = 2 * rms(same_dtype.double() - exact) + roundings * torch.finfo(dtype).eps * rms(exact)
        error = rms(got.double() - exact)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_repeatable(
    run: Callable[[Any, torch.dtype], Sequence[Tensor]], ops: Any, dtype: torch.dtype
) -> None:
    """The same bits from every run."""
    for first, second in zip(run(ops, dtype), run(ops, dtype), strict=True):
        assert torch.equal(first, second)


def rms(x: Tensor) -> float:
    """The root of the mean square; NaN if any is."""
    return x.square().mean().sqrt().item()


# argument, what is done to it, the error, its message after "operator: argument "
Mistake = tuple[str, Callable[[Any], Any], type[Exception], str]


def mistakes(
    vectors: Sequence[str] = (), maps: Sequence[str] = (), written: Sequence[str] = ()
) -> list[Mistake]:
    """What every operator refuses of its vectors, of the maps that it reads and of those that it writes."""
    found: list[Mistake] = []
    for name in vectors:
        found += [
            (name, lambda v: v[1:], ValueError, r"must be a contiguous vector of \d+ elements .*, got shape"),
            (name, lambda v: v.repeat(2)[::2], ValueError, r"must be a contiguous vector .*, got shape"),
            (name, lambda v: v[None], ValueError, r"must be a contiguous vector .*, got shape \[1, \d+\]"),
            (name, Tensor.float, TypeError, r"must be Double \(.*sums.*\), got Float"),
        ]
    for name in (*maps, *written):
        found += [
            (name, lambda x: x[..., 1:], ValueError, r"must have the .*(sizes|shape).* \[2.*\], got \[2"),
            (name, lambda x: x[1:], ValueError, r"must have the .*(sizes|shape).* \[2.*\], got \[1"),
            (name, lambda x: x[0], ValueError, r"must have the .*(sizes|shape).* \[2.*\], got \["),
            (name, lambda x: x[:, 1:], ValueError, r"must have (\d+ channels|the pooled shape).*, got "),
            (name, Tensor.float, TypeError, r"must be Double \(the features' type\), got Float"),
        ]
    for name in written:
        no_matrix = r"must be channels-last \(written in place\), got shape \[2, .*\] with strides \["
        found += [
            (name, lambda x: x.contiguous(), ValueError, no_matrix),
            (name, lambda x: in_buffer(x.repeat(1, 1, 1, 2))[..., : x.shape[-1]], ValueError, no_matrix),
        ]
    return found


def assert_refused(
    op: str, arguments: dict[str, Any], mistake: Mistake, ops: Any = torch.ops.effdense
) -> None:
    """The operator, called with one wrong argument, says so."""
    name, change, error, message = mistake
    wrong = {**arguments, name: change(arguments[name])}
    with pytest.raises(error, match=rf"^{op}: {name}( |(?=\[)){message}"):
        getattr(ops, op)(**wrong)


def permit_tf32(setting: Any, permitted: bool) -> Any:
    """Of CONVOLUTIONS or PRODUCTS. Returns a function that sets it back."""
    before = getattr(setting, _TF32)
    value: Any = permitted if _TF32 == "allow_tf32" else "tf32" if permitted else "ieee"
    setattr(setting, _TF32, value)
    return lambda: setattr(setting, _TF32, before)
