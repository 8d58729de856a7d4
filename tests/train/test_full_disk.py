"""A disk that is full at any write of a checkpoint: the one before it is whole, `--resume` goes on from it, to the bit."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense.train import checkpoint
from tests._training import assert_same_end, train, write_data
from tests.train._full_disk import Disk

EVERY = ("--epochs", "1", "--drops=", "--save-steps", "2")


def states() -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple(  # type: ignore[return-value]
        {"settings": {}, "state_dict": {f"w{i}": torch.full((50, i), float(n)) for i in range(9)}, "step": n}
        for n in (1, 2)
    )


def assert_is(path: Path, *steps: int) -> None:
    found = checkpoint.load(path)
    assert found["step"] in steps
    assert all((w == found["step"]).all() for w in found["state_dict"].values())
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no part of one beside it


@pytest.mark.parametrize("once", [False, True])
def test_at_every_write(once: bool, tmp_path: Path) -> None:
    before, after = states()
    checkpoint.save(before, path := tmp_path / "last.pt")
    with (counted := Disk()).mounted():
        checkpoint.save(after, path)
    assert counted.count > 20
    for at in range(counted.count):
        checkpoint.save(before, path)
        with (
            Disk(at, once).mounted(),
            pytest.raises(OSError, match=r"last.pt cannot be written: No space left"),
        ):
            checkpoint.save(after, path)
        # What fails last is that the folder's names reach the disk.
        assert_is(path, *((1,) if at < counted.count - 1 else (1, 2)))


def test_at_every_length_of_the_file(tmp_path: Path) -> None:
    """The system's own refusal, in the middle of what Python writes at once."""
    before, after = states()
    checkpoint.save(after, path := tmp_path / "last.pt")
    size = path.stat().st_size
    checkpoint.save(before, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for length in range(0, size, 211):
            resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
            try:
                with pytest.raises(OSError, match=r"last.pt cannot be written: File too large"):
                    checkpoint.save(after, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert_is(path, 1)
    finally:
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_run_goes_on_from_what_was_written_last(root: Path, tmp_path: Path, capsys: Any) -> None:
    """Full at writes in every checkpoint of a run, best.pt and last.pt of the epoch's end among them."""
    whole = tmp_path / "whole"
    with (counted := Disk()).mounted():
        assert train(root, whole, *EVERY) == 0
    for at in range(3, counted.count, counted.count // 7):
        out = tmp_path / "run"
        with Disk(at).mounted():
            assert train(root, out, *EVERY) == 2
        assert "No space left on device" in capsys.readouterr().err
        again = ("--resume",) if any(out.glob("*.pt")) else ()
        assert train(root, out, *EVERY, *again) == 0
        assert_same_end(out, whole)
        shutil.rmtree(out)
