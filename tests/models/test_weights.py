"""load_weights: every layout, from renamed weights and from the libraries' own models, what does not fit, a frozen net."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdense import models
from effdense.models import DenseNet, load_weights
from tests._conversions import library
from tests._stages import assert_close, kept_tensors

State = dict[str, Tensor]


def make(**options: Any) -> DenseNet:
    """A small net with statistics that are not the initial ones."""
    model = DenseNet(4, (2, 1, 1, 2), 6, 2, **{"num_classes": 5, **options}).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif not tensor.is_floating_point():
                tensor.fill_(7)
    return model


def renamed(*rules: tuple[str, str]) -> Callable[[State], State]:
    def rename(state: State) -> State:
        result = {}
        for key, tensor in state.items():
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            result[key] = tensor
        return result

    return rename


INNER = r"(denselayer\d+)\.((?:norm|relu|conv)[12])\."
LAYOUTS: dict[str, Callable[[State], Any]] = {
    "torchvision": renamed(),
    "old torchvision": renamed((r"(denselayer\d+\.(?:norm|relu|conv))([12])\.", r"\1.\2.")),
    "gpleiss": renamed((r"features\.norm5", "features.norm_final")),
    "MONAI": renamed((INNER, r"\1.layers.\2."), (r"^classifier\.", "class_layers.out.")),
    "DataParallel": renamed((r"^", "module.")),
    "compiled": renamed((r"^", "module._orig_mod.")),
    "FSDP": renamed(
        (r"^", "_fsdp_wrapped_module."), (r"\.denselayer", "._checkpoint_wrapped_module.denselayer")
    ),
    "a larger model's": renamed((r"^", "encoder.densenet121.")),
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **renamed((r"^", "module."))(state)},
    "timm's checkpoint": lambda state: {"state_dict": state, "epoch": 3},
    "torchvision's checkpoint": lambda state: {"model": state, "epoch": 3},
    "a checkpoint of any": lambda state: {"net_weights": state, "optimizer": {"state": {}}, "epoch": 3},
}


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_round_trips(layout: str, on_disk: bool, tmp_path: Path) -> None:
    theirs, fused = make(), make()
    weights = LAYOUTS[layout](theirs.state_dict())
    if on_disk:
        torch.save(weights, tmp_path / "weights.pth")
        weights = tmp_path / "weights.pth" if layout == "MONAI" else str(tmp_path / "weights.pth")
    assert load_weights(fused, weights) is fused
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(fused.state_dict()[key], tensor), key


def test_counters_may_be_missing() -> None:
    theirs, fused = make(), make()
    state = {k: v for k, v in theirs.state_dict().items() if "batches" not in k}
    load_weights(fused, LAYOUTS["old torchvision"](state))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(fused.eval()(x), theirs.eval()(x))


# ---- the libraries' own models


def torchvisions(name: str) -> tuple[nn.Module, DenseNet, int]:
    return importlib.import_module("torchvision").models.get_model(name), getattr(models, name)(), 2


def timms(name: str) -> tuple[nn.Module, DenseNet, int]:
    return importlib.import_module("timm").create_model(name), getattr(models, name)(), 2


def monais(dims: int, small: bool = False) -> tuple[nn.Module, DenseNet, int]:
    nets = importlib.import_module("monai.networks.nets")
    if small:
        theirs = nets.DenseNet(dims, 1, 3, 8, 4, (2, 2, 1))
        return theirs, DenseNet(4, (2, 2, 1), 8, num_classes=3, in_channels=1, spatial_dims=dims), dims
    return (
        nets.DenseNet121(dims, 1, 3),
        models.densenet121(num_classes=3, in_channels=1, spatial_dims=dims),
        dims,
    )


LIBRARIES: dict[str, tuple[str, Callable[[], tuple[nn.Module, DenseNet, int]]]] = {
    "torchvision 121": ("torchvision", lambda: torchvisions("densenet121")),
    "torchvision 161": ("torchvision", lambda: torchvisions("densenet161")),
    "timm 121": ("timm", lambda: timms("densenet121")),
    "timm 169": ("timm", lambda: timms("densenet169")),
    "MONAI 1D": ("monai", lambda: monais(1, small=True)),
    "MONAI 121 2D": ("monai", lambda: monais(2)),
    "MONAI 3D": ("monai", lambda: monais(3, small=True)),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_weights_of_the_libraries_own_models(name: str) -> None:
    package, pair = LIBRARIES[name]
    library(package)
    theirs, fused, dims = pair()
    theirs, fused = theirs.double(), fused.double()
    load_weights(fused, theirs.state_dict())
    x = torch.randn(
        2, fused.features.conv0.in_channels, *(64 if dims < 3 else 32,) * dims, dtype=torch.float64
    )
    for training in (True, False):
        with torch.no_grad():
            assert_close([fused.train(training)(x)], [theirs.train(training)(x)], 1e-9)


# ---- what does not fit


def without(*keys: str) -> Callable[[State], Any]:
    return lambda state: {k: v for k, v in state.items() if k not in keys}


LAST = "features.denseblock4.denselayer2.conv2.weight"
WRONG: dict[str, tuple[Callable[[State], Any], type[Exception], str]] = {
    "missing": (without(LAST), ValueError, f"do not fit DenseNet: missing: {LAST}$"),
    "unknown": (lambda s: s | {"op_threshs": torch.zeros(3)}, ValueError, "unknown: op_threshs$"),
    "shape": (
        lambda s: s | {LAST: torch.zeros(4, 4, 3, 3)},
        ValueError,
        rf"other shapes: {LAST} \(4, 4, 3, 3\) for \(4, 8, 3, 3\)$",
    ),
    "another net": (
        lambda _: DenseNet(4, (2, 1, 1, 3), 6, 2, num_classes=5).state_dict(),
        ValueError,
        r"unknown: features.denseblock4.denselayer3.norm1.weight, .* and 7 more; other shapes: features.norm5",
    ),
    "classes": (
        lambda _: make(num_classes=9).state_dict(),
        ValueError,
        r"other shapes: classifier.weight \(9, 12\) for \(5, 12\), .*strip_classifier=True keeps",
    ),
    "not tensors": (
        lambda _: {"optimizer": {"lr": 1}},
        ValueError,
        "'optimizer' is dict; a checkpoint may hold them as 'state_dict'",
    ),
    "quantised": (
        lambda s: s | {LAST: s[LAST].to(torch.int8)},
        ValueError,
        f"other kinds of numbers: {LAST}",
    ),
    "several": (
        lambda s: {"net": s, "ema": s, "epoch": 3},
        ValueError,
        "'net' is OrderedDict; there are state_dicts as 'net' and 'ema', one of which can be given",
    ),
    "two models": (
        lambda s: {f"{front}.{key}": t for front in ("student", "teacher") for key, t in s.items()},
        ValueError,
        r"the weights are of several models, whose names begin with 'student\.', 'teacher\.'; give those of one",
    ),
    "without numbers": (
        lambda s: s | {LAST: s[LAST].to("meta")},
        ValueError,
        rf"no plain tensors: {LAST} \(meta\)$",
    ),
    "sparse": (
        lambda s: s | {LAST: s[LAST].to_sparse()},
        ValueError,
        rf"no plain tensors: {LAST} \(torch.sparse_coo\)$",
    ),
    "a model": (lambda _: make(), TypeError, r"got DenseNet; its state_dict\(\) is one$"),
    "an address": (
        lambda _: "https://example.org/x.pth",
        ValueError,
        "weights must be a file, got the address https",
    ),
    "a number as a name": (lambda s: s | {1: s[LAST]}, ValueError, "1 is no name"),
    "not a mapping": (lambda _: [1, 2], TypeError, "must be a path or a state_dict, got list"),
    "twice": (
        lambda s: s | {LAST.replace("conv2", "conv.2"): s[LAST]},
        ValueError,
        f"two of the weights' keys mean {LAST}",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(name: str) -> None:
    change, error, message = WRONG[name]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_weights(model, change(make().state_dict()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, Wrapper, torch.compile]
)
def test_a_wrapped_model_takes_all_of_them(wrap: Callable[[nn.Module], nn.Module]) -> None:
    theirs = make()
    for weights in (theirs.state_dict(), Wrapper(theirs).state_dict()):
        fused = make()
        wrapped = wrap(fused)
        inner: Any = fused if wrap is not torch.optim.swa_utils.AveragedModel else wrapped.module
        assert load_weights(wrapped, weights) is wrapped
        assert all(torch.equal(v, inner.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (load_weights, (None, {}), "load_weights: model must be a torch.nn.Module, got NoneType"),
        (models.save_weights, ({}, "x.pt"), "save_weights: model must be a torch.nn.Module, got dict"),
        (
            models.save_weights,
            (nn.Linear(1, 1), 3),
            "save_weights: path must be a str or os.PathLike, got int",
        ),
        (models.load_checkpoint, (3,), "load_checkpoint: path must be a str or os.PathLike, got int"),
        (models.load_checkpoint, ("x", 3), "load_checkpoint: name must be a str, got int"),
    ],
)
def test_arguments_of_other_types(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=rf"^{message}$"):
        function(*arguments)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_model_without_memory_is_not_saved(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_weights: weight is on the meta device and has no numbers"):
        models.save_weights(nn.Linear(1, 1, device="meta"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_may_have_its_tensors_in_any_order(tmp_path: Path) -> None:
    """As files of safetensors do."""
    model = DenseNet(4, (1, 1, 1), 8, 4, num_classes=3, in_channels=2, small_inputs=True)
    torch.save(dict(sorted(model.state_dict().items())), tmp_path / "x.pt")
    loaded = models.load_checkpoint(tmp_path / "x.pt", "densenet_bc_10_4")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


# ---- another number of classes


def test_transfer_learning_trains_the_head_only() -> None:
    fused, theirs = make(num_classes=3), make(num_classes=9)
    own = fused.classifier.weight.clone()
    load_weights(fused, LAYOUTS["MONAI"](theirs.state_dict()), strip_classifier=True)
    assert torch.equal(fused.classifier.weight, own)
    assert torch.equal(fused.features.conv0.weight, theirs.features.conv0.weight)
    fused.freeze_features()
    assert [n for n, p in fused.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    kept, y = kept_tensors(fused, x)
    own_storages = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own_storages]
    assert [tuple(t.shape) for t in others] == [(2, 12)]  # what the classifier reads
    assert type(y.grad_fn).__name__ == "AddmmBackward0"
    F.cross_entropy(y, torch.tensor([0, 2])).backward()
    assert all((p.grad is None) != n.startswith("classifier") for n, p in fused.named_parameters())


def test_a_model_without_memory_takes_no_weights() -> None:
    with torch.device("meta"):
        model = models.densenet_cifar(10, 4)
    with pytest.raises(ValueError, match="on the meta device; give it memory with to_empty first"):
        models.load_weights(model, models.densenet_cifar(10, 4).state_dict())
