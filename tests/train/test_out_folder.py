"""`effdense train --out`: a run that is refused leaves nothing behind, and says in one line why a folder cannot be had."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from effdense.train import folder
from tests._training import train

REFUSED = ("--batch-size", "64")  # of 60 images


@pytest.mark.parametrize("there", ["nothing", "a folder", "a folder with a file", "a locked one"])
def test_a_run_that_is_refused_leaves_nothing(there: str, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "run"
    if there != "nothing":
        out.mkdir(parents=True)
    if there == "a folder with a file":
        (out / "notes.txt").touch()
    if there == "a locked one":
        (out / folder.LOCK).touch()
    before = sorted(tmp_path.rglob("*"))
    assert train(root, out, *REFUSED) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda out: out.write_text("mine"), "it is a file, and a folder was expected"),
        (
            lambda out: out.symlink_to("nowhere"),
            "it is a symbolic link to nowhere, which is missing, and a folder was expected",
        ),
        (lambda out: out.symlink_to(out), "it is a symbolic link to "),
    ],
    ids=["a file", "a dangling link", "a link to itself"],
)
def test_what_is_no_folder(make: Any, message: str, root: Path, tmp_path: Path, capsys: Any) -> None:
    make(out := tmp_path / "run")
    before = os.lstat(out)
    assert train(root, out) == 2
    assert f"--out {out} cannot be written: {message}" in capsys.readouterr().err
    assert os.path.samestat(os.lstat(out), before) and os.listdir(tmp_path) == ["run"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk(root: Path, tmp_path: Path, capsys: Any) -> None:
    """The system's own: no byte is left."""
    import ctypes

    libc, disk = ctypes.CDLL(None, use_errno=True), tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        (disk / "full").write_bytes(bytes(64 * 1024 - 4096))
        assert train(root, disk / "run") == 2
        assert "No space left on device" in capsys.readouterr().err
        (disk / "full").unlink()
        (disk / "full").write_bytes(bytes(32 * 1024))  # room for the beginning
        assert train(root, disk / "run") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not [path for path in (disk / "run").iterdir() if path.suffix in (".pt", ".part")]
    finally:
        assert libc.umount(bytes(disk)) == 0


def test_a_lock_that_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that is refused: who has opened its file before must not hold the folder by a file that nobody finds."""
    real, held = fcntl.flock, list[Any]()

    def flock(lock: Any, how: int) -> None:
        if not held:
            (tmp_path / folder.LOCK).unlink()
        held.append(lock)
        real(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder._lock(tmp_path) as lock:
        assert len(held) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), os.stat(tmp_path / folder.LOCK))
