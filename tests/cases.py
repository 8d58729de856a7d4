"""What the operator tests share: shapes, data, and what "as exact as plain PyTorch" means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdense import reference

# The operators' implementations that stand beside the twin. All must be there: a run without would prove nothing.
BACKENDS = {"cpu": torch.ops.effdense}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

# images, spatial sizes, channels of each feature, output channels
SHAPES = [
    (2, (5, 7), (3, 5, 2), 6),  # several odd features
    (1, (1, 1), (1,), 1),  # one pixel, one channel
    (3, (1, 1), (4, 3), 5),  # one pixel an image
    (2, (33,), (13,), 3),  # 1D
    (2, (4, 3, 5), (2, 7), 4),  # 3D
    (37, (7, 7), (24, 12, 12), 48),  # many small images share a tile
    (2, (40, 41), (24, 12, 12), 48),  # an image is cut into several tiles
    (0, (4, 4), (3, 2), 4),  # empty batch
    (2, (0, 4), (3, 2), 4),  # empty image
]


def make_features(images: int, spatial: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    """Features in float64, each a slice of a larger tensor (so that images do not lie side by side)."""
    wide = [torch.randn(images, c + 2, *spatial, dtype=torch.float64) * 2 + 0.5 for c in channels]
    return [x[:, 1:-1] for x in wide]


def random_scale(rstd: Tensor) -> Tensor:
    """A batch norm's scale of either sign, not close to zero."""
    weight = torch.randn_like(rstd)
    return (weight.sign() * 0.25 + weight) * rstd


def away_from_the_kink(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """x as `dtype` has it, without values that scale * x + shift takes so close to 0 that rounding decides on the mask."""
    scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
    x = x.to(dtype).double()
    return torch.where((scale * x + shift).abs() < 0.01, (0.5 - shift) / scale, x).to(dtype).double()


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Float64 test data in another dtype; vectors and matrices that hold sums go to its accumulation dtype."""
    return [x.to(dtype) for x in value] if isinstance(value, list) else value.to(dtype)


def assert_as_exact(
    run: Callable[[Any, torch.dtype], Sequence[Tensor]], ops: Any, dtype: torch.dtype
) -> None:
    """Runs on `ops` in `dtype`; errors against the float64 twin at most twice the twin's own in that dtype.

    Errors are root mean squares over a result. One rounding is granted on top; in float64, where the twin is itself the
    oracle, 100 of them.
    """
    oracle = run(reference, torch.float64)
    twin = run(reference, dtype)
    for got, same_dtype, exact in zip(run(ops, dtype), twin, oracle, strict=True):
        assert got.dtype == same_dtype.dtype and got.shape == same_dtype.shape
        if exact.numel() == 0:
            continue
        roundings = 100 if dtype == torch.float64 else 1
        allowed = 2 * rms(same_dtype.double() - exact) + roundings * torch.finfo(dtype).eps * rms(exact)
        error = rms(got.double() - exact)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def rms(x: Tensor) -> float:
    """The root of the mean square; NaN if any is."""
    return x.square().mean().sqrt().item()
