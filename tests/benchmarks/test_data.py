"""The cut of Fashion-MNIST in the repository, and the reader of the whole set."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from benchmarks import data
from tests._training import write_idx

pytestmark = pytest.mark.tools


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """A folder with the test split's two files, of zeros."""
    monkeypatch.setenv("EFFDENSE_DATA", str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((10_000, 28, 28), np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10_000, np.uint8))
    return tmp_path


def test_cut_is_balanced_and_small():
    images, labels = data.load_cut()
    assert images.shape == (2000, 28, 28) and images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [200] * 10
    assert data.CUT.stat().st_size <= 1_000_000
    values, targets = data.to_tensors(images, labels)
    assert values.shape == (2000, 1, 32, 32) and targets.dtype == torch.int64
    inner = values[:, :, 2:-2, 2:-2]
    assert abs(inner.mean()) < 0.05 and abs(inner.std() - 1) < 0.05


def test_to_tensors_sizes():
    images, labels = (array[:3] for array in data.load_cut())
    for size in (28, 33, 96):
        assert data.to_tensors(images, labels, size)[0].shape == (3, 1, size, size)
    with pytest.raises(ValueError, match="image_size must be 28 or more"):
        data.to_tensors(images, labels, 27)


def test_loader_reads_the_files(data_root):
    images, labels = data.load_fashion_mnist("test")
    assert images.shape == (10_000, 28, 28) and labels.shape == (10_000,)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is missing"):
        data.load_fashion_mnist("train", data_root)
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        data.load_fashion_mnist("val")
    with pytest.raises(FileNotFoundError, match=r"no Fashion-MNIST in /nowhere \(--data-root\)"):
        data.load_fashion_mnist("test", "/nowhere")


def test_loader_refuses_damaged_files(data_root):
    path = data_root / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path} must hold 7840016 bytes when unpacked, found "):
        data.load_fashion_mnist("test")
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"is damaged or not gzip \(22 bytes on disk"):
        data.load_fashion_mnist("test")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match="must hold 7840016 bytes when unpacked, found 7840015"):
        data.load_fashion_mnist("test")
    write_idx(path, np.zeros((10_000, 28, 28), np.uint8), magic=2049)
    with pytest.raises(ValueError, match="magic number 2051, found 2049"):
        data.load_fashion_mnist("test")
    write_idx(path, np.zeros((10_000, 14, 56), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(10000, 28, 28\), its header says \(10000, 14, 56\)"):
        data.load_fashion_mnist("test")
