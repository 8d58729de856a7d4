"""Fashion-MNIST's images, each turned by 0, 90, 180 or 270 degrees, which is its label: no label of the data set is used."""

import gzip
import struct
from pathlib import Path

import numpy as np

source, folder = Path("/usr/share/datasets/fashion-mnist"), Path("rotations")
folder.mkdir(exist_ok=True)
generator = np.random.default_rng(0)
for part in ("train", "t10k"):
    raw = gzip.decompress((source / f"{part}-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    labels = generator.integers(0, 4, len(images)).astype(np.uint8)
    turned = np.stack([np.rot90(x, k) for x, k in zip(images, labels, strict=True)])
    for kind, magic, values in (("images-idx3", 2051, turned), ("labels-idx1", 2049, labels)):
        header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
