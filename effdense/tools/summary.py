"""summary: a DenseNet's stages as in the paper's table 1, with parameters, work, and what each keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdense.conversion import convert
from effdense.nn import DenseBlock, DenseFeatures, DenseNet, Transition
from effdense.nn.foreign import ForeignBlock, ForeignTransition
from effdense.nn.kinds import CONVS
from effdense.tools.planner import bare_copy, check_input_shape

SAVED = ("naive", "balanced", "minimal")
_BLOCKS = (DenseBlock, ForeignBlock)
_KINDS = (
    (_BLOCKS, "Dense block"),
    ((Transition, ForeignTransition), "Transition"),
    (CONVS, "Convolution"),
)


class Row(NamedTuple):
    """A line of the table."""

    layer: str
    output: tuple[int, ...]  # channels and sizes
    parameters: int
    multiply_adds: int  # of the convolutions and the classifier, for one image
    saved: Mapping[str, int]  # bytes kept from forward to backward, for the batch, by memory mode


class Summary(NamedTuple):
    """A model's table; `print(effdense.summary(model, input_shape))`."""

    input_shape: tuple[int, ...]
    rows: list[Row]

    @property
    def total(self) -> Row:
        """The sums, with the last row's output."""
        saved = {memory: sum(row.saved[memory] for row in self.rows) for memory in SAVED}
        sums = sum(row.parameters for row in self.rows), sum(row.multiply_adds for row in self.rows)
        return Row("total", self.rows[-1].output, *sums, saved)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "input_shape": list(self.input_shape),
            "rows": [row._asdict() for row in self.rows],
            "total": self.total._asdict(),
        }

    def __str__(self) -> str:
        head = ["", "output", "parameters", "multiply-adds", *(f"{memory}, MiB" for memory in SAVED)]
        lines = [head]
        for row in (*self.rows, self.total):
            saved = [f"{row.saved[memory] / 2**20:.2f}" for memory in SAVED]
            output = "x".join(map(str, row.output))
            lines.append([row.layer, output, f"{row.parameters:,}", f"{row.multiply_adds:,}", *saved])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            f"input {'x'.join(map(str, self.input_shape))}; kept for the backward: naive, balanced, minimal",
            "",
        ]
        for line in lines:
            first, *others = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
            text.append("  ".join([f"{first.strip():<{widths[0]}}", *others]).rstrip())
        return "\n".join([*text, "", "A transition, and the head, run and keep with the block before them."])


def _places(model: Any) -> tuple[list[str], dict[nn.Module, int]]:
    """The rows' names, and the row of every child of the features and of the classifier.

    A norm, an activation or dropout belongs to the row before it; in front of the first convolution, to that one's; and what is
    behind the last block to the classification.
    """
    names: list[str] = []
    places: dict[nn.Module, int] = {}
    children = model.features.parts()
    last = max(i for i, m in enumerate(children) if isinstance(m, _BLOCKS))
    for module in children[: last + 1]:
        kind = next((name for kinds, name in _KINDS if isinstance(module, kinds)), None)
        if kind is None and "Pool" in type(module).__name__:
            kind = "Pooling"
        if kind in ("Dense block", "Transition"):
            kind += f" {sum(name.startswith(kind) for name in names) + 1}"
        if kind is not None:
            names.append(kind)
        places[module] = max(0, len(names) - 1)
    names.append("Classification")
    return names, {**places, **dict.fromkeys([*children[last + 1 :], model.classifier], len(names) - 1)}


class _Kept:
    """Counts what autograd keeps, by row: every storage once, without parameters, buffers and the image."""

    def __init__(self, model: nn.Module, x: Tensor, rows: int) -> None:
        self.row, self.bytes = 0, [0] * rows
        self._seen = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), x)]
        self._known = {s._cdata for s in self._seen}

    def note(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._seen.append(storage)  # its address stays taken
            self.bytes[self.row] += storage.nbytes()
        return tensor

    def enter(self, row: int) -> Callable[..., None]:
        """A hook that is called where a row begins."""

        def hook(*_: Any) -> None:
            self.row = row

        return hook


def _kept(model: Any, shape: Sequence[int], memory: str) -> list[int]:
    """Bytes kept by every row. "naive": hooks make every module call its submodules."""
    names, places = _places(model)
    x = torch.empty(tuple(shape), dtype=next(model.parameters()).dtype, device="meta")
    kept, children = _Kept(model, x, len(names)), model.features.parts()
    if memory == "naive":
        for module in model.modules():
            module.register_forward_pre_hook(
                kept.enter(places[module]) if module in places else lambda *_: None
            )
    else:
        convert(model, memory="minimal" if memory == "minimal" else "balanced")
        step, done = model.features._step, 0

        def watched(x: Tensor, modules: list[Any]) -> tuple[int, Tensor]:
            nonlocal done
            kept.row = places[children[done]]
            count, x = step(x, modules)
            done += count
            kept.row = places[children[done]] if done < len(children) else kept.row  # where a head may begin
            return count, x

        watched.effdense_may_fuse = True  # type: ignore[attr-defined]  # see obstacles.shadowed
        model.features.__dict__["_step"] = watched
        model.classifier.register_forward_pre_hook(kept.enter(places[model.classifier]))
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        model(x)
    return kept.bytes


def _sizes(model: Any, shape: Sequence[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Output sizes and multiply-adds of every row."""
    names, places = _places(model)
    sizes: list[tuple[int, ...]] = [()] * len(names)
    work = [0] * len(names)
    row_of = {m: row for module, row in places.items() for m in module.modules()}

    def hook(module: Any, _: Any, output: Tensor) -> None:
        if module in places:
            sizes[places[module]] = tuple(output.shape[1:])
        if isinstance(module, (*CONVS, nn.Linear)):
            pixels = output.shape[2:].numel()
            work[row_of[module]] += pixels * module.weight.numel()

    for module in row_of:
        module.register_forward_hook(hook)
    model.eval()(torch.empty(tuple(shape), dtype=next(model.parameters()).dtype, device="meta"))
    return sizes, work


def summary(model: nn.Module, input_shape: Sequence[int]) -> Summary:
    """Describes a DenseNet's stages as in Huang et al. (arXiv 1608.06993), table 1. The model is not touched, nothing is run.

    Multiply-adds are those of the convolutions and the classifier for one image, as the paper's authors count them:
    effdense's transitions need a quarter of theirs, for they pool first. What is kept for the backward is kept between a
    training step's forward and backward, parameters and images not counted; `effdense.plan` says the peak.

    Args:
        model: with `features`, a Sequential that holds dense blocks, and `classifier`; one that `effdense.convert` converts.
        input_shape: of one batch, [N, C, *spatial].

    Raises:
        TypeError: model is not a module.
        ValueError: input_shape is wrong, or the model is of another kind or does not run on it.

    Examples:
        >>> model = effdense.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8)
        >>> [row.layer for row in effdense.summary(model, (2, 3, 32, 32)).rows]
        ['Convolution', 'Pooling', 'Dense block 1', 'Transition 1', 'Dense block 2', 'Classification']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary: model must be a torch.nn.Module, got {type(model).__name__}")
    shape = check_input_shape("summary", input_shape)

    def bare() -> Any:
        return convert(bare_copy(model)).train()

    known = bare()
    named = isinstance(known, DenseNet) and "classifier" in known._modules
    if not named or not isinstance(known.features, DenseFeatures):
        raise ValueError(
            f"summary: {type(model).__name__} is not a DenseNet with features and classifier that effdense.convert converts"
        )
    names, places = _places(known)
    parameters = [0] * len(names)
    for module, row in places.items():
        parameters[row] += sum(p.numel() for p in module.parameters())
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
            sizes, work = _sizes(known, shape)
            kept = {memory: _kept(bare(), shape, memory) for memory in SAVED}
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"summary: the model does not run on an input of shape {shape}: {error}") from error
    saved = [dict(zip(SAVED, one, strict=True)) for one in zip(*kept.values(), strict=True)]
    return Summary(shape, [Row(*row) for row in zip(names, sizes, parameters, work, saved, strict=True)])
