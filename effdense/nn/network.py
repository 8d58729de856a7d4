"""DenseFeatures and DenseNet: the sequence around the blocks, so that what belongs to a stage runs as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.engine import node, pool, stem
from effdense.engine.autograd import in_its_layout
from effdense.engine.batch_norm import read_module, update_modules
from effdense.engine.inputs import accepts, through
from effdense.engine.validation import check_module
from effdense.nn.blocks import DenseBlock, Transition
from effdense.nn.chain import Chain
from effdense.nn.code import code_of
from effdense.nn.code_reader import counts
from effdense.nn.foreign import ForeignBlock, ForeignTransition, Head, Noted
from effdense.nn.kinds import ACTIVATIONS, CONVS, DROPOUTS, NORMS
from effdense.nn.modules import kind_of, walk
from effdense.nn.obstacles import (
    changed,
    dimensions,
    global_obstacle,
    is_norm,
    is_sequence,
    module_obstacle,
    plain_max_pool,
    refuse_scripting,
    same_processes,
)
from effdense.nn.stage_run import dimensions_of, run_stage
from effdense.ops.reference import channels_last

_BLOCKS = (DenseBlock, ForeignBlock)
_TRANSITIONS = (Transition, ForeignTransition)


def _is_part(module: nn.Module, kinds: tuple[type, ...]) -> Any:
    """Whether it is a block or transition, of our class or a foreign one, and nothing on it that a call would run."""
    own, foreign = kinds
    return (kind_of(module) is own or isinstance(module, foreign)) and changed("", module, False) is None


def _is(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    return module_obstacle("", module, kinds) is None


class DenseFeatures(nn.Sequential):
    """nn.Sequential that runs neighbours together: a stem's norm, relu and max pool; a block with what follows it.

    What it does not know, and what carries hooks, it calls as nn.Sequential does.

    Examples:
        >>> block = effdense.nn.DenseBlock(2, 16, bn_size=4, growth_rate=8, drop_rate=0.0)
        >>> features = effdense.nn.DenseFeatures(block, effdense.nn.Transition(32, 16))
        >>> features(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 16, 4, 4])
    """

    __prepare_scriptable__ = refuse_scripting

    def obstacle(self) -> str | None:
        """Why every submodule is called one by one at the moment, or None."""
        return global_obstacle()

    def forward(self, input: Tensor) -> Tensor:
        """What the submodules make of `input`, one after the other."""
        if not isinstance(input, Tensor) or self.obstacle() is not None:
            x: Tensor = super().forward(input)
            return x
        return self._walk(input, self.parts())

    def parts(self) -> list[Any]:
        """The submodules, and in a plain sequence's place, such as a stem's, those of that one."""
        return parts_of(self)

    def head(self, relu_before: bool = False) -> tuple[int, Any, Any] | None:
        """Where the last block is, what run_stage takes of it, and the norm behind it, if they and a head's pool can run together.

        `relu_before`: the head has no ReLU for certain, so the features must end with one.
        """
        modules = self.parts()
        ending = ending_of(modules)
        if ending is None or self.obstacle() is not None or not _is(self, (DenseFeatures,)):
            return None
        if relu_before and not ending.relu:
            return None
        block, norm = modules[ending.block : ending.block + 2]
        stage = block.chains() if _is_part(block, _BLOCKS) else None
        return (
            None if stage is None or not _shares_statistics(stage[0], norm) else (ending.block, stage, norm)
        )

    def pooled(self, input: Tensor, relu_before: bool = False) -> Tensor | None:
        """The global average [N, C] of relu of what forward gives, where there is a `head`."""
        head = self.head(relu_before)
        if head is None:
            return None
        block, (chains, memory), norm = head
        if not accepts(input, dimensions_of(chains)):
            return None
        modules = self.parts()
        x = _enter(modules[block], self._walk(input, modules[:block]))
        return run_stage(chains, memory, x, norm, x.shape[2:]).flatten(1)

    def gives_a_buffer(self, input: Tensor) -> bool:
        """Whether what forward gives is the last block's feature buffer."""
        parts = _not_idle(self.parts())
        stage = parts[-1].chains() if parts and _is_part(parts[-1], _BLOCKS) else None
        return stage is not None and accepts(input, dimensions_of(stage[0]))

    def _walk(self, x: Tensor, modules: list[Any]) -> Tensor:
        while modules:
            count, x = self._step(x, modules)
            modules = modules[count:]
        return x

    def _step(self, x: Tensor, modules: list[Any]) -> tuple[int, Tensor]:
        """Runs the first module, or the first few together; returns how many."""
        first = modules[0]
        after_conv = stem_of(modules)
        if after_conv is not None and accepts(x, after_conv.dimensions):
            windows = after_conv.windows
            return after_conv.modules, through(x, lambda x: _run_stem(first, windows, x))
        if len(modules) > 1 and _is_part(first, _BLOCKS):
            pooled = _step_of_block(x, modules)
            if pooled is not None:
                return pooled
        if len(modules) > 1 and _is(first, CONVS):
            after_conv = stem_of(modules[1:])
            if after_conv is not None and _keeps_no_map(self, modules, after_conv, x):
                norm, windows = modules[1], after_conv.windows
                return 1 + after_conv.modules, through(x, lambda x: _run_stem(norm, windows, x, first))
            if after_conv is not None or isinstance(modules[1], _BLOCKS):
                return 1, _conv_to_channels_last(first, x)
        return 1, first(_apart(first, x))


def parts_of(sequence: nn.Module) -> list[Any]:
    """See DenseFeatures.parts."""
    found: list[Any] = []
    for module in sequence._modules.values():
        plain = type(module) is nn.Sequential and changed("", module, False) is None
        found += module._modules.values() if plain and module is not None else [module]
    return found


class _Ending(NamedTuple):
    block: int  # the place of the module before the last norm
    relu: bool  # whether the norm's ReLU is there too


def ending_of(modules: list[Any]) -> _Ending | None:
    """The norm that a net's features end with, and its ReLU, if they do."""
    for count, relu in ((1, False), (1, True), (2, True)):
        last = modules[-count:]
        if len(modules) > count and (_relu_behind(last) == count if relu else _is(last[0], NORMS)):
            return _Ending(len(modules) - count - 1, relu)
    return None


def head_of(net: nn.Module) -> Head | None:
    """What its forward seems to call behind its features, by the names of its submodules and what these are."""
    read = code_of(type(net)).reads
    names = tuple(n for n, m in net._modules.items() if n != "features" and m is not None and counts(n, read))
    features = net._modules.get("features")
    ending = None if features is None else ending_of(parts_of(features))
    split = None if ending is None else _at_pool([net._modules[name] for name in names])
    if split is None and names != ("classifier",):
        return None
    return Head(names, None if split is None else split[0], ending is not None and ending.relu)


def tail_of(net: nn.Module, head: Head) -> list[Any] | None:
    """What a net calls on the averages [N, C] of its features; None where the pool is another one, or has hooks."""
    behind: list[Any] = [net._modules.get(name) for name in head.names]
    if head.relus is None or None in behind:
        return None if None in behind else behind
    split = _at_pool(behind)
    return split[1] if split is not None and split[0] == head.relus else None


def _at_pool(behind: list[Any]) -> tuple[int, list[Any]] | None:
    """How many ReLUs come before the global pool of a head, and what is called on its averages [N, C]; None: it is no such head."""
    modules = [m for m in _flat(behind) if type(m) is not nn.Identity or changed("", m, False) is not None]
    place = next((i for i, m in enumerate(modules) if _is_global_pool(m)), None)
    if place is None or not all(_is(m, ACTIVATIONS) for m in modules[:place]):
        return None
    tail = modules[place + 1 :]
    if tail and _is(tail[0], (nn.Flatten,)) and (tail[0].start_dim, tail[0].end_dim) == (1, -1):
        return place, tail[1:]
    # Else its forward flattens by a function; a convolution there would take the image of one pixel.
    return (place, tail) if all(type(m) in (nn.Linear, nn.Dropout) for m in tail) else None


def _flat(modules: Iterable[Any]) -> list[Any]:
    """The modules; in the place of a sequence with a global pool, what is in it."""
    found: list[Any] = []
    for module in modules:
        pools = is_sequence(module) and any(type(m) in _GLOBAL_POOLS for m in walk(module))
        found += _flat(filter(None, module._modules.values())) if pools else [module]
    return found


def _keeps_no_map(features: nn.Module, modules: list[Any], behind: _Stem, x: Tensor) -> bool:
    """Whether the convolution that comes first, of a stem, is to be computed again in the backward."""
    conv, norm = modules[:2]
    if conv.weight.dim() != behind.dimensions or not accepts(x, behind.dimensions) or not stem.is_plain(conv):
        return False
    tensors = x, conv.weight, conv.bias, norm.weight, norm.bias
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return trains and _memory(features) == "minimal"


def _memory(features: nn.Module) -> str:
    """What convert was asked for, else what the first block does."""
    block: Any = next((m for m in parts_of(features) if isinstance(m, _BLOCKS)), None)
    noted: Noted | None = features.__dict__.get("_effdense")
    if noted is None and isinstance(block, ForeignBlock):
        noted = block.__dict__.get("_effdense")
    if noted is not None:
        return noted.memory
    layer = None if block is None else next(iter(block._modules.values()), None)
    return str(getattr(layer, "memory", "balanced"))


def _run_stem(norm: Any, windows: Any, x: Tensor, conv: Any = None) -> Tensor:
    """The norm, ReLU and max pool; `conv`: the convolution before them, whose map is not to be kept."""
    if conv is not None:
        out, mean, var, count = stem.run(x, conv, read_module(norm), windows)
    else:
        names = [f"norm0.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        out, mean, var = pool.bn_relu_max_pool("stem", names, x, read_module(norm), *windows)
        count = x.numel() // x.shape[1]
    update_modules([(norm, mean, var)], count)
    return out


def _not_idle(modules: Iterable[Any]) -> list[Any]:
    return [m for m in modules if type(m) is not nn.Identity]


def _apart(module: Any, x: Tensor) -> Tensor:
    """x, or a copy where the module would change in place what a block has given: its backward needs that."""
    if torch.compiler.is_compiling():
        return x  # which sees to it
    while isinstance(module, nn.Sequential) and (inside := _not_idle(module._modules.values())):
        module = inside[0]
    if getattr(module, "inplace", False) is not True or not node.is_kept(x):
        return x
    # Contiguous, so that on the CPU dropout draws what it would have drawn.
    drops = isinstance(module, DROPOUTS)
    return x.clone(memory_format=torch.contiguous_format if drops else torch.preserve_format)


def _enter(block: Any, x: Tensor) -> Tensor:
    """What a block's first layer reads: ForeignBlock.enter."""
    y: Tensor = block.enter(x) if isinstance(block, ForeignBlock) else x
    return y


def _step_of_block(x: Tensor, modules: list[Any]) -> tuple[int, Tensor] | None:
    """A block with the transition, or the head's norm, relu and global average, behind it; None where they run apart."""
    first, second = modules[:2]
    if _is_part(second, _TRANSITIONS):
        stage = first.chains()
        if stage is None or not accepts(x, dimensions_of(stage[0])):
            return None
        x = _enter(first, x)
        parts = second.pool_first(x)
        if parts is None or not _shares_statistics(stage[0], parts[0]):
            return 1, run_stage(*stage, x)
        return 2, run_stage(*stage, x, *parts)
    count = _count_head(modules[1:])
    stage = first.chains() if count else None
    if stage is None or not accepts(x, dimensions_of(stage[0])) or not _shares_statistics(stage[0], second):
        return None
    x = _enter(first, x)
    return 1 + count, run_stage(*stage, x, second, x.shape[2:])


def _count_head(modules: list[Any]) -> int:
    """How many modules are a norm, relu and average over all pixels; 0 if these do not come first."""
    behind = _relu_behind(modules)
    if behind is None or behind >= len(modules) or not _is_global_pool(modules[behind]):
        return 0
    fits = dimensions(modules[0]) in (None, 1 + _GLOBAL_POOLS.index(type(modules[behind])))
    return behind + 1 if fits else 0


def _is_global_pool(module: Any) -> bool:
    """Whether it is PyTorch's average over all pixels."""
    if not _is(module, _GLOBAL_POOLS):
        return False
    sizes = module.output_size
    return all(size == 1 for size in (sizes if isinstance(sizes, (tuple, list)) else (sizes,)))


def _relu_behind(modules: list[Any]) -> int | None:
    """How many modules are a norm and its ReLU, which may be inside of it; None if these do not come first."""
    if not modules or not is_norm(modules[0]) or changed("", modules[0], True) is not None:
        return None
    norm = modules[0]
    # PyTorch's own norms call no module that they hold, as a timm norm does that was made a SyncBatchNorm.
    if norm._modules and type(norm) not in NORMS:
        inside = [m for m in norm._modules.values() if type(m) is not nn.Identity]
        idle = all(changed("", m, False) is None for m in norm._modules.values())
        return 1 if idle and len(inside) == 1 and _is(inside[0], ACTIVATIONS) else None
    return 2 if len(modules) > 1 and _is(modules[1], ACTIVATIONS) else None


_GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class _Stem(NamedTuple):
    modules: int
    windows: Any  # of its max pool

    @property
    def dimensions(self) -> int:
        """Of its input."""
        return len(self.windows[0]) + 2


def stem_of(modules: list[Any]) -> _Stem | None:
    """A norm, its relu and a plain max pool, if these come first."""
    behind = _relu_behind(modules)
    if behind is None or behind >= len(modules):
        return None
    windows = plain_max_pool(modules[behind], modules[0])
    return None if windows is None else _Stem(behind + 1, windows)


def _shares_statistics(chains: list[Chain], norm: nn.Module) -> bool:
    """Whether a norm behind a block takes the block's statistics: of all its features, over the same processes."""
    return not chains[0].new_only and same_processes((chains[0].norms[0], norm))


def _conv_to_channels_last(conv: Any, x: Tensor) -> Tensor:
    """conv(x) in the layout that comes next. Asked for through the weight, it needs no lasting copy of x."""
    weight = channels_last(conv.weight) if x.dim() > 3 else conv.weight
    y: Tensor = conv._conv_forward(in_its_layout(x), weight, conv.bias)
    return y


class DenseNet(nn.Module):
    """features and classifier, with relu and a global average pool between; torchvision's DenseNet, timm's and MONAI's become this.

    Args:
        features: gives [N, C, *spatial].
        classifier: takes [N, C].

    Raises:
        TypeError: one of them is no module.

    Examples:
        >>> block = effdense.nn.DenseBlock(2, 16, bn_size=4, growth_rate=8, drop_rate=0.0)
        >>> features = effdense.nn.DenseFeatures(block, torch.nn.BatchNorm2d(32))
        >>> effdense.nn.DenseNet(features, torch.nn.Linear(32, 10))(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        check_module("DenseNet", "features", features)
        check_module("DenseNet", "classifier", classifier)
        self.features = features
        self.classifier = classifier

    def obstacle(self) -> str | None:
        """Why the head runs apart from the last block at the moment, or None."""
        features, head = self.features, _noted_head(self)
        if not isinstance(features, DenseFeatures) or features.head(head.relu_before) is None:
            return "its features do not end with a dense block that runs as a whole and a norm"
        return "its head has another pool, or hooks" if tail_of(self, head) is None else None

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, *spatial] -> what the classifier makes of the pooled features."""
        out = self.fused(x) if isinstance(x, Tensor) else None
        if out is None:
            out = self.classifier(F.relu(self.features(x)).flatten(2).mean(2))
        return out

    def fused(self, x: Tensor) -> Tensor | None:
        """What forward gives, the head run with the last block; None where it cannot."""
        features: Any = self.features
        head = _noted_head(self)
        tail = tail_of(self, head)
        if not isinstance(features, DenseFeatures) or tail is None:
            return None
        y = features.pooled(x, head.relu_before)
        if y is None and not head.relu_before and features.gives_a_buffer(x):
            y = F.relu(features(x)).flatten(2).mean(2)  # where torchvision's forward would change it in place
        if y is not None:
            for module in tail:
                y = module(y)
        return y


def _noted_head(net: nn.Module) -> Head:
    noted: Noted | None = net.__dict__.get("_effdense")
    return Head() if noted is None else noted.form.head
