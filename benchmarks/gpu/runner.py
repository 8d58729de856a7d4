"""Runs stages one after the other within a budget, and keeps the report on disk as it grows.

The output folder has three files, because what brings results back from a lent machine may take only a few: report.json
(everything), report.md (to read) and log.txt (what the stages printed). While a stage runs, its output and partial result are
in running.log and running.json.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes, report, results
from benchmarks.gpu.stages import Stage, command_line

LOG_BYTES = 2**20  # of one stage: the beginning and the end of what it printed
LEAST_S = 3  # with less than this left nothing is started


class Run:
    """One call of `make gpu`.

    Args:
        stages: what to run, in this order.
        folder: where everything is written; it is made.
        budget: seconds for all of it.
        device: cuda or cuda:N.
        dry: start nothing; the report says what would run.
        say: prints a line.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        folder: Path,
        budget: float,
        device: str = "cuda",
        dry: bool = False,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self._stages, self._folder, self._device, self._dry, self._say = stages, folder, device, dry, say
        self._start, self._budget = time.monotonic(), budget
        self._card: dict[str, Any] | None = None
        self._no_card: str | None = None
        self.document: dict[str, Any] = {
            "form": 1,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": _commit(),
            "dry_run": dry,
            "device": device,
            "budget_s": budget,
            "spent_s": 0.0,
            "stages": [],
        }

    def all(self) -> int:
        """Runs every stage; returns the exit status: 1 where one did not succeed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "report.md", "log.txt"):
            (self._folder / name).unlink(missing_ok=True)
        interrupted = False
        for stage in self._stages:
            row = self._row(stage)
            self.document["stages"].append(row)
            try:
                self._go_through(stage, row, interrupted)
            except KeyboardInterrupt:  # at any moment; what is left of this loop takes no time
                interrupted = True
                if row["outcome"] not in report.BAD:
                    row.update(outcome="interrupted", reason="interrupted")
            interrupted = interrupted or row["outcome"] == "interrupted"
            try:
                self._say(f"{row['name']}: {report.line(row)}")
                self._save()
            except KeyboardInterrupt:
                interrupted = True
                self._save()
        bad = [row for row in self.document["stages"] if row["outcome"] in report.BAD]
        return 1 if bad else 0

    def _go_through(self, stage: Stage, row: dict[str, Any], interrupted: bool) -> None:
        reason = "interrupted" if interrupted else self._why_not(stage)
        if reason:
            row.update(outcome="skipped", reason=reason)
            return
        self._say(f"{stage.name}: {stage.title}, at most {row['limit_s']:.0f} s")
        self._run(stage, row)

    def _row(self, stage: Stage) -> dict[str, Any]:
        left = max(0.0, self._budget - (time.monotonic() - self._start))
        limit = min(stage.seconds, left)
        command = command_line(
            stage, json=str(self._folder / "running.json"), device=self._device, seconds=limit
        )
        return {
            "name": stage.name,
            "title": stage.title,
            "command": command,
            "outcome": "running",
            "reason": None,
            "limit_s": round(limit, 1),
            "seconds": 0.0,
            "finding": "",
            "result": None,
        }

    def _why_not(self, stage: Stage) -> str | None:
        if self._dry:
            return "dry run"
        if self._no_card:
            return self._no_card
        before = {row["name"]: row["outcome"] for row in self.document["stages"]}
        for name in stage.needs:
            if before.get(name, "ok") != "ok":
                return f"{name} did not succeed"
        for tool in stage.tools:
            if not results.program(tool):
                return f"{tool} is not on the PATH"
        left = self._budget - (time.monotonic() - self._start)
        return None if left >= LEAST_S else f"the budget of {self._budget:.0f} s is spent"

    def _run(self, stage: Stage, row: dict[str, Any]) -> None:
        log, result = self._folder / "running.log", self._folder / "running.json"
        result.unlink(missing_ok=True)
        start, status = time.monotonic(), None
        try:
            with log.open("wb") as output:
                environment = _environment(stage.checked)
                status = processes.run(row["command"], row["limit_s"], output, results.ROOT, environment)
            row["outcome"] = "ok" if status == 0 else "failed"
        except processes.TimedOut:
            row.update(outcome="timed out", reason=f"ended after its limit of {row['limit_s']:.0f} s")
        except KeyboardInterrupt:
            row.update(outcome="interrupted", reason="interrupted")
        except OSError as error:
            row.update(outcome="failed", reason=f"{row['command'][0]} cannot be started: {error.strerror}")
        row["seconds"] = round(time.monotonic() - start, 1)
        with contextlib.suppress(OSError, ValueError):  # a stage that wrote none
            row["result"] = json.loads(result.read_text())
        last = _last_line(log)
        row["finding"] = (row["result"] or {}).get("finding") or (last if row["outcome"] == "ok" else "")
        if row["outcome"] == "failed" and row["reason"] is None:
            row["reason"] = last or f"exit status {status}"
        if stage.name == "machine":
            self._take_card(row)
        self._keep_log(row, log)
        for file in (log, result):
            file.unlink(missing_ok=True)

    def _take_card(self, row: dict[str, Any]) -> None:
        self._card = self.document["card"] = (row["result"] or {}).get("card")
        if self._card is None:
            self._no_card = "there is no GPU that torch can use"

    def _keep_log(self, row: dict[str, Any], log: Path) -> None:
        text = log.read_bytes() if log.exists() else b""
        if len(text) > LOG_BYTES:
            half = LOG_BYTES // 2
            text = text[:half] + b"\n[... %d bytes ...]\n" % (len(text) - 2 * half) + text[-half:]
        head = f"=== {row['name']}: {' '.join(row['command'])}\n=== {report.line(row)}\n"
        with (self._folder / "log.txt").open("ab") as file:
            file.write(head.encode() + text + b"\n")

    def _save(self) -> None:
        self.document["spent_s"] = round(time.monotonic() - self._start, 1)
        results.write_json(self._folder / "report.json", self.document)
        results.write(self._folder / "report.md", report.markdown(self.document))


def _environment(checked: bool) -> Mapping[str, str]:
    values = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return values if checked else {**values, "EFFDENSE_SELF_CHECK": "0"}


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
    return ""


def _commit() -> str | None:
    """Of the repository, where it is one; with + where files differ."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None
