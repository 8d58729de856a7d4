"""Prints the environment variables that make every library of a process use a smaller instruction set than the machine's.

    env $(python -m benchmarks.isa avx2) python script.py

Names are ATen's, `default` is the baseline. The libraries read their variables when they are loaded, so that they must be set
before a process starts.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import measure


class Isa(NamedTuple):
    """What limits each library: ATen and effdense, oneDNN, MKL, and the C++ that torch.compile writes."""

    onednn: str
    mkl: str
    march: str  # GCC's name of the architecture
    bits: int  # of a vector in torch.compile's code; 1: no vectors of its own


# oneDNN's smallest is SSE4.1. Its AVX-512 without AMX, which ATen's is without too.
ISAS = {
    "default": Isa("SSE41", "SSE4_2", "x86-64-v2", 1),
    "avx2": Isa("AVX2", "AVX2", "x86-64-v3", 256),
    "avx512": Isa("AVX512_CORE_FP16", "AVX512", "x86-64-v4", 512),
}


def variables(name: str) -> dict[str, str]:
    """Return the environment of a process in which no library goes beyond the instruction set.

    MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors alone; on others only its baseline can be asked for, as MKL_CBWR.
    """
    isa = ISAS[name]
    wanted = {
        "ATEN_CPU_CAPABILITY": name,
        "ONEDNN_MAX_CPU_ISA": isa.onednn,
        "MKL_ENABLE_INSTRUCTIONS": isa.mkl,
        "TORCHINDUCTOR_CPP_MARCH": isa.march,
    }
    return wanted | ({"MKL_CBWR": "COMPATIBLE"} if name == "default" and not _is_intel() else {})


def _is_intel() -> bool:
    return "intel" in measure.cpu_model().lower()


def available() -> list[str]:
    """Return the instruction sets that this machine has, the smallest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    has = {"avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}
    return [name for name in ISAS if has.get(name, True)]


def argument(text: str) -> str:
    """Return the instruction set that an argument of a command line names, if this machine has it."""
    has = available()
    if not has:
        raise argparse.ArgumentTypeError(
            f"is for x86-64 and this machine is {platform.machine()}: leave it out"
        )
    if text not in has:
        wrong = f"{text} is not there" if text in ISAS else f"there is no {text!r}"
        raise argparse.ArgumentTypeError(
            f"{wrong}: this machine ({measure.cpu_model()}) has {has[-1]}, choose one of {', '.join(has)}"
        )
    return text


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --isa to a command line."""
    parser.add_argument(
        "--isa",
        type=argument,
        metavar="NAME",
        help="no implementation goes beyond this instruction set: default (the baseline), avx2, avx512 (the machine's unless given)",
    )


def refuse_other_devices(parser: argparse.ArgumentParser, isa: str | None, device: str) -> None:
    """End the program where --isa would say nothing about what is measured."""
    if isa and device != "cpu":
        parser.error(f"--isa {isa} is for --device cpu: what runs on {device} does not depend on it")


def is_active(name: str) -> bool:
    """Whether this process has been started with an instruction set's variables."""
    return all(os.environ.get(key) == value for key, value in variables(name).items())


def check_active(name: str) -> None:
    """Raise RuntimeError where this process does not run on the instruction set, whatever its variables say."""
    runs = torch.backends.cpu.get_cpu_capability().lower()
    if not is_active(name) or runs != name:
        raise RuntimeError(f"isa: {name} was asked for, and this process runs on {runs}")


def run_again(module: str, arguments: Sequence[str] | None, name: str) -> int:
    """Run a command line in a process with the instruction set's variables; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    environment = os.environ | variables(name)
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode


def limit_compiler(name: str) -> str:
    """Limit what torch.compile writes in this process; return what it could not limit, "" where nothing is left.

    ATEN_CPU_CAPABILITY limits its vectors. `simdlen` says the same and is part of its cache's keys, which the variable is not.
    """
    from torch._inductor import config

    config.cpp.simdlen = ISAS[name].bits
    if getattr(config.cpp, "march", None) == ISAS[name].march:
        return ""
    return f"its scalar loops compiled for the machine (torch {torch.__version__} has no setting for them)"


def record(name: str | None) -> dict[str, Any]:
    """Return what a row says of it: the instruction set asked for, and the one that this process runs on."""
    return {"isa": name, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the variables of an instruction set, for `env`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.isa", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("name", type=argument, metavar="NAME", help=f"one of {', '.join(ISAS)}")
    print(*(f"{key}={value}" for key, value in variables(parser.parse_args(arguments).name).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
