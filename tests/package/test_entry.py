"""Every command: Ctrl-C, a pipe that nobody reads and a full disk are a line and a status, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import effdense
from effdense import _program, cli, files
from effdense.inference import trained
from effdense.tools import bench
from effdense.train import loop
from tests._training import arguments
from tests.train.test_progress import broken

SMALL = ("--model", "densenet_bc_10_4", "--image-size", "8", "--batch", "2")
COMMANDS = {
    "check": ["check"],
    "plan": ["plan", *SMALL],
    "bench": ["bench", "densenet_bc_10_4", "--image-size", "8", "--batch", "2", "--seconds", "1"],
    "summary": ["summary", "densenet_bc_10_4", "--image-size", "8"],
    "reuse": ["reuse", "x.pt"],
    "plot": ["plot", "x"],
    "train": arguments(Path("data"), Path("run")),
    "evaluate": ["evaluate", "x.pt"],
    "predict": ["predict", "x.pt", "x.png"],
}


def raises(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("command", list(COMMANDS))
def test_interrupted(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from effdense.tools import plots

    monkeypatch.chdir(tmp_path)
    stop = raises(KeyboardInterrupt())
    for holder, name in (
        *((cli, "check"), (cli, "Planner"), (cli, "summary"), (cli, "find")),
        *((plots, "read_run"), (loop.Training, "__init__"), (bench, "run"), (trained, "load")),
    ):
        monkeypatch.setattr(holder, name, stop)
    assert cli.main(COMMANDS[command]) == cli.INTERRUPTED
    error = capsys.readouterr().err
    assert error.startswith(f"effdense {command}: stopped") and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["full", "unread"])
@pytest.mark.parametrize("command", ["check", "plan", "summary", "--help"])
def test_output_that_is_not_taken(
    kind: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "check", lambda *_: [])
    with monkeypatch.context() as patch, broken(kind) as out:
        patch.setattr(sys, "stdout", out)
        if command == "--help":
            with pytest.raises(SystemExit, match="0"):
                cli.main([command])
            status = 0
        else:
            status = cli.main(COMMANDS[command])
        assert os.path.samestat(os.fstat(out.fileno()), os.stat(os.devnull))  # so that Python ends well
    error = capsys.readouterr().err
    if command != "--help":
        assert status == (2 if kind == "full" else cli.UNREAD)
        assert error == (f"effdense {command}: No space left on device\n" if kind == "full" else "")


def test_neither_output_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, broken("full") as out, broken("unread") as error:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        assert cli.main(COMMANDS["summary"]) == 2
        files.silence(error)


def test_outputs_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with >&- 2>&-, of which Python makes None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    statuses = [cli.main(COMMANDS[command]) for command in ("summary", "plan", "predict")]
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    assert statuses == [0, 0, 2]


def test_the_program_itself() -> None:
    """As in `effdense summary … | true`: Python's own end says nothing either."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-W", "ignore", "-m", "effdense", *COMMANDS["summary"]]
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=1200)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (cli.UNREAD, b"")


def test_interrupted_while_torch_is_imported(tmp_path: Path) -> None:
    """There is nothing to save yet: it ends as a program in C does, which a shell calls status 130."""
    (tmp_path / "torch").mkdir()
    slow = "import time\nprint('torch', flush=True)\ntime.sleep(120)"
    (tmp_path / "torch" / "__init__.py").write_text(slow)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(effdense.__file__).parents[1]}"}
    command = [sys.executable, "-m", "effdense", *COMMANDS["plan"]]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    )
    assert started.stdout is not None and started.stdout.readline() == b"torch\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=60) == (b"", b"") and started.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "argv, original, started",
    [
        (["/usr/bin/effdense", "plan"], ["python", "/usr/bin/effdense", "plan"], True),
        (["-m", "plan"], ["python", "-W", "ignore", "-m", "effdense", "plan"], True),
        (["train.py", "effdense"], ["python", "train.py", "effdense"], False),
        (["-m", "x"], ["python", "-m", "pytest", "-m", "effdense"], False),
        ([""], ["python"], False),
    ],
)
def test_what_the_program_is(argv: list[str], original: list[str], started: bool) -> None:
    """Nobody else's Ctrl-C is changed by an import."""
    assert _program.is_started(argv, original) == started


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"effdense {effdense.__version__}, torch {torch.__version__}\n"


def test_a_model_without_convolutions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "without_memory", lambda name: torch.nn.Linear(2, 2))
    for command in ("plan", "summary"):
        assert cli.main(COMMANDS[command]) == 2
        assert capsys.readouterr().err.endswith("has no convolution\n")
