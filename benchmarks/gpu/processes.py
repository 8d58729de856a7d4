"""Runs a command with a time limit, and ends all processes that it started, those in sessions of their own too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE_S = 3.0  # between SIGTERM and SIGKILL
_PR_SET_CHILD_SUBREAPER = 36


class TimedOut(Exception):
    """The command took longer than its limit and was ended."""


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parents end, so that `run` finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first; by /proc, so none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # pid (name) state parent …; the name may have spaces and parentheses
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))

    def walk(parent: int) -> Iterator[int]:
        for child in children.get(parent, []):
            yield child
            yield from walk(child)

    return list(walk(pid))


def run(
    command: Sequence[str], seconds: float, log: IO[bytes], cwd: Path, environment: Mapping[str, str]
) -> int:
    """Runs `command` with its output in `log` and returns its exit status.

    Whatever happens, Ctrl-C included, neither it nor what it has started is alive afterwards.

    Raises:
        TimedOut: after `seconds`.
        OSError: it cannot be started.
    """
    others = {*descendants(os.getpid())}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=dict(environment),
        start_new_session=True,
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimedOut from None
    finally:
        _end(process, others)


def _end(process: subprocess.Popen[bytes], others: set[int]) -> None:
    """Ends the process, if it runs, and all descendants of this one that were not there before."""
    end = time.monotonic() + GRACE_S
    _signal(process, others, signal.SIGTERM)
    while time.monotonic() < end and _left(process, others):
        time.sleep(0.02)
    while left := _left(process, others):
        _signal(process, others, signal.SIGKILL)
        if time.monotonic() > end + GRACE_S:
            print(f"make gpu: processes {left} do not end (a driver that hangs?)", flush=True)
            return
        time.sleep(0.02)


def _left(process: subprocess.Popen[bytes], others: set[int]) -> list[int]:
    process.poll()
    left = []
    for pid in descendants(os.getpid()):
        if pid in others:
            continue
        with contextlib.suppress(ChildProcessError):
            if pid != process.pid and os.waitpid(pid, os.WNOHANG)[0]:  # adopted, and has ended
                continue
        left.append(pid)
    return left


def _signal(process: subprocess.Popen[bytes], others: set[int], number: signal.Signals) -> None:
    for pid in _left(process, others):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
