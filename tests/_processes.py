"""Runs a function in several processes that form a gloo group on this machine: for tests of distributed training."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Until processes that wait for each other are given up; a machine that is very busy needs more.
SECONDS = int(os.environ.get("EFFDENSE_TEST_SECONDS", "120"))


def _run(
    rank: int, function: Callable[..., Any], count: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store, limit = dist.FileStore(str(folder / "store"), count), datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    except Exception:
        # The first: the others then fail because they wait for this one.
        with contextlib.suppress(FileExistsError), (folder / "error").open("x") as file:
            file.write(f"process {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def once(factory: pytest.TempPathFactory, function: Callable[..., Any], count: int) -> list[Any]:
    """What `run_in_processes` returns, made once for all of pytest's workers: the others wait for it."""
    # pytest-xdist gives every worker a folder of its own in the run's.
    folder = (
        factory.getbasetemp() if "PYTEST_XDIST_WORKER" not in os.environ else factory.getbasetemp().parent
    )
    made = folder / f"{function.__module__}.{function.__qualname__}.pt"
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            torch.save(run_in_processes(function, count), made)
    result: list[Any] = torch.load(made, weights_only=False)
    return result


def run_in_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes (tensors, and what else torch.save takes).

    The function must be a module's own, and knows which process it is by torch.distributed.get_rank(). It starts with seed 0
    and one thread.

    Raises:
        RuntimeError: with the traceback of the first process that failed, or where they have not ended in time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context: Any = mp.start_processes(
            _run, (function, count, folder, arguments), count, join=False, start_method="spawn"
        )
        end = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise RuntimeError(f"{function.__name__} has not ended within {SECONDS} s")
        except mp.ProcessRaisedException as error:
            first = folder / "error"
            raise RuntimeError(first.read_text() if first.exists() else str(error)) from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
