"""The measured models, by name: DenseNets (torchvision's, or densenet.py's), and nets of other libraries.

`build(name, impl)` returns the model together with what it is; `parse_impl` reads the implementations' names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from benchmarks import nets
from benchmarks.densenet import DenseNet, large_stem, small_stem

if TYPE_CHECKING:  # effdense is imported where it is measured
    from effdense.engine.validation import Memory

# growth_rate, block_config, num_init_features (Huang et al., arXiv:1608.06993, table 1)
IMAGENET_CONFIGS = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
    "densenet264": (32, (6, 12, 64, 48), 64),
}
PEERS = ("naive", "checkpoint", "compile")
EFFDENSE = ("effdense-balanced", "effdense-minimal")
IMPLS = (*PEERS, *EFFDENSE, *(f"{name}-fallback" for name in EFFDENSE))
CHANNELS_LAST = "+channels-last"
FORCE_REFERENCE = "EFFDENSE_FORCE_REFERENCE"


@dataclasses.dataclass(frozen=True)
class Impl:
    """An implementation's name, taken apart."""

    name: str
    base: str  # naive, checkpoint, compile or effdense
    memory: Memory | None  # None for the peers
    fallback: bool  # effdense asked for on plain PyTorch, by name
    channels_last: bool


@dataclasses.dataclass(frozen=True)
class Built:
    """A model, `label`: which code it comes from, and `compiled`: whether effdense's C++ runs in it."""

    model: nn.Module
    label: str
    memory: str | None
    compiled: bool


@dataclasses.dataclass(frozen=True)
class _Spec:
    """A model's name, taken apart; the defaults are those of the ImageNet models."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    small_inputs: bool = False
    num_classes: int = 1000
    bn_size: int | None = 4  # None: plain layers
    compression: float = 0.5
    bias: bool = False
    image_channels: int = 3
    spatial_dims: int = 2
    sizes: tuple[int, int] = (8, 224)  # batch and image size


# Zhang et al., "Dive into Deep Learning", section 8.7: gray images of 96 pixels, plain layers, biases.
_D2L = _Spec(32, (4, 4, 4, 4), 64, num_classes=10, bn_size=None, bias=True, image_channels=1, sizes=(64, 96))

# MONAI's DenseNet-121 for volumes of one channel, in torchvision's structure: what 3D medical images are trained with.
_VOLUMES = _Spec(
    *IMAGENET_CONFIGS["densenet121"], num_classes=10, image_channels=1, spatial_dims=3, sizes=(4, 96)
)


def parse_impl(name: str) -> Impl:
    """Take an implementation's name apart; a ValueError names the nearest one that exists."""
    kind, plus, suffix = name.partition("+")
    if kind not in IMPLS or (plus and plus + suffix != CHANNELS_LAST):
        raise ValueError(
            f"unknown implementation {name!r}{_did_you_mean(kind, IMPLS)}; there are {', '.join(IMPLS)}, "
            f"each also with {CHANNELS_LAST}"
        )
    if kind in PEERS:
        return Impl(name, kind, None, False, bool(plus))
    base, memory = kind.split("-")[:2]
    return Impl(name, base, cast("Memory", memory), kind.endswith("-fallback"), bool(plus))


def expand(names: Sequence[str], mode: str) -> list[str]:
    """Return the names with groups replaced by their members, each once.

    "peers" is every peer in both layouts, "effdense" its memory modes, "all" both. Inference keeps nothing for a backward, so that
    checkpoint is naive there and "minimal" is "balanced".
    """
    training = mode == "train"
    peers = [n for n in PEERS if training or n != "checkpoint"]
    groups = {
        "peers": [name + layout for name in peers for layout in ("", CHANNELS_LAST)],
        "effdense": list(EFFDENSE if training else EFFDENSE[:1]),
    }
    groups["all"] = groups["peers"] + groups["effdense"]
    return list(dict.fromkeys(member for name in names for member in groups.get(name, [name])))


def default_sizes(name: str) -> tuple[int, int]:
    """Return the usual batch and image size of model `name`; ValueError when there is no such model here."""
    if name in nets.NETS:
        return nets.NETS[name].batch, nets.NETS[name].image_size
    return _spec(name).sizes


def build(
    name: str,
    impl: str,
    *,
    image_channels: int | None = None,
    num_classes: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> Built:
    """Build model `name` as implementation `impl`, with weights from the global random state.

    `name`: densenet121, 161, 169, 201, 264; densenet121_3d; densenet_bc_<depth>_<growth>; densenet_<depth>_<growth> (plain
    layers, no compression); densenet_d2l; torchvision:NAME; one of nets.NETS, which takes its own channels and classes
    and is not checkpointed. Unless given, `image_channels` is 3 (1 for
    densenet_d2l) and `num_classes` 1000 (10 for the models of small images). The same random state gives
    every `impl` the same weights, on every `device` (None: torch's default). `dtype` is that of the features, which
    effdense must have operators for. Raises ValueError for unknown names, RuntimeError where effdense would not
    run as named.
    """
    parsed = parse_impl(impl)
    compiled = parsed.base == "effdense" and _check_effdense(
        parsed, torch.empty(0, device=device, dtype=getattr(torch, dtype))
    )
    given: dict[str, Any] = {"image_channels": image_channels, "num_classes": num_classes}
    given = {key: value for key, value in given.items() if value is not None}
    efficient = parsed.base == "checkpoint"
    if name in nets.NETS and not given and not efficient:
        model, label = nets.build(name), nets.label(name)
    else:
        model, label = _naive(dataclasses.replace(_spec(name), **given), memory_efficient=efficient)
    if parsed.base == "checkpoint":
        label += ", checkpointed"
    elif parsed.base == "compile":
        model, label = cast(nn.Module, torch.compile(model)), f"{label}, torch.compile"
    elif parsed.base == "effdense":
        model, label = (
            _convert(model, parsed, name in nets.NETS),
            f"{label}, converted{'' if compiled else ', fallback'}",
        )
    if device:
        model = model.to(device)
    if parsed.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        label += ", channels-last"
    return Built(model, label, parsed.memory, compiled)


def _spec(name: str) -> _Spec:
    origin, colon, plain_name = name.rpartition(":")
    if name in nets.NETS:
        raise ValueError(
            f"model {name!r} is measured as it is: not checkpointed, with its own channels and classes"
        )
    if colon and origin != "torchvision":
        known = f"torchvision:NAME, {', '.join(nets.NETS)}"
        raise ValueError(
            f"unknown model {name!r}{_did_you_mean(name, list(nets.NETS))}; of libraries there are {known}"
        )
    if plain_name in IMAGENET_CONFIGS and name != "torchvision:densenet264":
        if colon and not _has_torchvision():
            from effdense import extras  # here: peers are measured beside an effdense that does not load

            raise ValueError(f"model {name!r} {extras.needed('torchvision')} ({plain_name!r} does not)")
        return _Spec(*IMAGENET_CONFIGS[plain_name])
    if match := re.fullmatch(r"densenet_(bc_)?(\d+)_(\d+)", name):
        return _cifar_spec(name, int(match[2]), int(match[3]), bottleneck=bool(match[1]))
    if name == "densenet_d2l":
        return _D2L
    if name == "densenet121_3d":
        return _VOLUMES
    if name == "densenet169_tutorial":
        raise ValueError(f"model {name!r} cannot be measured yet: only torchvision's and plain layers can")
    torchvisions = [f"torchvision:{known}" for known in IMAGENET_CONFIGS if known != "densenet264"]
    others = ["densenet_bc_100_12", "densenet_40_12", "densenet_d2l", "densenet121_3d"]
    suggestion = _did_you_mean(name, [*IMAGENET_CONFIGS, *others, *torchvisions])
    raise ValueError(
        f"unknown model {name!r}{suggestion}; there are {', '.join(IMAGENET_CONFIGS)}, "
        "densenet_bc_<depth>_<growth>, densenet_<depth>_<growth> (plain layers), densenet_d2l, densenet121_3d and "
        "torchvision:NAME"
    )


def _cifar_spec(name: str, depth: int, growth_rate: int, bottleneck: bool) -> _Spec:
    """Three blocks for images of 32 pixels: DenseNet-BC, or plain layers without compression."""
    convolutions = 2 if bottleneck else 1
    step = 3 * convolutions
    layers, rest = divmod(depth - 4, step)
    if rest or layers < 1 or growth_rate < 1:
        nearest = step * max(1, round((depth - 4) / step)) + 4
        raise ValueError(
            f"model {name!r}: growth must be at least 1, depth {step} n + 4 (three blocks of n layers of "
            f"{convolutions} convolution{'s' * bottleneck}); the nearest depth is {nearest}"
        )
    form: dict[str, Any] = {"small_inputs": True, "num_classes": 10, "sizes": (64, 32)}
    if bottleneck:
        return _Spec(growth_rate, (layers,) * 3, 2 * growth_rate, **form)
    return _Spec(growth_rate, (layers,) * 3, 16, bn_size=None, compression=1.0, **form)


def _naive(spec: _Spec, memory_efficient: bool) -> tuple[nn.Module, str]:
    """Build torchvision's DenseNet where it is installed and has such layers, else the twin, and say which."""
    arguments: dict[str, Any] = dict(
        growth_rate=spec.growth_rate,
        block_config=spec.block_config,
        num_init_features=spec.num_init_features,
        bn_size=spec.bn_size,
        num_classes=spec.num_classes,
        memory_efficient=memory_efficient,
    )
    in_channels = spec.image_channels
    lacking = "plain layers" if spec.bn_size is None else "volumes" if spec.spatial_dims == 3 else None
    if lacking or not _has_torchvision():
        form = {key: getattr(spec, key) for key in ("small_inputs", "compression", "bias", "spatial_dims")}
        model = DenseNet(**arguments, in_channels=in_channels, **form)
        return model, "plain twin" + (f" (torchvision has no {lacking})" if lacking else "")
    import torchvision

    model = torchvision.models.DenseNet(**arguments)
    label = f"torchvision {torchvision.__version__.partition('+')[0]} DenseNet"
    if spec.small_inputs:
        model.features.conv0 = small_stem(in_channels, spec.num_init_features)
        del model.features.norm0, model.features.relu0, model.features.pool0
        label += ", 3x3 stem"
    elif in_channels != 3:
        model.features.conv0 = large_stem(in_channels, spec.num_init_features)
        label += f", stem for {in_channels} channels"
    nn.init.kaiming_normal_(model.features.conv0.weight)
    return model, label


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _check_effdense(impl: Impl, features: Tensor) -> bool:
    """Return whether effdense's compiled code runs on such features; refuse what would not be what the name says."""
    from effdense.ops.dispatch import operators

    compiled = operators(features) is torch.ops.effdense
    if compiled and impl.fallback:
        raise RuntimeError(
            f"{impl.name} needs {FORCE_REFERENCE}=1 in the environment before effdense is imported"
        )
    if not compiled and not impl.fallback:
        where = f"{features.device.type}, {str(features.dtype).removeprefix('torch.')}"
        compiler = "nvcc and a C++ compiler" if features.is_cuda else "a C++ compiler"
        raise RuntimeError(
            f"effdense runs on its plain PyTorch fallback here ({where}), whose time and memory say nothing "
            f"about it: install it with {compiler}, or ask by name for the fallback itself, "
            f"effdense-{impl.memory}-fallback"
        )
    return compiled


def _convert(model: nn.Module, impl: Impl, partly: bool) -> nn.Module:
    """`partly`: whether some of it may stay as it was; benchmarks.libraries says what."""
    import effdense

    model = effdense.convert(model, memory=impl.memory or "balanced")
    report = effdense.report(model)
    # A library's own class around the features may have more than effdense's, and stay.
    left = [e for e in report if e.kind != "DenseNet" and (not e.converted or e.reason)]
    if len(left) == len(report) or (left and not partly):
        example = f": {left[0].name}: {left[0].reason}" if left else ""
        raise RuntimeError(
            f"effdense.convert left {len(left) or 'all'} of the model's modules as they were{example}"
        )
    return model


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
