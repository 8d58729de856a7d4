"""DenseNet in general, and the constructors of the ones with a name. Huang et al., arXiv 1608.06993, sections 3 and 4."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.fx
from torch import Tensor, nn

from effdense import nn as dense
from effdense.engine.validation import (
    Memory,
    check_count,
    check_flag,
    check_memory,
    check_number,
    check_probability,
    check_spatial_dims,
    shown,
)
from effdense.models.timm_methods import TimmMethods
from effdense.models.weights import load_published
from effdense.nn.kinds import AVG_POOLS, CONVS, MAX_POOLS, NORMS

if TYPE_CHECKING:
    from typing_extensions import Unpack

# growth_rate, block_config, num_init_features (table 1 of the paper; 161 is the authors' own, wider than the table's)
IMAGENET = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
    "densenet264": (32, (6, 12, 64, 48), 64),
}


class Options(TypedDict, total=False):
    """What the nets of table 1 take besides their sizes; see DenseNet."""

    bn_size: int | None
    drop_rate: float
    num_classes: int
    memory_efficient: bool
    compression: float
    dropout_after_bottleneck: bool
    small_inputs: bool
    in_channels: int
    spatial_dims: int
    bias: bool
    memory: Memory


class DenseNet(TimmMethods, dense.DenseNet):
    """A DenseNet with torchvision's arguments, names, state_dict keys and initialisation; 1D, 2D or 3D.

    Stem, blocks, transitions and head of Huang et al. (arXiv 1608.06993), sections 3 and 4. By default it is
    DenseNet-121. Images [N, in_channels, *spatial] -> scores [N, num_classes].

    Args:
        growth_rate: channels that a layer adds (k).
        block_config: how many layers each block has.
        num_init_features: channels that the stem gives.
        bn_size: a bottleneck has bn_size * growth_rate channels; None: layers without bottlenecks.
        drop_rate: probability of dropping a value of a layer's new features while training.
        num_classes: how many scores.
        memory_efficient: accepted for torchvision's sake; `memory` is what counts here.
        compression: channels that a transition gives per channel that it reads (theta).
        dropout_after_bottleneck: whether drop_rate counts behind the 1x1 convolutions too, as in the paper's Lua code.
        small_inputs: a stem for images of about 32 pixels: a 3x3 convolution alone, instead of norm and max pool behind 7x7.
        in_channels: of the images.
        spatial_dims: 1, 2 or 3.
        bias: whether the convolutions have biases.
        memory: "balanced" keeps each layer's bottleneck output for the backward, "minimal" computes it again.

    Raises:
        TypeError: compression or drop_rate is not a number, or what is yes or no is something else; in the forward, no images.
        ValueError: an argument makes no sense; in the forward, images of another form or too small for the poolings.

    Examples:
        >>> model = effdense.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=10)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        compression: float = 0.5,
        dropout_after_bottleneck: bool = False,
        small_inputs: bool = False,
        in_channels: int = 3,
        spatial_dims: int = 2,
        bias: bool = False,
        memory: Memory = "balanced",
    ) -> None:
        if not isinstance(block_config, Sequence) or isinstance(block_config, str) or not block_config:
            raise ValueError(
                f"DenseNet: block_config must be a sequence of the blocks' numbers of layers, got {shown(block_config)}"
            )
        counts = {
            "growth_rate": growth_rate,
            "num_init_features": num_init_features,
            "num_classes": num_classes,
        }
        counts |= {f"block_config[{i}]": layers for i, layers in enumerate(block_config)}
        counts |= {"in_channels": in_channels} | ({} if bn_size is None else {"bn_size": bn_size})
        for name, value in counts.items():
            check_count("DenseNet", name, value)
        check_spatial_dims("DenseNet", spatial_dims)
        check_number("DenseNet", "compression", compression)
        if not 0 < compression <= 1:
            raise ValueError(f"DenseNet: compression must be above 0 and at most 1, got {compression!r}")
        check_probability("DenseNet", "drop_rate", drop_rate)
        check_memory("DenseNet", memory)
        check_flag("DenseNet", "small_inputs", small_inputs)
        check_flag("DenseNet", "memory_efficient", memory_efficient)
        check_flag("DenseNet", "dropout_after_bottleneck", dropout_after_bottleneck)
        check_flag("DenseNet", "bias", bias)
        if dropout_after_bottleneck and bn_size is None:
            raise ValueError("DenseNet: dropout_after_bottleneck needs bottlenecks, but bn_size is None")

        form: dict[str, Any] = {"bias": bias, "spatial_dims": spatial_dims}
        features = dense.DenseFeatures(_stem(in_channels, num_init_features, small_inputs, **form))
        width = num_init_features
        for i, layers in enumerate(block_config, start=1):
            block = dense.DenseBlock(
                layers,
                width,
                bn_size,
                growth_rate,
                drop_rate,
                memory_efficient,
                dropout_after_bottleneck=dropout_after_bottleneck,
                memory=memory,
                **form,
            )
            features.add_module(f"denseblock{i}", block)
            width += layers * growth_rate
            if i < len(block_config):
                compressed = int(compression * width)
                few = f"compression = {compression} leaves transition{i} too few channels:"
                check_count("DenseNet", few, compressed)
                features.add_module(f"transition{i}", dense.Transition(width, compressed, **form))
                width = compressed
        features.add_module("norm5", NORMS[spatial_dims - 1](width))
        super().__init__(features, nn.Linear(width, num_classes))
        self.num_features, self.num_classes, self.head_drop_rate = width, int(num_classes), 0.0
        halvings = len(block_config) - 1
        self.least_size: int = 2**halvings if small_inputs else 4 * 2**halvings - 3
        _initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, *spatial] -> the features before their average, [N, num_features, *smaller]."""
        self._check_images(x)
        return super().forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, *spatial] -> scores [N, num_classes]."""
        self._check_images(x)
        return super().forward(x)

    def _check_images(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            if isinstance(x, torch.fx.Proxy):
                return
            raise TypeError(f"DenseNet: images must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(
                f"DenseNet: images must have a floating dtype, as their mean is subtracted, got {x.dtype}"
            )
        stem: Any = self.features.conv0
        convs: list[Any] = [m for m in stem.modules() if isinstance(m, CONVS)]
        if not convs:  # a user has put something else there
            return
        conv = convs[0]
        channels, spatial = conv.in_channels, len(conv.kernel_size)
        if x.dim() != spatial + 2 or x.shape[1] != channels:
            form = ", ".join(["N", str(channels), *("DHW"[-spatial:])])
            raise ValueError(f"DenseNet: images must be [{form}], got shape {tuple(x.shape)}")
        if any(n < self.least_size for n in x.shape[2:]):
            raise ValueError(
                f"DenseNet: images must have at least {self.least_size} pixels each way for the poolings, "
                f"got shape {tuple(x.shape)}"
            )

    def freeze_features(self) -> None:
        """Stops training all but the classifier; the blocks then have no backward and keep nothing for one.

        Their norms go on following `train` and `eval`: call `model.features.eval()` behind `model.train()` for statistics
        that do not move either.
        """
        self.features.requires_grad_(False)


def _stem(
    in_channels: int, width: int, small_inputs: bool, bias: bool, spatial_dims: int
) -> OrderedDict[str, nn.Module]:
    conv = CONVS[spatial_dims - 1]
    if small_inputs:
        return OrderedDict(conv0=conv(in_channels, width, kernel_size=3, stride=1, padding=1, bias=bias))
    return OrderedDict(
        conv0=conv(in_channels, width, kernel_size=7, stride=2, padding=3, bias=bias),
        norm0=NORMS[spatial_dims - 1](width),
        relu0=nn.ReLU(inplace=True),
        pool0=MAX_POOLS[spatial_dims - 1](kernel_size=3, stride=2, padding=1),
    )


def _initialize(model: nn.Module) -> None:
    """As torchvision and the paper's code do: He et al. (arXiv 1502.01852) for convolutions."""
    for module in model.modules():
        if isinstance(module, CONVS):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def _imagenet(name: str, weights: Any, progress: bool, options: Options) -> DenseNet:
    if weights is not None and options.setdefault("num_classes", 1000) != 1000:
        raise ValueError(
            f"{name}: the published weights have 1000 classes, num_classes is {options['num_classes']}; build it without "
            "weights and use load_weights(…, strip_classifier=True)"
        )
    growth_rate, block_config, num_init_features = IMAGENET[name]
    model = DenseNet(growth_rate, block_config, num_init_features, **options)
    if weights is not None:
        load_published(model, name, weights, progress)
    return model


def densenet121(*, weights: Any = None, progress: bool = True, **options: Unpack[Options]) -> DenseNet:
    """DenseNet-121 (arXiv 1608.06993, table 1): 7,978,856 parameters, images of 29 pixels or more, [N, 3, H, W].

    Args:
        weights: None; "DEFAULT" or "IMAGENET1K_V1": what torchvision published, downloaded; or torchvision's enum member.
        progress: whether a download shows a bar.
        options: see DenseNet.

    Raises:
        TypeError: there is no such option.
        ValueError: there are no such weights, or an option makes no sense.

    Examples:
        >>> model = effdense.models.densenet121(num_classes=10, memory="minimal")
        >>> sum(p.numel() for p in model.parameters())
        6964106
    """
    return _imagenet("densenet121", weights, progress, options)


def densenet161(*, weights: Any = None, progress: bool = True, **options: Unpack[Options]) -> DenseNet:
    """DenseNet-161 (k = 48, the authors' own): 28,681,000 parameters. See densenet121."""
    return _imagenet("densenet161", weights, progress, options)


def densenet169(*, weights: Any = None, progress: bool = True, **options: Unpack[Options]) -> DenseNet:
    """DenseNet-169 (arXiv 1608.06993, table 1): 14,149,480 parameters. See densenet121."""
    return _imagenet("densenet169", weights, progress, options)


def densenet201(*, weights: Any = None, progress: bool = True, **options: Unpack[Options]) -> DenseNet:
    """DenseNet-201 (arXiv 1608.06993, table 1): 20,013,928 parameters. See densenet121."""
    return _imagenet("densenet201", weights, progress, options)


def densenet264(*, weights: Any = None, progress: bool = True, **options: Unpack[Options]) -> DenseNet:
    """DenseNet-264 (arXiv 1608.06993, table 1, k = 32): 33,337,704 parameters. No weights were published. See densenet121."""
    return _imagenet("densenet264", weights, progress, options)


def densenet_cifar(
    depth: int = 100,
    growth_rate: int = 12,
    bottleneck: bool = True,
    compression: float = 0.5,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    drop_rate: float = 0.0,
    memory: Memory = "balanced",
) -> DenseNet:
    """Three blocks for images of 32 pixels (arXiv 1608.06993, section 4.2): DenseNet-BC, or plain layers.

    The paper's plain nets are densenet_cifar(depth, k, bottleneck=False, compression=1.0).

    Args:
        depth: 6 n + 4 with bottlenecks, 3 n + 4 without: three blocks of n layers.
        bottleneck: whether a layer has a 1x1 convolution to 4 * growth_rate channels first.
        growth_rate, compression, num_classes, in_channels, drop_rate, memory: see DenseNet.

    Raises:
        ValueError: there is no such depth (the message says the nearest one), or an option makes no sense.

    Examples:
        >>> model = effdense.models.densenet_cifar(depth=16, growth_rate=8)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_flag("densenet_cifar", "bottleneck", bottleneck)
    step = 6 if bottleneck else 3
    whole = isinstance(depth, Integral) and not isinstance(depth, bool)
    if not whole or depth <= 4 or (depth - 4) % step:
        near = f"; the nearest is {step * max(1, round((depth - 4) / step)) + 4}" if whole else ""
        raise ValueError(
            f"densenet_cifar: depth must be {step} n + 4 (three blocks of n layers), got {depth!r}{near}"
        )
    return DenseNet(
        growth_rate,
        ((depth - 4) // step,) * 3,
        2 * growth_rate if bottleneck else 16,
        4 if bottleneck else None,
        drop_rate,
        num_classes,
        compression=compression,
        small_inputs=True,
        in_channels=in_channels,
        memory=memory,
    )


def densenet_d2l(num_classes: int = 10, in_channels: int = 1, *, memory: Memory = "balanced") -> DenseNet:
    """The net of Zhang et al., "Dive into Deep Learning", section 8.7, for gray images of 96 pixels: [N, 1, 96, 96].

    A 7x7 stem of 64 channels, four blocks of four plain layers with k = 32, transitions that halve, biases. See DenseNet.

    Examples:
        >>> effdense.models.densenet_d2l()(torch.rand(1, 1, 96, 96)).shape
        torch.Size([1, 10])
    """
    return DenseNet(
        32,
        (4, 4, 4, 4),
        64,
        None,
        num_classes=num_classes,
        in_channels=in_channels,
        bias=True,
        memory=memory,
    )


class _TutorialDenseNet(DenseNet):
    """See densenet169_tutorial."""

    _relu_behind = False

    def __init__(self, drop_rate: float, **options: Any) -> None:
        super().__init__(
            *IMAGENET["densenet169"], 4, drop_rate, dropout_after_bottleneck=True, bias=True, **options
        )
        old: Any = self.features
        del old.norm5
        conv = old.conv0
        spatial = len(conv.kernel_size)
        stem = OrderedDict[str, nn.Module](
            norm0=NORMS[spatial - 1](conv.in_channels),
            relu0=nn.ReLU(inplace=True),
            conv0=conv,
            drop0=nn.Dropout(drop_rate),
            pool0=old.pool0,
        )
        blocks = {name: module for name, module in old.named_children() if name not in (*stem, "norm5")}
        self.features = dense.DenseFeatures(stem | blocks)
        for name, module in blocks.items():
            if name.startswith("transition"):
                pool = AVG_POOLS[spatial - 1](kernel_size=2, stride=2)
                module.pool = nn.Sequential(nn.Dropout(drop_rate), pool)

    def obstacle(self) -> None:
        """None: behind the last block there is nothing to run with it."""

    def forward(self, x: Tensor) -> Tensor:
        """See DenseNet."""
        self._check_images(x)
        y: Tensor = self.features(x)
        scores: Tensor = self.classifier(y.mean(tuple(range(2, y.dim()))))
        return scores


def densenet169_tutorial(
    num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.2, *, memory: Memory = "balanced"
) -> DenseNet:
    """DenseNet-169 as tutorials build it from `bn_relu_conv`: 14,160,238 parameters with 1000 classes. See DenseNet.

    Every convolution, the stem's too, is batch norm, ReLU, convolution with bias, dropout. So the first norm is on the image;
    and the last block's output is averaged as it is, without a norm or a ReLU.
    """
    return _TutorialDenseNet(drop_rate, num_classes=num_classes, in_channels=in_channels, memory=memory)
