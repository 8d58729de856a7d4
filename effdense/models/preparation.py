"""How images become a model's input: for the tests of the run that trains it, and for whoever uses it afterwards."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdense import extras
from effdense.tensor_files import shortly

# Mean and standard deviation of the training images, as fractions of 255; a folder's are ImageNet's.
STATISTICS = {
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SIZES = {"fashion-mnist": 28, "cifar10": 32, "cifar100": 32}  # their images' height and width
GREY = ((0.449,), (0.226,))  # a folder's that is read in grey: means of the three
_ORIENTATION = 0x0112  # EXIF's number for it
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to images, in this order; call it with some of them for a batch.

    Args:
        mean: of every channel that images are read with, as a fraction of 255.
        std: the standard deviation, likewise.
        channels: of the model's input. Grey images are repeated to that.
        pad: zeros are put around images, to that height and width.
        resize: the height and width that images are brought to; None: they stay as they are.
        centre: what part of the sides of the square in their middle is brought to it; None: all of the image, and after the
            normalisation (data sets in memory).

    Examples:
        >>> prepare = effdense.models.Preparation(mean=(0.5,), std=(0.25,), channels=1, resize=8)
        >>> prepare(torch.zeros(1, 28, 28, dtype=torch.uint8)).shape
        torch.Size([1, 1, 8, 8])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    pad: int | None = None
    resize: int | None = None
    centre: float | None = None

    @classmethod
    def checked(cls, given: Any) -> Preparation:
        """Of what a checkpoint has: the fields by their names.

        Raises:
            TypeError, ValueError: one is missing, too many, or of another kind.
        """
        made = cls(**given)

        def numbers(values: Any) -> bool:
            return isinstance(values, (list, tuple)) and all(type(v) in (int, float) for v in values)

        def size(value: Any) -> bool:
            return value is None or (type(value) is int and value > 0)

        right = {
            "mean": numbers(made.mean) and len(made.mean) in (1, 3),
            "std": numbers(made.std) and len(made.std) == len(made.mean),
            "channels": type(made.channels) is int and made.channels > 0,
            "pad": size(made.pad),
            "resize": size(made.resize),
            "centre": made.centre is None or type(made.centre) in (int, float),
        }
        for name, is_right in right.items():
            if not is_right:
                raise ValueError(f"{name} is {shortly(getattr(made, name))}")
        return made

    def __call__(self, images: Any) -> Tensor:
        """The model's input, float32 [N, channels, height, width].

        Args:
            images: a file's path, an image of Pillow's, or a list of these; or a tensor uint8 [channels, height, width] or
                [N, channels, height, width].

        Raises:
            ImportError: Pillow is needed and missing.
            TypeError: the images are something else.
            ValueError: a file cannot be read, or the images have different sizes or a wrong number of channels.
        """
        if isinstance(images, Tensor):
            parts = self.of_tensors(images)
        else:
            one = isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence)
            parts = [self.of_file(image) for image in ([images] if one else images)]
        if not parts:
            raise ValueError("prepare: one image or more was expected, got none")
        done = [self.finish(part.unsqueeze(0), torch.float32) for part in parts]
        if len(sizes := {part.shape for part in done}) > 1:
            found = " and ".join(f"{height}x{width}" for _, _, height, width in sorted(sizes)[:2])
            raise ValueError(f"prepare: images of one size were expected, got {found}")
        return torch.cat(done)

    def of_tensors(self, images: Tensor) -> list[Tensor]:
        """Pixels of every image of a tensor, as of files; errors as above."""
        wanted = (len(self.mean), 1) if len(self.mean) == 3 else (1,)
        if images.dtype != torch.uint8 or not 3 <= images.dim() <= 4 or images.shape[-3] not in wanted:
            raise ValueError(
                f"prepare: images must be uint8 [{len(self.mean)}, height, width], or several of them, got "
                f"{images.dtype} {list(images.shape)}"
            )
        several = images if images.dim() == 4 else images.unsqueeze(0)
        several = several.expand(-1, len(self.mean), -1, -1)
        if self.resize is None or self.centre is None:
            return list(several)
        pil = extras.load("PIL.Image", "resizing as the run has")
        mode = MODES[len(self.mean)]
        return [
            self.pixels(
                pil.frombytes(mode, tuple(x.shape[:0:-1]), bytes(x.permute(1, 2, 0).flatten().tolist()))
            )
            for x in several.cpu()
        ]

    def of_file(self, image: Any) -> Tensor:
        """Pixels of a file, or of an image of Pillow's; errors as above."""
        if not isinstance(image, (str, os.PathLike)):
            if not hasattr(image, "convert"):
                raise TypeError(
                    f"prepare: a path, an image of Pillow's or a tensor was expected, got {type(image).__name__}"
                )
            return self.pixels(image)
        pil = extras.load("PIL.Image", "reading an image")
        try:
            with pil.open(image) as opened:
                return self.pixels(opened)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged one makes of it
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ValueError(f"{os.fspath(image)} cannot be read: {reason}") from error

    # --- the steps

    def pixels(self, file: Any, box: tuple[float, float, float, float] | None = None) -> Tensor:
        """uint8 [C, height, width] of an image of Pillow's, which is resized; `box`: left, top, width and height of what is taken.

        Where Pillow has 16 bits, which it has of grey images alone, they are float32, of 0 to 255 all the same.
        """
        exact = file.mode.startswith(("I", "F"))  # which Pillow's own conversion would cut off at 255
        if exact and _bits(file) != 16:
            raise ValueError(f"32 bits a pixel, whose range is not known (Pillow's mode {file.mode})")
        image = file.convert("I").convert("F") if exact else file.convert(MODES[len(self.mean)])
        if self.resize is not None and self.centre is not None:
            width, height = image.size
            side = self.centre * min(width, height)
            left, top, w, h = box or ((width - side) / 2, (height - side) / 2, side, side)
            within = (left, top, min(left + w, width), min(top + h, height))  # rounding aside
            bilinear = extras.load("PIL.Image", "resizing").Resampling.BILINEAR
            image = image.resize((self.resize, self.resize), bilinear, box=within)
        dtype = torch.float32 if exact else torch.uint8
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
        values = values.view(image.height, image.width, -1).permute(2, 0, 1)
        return (values / 257).expand(len(self.mean), -1, -1) if exact else values

    def loses(self, file: Any) -> str:
        """What an image of Pillow's that has just been opened has otherwise than it is read; empty: nothing."""
        gray = file.mode in ("1", "L", "LA", "La") or file.mode.startswith(("I", "F"))
        bits, channels = _bits(file), len(self.mean)
        found = ["grey, repeated to 3 channels"] if gray and channels == 3 else []
        found += ["in colour, read as grey"] if not gray and channels == 1 else []
        if bits == 16:
            exact = file.mode.startswith("I")
            found.append("with 16 bits" if exact else "with 16 bits a channel, of which 8 are read")
        if "A" in file.mode or "a" in file.mode or "transparency" in file.info:
            found.append("transparent, which is left out")
        if file.format == "JPEG" and file.getexif().get(_ORIENTATION, 1) != 1:
            found.append("turned by its EXIF data, which are left out")
        if file.format in ("TIFF", "PNG", "WEBP", "GIF") and getattr(file, "n_frames", 1) > 1:
            found.append("of several pages, of which the first is read")
        return " and ".join(found)

    def finish(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels [n, C, height, width] as the model's input."""
        x = x if self.pad is None else padded(x, self.pad)
        return self.repeated(self.fitted(self.normalised(x, dtype)))

    def normalised(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In the model's dtype, with the mean 0 and the deviation 1."""
        mean, std = (_column(values, dtype, x.device) for values in (self.mean, self.std))
        return (x.to(dtype) / 255 - mean) / std

    def fitted(self, x: Tensor) -> Tensor:
        """Resized, where that has not been done with the pixels."""
        if self.resize is None or x.shape[-2:] == (self.resize, self.resize):
            return x
        size = (self.resize, self.resize)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)

    def repeated(self, x: Tensor) -> Tensor:
        """Grey images with the channels that the model wants."""
        return x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x


def _bits(file: Any) -> int:
    """8, 16 or 32: the bits that a channel has in a file that Pillow has opened and not read yet."""
    arguments = file.tile[0][3] if getattr(file, "tile", None) else ()
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    netpbm = getattr(file, "format", None) == "PPM"  # which says the largest value
    for argument in arguments:
        if isinstance(argument, str) and re.match(r"(RGB|L|I|CMYK)[A-Za-z]*;16", argument):
            return 16
        if netpbm and type(argument) is int and argument > 255:
            return 16
    if file.mode.startswith("I;16") or (netpbm and file.mode == "I"):
        return 16
    return 32 if file.mode.startswith(("I", "F")) else 8


@functools.lru_cache(maxsize=16)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).to(dtype).view(1, -1, 1, 1)


def padded(x: Tensor, size: int) -> Tensor:
    """Zeros around images [n, C, H, W] up to [n, C, size, size]."""
    height, width = x.shape[-2:]
    if size < max(height, width):
        raise ValueError(f"--pad must be at least the images' size, {height}x{width}, got {size}")
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(x, (left, size - width - left, top, size - height - top))


def for_test(data: str, channels: int, augment: str, resize: int | None, pad: int | None) -> Preparation:
    """What `effdense train` does with the images of its test.

    Args:
        data: one of STATISTICS.
        channels: that images are read with, 1 or 3 of a folder's.
        augment: of the training. What has learned from resized crops sees the middle of an image, without an eighth of its sides.
        resize: the recipe's.
        pad: the recipe's.
    """
    centre = 0.875 if augment == "resized-crop" else 1.0
    statistics = GREY if data == "folder" and channels == 1 else STATISTICS[data]
    return Preparation(*statistics, channels, pad, resize, centre if data == "folder" else None)
