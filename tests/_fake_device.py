"""Trains models on a device without effdense's kernels, and on the CPU, and compares them.

The device is PyTorch's privateuse1 (harness/fake_device.cpp, the library that is the argument). It is a program, since a process
cannot forget a device.
"""

from __future__ import annotations

import copy
import sys
import types

import torch

from effdense.ops import dispatch, reference
from tests._stages import assert_close, step
from tests.nn.test_model import make_input, make_pair

torch.ops.load_library(sys.argv[1])
torch.utils.rename_privateuse1_backend("fake")
torch._register_device_module("fake", types.ModuleType("fake"))

for memory, plain in (("balanced", False), ("minimal", True)):
    naive, fused = make_pair(None, memory, plain=plain, drop_rate=0.2)
    x, there = make_input(), copy.deepcopy(fused).to("fake")
    with torch.device("fake"):
        got = step(there, x.to("fake"))
    assert got[0].device.type == "fake" and dispatch.operators(got[0]) is reference
    got = [t if t is None else t.cpu() for t in got]
    assert_close(got, step(fused, x))
    assert_close(got, step(naive, x))
    print(f"{memory}, {'plain' if plain else 'bottleneck'}: the same")
