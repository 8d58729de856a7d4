import pytest, torch
import torch.distributed as dist
from tests.processes import run_in_processes


def f(x):
    t = torch.tensor([dist.get_rank() + x])
    dist.all_reduce(t)
    return t


def g():
    if dist.get_rank() == 1:
        raise ValueError("no")
    dist.barrier()


def test_a():
    assert run_in_processes(f, 2, 5) == [11, 11]


def test_b():
    with pytest.raises(Exception, match="no"):
        run_in_processes(g, 2)
