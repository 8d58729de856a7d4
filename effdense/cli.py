"""The command line: `effdense` or `python -m effdense`."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effdense import extras, files
from effdense.models import build, load_checkpoint
from effdense.nn.kinds import CONVS
from effdense.ops import gpu_check, reference
from effdense.ops.dispatch import operators
from effdense.ops.extension import build_info
from effdense.ops.self_test import check
from effdense.tools.planner import CATEGORIES, MEMORY, NotCheckpointed, Plan, largest_batch, plan
from effdense.tools.reuse import feature_reuse
from effdense.tools.summary import summary
from effdense.train import command as train


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device}: {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )


def _check(arguments: argparse.Namespace) -> int:
    try:
        x = torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        print(f"effdense check: device {arguments.device!r} cannot be used here: {error}", file=sys.stderr)
        return 2
    for key, value in build_info().items():
        print(f"{key}: {value}")
    if x.device.type != "cuda":
        ops = operators(x)
    elif reason := gpu_check.why_unsupported(x.device.index):
        print(f"\nno kernels for this card, because {reason}")
        ops = reference
    else:  # without asking whether they are right, which is to be seen
        ops = torch.ops.effdense
    kind = "plain PyTorch (no compiled operators)" if ops is reference else "compiled operators"
    print(f"\n{kind} on {_describe(x.device)} against the float64 twin:")
    results = check(str(x.device), ops)
    for result in results:
        verdict = "passed" if result.passed else "FAILED"
        print(
            f"  {result.operator:<25} {result.number!s:<9} error {result.error:.1e} of {result.allowed:.1e}  {verdict}"
        )
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _size(text: str) -> int:
    """8GiB, 512 MiB, 2e9: bytes."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)\s*(?:([KMGT])(i?))?B?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"a size such as 8GiB, 512MiB or 8e9 was expected, got {text!r}")
    power = " KMGT".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _model_and_shape(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """The model without memory, and the shape of a batch for it."""
    with torch.device("meta"):
        model = build(arguments.model)
    conv = next(m for m in model.modules() if isinstance(m, CONVS))
    return model, (arguments.batch, conv.in_channels, arguments.image_size, arguments.image_size)


def _plans(model: nn.Module, shape: Sequence[int]) -> list[Plan]:
    """In every memory mode that can be planned for the model."""
    plans = []
    for memory in MEMORY:
        with contextlib.suppress(NotCheckpointed):
            plans.append(plan(model, shape, memory=memory))
    return plans


def _plan(arguments: argparse.Namespace) -> int:
    try:
        model, shape = _model_and_shape(arguments)
        plans = _plans(model, shape)
        budget = arguments.budget
        batches = [largest_batch(model, shape, budget, memory=p.memory) for p in plans] if budget else []
    except (ImportError, ValueError) as error:
        print(f"effdense plan: {error}", file=sys.stderr)
        return 2
    used = [name for name in CATEGORIES if any(p.breakdown[name] for p in plans)]
    print(
        f"{arguments.model}, input {'x'.join(map(str, shape))}: predicted peak of a training step, in MiB\n"
    )
    print(f"{'':<10}" + "".join(f"{name:>12}" for name in ("total", *used)))
    for p in plans:
        sizes = (p.total, *(p.breakdown[name] for name in used))
        print(f"{p.memory:<10}" + "".join(f"{size / 2**20:>12.1f}" for size in sizes))
    first = plans[0]
    print(
        f"\nBeside it: parameters and buffers {first.parameters / 2**20:.1f}, their gradients "
        f"{first.gradients / 2**20:.1f}, SGD's momentum {first.optimizer / 2**20:.1f}"
    )
    if budget:
        print(f"\nLargest batch within {budget / 2**20:.0f} MiB, all of that included:")
        for p, batch in zip(plans, batches, strict=True):
            print(f"{p.memory:<10}{batch or 'none':>12}")
    return 0


def _summary(arguments: argparse.Namespace) -> int:
    try:
        table = summary(*_model_and_shape(arguments))
    except ValueError as error:
        print(f"effdense summary: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.model}, {table}")
    if arguments.json:
        content = {"model": arguments.model, **table.as_dict()}
        try:
            files.write_json(content, arguments.json)
        except OSError as error:
            print(f"effdense summary: {error}", file=sys.stderr)
            return 2
    return 0


def _draw(arguments: argparse.Namespace, draw: Callable[[Any], None]) -> int:
    """Calls `draw` with effdense.tools.plots and says where the picture is."""
    try:
        plots = extras.load("effdense.tools.plots", f"effdense {arguments.command}", "train")
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        draw(plots)
    except (OSError, ValueError) as error:
        print(f"effdense {arguments.command}: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


def _reuse(arguments: argparse.Namespace) -> int:
    def draw(plots: Any) -> None:
        blocks = feature_reuse(load_checkpoint(arguments.checkpoint, arguments.model))
        plots.reuse_picture(blocks, f"feature reuse in {arguments.checkpoint}", arguments.output)

    return _draw(arguments, draw)


def _plot(arguments: argparse.Namespace) -> int:
    def draw(plots: Any) -> None:
        plots.runs_picture({str(run): plots.read_run(run) for run in arguments.runs}, arguments.output)

    return _draw(arguments, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 when something failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="effdense", description="Memory-efficient DenseNet training.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "check", help="run every operator on this machine against plain PyTorch in float64"
    )
    command.add_argument("--device", default="cpu", help="where to run them (default: %(default)s)")
    command.set_defaults(run=_check)
    command = commands.add_parser("plan", help="predict a training step's memory, without running it")
    command.add_argument(
        "--model", required=True, help="densenet121, densenet_bc_100_12, torchvision:NAME, …"
    )
    command.add_argument("--image-size", type=int, required=True, help="height and width")
    command.add_argument("--batch", type=int, required=True, help="images in a batch")
    command.add_argument("--budget", type=_size, help="such as 8GiB: also say the largest batch within it")
    command.set_defaults(run=_plan)
    command = commands.add_parser("summary", help="a model's stages: sizes, parameters, work, memory kept")
    command.add_argument("model", help="as in plan")
    command.add_argument("--image-size", type=int, required=True, help="height and width")
    command.add_argument("--batch", type=int, default=1, help="images in a batch (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    command.set_defaults(run=_summary)
    command = commands.add_parser(
        "reuse", help="draw how strongly each layer reads each earlier layer's features"
    )
    command.add_argument("checkpoint", type=Path, help="of effdense train, or a state_dict with --model")
    command.add_argument("--model", help="as in plan, where the file does not say it")
    command.add_argument("-o", "--output", type=Path, default="reuse.png", help="PNG (default: %(default)s)")
    command.set_defaults(run=_reuse)
    command = commands.add_parser(
        "plot", help="draw loss, accuracy, memory and time of up to six training runs"
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of effdense train --out")
    command.add_argument("-o", "--output", type=Path, default="runs.png", help="PNG (default: %(default)s)")
    command.set_defaults(run=_plot)
    command = commands.add_parser("train", help="train a DenseNet on images; also under torchrun")
    train.add_arguments(command)
    command.set_defaults(run=train.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
