"""Finds the dense layers, blocks and transitions of a model, and says why one cannot be converted.

By structure first, then by a comparison on a copy (probe.py). Nothing here changes the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from effdense.conversion.class_swap import LAYERS, class_obstacle, has_base, is_fused_kind
from effdense.conversion.probe import difference
from effdense.conversion.widths import growing
from effdense.nn import DenseBlock, DenseFeatures, DenseLayer, DenseNet, PlainDenseLayer, Transition
from effdense.nn.code import code_of_tree, is_known
from effdense.nn.code_reader import Reads, counts
from effdense.nn.foreign import Foreign, ForeignBlock, ForeignTransition, Form
from effdense.nn.kinds import ACTIVATIONS, CONVS
from effdense.nn.modules import kind_of, named, original, walk
from effdense.nn.network import head_of, stem_of
from effdense.nn.obstacles import chain_obstacle, transition_obstacle
from effdense.nn.structure import (
    MODULE_STATE,
    Obstacle,
    drop_attributes,
    layer_obstacle,
    layers_of,
    lead_of,
    looks_like_block,
    looks_like_transition,
    own_tensors,
    read_block,
    read_transition,
)


def _looks_like(module: nn.Module) -> type | None:
    """Which of our classes a module might be, by the names of its submodules alone."""
    names = set(module._modules)
    cls: Any = type(module)
    if cls.forward is nn.Module.forward:
        return None  # a container that nobody calls
    sequence = cls.forward is nn.Sequential.forward and is_known(module) and _holds_blocks(module)
    # Each of the layers in MONAI's block, a subclass of Sequential, might be a block of its own.
    if sequence and (cls is nn.Sequential or not looks_like_block(module)):
        return DenseFeatures
    if {"norm1", "conv1", "norm2", "conv2"} <= names:
        return DenseLayer
    if {"norm1", "conv1"} <= names and "conv2" not in names:
        return PlainDenseLayer
    if {"norm", "conv", "pool"} <= names:
        return Transition
    if "features" in names and _holds_blocks(module._modules["features"]):
        return None if head_of(module) is None else DenseNet
    layers = list(module._modules.values())
    if layers and all(m is not None and _looks_like(m) in LAYERS for m in layers):
        return DenseBlock
    return None


def _holds_blocks(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and any(
        m is not None
        and (isinstance(m, (DenseBlock, ForeignBlock)) or _looks_like(m) is DenseBlock or looks_like_block(m))
        for m in module._modules.values()
    )


def _successors(model: nn.Module) -> dict[nn.Module, set[nn.Module]]:
    """What comes behind a module in a sequence."""
    behind: dict[nn.Module, set[nn.Module]] = {}
    for m in walk(model):
        if isinstance(m, nn.Sequential):
            for before, after in itertools.pairwise(filter(None, m._modules.values())):
                behind.setdefault(before, set()).add(after)
    return behind


def _why_no_block(layers: dict[str, nn.Module]) -> str:
    """Why modules that read a dense block's widths (widths.py) do not run fused."""
    first, *_, last = layers
    reasons = (layer_obstacle(n, m, code_of_tree(m).reads) for n, m in layers.items())
    bare = "they are convolutions by themselves, not modules with a norm, ReLU and convolution each"
    reason = bare if isinstance(layers[first], CONVS) else next(filter(None, reasons), None)
    return (
        f"{first} to {last} read widths that grow like a dense block's, but "
        f"{reason or 'they are not all that is in a module, whose forward could be compared'}"
    )


def _structure_obstacle(module: nn.Module, kind: type, reads: Reads) -> str | None:
    """Why a module is not made like a `kind`, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(module).forward is nn.Module.forward:
        return f"a {type(module).__name__} has no forward: put its layers into a module whose forward is a block's alone"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if own := own_tensors(module, reads):
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if (reason := class_obstacle(module, kind)) is not None:
        return reason
    if issubclass(kind, Foreign):
        read: Any = read_block if kind is ForeignBlock else read_transition
        try:
            read(module, hooks=False, reads=reads)
        except Obstacle as obstacle:
            return str(obstacle)
        return None
    if kind is Transition:
        return transition_obstacle(module._modules, ignore_hooks=True)
    if not issubclass(kind, LAYERS):
        return None
    extra = set(module._modules) - set(kind.parts)
    if extra:
        return f"it has further submodules: {', '.join(sorted(extra))}"
    return chain_obstacle(module._modules, kind.parts, ignore_hooks=True)


class Examiner:
    """Says why a module cannot become a `kind`, or None.

    Every module's structure is looked at. The comparison on a copy is made once for all modules that run the same code:
    the same class with the same attributes, on submodules of the same names and classes.
    """

    def __init__(self) -> None:
        self.known: dict[Any, str | Form] = {}
        self.blocks: set[type] = set()  # the classes of what looks like a block
        self.sequences: set[nn.Module | None] = set()  # what a DenseFeatures looks into by itself
        self.dense = False  # whether there are blocks, or nothing but a transition
        self.forms: dict[nn.Module, Form] = {}  # of what can be converted

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, type, str | None]]:
        """Every part that is converted or might be: its name, itself, its class in effdense.nn, why it is not that.

        What is inside a foreign block or transition is left out.
        """
        successors, behind = _successors(model), set[nn.Module]()
        inside: set[nn.Module] = set()
        told: set[nn.Module] = set()  # layers of what has a block's widths only
        blocks = [m for m in walk(model) if looks_like_block(m)]
        self.blocks = {original(type(m)) for m in blocks} - {nn.Sequential}
        self.dense = bool(blocks) or looks_like_transition(model)
        for name, module in named(model):
            if module in inside:
                continue
            kind: type | None = kind_of(module)
            reason = None
            if not is_fused_kind(module):
                kind, reason = self._kind(module, module in behind)
            if kind is None or kind in (DenseFeatures, DenseNet):
                layers = growing(module)
                if not told.issuperset(layers.values()):
                    told.update(layers.values())
                    yield name, module, ForeignBlock, _why_no_block(layers)
            if kind is None:
                continue
            yield name, module, kind, reason
            if kind is DenseFeatures:
                self.sequences.update(module._modules.values())
            if issubclass(kind, (DenseBlock, ForeignBlock)):
                behind |= successors.get(module, set())
            if issubclass(kind, Foreign) and (reason is None or kind is ForeignBlock):
                lead = lead_of(module) if kind is ForeignBlock else None
                inside.update(set(walk(module)) - ({lead, *walk(lead)} if lead is not None else set()))
                behind |= set() if lead is None else {lead}

    def _kind(self, module: nn.Module, behind: bool) -> tuple[type | None, str | None]:
        """What a module might become, and why not."""
        kind = _looks_like(module)
        if kind is None or (
            kind is DenseBlock
            and not (
                has_base(type(module), kind) and any(self._is_layer(m) for m in module._modules.values())
            )
        ):
            reason = self._no_foreign_block(module, kind is DenseBlock or type(module) in self.blocks)
            if reason != "":
                return ForeignBlock, reason
            kind = None
        if kind is None and self.dense and module not in self.sequences and self._is_stem(module):
            return DenseFeatures, self(module, DenseFeatures)
        if kind not in (None, Transition):
            reason = self(module, kind)
            # A block with torchvision's names may put its features together in another way.
            other = kind is DenseBlock and reason is not None and self(module, ForeignBlock) is None
            return (ForeignBlock, None) if other else (kind, reason)
        own = kind is Transition and has_base(type(module), kind)
        if (behind or self.dense) and looks_like_transition(module):
            # With torchvision's names and all that it has, it can become our own.
            if own and self(module, Transition) is None:
                return Transition, None
            reason = self(module, ForeignTransition)
            if behind or (reason is None and self._has_pool(module)):
                return ForeignTransition, reason
        if kind is None or not has_base(type(module), kind):
            return None, None
        return kind, self(module, kind)

    def _is_stem(self, module: nn.Module) -> bool:
        """Whether a sequence outside of those that hold blocks has a norm, relu and max pool."""
        cls: Any = type(module)
        parts = list(filter(None, module._modules.values()))
        if cls.forward is not nn.Sequential.forward or not is_known(module):
            return False
        return any(stem_of(parts[i:]) is not None for i in range(len(parts)))

    def _has_pool(self, module: nn.Module) -> bool:
        """Without one, or a block before it, it is not known for a transition."""
        form = self.forms[module]
        return bool(form.pool) or read_transition(module, hooks=False, reads=form.reads)[0].has_pool()

    def _no_foreign_block(self, module: nn.Module, expected: bool) -> str | None:
        """Why it is no foreign block, or None; "" where nothing but the reason speaks for one.

        A single layer has no widths to compare: its names or other blocks of the same class must let one expect a block, or
        the probe must prove it.
        """
        if looks_like_block(module):
            return self(module, ForeignBlock)
        if len(layers_of(module)) != 1:
            return ""
        reason = self(module, ForeignBlock)
        return reason if reason is None or expected else ""

    def _is_layer(self, module: Any) -> bool:
        """Whether it is one of our layers, or can be."""
        if isinstance(module, LAYERS):
            return True
        kind = _looks_like(module)
        return kind is not None and issubclass(kind, LAYERS) and self(module, kind) is None

    def __call__(self, module: nn.Module, kind: type) -> str | None:
        reads = Reads() if kind is DenseFeatures else code_of_tree(module).reads
        structure = _structure_obstacle(module, kind, reads)
        if structure is not None:
            return structure
        if kind is DenseFeatures:  # nn.Sequential's own forward: there is nothing to compare
            self.forms[module] = Form(reads=reads)
            return None
        key = _same_code(module, kind)
        if key not in self.known:
            self.known[key] = self._compare(module, kind, reads)
        known = self.known[key]
        if isinstance(known, str):
            return known
        self.forms[module] = known
        return None

    def _compare(self, module: nn.Module, kind: type, reads: Reads) -> str | Form:
        """Why it does something else; or what the probe has found out."""
        # Whatever is switched on around the call must not reach the probe, nor the probe the random numbers.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            first: str | None = None
            for form in _forms(module, kind, reads):
                reason = difference(module, kind, form)
                if reason is None:
                    break
                first = first or reason
            else:
                return str(first) if kind is not ForeignTransition or _has_relu(module, reads) else _NO_RELU
            switches = {
                name
                for m in walk(module)
                for name, value in vars(m).items()
                if isinstance(value, bool)
                and name not in MODULE_STATE
                and counts(name, reads)
                and not is_plain(m)
            }
            same = frozenset(n for n in switches if difference(module, kind, form, n) is None)
            return form._replace(reads=reads._replace(without=same))


_NO_RELU = (
    "it has no ReLU between its norm and its convolution, as far as convert sees; the fused forward has one"
)


def _has_relu(module: nn.Module, reads: Reads) -> bool:
    """Whether a ReLU is among its modules, or named in its code."""
    return any(type(m) in ACTIVATIONS for m in walk(module)) or any("relu" in name for name in reads.names)


def _forms(module: nn.Module, kind: type, reads: Reads) -> Iterator[Form]:
    """What is tried on the probe, in this order."""
    head = head_of(module) if kind is DenseNet else None
    form = Form(reads=reads) if head is None else Form(reads=reads, head=head)
    yield form
    if kind is ForeignBlock:
        drops = any(drop_attributes(m) for m in walk(module))
        # A layer alone that gives back what it adds is no block: no more than a norm, ReLU and convolution.
        only = (False, True) if len(layers_of(module)) > 1 else (False,)
        for new_only, newest_first, after_each in itertools.product(only, (False, True), (False, True)):
            if (drops or not after_each) and (new_only or newest_first or after_each):
                yield form._replace(after_each=after_each, newest_first=newest_first, new_only=new_only)
    if kind is ForeignTransition:
        conv = read_transition(module, hooks=False, reads=reads)[0].conv
        yield form._replace(pool=(2,) * len(conv.kernel_size))


def is_plain(module: nn.Module) -> bool:
    """Whether its class is PyTorch's: what it does is read from it, not compared."""
    return type(module).__module__.startswith("torch.nn.")


def _same_code(module: nn.Module, kind: type) -> Any:
    """What modules that run the same code have in common; of a foreign one, and of a net, nothing is known before its probe."""
    if issubclass(kind, (Foreign, DenseNet)):
        return kind, module
    attributes = {k: repr(v) for k, v in vars(module).items() if k not in MODULE_STATE}
    children = tuple((n, type(m)) for n, m in named(module)) if kind is not DenseBlock else ()
    return kind, type(module), *sorted(attributes.items()), *children
