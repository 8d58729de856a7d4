"""DenseFeatures and DenseNet: the sequence around the blocks, so that what belongs to a stage runs as one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense import dense_block, pool
from effdense.batch_norm import read_module, update_modules
from effdense.inputs import takes, through
from effdense.nn.foreign import ForeignBlock, ForeignTransition
from effdense.nn.layers import DenseBlock, Transition, dimensions_of, run_stage
from effdense.nn.obstacles import (
    ACTIVATIONS,
    CONVS,
    NORMS,
    changed,
    global_obstacle,
    module_obstacle,
    plain_max_pool,
    refuse_scripting,
    same_processes,
)
from effdense.nn.structure import DROPOUTS, Chain
from effdense.reference import channels_last

_BLOCKS = (DenseBlock, ForeignBlock)
_TRANSITIONS = (Transition, ForeignTransition)


def _is_part(module: nn.Module, kinds: tuple[type, ...]) -> Any:
    """Whether it is a block or transition, of our class or a foreign one, and nothing on it that a call would run."""
    ours, foreign = kinds
    return (type(module) is ours or isinstance(module, foreign)) and changed("", module, False) is None


def _is(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    return module_obstacle("", module, kinds) is None


class DenseFeatures(nn.Sequential):
    """nn.Sequential that runs neighbours together: a stem's norm, relu and max pool; a block with what follows it.

    What it does not know, and what carries hooks, it calls as nn.Sequential does.
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
        return self._walk(input, list(self._modules.values()))

    def head(self) -> tuple[Any, Any] | None:
        """What run_stage takes of the last block, and the norm behind it, if they and a head's pool can run together."""
        modules: list[Any] = list(self._modules.values())
        if len(modules) < 2 or self.obstacle() is not None or not _is(self, (DenseFeatures,)):
            return None
        block, norm = modules[-2:]
        stage = block.chains() if _is_part(block, _BLOCKS) and _is(norm, NORMS) else None
        return None if stage is None or not _same_processes(stage[0], norm) else (stage, norm)

    def pooled(self, input: Tensor) -> Tensor | None:
        """The global average [N, C] of relu of what forward gives, where there is a `head`."""
        head = self.head()
        if head is None:
            return None
        (chains, memory), norm = head
        modules: list[Any] = list(self._modules.values())
        x = self._walk(input, modules[:-2])
        if not takes(x, dimensions_of(chains)):
            return F.relu(norm(modules[-2](x))).flatten(2).mean(2)
        return run_stage(chains, memory, x, norm, x.shape[2:]).flatten(1)

    def _walk(self, x: Tensor, modules: list[Any]) -> Tensor:
        while modules:
            count, x = self._step(x, modules)
            modules = modules[count:]
        return x

    def _step(self, x: Tensor, modules: list[Any]) -> tuple[int, Tensor]:
        """Runs the first module, or the first few together; returns how many."""
        first = modules[0]
        windows = _stem(modules)
        if windows is not None and takes(x, len(windows[0]) + 2):
            return 3, through(x, lambda x: _run_stem(first, windows, x))
        if len(modules) > 1 and _is_part(first, _BLOCKS) and _is_part(modules[1], _TRANSITIONS):
            passage = modules[1].passage(x)
            fits = passage is not None and takes(x, passage[2].weight.dim())
            stage = first.chains() if fits else None
            if stage is not None and _same_processes(stage[0], passage[0]):
                chains, memory = stage
                return 2, run_stage(chains, memory, x, *passage)
        if (
            len(modules) > 1
            and _is(first, CONVS)
            and (_stem(modules[1:]) is not None or isinstance(modules[1], _BLOCKS))
        ):
            return 1, _conv_to_channels_last(first, x)
        return 1, first(_apart(first, x))


def _run_stem(norm: Any, windows: Any, x: Tensor) -> Tensor:
    names = [f"norm0.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    out, mean, var = pool.bn_relu_max_pool("stem", names, x, read_module(norm), *windows)
    update_modules([(norm, mean, var)], x.numel() // x.shape[1])
    return out


def _apart(module: Any, x: Tensor) -> Tensor:
    """x, or a copy where the module would change in place what a block has given: its backward needs that."""
    if torch.compiler.is_compiling():
        return x  # which sees to it
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    if getattr(module, "inplace", False) is not True or not dense_block.is_kept(x):
        return x
    # Contiguous, so that on the CPU dropout draws what it would have drawn.
    drops = isinstance(module, DROPOUTS)
    return x.clone(memory_format=torch.contiguous_format if drops else torch.preserve_format)


def _same_processes(chains: list[Chain], norm: nn.Module) -> bool:
    """Whether a norm behind a block takes the block's statistics."""
    return same_processes((chains[0].norms[0], norm))


def _conv_to_channels_last(conv: Any, x: Tensor) -> Tensor:
    """conv(x) in the layout that comes next. Asked for through the weight, it needs no lasting copy of x."""
    weight = channels_last(conv.weight) if x.dim() > 3 else conv.weight
    y: Tensor = conv._conv_forward(x, weight, conv.bias)
    return y


def _stem(modules: list[Any]) -> Any:
    """The max pool's windows, if a norm, a relu and a plain max pool come first."""
    if len(modules) < 3 or not (_is(modules[0], NORMS) and _is(modules[1], ACTIVATIONS)):
        return None
    return plain_max_pool(modules[2], modules[0])


class DenseNet(nn.Module):
    """features and classifier, with relu and a global average pool between; torchvision's DenseNet becomes this.

    Args:
        features: gives [N, C, *spatial].
        classifier: takes [N, C].
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def obstacle(self) -> str | None:
        """Why the head runs apart from the last block at the moment, or None."""
        features = self.features
        if not isinstance(features, DenseFeatures) or features.head() is None:
            return "its features do not end with a dense block that runs as a whole and a norm"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, *spatial] -> what the classifier makes of the pooled features."""
        features: Any = self.features
        pooled = features.pooled(x) if isinstance(x, Tensor) and isinstance(features, DenseFeatures) else None
        if pooled is None:
            pooled = F.relu(features(x)).flatten(2).mean(2)
        out: Tensor = self.classifier(pooled)
        return out
