"""A pytest plugin: runs tests in a random order until a time limit, and writes the outcome of each as it ends.

`-p benchmarks.gpu.sampling`, with EFFDENSE_TEST_SAMPLE = {"until": seconds of time.time(), "file": path}. The tests that the limit
leaves out are reported as not run. With pytest-xdist too: each process knows the limit.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

VARIABLE = "EFFDENSE_TEST_SAMPLE"
LATE = "the time limit of this sample was reached"
SEED = 20261128


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    random.Random(SEED).shuffle(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > json.loads(os.environ[VARIABLE])["until"]:
        pytest.skip(LATE)


class _Writer:
    """In the one process that hears of all tests."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and not report.passed) and not report.failed:
            return
        outcome: str = "failed" if report.failed else report.outcome
        if report.skipped and isinstance(report.longrepr, tuple) and LATE in report.longrepr[2]:
            outcome = "not run"
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") if report.failed else ""
        self._say(report.nodeid, outcome, message or (report.longreprtext[-300:] if report.failed else ""))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(report.nodeid, "failed", f"not collected: {report.longreprtext.splitlines()[-1]}")

    def _say(self, test: str, outcome: str, message: str) -> None:
        self._file.write(json.dumps({"test": test, "outcome": outcome, "message": message[:300]}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(json.loads(os.environ[VARIABLE])["file"])))
