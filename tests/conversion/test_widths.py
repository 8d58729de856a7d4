"""report on modules that have the widths of a dense block and are not converted, and on modules that have other widths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effdense
from effdense.conversion.widths import growing
from effdense.nn.modules import walk
from effdense.nn.structure import looks_like_block
from tests._conversions import library

pytestmark = pytest.mark.core
C, K = 8, 4


def conv(channels: int, width: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2)


def named(**modules: nn.Module) -> nn.Module:
    """A module of its own class with these submodules."""
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


class Joining(nn.Module):
    """RDN's and SRDenseNet's layer (arXiv 1802.08797): no norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.conv(x))], 1)


def rdn() -> nn.Module:
    return named(
        dense_layers=nn.Sequential(*(Joining(C + K * i) for i in range(3))), last=conv(C + 3 * K, C, 1)
    )


def esrgan() -> nn.Module:
    widths = {f"conv{i + 1}": conv(C + K * i, K) for i in range(4)}
    return named(**widths, conv5=conv(C + 4 * K, C), act=nn.LeakyReLU(0.2))


def flat() -> nn.Module:
    parts: dict[str, nn.Module] = {}
    for i in range(3):
        parts |= {f"bn{2 * i}": nn.BatchNorm2d(C + K * i), f"conv{2 * i}": conv(C + K * i, 16, 1)}
        parts |= {f"bn{2 * i + 1}": nn.BatchNorm2d(16), f"conv{2 * i + 1}": conv(16, K)}
    return named(**parts)


def dense_aspp() -> nn.Module:
    def part(channels: int) -> nn.Module:
        first = nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, 12, 1)
        return nn.Sequential(*first, nn.BatchNorm2d(12), nn.ReLU(), conv(12, K))

    parts = {f"ASPP_{d}": part(C + K * i) for i, d in enumerate((3, 6, 12, 18, 24))}
    return named(features=nn.Sequential(conv(3, C)), **parts, classification=conv(C + 5 * K, 2, 1))


def pelee() -> nn.Module:
    """Two ways of which each adds half (arXiv 1804.06882)."""

    def part(channels: int, width: int, kernel: int) -> nn.Module:
        return nn.Sequential(conv(channels, width, kernel), nn.BatchNorm2d(width), nn.ReLU())

    def layer(channels: int) -> nn.Module:
        one = part(channels, 6, 1), part(6, K // 2, 3)
        return named(
            a=nn.Sequential(*one), b=nn.Sequential(part(channels, 6, 1), part(6, 2, 3), part(2, 2, 3))
        )

    return nn.Sequential(*(layer(C + K * i) for i in range(3)))


def flow() -> nn.Module:
    """A decoder of PWC-Net: densely connected, with other widths layer by layer."""
    parts, channels = dict[str, nn.Module](), 20
    for i, width in enumerate((12, 12, 8, 6)):
        parts[f"conv6_{i}"] = nn.Sequential(conv(channels, width), nn.LeakyReLU(0.1))
        channels += width
    return named(conv1=nn.Sequential(conv(3, 8)), **parts, predict=conv(channels, 2))


class Listed(nn.Module):
    """The layers in a list, and something behind them in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        parts = (nn.Sequential(nn.BatchNorm2d(C + K * i), nn.ReLU(), conv(C + K * i, K)) for i in range(3))
        self.layers, self.last = nn.ModuleList(parts), conv(C + 3 * K, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.last(x)


GROW = "read widths that grow like a dense block's, but"
LIKE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "RDN": (rdn, "dense_layers", "0.conv has no norm before it"),
    "ESRGAN": (esrgan, "", f"conv1 to conv5 {GROW} they are convolutions by themselves, not modules with"),
    "flat": (flat, "", f"conv0 to conv5 {GROW} they are convolutions by themselves, not modules with"),
    "DenseASPP": (dense_aspp, "", f"ASPP_3 to ASPP_24 {GROW} they are not all that is in a module"),
    "Pelee": (pelee, "", f"0 to 2 {GROW} 0.a.0.0 has no norm before it"),
    "PWC-Net": (flow, "", f"conv6_0 to conv6_3 {GROW} conv6_0.0 has no norm before it"),
    "in a list": (Listed, "layers", "a ModuleList has no forward: put its layers into a module"),
}


@pytest.mark.parametrize("name", LIKE)
def test_what_looks_like_a_block_gets_one_line_with_the_reason(name: str) -> None:
    make, place, reason = LIKE[name]
    model = effdense.convert(make())
    (entry,) = effdense.report(model)
    assert (entry.name, entry.kind, entry.converted) == (place, "DenseBlock", False)
    assert entry.reason is not None and entry.reason.startswith(reason), entry.reason


def test_the_rest_of_the_net_is_converted() -> None:
    net = nn.Sequential(dense_aspp(), nn.Sequential(*(Joined(C + K * i) for i in range(3))))
    report = effdense.report(effdense.convert(net))
    assert [(e.name, e.converted) for e in report if e.kind == "DenseBlock"] == [("0", False), ("1", True)]


class Joined(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), conv(channels, K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


def osa() -> nn.Module:
    """VoVNet: concatenated at the end only."""
    parts = (nn.Sequential(conv(C if i == 0 else K, K), nn.BatchNorm2d(K), nn.ReLU()) for i in range(4))
    return named(layers=nn.ModuleList(parts), concat=conv(C + 4 * K, 16, 1))


def hardnet() -> nn.Module:
    """Each reads the layers 1, 2, 4 … before it, where that divides its number."""
    widths, parts = [16], list[nn.Module]()
    for i in range(1, 9):
        sources = [i - 2**j for j in range(4) if i % 2**j == 0 and i >= 2**j]
        widths.append(int(K * 1.6 ** (len(sources) - 1)))
        parts.append(
            nn.Sequential(conv(sum(widths[s] for s in sources), widths[i]), nn.BatchNorm2d(widths[i]))
        )
    return named(layers=nn.ModuleList(parts))


def res2net() -> nn.Module:
    return named(convs=nn.ModuleList(conv(8, 8) for _ in range(3)), conv3=conv(32, 64, 1))


def unet() -> nn.Module:
    down = {
        f"down{i}": nn.Sequential(conv(8 * 2**i, 16 * 2**i), conv(16 * 2**i, 16 * 2**i)) for i in range(3)
    }
    up = {f"up{i}": nn.Sequential(conv(32 * 2**i, 16 * 2**i), conv(16 * 2**i, 16 * 2**i)) for i in (2, 1, 0)}
    return named(**down, **up)


def memnet() -> nn.Module:
    """Memory blocks whose gate reads all before it."""
    blocks = (
        named(body=nn.Sequential(conv(8, 8), conv(8, 8)), gate=conv(8 * (i + 2), 8, 1)) for i in range(4)
    )
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("make", [osa, hardnet, res2net, unet, memnet])
def test_what_only_joins_features_gets_no_line(make: Callable[[], nn.Module]) -> None:
    assert effdense.report(effdense.convert(make())) == []


TORCHVISION = ("resnet18", "vgg11_bn", "inception_v3", "googlenet", "shufflenet_v2_x1_0", "mobilenet_v2", "mnasnet1_0",
               "efficientnet_b0", "squeezenet1_0", "regnet_y_400mf", "convnext_tiny", "alexnet")  # fmt: skip
TIMM = ("hrnet_w18_small", "dla34", "vovnet39a", "res2net50_26w_4s", "dpn68", "cspresnet50", "selecsls42", "rexnet_100",
        "xception41", "inception_v4", "ghostnet_100", "tresnet_m", "darknet53")  # fmt: skip


@pytest.mark.parametrize(
    "library_and_name", [*(f"torchvision {n}" for n in TORCHVISION), *(f"timm {n}" for n in TIMM)]
)
def test_other_nets_get_no_line(library_and_name: str) -> None:
    root, name = library_and_name.split()
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    make = library("torchvision.models").get_model if root == "torchvision" else library("timm").create_model
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = make(name, **options)
    assert [type(m).__name__ for m in walk(net) if growing(m) or looks_like_block(m)] == []
