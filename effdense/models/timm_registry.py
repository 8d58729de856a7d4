"""Makes the nets known to timm, on request: `timm.create_model("effdense_densenet121")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effdense import extras
from effdense.engine.validation import check_probability
from effdense.models import densenet
from effdense.models.preparation import STATISTICS

PREFIX = "effdense_"
_MEAN, _STD = STATISTICS["folder"]


def register_timm() -> list[str]:
    """Registers `effdense_densenet121`, 161, 169, 201, 264 and `effdense_densenet_cifar` with timm; again does nothing.

    `timm.create_model` then takes, as for timm's own DenseNets: `num_classes` (0: no classifier), `in_chans`, `drop_rate` (before
    the classifier), `proj_drop_rate` (in the layers), `pretrained` (what torchvision published), `memory_efficient`
    (`memory="minimal"`), and what the constructor in effdense.models takes. The nets are the same as these constructors'.

    Returns:
        The names.

    Raises:
        ImportError: timm is not installed.

    Examples:
        >>> names = effdense.models.register_timm()
        >>> model = timm.create_model("effdense_densenet121", num_classes=5, in_chans=1)
    """
    timm: Any = extras.load("timm", "effdense.models.register_timm")
    names = []
    for name in (*densenet.IMAGENET, "densenet_cifar"):
        names.append(PREFIX + name)
        if not timm.is_model(names[-1]):
            timm.models.register_model(_entry(name))
    return names


def _entry(name: str) -> Callable[..., densenet.DenseNet]:
    """What timm calls for a name."""

    def create(pretrained: bool = False, **options: Any) -> densenet.DenseNet:
        return _create(name, pretrained, options)

    create.__name__ = create.__qualname__ = PREFIX + name
    return create


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> densenet.DenseNet:
    for of_timm in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"):
        if options.pop(of_timm, None) is not None and of_timm != "cache_dir":
            raise ValueError(
                f"{PREFIX}{name}: there are no weights by {of_timm}; checkpoint_path loads a file"
            )
    if options.pop("global_pool", "avg") != "avg":
        raise ValueError(f'{PREFIX}{name}: global_pool must be "avg"')
    if options.pop("features_only", False):
        raise ValueError(
            f"{PREFIX}{name}: there is no features_only; effdense.convert(timm.create_model('densenet121', features_only=True)) has it"
        )
    num_classes, rate = options.pop("num_classes", 1000), options.pop("drop_rate", 0.0) or 0.0
    check_probability(PREFIX + name, "drop_rate", rate)
    if "proj_drop_rate" in options:
        options["drop_rate"] = options.pop("proj_drop_rate")
    if "in_chans" in options:
        options["in_channels"] = options.pop("in_chans")
    if options.pop("memory_efficient", False):
        options.setdefault("memory", "minimal")
    if pretrained:
        options["weights"] = "DEFAULT"
    before = 1000 if pretrained else num_classes or 1
    model: densenet.DenseNet = getattr(densenet, name)(num_classes=before, **options)
    model.head_drop_rate = rate
    if rate or num_classes != before:
        kept = model.classifier
        model.reset_classifier(num_classes)
        if num_classes == before:
            model.classifier.load_state_dict(kept.state_dict())
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = _data_config(name, model)
    return model


def _data_config(name: str, model: densenet.DenseNet) -> dict[str, Any]:
    """What timm's `resolve_data_config` asks a model for."""
    conv: Any = model.features.conv0
    cifar = name == "densenet_cifar"
    mean, std = STATISTICS["cifar10"] if cifar else (_MEAN, _STD)
    channels, side = conv.in_channels, 32 if cifar else 224
    several = channels == len(mean)
    return {
        "architecture": PREFIX + name,
        "num_classes": model.num_classes,
        "input_size": (channels, side, side),
        "mean": mean if several else (0.5,) * channels,
        "std": std if several else (0.5,) * channels,
        "interpolation": "bilinear",
        "crop_pct": 1.0 if cifar else 0.875,
        "pool_size": None,
        "first_conv": "features.conv0",
        "classifier": "classifier",
    }
