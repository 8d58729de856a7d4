"""Models as files for other programs: ONNX, torch.export's .pt2, safetensors; compared with the model before they are written."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense import extras, files, tensor_files
from effdense._version import __version__
from effdense.conversion import revert
from effdense.tools.planner import check_input_shape

SUFFIXES = (".onnx", ".pt2", ".safetensors")
INPUT, OUTPUT = "images", "scores"  # the names of an ONNX file's
PT2_METADATA = "effdense.json"  # the extra file in a .pt2
_BATCHES = (1, 3)  # that are compared; traced is another one
_ROUNDINGS = (
    1000  # of the largest score's last place, by which two orders of adding may differ in hundreds of layers
)
_ONNX_BYTES = 2**31  # what a file of protobuf's may have


class Differs(ValueError):
    """What would have been written does not compute what the model does; nothing was written."""


class Exported(NamedTuple):
    """What was written."""

    path: Path
    bytes: int
    dtype: torch.dtype  # of its weights
    input_shape: tuple[int, ...] | None  # of one batch, which may have any size; None: safetensors
    compared_by: str | None  # None: that needs a package that is not installed
    difference: float  # the largest to the model's scores, or weights
    largest: float  # of the model's scores, by their size


class _Way(NamedTuple):
    """How a form of file is made."""

    needs: tuple[str, ...]  # packages
    make: Callable[[nn.Module, tuple[int, ...], dict[str, str]], bytes]
    run: Callable[
        [bytes], tuple[str, Callable[[Tensor], Tensor]] | None
    ]  # who computes what a file does, and how


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The ending of a path that says the form, in small letters.

    Raises:
        ImportError: that form needs a package that is not installed.
        ValueError: there is no such form.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"the file's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path}"
        )
    for package in _WAYS[suffix].needs if suffix in _WAYS else ("safetensors",):
        extras.load(package, f"writing {'ONNX' if suffix == '.onnx' else package}", "export")
    return suffix


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int] | None = None,
    *,
    name: str | None = None,
) -> Exported:
    """Writes a model for programs without effdense, in evaluation, as a whole or not at all.

    .onnx has ONNX's own operators only, in float32; .pt2 (torch.export) PyTorch's only. Both take any number of images and are
    first compared with the model on random ones. .safetensors has the state_dict. What `load_checkpoint` knows of a model
    goes into the metadata: its name, `class_names` and `prepare`.

    Args:
        model: of effdense.models, or any other that torch.export takes, converted or not. It is not changed.
        path: ends in .onnx, .pt2 or .safetensors.
        input_shape: of a batch, [N, C, *spatial]; .safetensors needs none.
        name: of the model, for the metadata.

    Raises:
        Differs: the file would compute something else.
        ImportError: ONNX and safetensors need `pip install 'effdense[export]'`.
        OSError: the file cannot be written; the message says what is there instead.
        TypeError: model is not a module.
        ValueError: the name ends in something else, input_shape is wrong, or the model cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: model must be a torch.nn.Module, got {type(model).__name__}")
    suffix = check_suffix(path)
    files.check_replaceable(path)
    metadata = metadata_of(model, name)
    if suffix == ".safetensors":
        content, exported = _weights(model, Path(path), metadata)
    else:
        if input_shape is None:
            raise ValueError(f"export: {suffix} needs input_shape, the shape of a batch")
        content, exported = _program(model, Path(path), check_input_shape("export", input_shape), metadata)
    with files.replacing(path) as file:
        file.write(content)
    return exported


def metadata_of(model: nn.Module, name: str | None = None) -> dict[str, str]:
    """What is known of a model besides its weights, as texts: plain ones and JSON."""
    found = {"producer": f"effdense {__version__}"}
    if name is not None:
        found["model"] = name
    if (names := getattr(model, "class_names", None)) is not None:
        found["class_names"] = json.dumps(list(names))
    if dataclasses.is_dataclass(prepare := getattr(model, "prepare", None)) and not isinstance(prepare, type):
        found["preparation"] = json.dumps(dataclasses.asdict(prepare))
    return found


def _weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> tuple[bytes, Exported]:
    state = model.state_dict()
    content = tensor_files.safetensors_of(state, metadata, str(path))
    read = tensor_files.read_safetensors(content, str(path))
    if wrong := [k for k in state if k not in read or not torch.equal(read[k], state[k].cpu())]:
        raise Differs(f"export: {wrong[0]} was read back as something else")
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    return content, Exported(path, len(content), dtype, None, "reading it back", 0.0, 0.0)


def _program(
    model: nn.Module, path: Path, shape: tuple[int, ...], metadata: dict[str, str]
) -> tuple[bytes, Exported]:
    """The content of an .onnx or .pt2."""
    suffix, net = path.suffix.lower(), revert(copy.deepcopy(model)).cpu().eval()
    if suffix == ".onnx":
        net = net.float()  # onnxruntime has convolutions of no other type on every CPU
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    way = _WAYS[suffix]
    with torch.no_grad(), _quiet():
        try:
            content = way.make(net, shape, metadata)
        except Exception as error:  # whatever a model makes of being traced
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"export: {type(model).__name__} with images {'x'.join(map(str, shape))} cannot be traced: {reason}"
            ) from error
        ran = way.run(content)
        by, difference, largest = None, 0.0, 0.0
        if ran is not None:
            by, run = ran
            difference, largest = _compare(net, run, shape, dtype, by)
    return content, Exported(path, len(content), dtype, shape, by, difference, largest)


def _compare(
    net: nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, by: str
) -> tuple[float, float]:
    """The largest difference, and the largest score."""
    generator, difference, largest = torch.Generator().manual_seed(0), 0.0, 0.0
    for images in _BATCHES:
        x = torch.randn(images, *shape[1:], generator=generator).to(dtype)
        expected, got = net(x).double(), run(x).double()
        if got.shape != expected.shape:
            raise Differs(f"export: {by} gives {list(got.shape)}, the model {list(expected.shape)}")
        difference = max(difference, (got - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not difference <= _ROUNDINGS * torch.finfo(dtype).eps * largest:  # nor where one is no number
        raise Differs(
            f"export: {by} gives something else than the model: {difference:.1e} beside scores of up to {largest:.1e}"
        )
    return difference, largest


def _make_pt2(net: nn.Module, shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (_example(net, shape),), dynamic_shapes=sizes, strict=False)
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={PT2_METADATA: json.dumps(metadata)})
    return stream.getvalue()


def _run_pt2(content: bytes) -> tuple[str, Callable[[Tensor], Tensor]]:
    return "torch.export", torch.export.load(io.BytesIO(content)).module()


def _make_onnx(net: nn.Module, shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    if sum(t.numel() * t.element_size() for t in net.state_dict().values()) > _ONNX_BYTES - 2**24:
        raise ValueError("an ONNX file holds 2 GiB, and its weights are more")
    program: Any = torch.onnx.export(
        net,
        (_example(net, shape),),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    try:
        runtime = extras.load("onnxruntime", "comparing", "export")
    except ImportError:
        return None
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return "onnxruntime", lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def _example(net: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Two images: of one, a trace would take the batch's size for a constant."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(2, *shape[1:], dtype=dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own notes on what they do not need, such as torchvision's operators."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


_WAYS = {
    ".onnx": _Way(("onnx", "onnxscript"), _make_onnx, _run_onnx),
    ".pt2": _Way((), _make_pt2, _run_pt2),
}
