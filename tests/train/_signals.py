"""Signals at random moments of `effdense train`, then --resume: it ends as an undisturbed run, to the bit. `python -m tests.train._signals --times 30`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests._training import assert_same_end, train, write_data

SIGNALS = {s.name: s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)}
RUN = ("--save-steps", "2", "--drops=", "--ema-decay", "0.9", "--val-split", "0.2", "--batch-size", "6")
STOPPED = 130  # a shell's status for Ctrl-C


def forked(root: Path, out: Path, log: Path, *more: str) -> int:
    """The number of a child that trains; it has all imported already, so that signals meet the run."""
    if (child := os.fork()) != 0:
        return child
    status = 99
    try:
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.default_int_handler if s is signal.SIGINT else signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = train(root, out, *RUN, *more)
        sys.stdout.flush(), sys.stderr.flush()
    except KeyboardInterrupt:  # before the command has begun
        status = STOPPED
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The exit status; below zero: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(child: int, seconds: float) -> float:
    """Until a child has had so much processor time, or has ended: whatever else runs on the machine. How much it has had."""
    while True:
        state, *fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
        if state == "Z" or used >= seconds:
            return used
        time.sleep(0.002)


def disturb(root: Path, whole: Path, seconds: float, number: signal.Signals, folder: Path) -> str:
    """One run that is sent a signal after so many seconds of processor time, and goes on; what became of it first.

    Raises:
        AssertionError: a traceback, another exit status, or another end than the undisturbed run's.
    """
    out, log = folder / "run", folder / "log"
    child = forked(root, out, log)
    wait_until(child, seconds)
    os.kill(child, number)
    status, said = ended(child), log.read_text() if log.exists() else ""
    about = f"{number.name} after {seconds:.2f} s, status {status}:\n{said}"
    assert "Traceback" not in said, about
    assert status in (0, -number, *(() if number is signal.SIGKILL else (STOPPED,))), about
    saved = any(out.glob("*.pt"))
    if status != 0 or not saved:
        again = ended(forked(root, out, log, *(("--resume",) if saved else ())))
        assert again == 0, f"{about}\nthen {again}:\n{log.read_text()}"
    assert_same_end(out, whole)
    parts = [path.name for path in out.iterdir() if path.name.endswith(".part")]
    assert not parts, f"{about}: {parts}"
    if status == 0:
        return "had ended"
    return ("killed" if status < 0 else "stopped") + (", went on" if saved else ", began anew")


def main(times: int, only: str = "", seed: int = 0) -> int:
    """Disturbs so many runs by every signal; the exit status."""
    torch.set_num_threads(1)
    chance, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, whole = write_data(folder), folder / "whole"
        with contextlib.redirect_stdout(io.StringIO()):
            assert (
                train(root, folder / "first", *RUN) == 0
            )  # what takes long the first time is no part of a child's
        length = wait_until(child := forked(root, whole, folder / "log"), float("inf"))
        assert ended(child) == 0, (folder / "log").read_text()
        print(f"an undisturbed run takes {length:.2f} s of processor time", flush=True)
        for signal_name, number in SIGNALS.items():
            if only not in signal_name:
                continue
            found = Counter[str]()
            for i in range(times):
                place = folder / f"{signal_name}{i}"
                place.mkdir()
                try:
                    found[disturb(root, whole, chance.uniform(0, length), number, place)] += 1
                except AssertionError as error:
                    bad += 1
                    print(f"{signal_name}: {error}", flush=True)
                shutil.rmtree(place)
            told = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
            print(f"{signal_name}: {times} runs: {told}", flush=True)
    print(f"{bad} not right", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.train._signals", description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="runs for each signal (default: 30)")
    parser.add_argument("--only", default="", help="signals whose names hold this (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.times, options.only, options.seed))
