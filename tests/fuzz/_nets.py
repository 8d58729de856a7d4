"""Nets for fuzzing: a dense stage in plain PyTorch, the same fused, and a history of what users do to both."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import effdense
from benchmarks import densenet
from effdense.nn import DenseBlock, DenseFeatures, Transition
from effdense.ops import dispatch, reference
from tests._cases import LAYOUTS
from tests._stages import Head, in_dimensions

REFUSALS = (ValueError, RuntimeError, TypeError)


class Net(NamedTuple):
    """A dense stage and its first input."""

    layers: int
    channels: int
    growth: int
    bn_size: int  # 0: plain layers
    tail: str  # "block", "transition" or "head"
    bias: bool
    images: int
    spatial: tuple[int, ...]
    memory: str
    way: str  # how it becomes fused: "modules" or "convert"
    engine: str  # "compiled", "python" or "reference"
    dtype: torch.dtype
    seed: int
    drop: float = 0.0
    sure: bool = False  # whether norms keep what ReLUs get far from 0, so that gradients can be compared in any precision


class Action(NamedTuple):
    """What happens before a step, to the a-th of its kind, and how: b."""

    name: str
    a: int
    b: int


class _Python:
    """The compiled operators without a whole stage: so the engine in Python calls them one by one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("stage_"):
            raise AttributeError(name)
        return getattr(torch.ops.effdense, name)


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """Runs on the compiled stage, on the engine in Python over compiled operators, or on PyTorch's own."""
    if name == "compiled":
        yield
        return
    ops, dtypes = (reference, ()) if name == "reference" else (_Python(), dispatch.implementation("cpu")[1])
    with dispatch.override("cpu", ops, dtypes):
        yield


def make(net: Net) -> tuple[nn.Module, nn.Module]:
    """The stage in plain PyTorch in float64, and fused in the net's dtype; the same parameters and statistics."""
    dims, wide = len(net.spatial), net.channels + net.layers * net.growth
    block: nn.Module = densenet._DenseBlock(
        net.layers, net.channels, net.bn_size or None, net.growth, net.drop, bias=net.bias
    )
    naive = block
    if net.tail == "transition":
        parts = ("denseblock1", block), ("transition1", densenet._Transition(wide, 5, net.bias))
        naive = nn.Sequential(OrderedDict(parts))
    elif net.tail == "head":
        naive = Head(nn.Sequential(OrderedDict(denseblock1=block, norm5=nn.BatchNorm2d(wide))))
    naive = in_dimensions(naive, dims) if dims != 2 else naive
    with torch.no_grad():
        for name, tensor in (*naive.named_parameters(), *naive.named_buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
                if name.endswith(("bias", "running_mean")):
                    tensor.sub_(1)
        for norm in norms_of(naive) if net.sure else ():
            norm.weight.uniform_(0.2, 0.3)
            norm.bias.copy_(1.25 * (torch.rand_like(norm.bias) - 0.5).sign())
    naive = naive.to(net.dtype).double()  # both have the same values
    return naive, _fused(net, naive).to(net.dtype)


def _fused(net: Net, naive: nn.Module) -> nn.Module:
    if net.way == "convert":
        return effdense.convert(copy.deepcopy(naive), memory=net.memory)
    dims, wide = len(net.spatial), net.channels + net.layers * net.growth
    form: dict[str, Any] = {"memory": net.memory, "bias": net.bias, "spatial_dims": dims}
    ours: nn.Module = DenseBlock(net.layers, net.channels, net.bn_size or None, net.growth, net.drop, **form)
    if net.tail == "transition":
        end = Transition(wide, 5, bias=net.bias, spatial_dims=dims)
        ours = DenseFeatures(OrderedDict(denseblock1=ours, transition1=end))
    elif net.tail == "head":
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](wide)
        ours = Head(DenseFeatures(OrderedDict(denseblock1=ours, norm5=norm)))
    ours.load_state_dict(naive.state_dict())
    return ours


def norms_of(model: nn.Module) -> list[Any]:
    """Its batch norms in order."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def pick(every: list[Any], number: int) -> Any:
    """One of them, whatever the number."""
    return every[number % len(every)]


class Side:
    """One of the two models, with what is remembered about it between steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}  # by hooks
        self.handles: list[Any] = []
        self.how = ""  # of the next steps: "", "no_grad", "inference", "checkpoint", "reentrant", "wrapper"
        self.passes = "once"  # see `_passes`
        self.autocast: torch.dtype | None = None

    def note(self, hook: str, *values: Any) -> None:
        """Called by hooks."""
        tensors = [v for value in values for v in (value if isinstance(value, (tuple, list)) else [value])]
        for t in tensors:
            if isinstance(t, Tensor):
                count = sum(name.startswith(hook + ".") for name in self.seen)
                self.seen[f"{hook}.{count}"] = t.detach().double().clone()

    def hook(self, a: int, b: int) -> None:
        """Puts a hook on a module or a parameter."""
        module: Any = pick(list(self.model.modules()), a)
        parameter = pick(list(self.model.parameters()), a)
        forward, backward = (f"{kind} hook {len(self.handles)}" for kind in ("forward", "gradient"))
        add: Any = [
            lambda: module.register_forward_hook(lambda m, x, y: self.note(forward, y)),
            lambda: module.register_forward_pre_hook(lambda m, x: self.note(forward, x)),
            lambda: parameter.register_hook(lambda g: self.note(backward, g)),
            lambda: module.register_forward_hook(lambda m, x, y: y * 2 if isinstance(y, Tensor) else y),
            lambda: parameter.register_hook(lambda g: g * 3),
            lambda: parameter.register_post_accumulate_grad_hook(lambda p: self.note(backward, p.grad)),
        ][b % 6]
        if parameter.requires_grad or b % 6 in (0, 1, 3):
            self.handles.append(add())


def _parameter(side: Side, a: int, b: int) -> None:
    """Another parameter in its place, of the same values less a part that b says."""
    owners = [(m, n) for m in side.model.modules() for n, p in m._parameters.items() if p is not None]
    owner, name = pick(owners, a)
    old = getattr(owner, name)
    new = nn.Parameter(old.detach() * (1 - 0.1 * (b % 3)), requires_grad=old.requires_grad)
    setattr(owner, name, new)


def _no_affine(side: Side, a: int, b: int) -> None:
    norm = pick(norms_of(side.model), a)
    for name in (("weight", "bias"), ("weight",), ("bias",))[b % 3]:
        norm.register_parameter(name, None)


def _no_statistics(side: Side, a: int, b: int) -> None:
    norm = pick(norms_of(side.model), a)
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _edit(side: Side, a: int, b: int) -> None:
    """Values changed in place, without autograd's knowledge or with."""
    every = [t for t in (*side.model.parameters(), *side.model.buffers()) if t.is_floating_point()]
    tensor = pick(every, a)
    if b % 2:
        tensor.data.mul_(1.25)
    else:
        with torch.no_grad():
            tensor.mul_(0.75)


def _load(side: Side, a: int, b: int) -> None:
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in side.model.state_dict().items()}
    if b % 3 == 2:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    side.model.load_state_dict(state, assign=bool(b % 2))


def _train(side: Side, a: int, b: int) -> None:
    modules = [side.model, *side.model.modules()]
    pick(modules, a).train(bool(b % 2))


def _norm(name: str, *values: Any) -> Callable[[Side, int, int], None]:
    return lambda side, a, b: setattr(pick(norms_of(side.model), a), name, pick(list(values), b))


def _freeze(side: Side, a: int, b: int) -> None:
    every = list(side.model.parameters())
    for p in every if b % 4 == 3 else [pick(every, a)]:
        p.requires_grad_(bool(b % 2))
        p.grad = None


def _copy(side: Side, a: int, b: int) -> None:
    for handle in side.handles:  # not picklable, and not copied for good
        handle.remove()
    side.handles = []
    side.model.zero_grad()
    side.model = copy.deepcopy(side.model) if b % 2 else pickle.loads(pickle.dumps(side.model))


def _how(side: Side, a: int, b: int) -> None:
    side.how = ("", "no_grad", "inference", "checkpoint", "", "reentrant", "wrapper")[b % 7]


def _passes(side: Side, a: int, b: int) -> None:
    """Forwards and backwards of a step: gradients added up over two; both forwards first; a graph used twice; a penalty."""
    side.passes = ("once", "twice", "both", "again", "second")[b % 5]


def _autocast(side: Side, a: int, b: int) -> None:
    side.autocast = (torch.bfloat16, None, torch.float16)[b % 3]


def _drop(side: Side, a: int, b: int) -> None:
    layers: list[Any] = [m for m in side.model.modules() if hasattr(m, "norm1") and hasattr(m, "drop_rate")]
    pick(layers, a).drop_rate = (0.0, 0.4, 1.0, 0.2)[b % 4]


def _unhook(side: Side, a: int, b: int) -> None:
    for handle in side.handles:
        handle.remove()
    side.handles = []


def _data(side: Side, a: int, b: int) -> None:
    """New memory under a parameter or buffer."""
    tensor = pick(list(side.model.parameters()), a)
    tensor.data = tensor.data.clone().mul(1.1) if b % 2 else tensor.data.contiguous().clone()


ACTIONS: dict[str, Callable[[Side, int, int], None]] = {
    "nothing": lambda side, a, b: None,
    "train": _train,
    "freeze": _freeze,
    "momentum": _norm("momentum", 0.1, None, 0.0, 1.0, 0.3),
    "eps": _norm("eps", 1e-5, 1e-3, 0.1),
    "no affine": _no_affine,
    "no statistics": _no_statistics,
    "hook": lambda side, a, b: side.hook(a, b),
    "unhook": _unhook,
    "parameter": _parameter,
    "edit": _edit,
    "load": _load,
    "copy": _copy,
    "how": _how,
    "data": _data,
    "passes": _passes,
    "autocast": _autocast,
    "drop": _drop,
}
OURS = (
    "memory",
    "convert",
    "revert",
    "to",
    "input",
)  # that the plain one does not know, or both get otherwise
LOW = ("autocast", "to")


def change_ours(side: Side, action: Action) -> None:
    """What only the fused model knows, and what changes nothing of its results."""
    memory = ("balanced", "minimal")[action.b % 2]
    if action.name == "revert":
        effdense.revert(side.model)
    elif action.name == "convert":
        effdense.convert(side.model, memory=memory)
    elif action.name == "memory":
        for m in side.model.modules():
            if isinstance(getattr(type(m), "memory", None), property):
                m.memory = memory  # type: ignore[assignment]
    elif action.name == "to":
        side.model.to(pick([torch.bfloat16, torch.float32, torch.float64, torch.float16], action.a))
        if action.b % 4 == 3:
            for m in norms_of(side.model):
                m.float()


class Input(NamedTuple):
    """What comes in: as many images, of these sizes, so laid out, with a gradient or not."""

    images: int
    spatial: tuple[int, ...]
    layout: str
    need: bool

    def changed(self, action: Action) -> Input:
        """By an action of this name."""
        a, b = action.a, action.b
        sizes = tuple(max(2, n + (a % 3) - 1) for n in self.spatial)
        return Input(1 + a % 4, sizes if b % 2 else self.spatial, pick(list(LAYOUTS), a), bool(b % 4))

    def make(self, channels: int, seed: int) -> Tensor:
        """In float64, as float32 has it."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.images, channels, *self.spatial, generator=generator).double()


@contextlib.contextmanager
def contiguous_dropout() -> Iterator[None]:
    """PyTorch's dropout draws in the layout of what comes: here in the contiguous one, as fused layers do."""
    real = F.dropout
    F.dropout = lambda x, *rest, **named: real(x.contiguous(), *rest, **named)
    try:
        yield
    finally:
        F.dropout = real


def _run(side: Side, x: Tensor, plain: bool) -> Tensor:
    """One forward as `side.how` says; `plain`: never checkpointed."""
    model, how = side.model, "" if plain else side.how
    if how == "wrapper":
        y: Tensor = checkpoint_wrapper(model)(x)
    elif how in ("checkpoint", "reentrant"):
        # The reentrant kind gives no gradients to parameters where x needs none, and none by torch.autograd.grad.
        reentrant = how == "reentrant" and x.requires_grad and side.passes != "second"
        y = checkpoint(model, x, use_reentrant=reentrant)
    else:
        y = model(x)
    return y


def _loss(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, max(1, y.numel()), dtype=torch.float64)[: y.numel()]
    return (y.double() * weights.view(y.shape)).sum()


def _backward(side: Side, ys: list[Tensor], xs: list[Tensor]) -> None:
    loss = torch.stack([_loss(y) for y in ys]).sum()
    if not loss.requires_grad:
        return
    if side.passes == "second":
        inputs = [t for t in (*xs, *side.model.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        loss = loss + sum(g.double().square().sum() for g in grads if g is not None)
    loss.backward(retain_graph=side.passes == "again")
    if side.passes == "again":
        loss.backward()


def step(
    side: Side, images: list[Tensor], like: Input, dtype: torch.dtype, seed: int = 0, plain: bool = False
) -> dict[str, Tensor | None]:
    """Outputs, gradients, buffers and what hooks saw of one step, by name. The second of the images is for a second pass.

    `plain`: never checkpointed, since statistics of plain PyTorch move twice then, and fused ones once. What hooks saw of a
    checkpointed step is left out, because they see that twice.
    """
    model, two = side.model, side.passes in ("twice", "both")
    side.seen = {}
    need = like.need and not side.how.startswith(("no", "inf"))
    xs = [LAYOUTS[like.layout](x.to(dtype)).detach().requires_grad_(need) for x in images[: 1 + two]]
    model.zero_grad()
    torch.manual_seed(seed)
    within = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        side.how, contextlib.nullcontext
    )
    autocast = torch.autocast(
        "cpu", dtype=side.autocast or torch.bfloat16, enabled=side.autocast is not None and not plain
    )
    ys: list[Tensor] = []
    with contiguous_dropout():
        for x in xs:
            with within(), autocast:
                ys.append(_run(side, x, plain))
            if side.passes != "both":
                _backward(side, ys[-1:], [x])
        if side.passes == "both":
            _backward(side, ys, xs)
    results: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(ys)}
    results |= {f"gradient of input {i}": x.grad for i, x in enumerate(xs)}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    results |= {name: b.clone() for name, b in model.named_buffers()}
    if not is_checkpointed(side):
        results |= side.seen
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p.numel():
                p.sub_(p.grad * (0.01 / p.grad.abs().max().clamp(min=1)))
    return results


def is_checkpointed(side: Side) -> bool:
    """Whether forwards run again in the backward."""
    return side.how in ("checkpoint", "reentrant", "wrapper")
