"""A module's class changed to one of ours, and given back."""

from __future__ import annotations

from typing import Any

from torch import nn

from effdense.nn.foreign import Foreign, ForeignBlock, foreign_class
from effdense.nn.layers import DenseBlock, DenseLayer, PlainDenseLayer, Transition
from effdense.nn.model import DenseFeatures, DenseNet
from effdense.nn.structure import read_block, read_transition

LAYERS = (DenseLayer, PlainDenseLayer)
OURS = (*LAYERS, DenseBlock, Transition, DenseFeatures, DenseNet)


def adopt(module: Any, ours: type, memory: str, everywhere: bool = False) -> None:
    """Makes a module one of ours, or changes the memory mode of one that is. `everywhere`: see read_block."""
    if isinstance(module, Foreign):
        module._effdense = module._effdense and (memory, *module._effdense[1:])
    elif issubclass(ours, Foreign):
        read: Any = read_block if ours is ForeignBlock else read_transition
        seen = read(module, hooks=False)[1]
        classes: Any = ours, type(module)
        module.__class__ = foreign_class(*classes)
        module._effdense = memory, everywhere, tuple(seen)
    elif type(module) is not ours:
        module._effdense_original = type(module), set(vars(module))
        module.__class__ = ours
    if issubclass(ours, LAYERS):
        module.memory = memory
        module.__dict__.setdefault("drop_rate", 0.0)  # a class without dropout need not have it


def give_back(module: nn.Module) -> None:
    """Undoes what adopt has done, if it has."""
    state = module.__dict__
    if isinstance(module, Foreign):
        module.__class__ = module.original
        state.pop("_effdense", None)
    elif "_effdense_original" in state:
        module.__class__, had = state.pop("_effdense_original")
        for name in {"_memory", "drop_rate"} - had:
            state.pop(name, None)
