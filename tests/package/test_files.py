"""Output files: replaced as a whole or not at all; what is no regular file stays what it is, links and permissions stay."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from effdense import cli, files
from effdense.train import checkpoint, command, config, folder
from effdense.train.metrics import Metrics, Row
from tests._training import arguments, assert_same_end, load, rows, train, write_data

SUMMARY = ("summary", "densenet_bc_10_4", "--image-size", "8", "--json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write(path: Path, content: bytes = b"new") -> None:
    with files.replacing(path) as file:
        file.write(content)


@pytest.mark.parametrize("kind", ["absolute", "relative", "of a link", "to nothing yet"])
def test_a_link_stays_and_its_file_is_replaced(kind: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file if kind == "absolute" else Path("there", "file"))
    if kind == "of a link":
        link = tmp_path / "second"
        link.symlink_to("link")
    if kind == "to nothing yet":
        file.unlink()
    write(link)
    assert link.is_symlink() and not file.is_symlink() and file.read_bytes() == b"new"
    assert os.listdir(tmp_path / "there") == ["file"]


def test_links_that_go_round(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(
        OSError, match="a cannot be written: Too many levels of symbolic links; there is none"
    ):
        write(tmp_path / "a")


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join()
    assert got == [b"new"] and stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_device_stays_a_device(tmp_path: Path, capsys: Any) -> None:
    """/dev/null's own numbers at a path of ours, so that a fault hurts nobody; else a terminal."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except PermissionError:
        _, terminal = os.openpty()
        device = Path(os.ttyname(terminal))
    assert cli.main([*SUMMARY, str(device)]) == 0
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("where", ["file", "pipe"])
def test_the_programs_own_output(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/stdout, which the shell has led to a file: behind the table, and not over it."""
    read, out = os.pipe() if where == "pipe" else (None, os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY))
    before = os.dup(1)
    os.dup2(out, 1)
    try:
        with open(1, "w", closefd=False) as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert cli.main([*SUMMARY, "/dev/stdout"]) == 0
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(out)
    text = (tmp_path / "out").read_text() if read is None else os.read(read, 2**16).decode()
    table, brace, rest = text.partition("{\n")
    assert "densenet_bc_10_4" in table and json.loads(brace + rest)["model"] == "densenet_bc_10_4"
    assert os.listdir(tmp_path) == (["out"] if read is None else [])


def test_sockets_and_folders_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    for name, why in {"socket": "a disk or a socket is not overwritten", "folder": "it is a folder"}.items():
        with pytest.raises(OSError, match=f"{name} cannot be written: {why}"):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "socket"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_permissions_stay(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    write(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    file.chmod(mode)
    write(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_write_protected_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file := tmp_path / "file", b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for anybody but root
    with pytest.raises(OSError, match="it is write-protected; the one before it is as it was"):
        write(file)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_longest_name(tmp_path: Path) -> None:
    file = tmp_path / (126 * "ü" + "xyz")  # 255 bytes
    write(file)
    assert file.read_bytes() == b"new"
    with pytest.raises(OSError, match="cannot be written: File name too long"):
        write(tmp_path / (256 * "x"))


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each is whole; the last one stays."""
    file = tmp_path / "file"
    with files.replacing(file) as first:
        first.write(b"first")
        write(file, b"the second, which is longer")
        assert file.read_bytes() == b"the second, which is longer"
    assert file.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_names_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there, and is not said to be missing."""
    sync = os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file")


@pytest.mark.parametrize("option", ["--out", "--data-root", "--weights"])
def test_an_empty_path(option: str, root: Path, tmp_path: Path, capsys: Any) -> None:
    """A shell's variable that is not set."""
    with pytest.raises(SystemExit, match="2"):
        train(root, tmp_path, option, "")
    assert f"argument {option}: a path was expected, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [(*SUMMARY, ""), ("plot", ""), ("plot", "x", "-o", " "), ("reuse", ""), ("reuse", "x", "-o", "")],
)
def test_an_empty_path_in_other_commands(given: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(given)
    assert "a path was expected, got '" in capsys.readouterr().err


def test_a_path_that_is_not_utf8(root: Path, tmp_path: Path, capsys: Any) -> None:
    """TensorBoard would refuse it in the middle."""
    with pytest.raises(SystemExit, match="2"):
        train(root, tmp_path / os.fsdecode(b"run\xff"))
    assert "argument --out: a path in UTF-8 was expected, got " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


OUTPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "evaluate": (("run", "--csv"), "x.csv"),
    "predict": (("run", "i.png", "--csv"), "x.csv"),
    "export": (("run", "-o"), "x.pt2"),
    "plot": (("run", "-o"), "x.png"),
    "reuse": (("run", "-o"), "x.png"),
    "summary": (("densenet_bc_10_4", "--image-size", "8", "--json"), "x.json"),
    "bench": (("densenet_bc_10_4", "--json"), "x.json"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_looked_at_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before a model is built, or a minute is measured; and a file that is read is not written over."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    Path("run", "best.pt").write_bytes(b"the weights")
    Path("link").symlink_to(Path("run", "best.pt"))
    words, file = OUTPUTS[name]
    wrong = {f"no/{file}": "there is no folder", "run": "it is a folder", "x" * 300: "File name too long"}
    if "run" in words:
        wrong |= dict.fromkeys(("run/best.pt", "link"), "would be overwritten: name another file")
    for given, why in wrong.items():
        assert cli.main([name, *words, given]) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1 and why in said.err
    for given in ("-", f"{file}/", os.fsdecode(b"x\xff")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([name, *words, given])
    assert sorted(os.listdir()) == ["link", "run"] and Path("link").read_bytes() == b"the weights"


def test_two_outputs_in_one_file(tmp_path: Path, capsys: Any) -> None:
    words = ("evaluate", str(tmp_path), "--csv", str(tmp_path / "x"))
    assert cli.main([*words, "--json", str(tmp_path / ".." / tmp_path.name / "x")]) == 2
    assert "--csv and --json are the same file" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path), "--csv", os.devnull, "--json", os.devnull]) == 2
    assert "has no best.pt or last.pt" in capsys.readouterr().err


# --- the folder of a run


def test_a_run_among_its_classes(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data" / "train")
    words = ("train", "--model", "x", "--data", "folder", "--data-root", str(tmp_path / "data"), "--out")
    for out in ("data/train", "data/val/run", "link/ant/run"):
        assert cli.main([*words, str(tmp_path / out)]) == 2
        assert "where every folder is a class" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["link"]


def held(out: Path) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return folder.held(command.read_settings(parser.parse_args(arguments(out, out)[1:])))


def test_two_runs_into_one_folder(root: Path, tmp_path: Path, capsys: Any) -> None:
    with held(tmp_path):
        assert train(root, tmp_path) == 2
        assert train(root, tmp_path, "--resume") == 2
        said = capsys.readouterr().err
        assert said.count(f"--out {tmp_path} is in use by another run (process {os.getpid()} on ") == 2
        assert os.listdir(tmp_path) == [folder.LOCK]
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", "12") == 0


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with held(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [tmp_path / f".{name}.0123abcd.part" for name in ("last.pt", "best.pt", "results.json")]
    other = tmp_path / ".plot.png.0123abcd.part"  # which may be being written
    for path in (*left, other):
        path.touch()
    with held(tmp_path):
        assert not any(path.exists() for path in left) and other.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)  # type: ignore[attr-defined]
    with held(tmp_path):
        pass


def test_full_behind_the_first_best(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """best.pt is written, and last.pt never was: nothing of the epoch is lost, and nothing is written over it."""
    original = checkpoint.save

    def full(state: dict[str, Any], path: Path) -> None:
        if path.name == "last.pt":
            raise OSError(f"{path} cannot be written: No space left on device; there is none")
        original(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert train(root, tmp_path / "parts") == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "last.pt").exists()
    assert train(root, tmp_path / "parts") == 2
    assert "holds a run: --resume goes on with it" in capsys.readouterr().err
    assert train(root, tmp_path / "parts", "--resume") == 0
    assert (
        f"there is no {tmp_path}/parts/last.pt; going on from {tmp_path}/parts/best.pt"
        in capsys.readouterr().err
    )
    assert train(root, tmp_path / "whole") == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_a_last_checkpoint_that_is_damaged(root: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(root, tmp_path, "--epochs", "1") == 0
    (tmp_path / "last.pt").write_bytes(b"damaged")
    assert train(root, tmp_path, "--epochs", "1", "--resume") == 2
    assert f"Once it is moved away, --resume goes on from {tmp_path}/best.pt" in capsys.readouterr().err


def test_results_that_cannot_be_written_cost_no_epoch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(config, "write", lambda out, *_: (out / "results.json").mkdir())  # when it has begun
        assert train(root, tmp_path, "--epochs", "1") == 2
    assert "results.json cannot be written: it is a folder" in capsys.readouterr().err
    assert load(tmp_path)["epoch"] == 1
    (tmp_path / "results.json").rmdir()
    assert train(root, tmp_path, "--epochs", "1", "--resume") == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["epochs"]) == 1


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv", "results.json", "settings.toml"])
def test_files_of_a_run_that_are_none(name: str, root: Path, tmp_path: Path, capsys: Any) -> None:
    os.mkfifo(tmp_path / name)  # which would be waited for
    assert train(root, tmp_path) == 2
    assert f"holds {name}, which a run writes, and which is no regular file" in capsys.readouterr().err


def test_metrics_on_a_full_disk_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # whose thread would say it, too
    metrics = Metrics(tmp_path, 0, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.csv cannot be written: File too large"):
            for step in range(9):
                metrics.write(Row(1, step, "step", 1.0, 0.5, 0.1, 10.0, 2**20, 1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_curves_that_cannot_be_written_cost_no_run(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    assert train(root, tmp_path, "--epochs", "1", "--limit-train", "12") == 0
    assert "TensorBoard gets nothing more: " in capsys.readouterr().err
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1 and len(rows(tmp_path)) == 3
