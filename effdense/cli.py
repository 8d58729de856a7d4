"""The command line: `effdense` or `python -m effdense`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effdense import _program, extras, files, values
from effdense._version import __version__
from effdense.inference import command as inference
from effdense.inference.trained import find
from effdense.models import load_checkpoint
from effdense.models.names import without_memory
from effdense.nn.kinds import CONVS
from effdense.ops import gpu_check, reference
from effdense.ops.dispatch import operators
from effdense.ops.extension import build_info
from effdense.ops.self_test import check
from effdense.tools import bench, export
from effdense.tools.planner import MEMORY, NotCheckpointed, Plan, Planner
from effdense.tools.reuse import feature_reuse
from effdense.tools.summary import summary
from effdense.tools.timeline import CATEGORIES
from effdense.train import command as train
from effdense.train.folder import of_a_run

INTERRUPTED, UNREAD = 130, 141  # a shell's status for Ctrl-C, and for a pipe that nobody reads


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
        x = torch.empty(0, device=values.device(arguments.device))
    except ValueError as error:
        print(f"effdense check: {error}", file=sys.stderr)
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


def _model_and_shape(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """The model without memory, and the shape of a batch for it."""
    model = without_memory(arguments.model)
    conv = next((m for m in model.modules() if isinstance(m, CONVS)), None)
    if conv is None:
        raise ValueError(f"model {arguments.model!r} has no convolution")
    return model, (arguments.batch, conv.in_channels, arguments.image_size, arguments.image_size)


def _plans(planner: Planner, shape: Sequence[int]) -> list[Plan]:
    """In every memory mode that can be planned for the model."""
    plans = []
    for memory in MEMORY:
        _note(f"planning {memory} …")
        with contextlib.suppress(NotCheckpointed):
            plans.append(planner.plan(shape, memory))
    return plans


def _note(text: str) -> None:
    """Says on a terminal what is being done; the next note takes its place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _largest_batches(planner: Planner, shape: Sequence[int], plans: Sequence[Plan], budget: int) -> list[int]:
    batches = []
    for p in plans:
        _note(f"looking for the largest batch with {p.memory} …")
        batches.append(planner.largest_batch(shape, budget, p.memory))
    return batches


def _plan(arguments: argparse.Namespace) -> int:
    budget = arguments.budget
    try:
        _note(f"building {arguments.model} …")
        model, shape = _model_and_shape(arguments)
        planner = Planner(model)
        plans = _plans(planner, shape)
        batches = _largest_batches(planner, shape, plans, budget) if budget else []
    except (ImportError, ValueError) as error:
        _note("")
        return _ended(f"effdense plan: {error}", 2)
    finally:
        _note("")
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
    except (ImportError, ValueError) as error:
        return _ended(f"effdense summary: {error}", 2)
    print(f"{arguments.model}, {table}")
    if arguments.json:
        files.write_json({"model": arguments.model, **table.as_dict()}, arguments.json)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    try:
        device = values.device(arguments.device)
        result = bench.run(
            bench.Settings(
                arguments.model,
                arguments.batch,
                arguments.image_size,
                not arguments.inference,
                arguments.threads,
                device,
                arguments.seconds,
            ),
            _note,
        )
    except (ImportError, ValueError) as error:
        _note("")
        return _ended(f"effdense bench: {error}", 2)
    finally:
        _note("")
    print(result)
    if arguments.json:
        files.write_json(result.as_dict(), arguments.json)
    return 0


def _draw(arguments: argparse.Namespace, draw: Callable[[Any], None]) -> int:
    """Calls `draw` with effdense.tools.plots and says where the picture is."""
    try:
        plots = extras.load("effdense.tools.plots", f"effdense {arguments.command}", "train")
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        plots.check_format(arguments.output)
        draw(plots)
    except (OSError, ValueError) as error:
        print(f"effdense {arguments.command}: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


def _reuse(arguments: argparse.Namespace) -> int:
    def draw(plots: Any) -> None:
        blocks = feature_reuse(load_checkpoint(find(arguments.checkpoint), arguments.model))
        plots.reuse_picture(blocks, f"feature reuse in {arguments.checkpoint}", arguments.output)

    return _draw(arguments, draw)


def _export(arguments: argparse.Namespace) -> int:
    try:
        export.check_suffix(arguments.output)
        model = load_checkpoint(find(arguments.checkpoint), arguments.model)
        shape = None if arguments.output.suffix.lower() == ".safetensors" else _shape_of(model, arguments)
        name = arguments.model or getattr(model, "model_name", None)
        done = export.export_model(model, arguments.output, shape, name=name)
    except export.Differs as error:
        return _ended(f"effdense export: {error}; nothing was written", 1)
    except (ImportError, OSError, ValueError) as error:
        return _ended(f"effdense export: {error}", 2)
    print(f"{done.path}: {done.bytes / 2**20:.1f} MiB, {str(done.dtype).removeprefix('torch.')}", end="")
    if done.input_shape is None:
        print(", the same weights when read back")
    else:
        print(f", for images {'x'.join(['batch', *map(str, done.input_shape[1:])])}")
        if done.compared_by is None:
            print(f"not compared with the model: that {extras.needed('onnxruntime', 'export')}")
        else:
            print(
                f"compared with the model by {done.compared_by}: they differ by {done.difference:.1e} at most, beside scores "
                f"of up to {done.largest:.1e}"
            )
    return 0


def _shape_of(model: nn.Module, arguments: argparse.Namespace) -> tuple[int, ...]:
    """The shape of a batch for a checkpoint's model."""
    conv = next((m for m in model.modules() if isinstance(m, CONVS)), None)
    if conv is None:
        raise ValueError(f"the model in {arguments.checkpoint} has no convolution")
    size = arguments.image_size or getattr(model, "image_size", None)
    if size is None:
        raise ValueError(f"{arguments.checkpoint} does not say how large its images are: --image-size")
    return (1, conv.in_channels, *(size,) * len(conv.kernel_size))


def _plot(arguments: argparse.Namespace) -> int:
    def draw(plots: Any) -> None:
        plots.runs_picture({str(run): plots.read_run(run) for run in arguments.runs}, arguments.output)

    return _draw(arguments, draw)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effdense", description="Memory-efficient DenseNet training.")
    parser.add_argument(
        "--version", action="version", version=f"effdense {__version__}, torch {torch.__version__}"
    )
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
    command.add_argument("--image-size", type=values.side, required=True, help="height and width")
    command.add_argument("--batch", type=values.count, required=True, help="images in a batch")
    command.add_argument(
        "--budget", type=values.size, help="such as 8GiB: also say the largest batch within it"
    )
    command.set_defaults(run=_plan)
    command = commands.add_parser(
        "bench", help="is it faster here? a step as it is, checkpointed and with effdense"
    )
    command.add_argument("model", help="as in plan")
    command.add_argument(
        "--batch",
        type=values.count,
        help="images in a batch (default: 8 of 224x224 or 64 of 32x32, fewer where that takes long)",
    )
    command.add_argument("--image-size", type=values.side, help="height and width")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--train", action="store_true", help="a training step (default)")
    kind.add_argument("--inference", action="store_true", help="a forward in evaluation, without gradients")
    command.add_argument(
        "--threads", type=values.whole(1, bench.MOST_THREADS), help="of the CPU (default: PyTorch's)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    command.add_argument(
        "--seconds",
        type=values.whole(1, 86_400),
        default=60,
        help="about how long it may take (default: %(default)s)",
    )
    command.add_argument(
        "--json", type=values.new_file, metavar="FILE", help="write everything measured there too"
    )
    command.set_defaults(run=_bench)
    command = commands.add_parser("summary", help="a model's stages: sizes, parameters, work, memory kept")
    command.add_argument("model", help="as in plan")
    command.add_argument("--image-size", type=values.side, required=True, help="height and width")
    command.add_argument(
        "--batch", type=values.count, default=1, help="images in a batch (default: %(default)s)"
    )
    command.add_argument("--json", type=values.new_file, metavar="FILE", help="write the table there too")
    command.set_defaults(run=_summary)
    command = commands.add_parser(
        "reuse", help="draw how strongly each layer reads each earlier layer's features"
    )
    command.add_argument(
        "checkpoint", type=values.path, help="of effdense train, its folder, or a state_dict with --model"
    )
    command.add_argument("--model", help="as in plan, where the file does not say it")
    command.add_argument(
        "-o", "--output", type=values.new_file, default="reuse.png", help="PNG (default: %(default)s)"
    )
    command.set_defaults(run=_reuse)
    command = commands.add_parser(
        "export", help="write a trained model as ONNX, torch.export's .pt2 or safetensors"
    )
    command.add_argument(
        "checkpoint", type=values.path, help="of effdense train, its folder, or a state_dict with --model"
    )
    command.add_argument(
        "-o", "--output", type=values.new_file, required=True, help="ends in .onnx, .pt2 or .safetensors"
    )
    command.add_argument("--model", help="as in plan, where the file does not say it")
    command.add_argument(
        "--image-size", type=values.side, help="height and width (default: what the run prepared)"
    )
    command.set_defaults(run=_export)
    command = commands.add_parser(
        "plot", help="draw loss, accuracy, memory and time of up to six training runs"
    )
    command.add_argument(
        "runs", type=values.path, nargs="+", metavar="RUN", help="folder of effdense train --out"
    )
    command.add_argument(
        "-o", "--output", type=values.new_file, default="runs.png", help="PNG (default: %(default)s)"
    )
    command.set_defaults(run=_plot)
    command = commands.add_parser("train", help="train a DenseNet on images; also under torchrun")
    train.add_arguments(command)
    command.set_defaults(run=train.run)
    inference.add_evaluate(
        commands.add_parser(
            "evaluate",
            help="test a trained model: accuracy, precision, recall and AUC of every class, confusion matrix",
        )
    )
    inference.add_predict(
        commands.add_parser("predict", help="a trained model's classes and probabilities for images, as CSV")
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 when something failed, 2 for a wrong call.

    Where it is interrupted, or what it prints is not read to the end, that is no traceback: 130 and 141, as shells have it.
    """
    name = "effdense"
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell, as with >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding does not have is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _program.interrupt_as_usual()
        arguments = _parser().parse_args(train.with_config(sys.argv[1:] if argv is None else argv))
        name = f"effdense {arguments.command}"
        if wrong := _wrong_outputs(arguments):
            return _ended(f"{name}: {wrong}", 2)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _ended(f"{name}: stopped", INTERRUPTED)
    except BrokenPipeError:
        return UNREAD
    except OSError as error:
        return _ended(f"{name}: {error.strerror or error}", 2)
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            files.silence(sys.stdout)


def _wrong_outputs(arguments: argparse.Namespace) -> str:
    """What is wrong with the files that a command is to write, as far as that can be seen before it begins."""
    outputs: dict[str, Path] = {}
    inputs: list[Path] = []
    for name, value in vars(arguments).items():
        if isinstance(value, values.NewFile):
            outputs[f"--{name}"] = value
        else:
            inputs += [p for p in (value if isinstance(value, list) else [value]) if isinstance(p, Path)]
    try:
        for path in outputs.values():
            files.check_replaceable(path)
        run = [f for p in inputs for f in of_a_run(p)] if outputs else []
        files.check_apart(outputs, [*inputs, *run])
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _ended(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody is there to read it
        print(message, file=sys.stderr)
    return status
