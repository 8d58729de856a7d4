"""`effdense train` in two processes, as torchrun starts them: the same training as one with the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from effdense import models
from effdense.train.processes import Processes
from tests._processes import run_in_processes
from tests._training import arguments, load, rows, train

EXACT = ("--dtype", "float64", "--drop-rate", "0", "--save-steps", "3")
DYING = """
import sys
from effdense import cli
from effdense.train import loop
step = loop.Training._train_step
def dying(self, *arguments):
    if self.step == 4 and self.processes.rank == 1:
        raise RuntimeError("the second process has died")
    return step(self, *arguments)
loop.Training._train_step = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=180)


def test_two_processes_train_like_one(root: Path, tmp_path: Path) -> None:
    """One of them dies in the middle, which ends both; then they go on."""
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "dying.py"
    script.write_text(DYING)
    died = torchrun(str(script), *arguments(root, two, *EXACT, "--sync-bn"))
    assert died.returncode != 0 and "the second process has died" in died.stderr
    assert load(two)["step"] == 3 and len(load(two)["random"]) == 2
    ended = torchrun("-m", "effdense", *arguments(root, two, *EXACT, "--sync-bn", "--resume"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 2/2") == 1  # one of them says it
    assert train(root, one, *EXACT) == 0
    assert [row["split"] for row in rows(two)] == [row["split"] for row in rows(one)]
    for of_two, of_one in zip(rows(two), rows(one), strict=True):
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-9), of_two
        assert of_two["accuracy"] == of_one["accuracy"]
    torch.testing.assert_close(load(two)["state_dict"], load(one)["state_dict"], rtol=1e-9, atol=1e-9)


def test_two_processes_have_one_average(root: Path, tmp_path: Path) -> None:
    """And the same validation, weights of classes and clipped gradients."""
    run = (*EXACT, "--sync-bn", "--recipe", "finetune", "--class-weights", "balanced", "--early-stop", "1")
    ended = torchrun("-m", "effdense", *arguments(root, tmp_path / "two", *run))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the best: loss ") == 1
    assert train(root, tmp_path / "one", *run) == 0
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-7), ours
        assert (ours["split"], ours["accuracy"]) == (theirs["split"], theirs["accuracy"])
    for name in ("state_dict", "ema", "tested", "stale"):
        one, two = load(tmp_path / "one")[name], load(tmp_path / "two")[name]
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-8)


def step_peak(images: int, sync_bn: bool = False) -> int:
    """The most that a training step allocates in this process, the first step aside, which sets things up."""
    if torch.distributed.is_initialized():
        os.environ["RANK"] = str(torch.distributed.get_rank())
        os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    model = models.build("densenet_bc_22_8")
    wrapped = Processes("cpu").wrap(model, sync_bn)
    x = torch.randn(images, 3, 32, 32)

    def step() -> None:
        model.zero_grad()
        wrapped(x).square().mean().backward()

    step()
    return measure.peak_bytes(step)


def step_peaks(images: int) -> list[int]:
    return [step_peak(images, sync_bn) for sync_bn in (False, True)]


def test_memory_per_process() -> None:
    """Each process needs what its own images need, and nothing for the others'."""
    half, whole = step_peak(32), step_peak(64)
    assert half < 0.55 * whole
    for peaks in run_in_processes(step_peaks, 2, 32):
        assert peaks == pytest.approx([half, half], rel=0.01)
