"""The benchmarks: plain models, counted bytes, the data's reader and one small comparison, end to end."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from benchmarks import compare, data, demo, densenet, isa, measure, models, plots
from benchmarks.worker import ROOT, Worker, WorkerConfig, WorkerError, batch_for
from tests._papers import PARAMETERS
from tests._training import write_idx

pytestmark = pytest.mark.tools

FLOATS = 250_000  # of the known allocations below
FLOAT_BYTES = 4 * FLOATS
CONTRACT = {
    "impl",
    "device",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_bytes",
    "peak_rss_bytes",
    "memory",
    "mode",
}
TINY = ("--model", "densenet_bc_22_4", "--batch", "2", "--threads", "1", "--repeats", "2")


def build_seeded(name, impl, **kwargs):
    torch.manual_seed(0)
    return models.build(name, impl, **kwargs).model


def small_twin(**kwargs):
    torch.manual_seed(0)
    return densenet.DenseNet(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5, **kwargs)


# --- models


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = models.build(name, "naive").model
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("small_inputs", [False, True])
def test_twin_has_the_parameters_it_says(small_inputs):
    twin = small_twin(small_inputs=small_inputs, in_channels=1)
    assert twin.features.conv0.weight.shape == ((8, 1, 3, 3) if small_inputs else (8, 1, 7, 7))
    assert hasattr(twin.features, "pool0") != small_inputs
    assert twin(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_twin_is_torchvisions_densenet():
    torchvision = pytest.importorskip("torchvision", reason="the twin stands in where torchvision is missing")
    twin = small_twin(drop_rate=0.2)
    torch.manual_seed(0)
    original = torchvision.densenet.DenseNet(4, (2, 3), 8, drop_rate=0.2, num_classes=5)
    assert list(twin.state_dict()) == list(original.state_dict())
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in original.named_modules()]
    for key, value in original.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    x = torch.randn(2, 3, 64, 64)
    outputs = []
    for model in (twin, original):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, of_twin), theirs in zip(twin.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(of_twin.grad, theirs.grad), name


def test_plain_twin_is_d2ls_densenet():
    """Block outputs of "Dive into Deep Learning", section 8.7, at its 96 gray pixels."""
    with torch.device("meta"):
        model, x = models.build("densenet_d2l", "naive").model, torch.empty(2, 1, 96, 96)
        shapes = {name: tuple((x := module(x)).shape) for name, module in model.features.named_children()}
    assert list(shapes)[:4] == ["conv0", "norm0", "relu0", "pool0"] and list(shapes)[-1] == "norm5"
    blocks = [shape[1:3] for name, shape in shapes.items() if name.startswith(("dense", "transition"))]
    assert blocks == [(192, 24), (96, 12), (224, 12), (112, 6), (240, 6), (120, 3), (248, 3)]
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 4 + 3 and all(conv.bias is not None for conv in convolutions)
    assert model.classifier.out_features == 10
    assert models.default_sizes("densenet_d2l") == (64, 96)


def test_plain_layers_have_names_of_their_own_kind():
    with torch.device("meta"):
        built = models.build("densenet_40_12", "checkpoint")
    features = built.model.features
    assert built.label == "plain twin (torchvision has no plain layers), checkpointed"
    assert models.default_sizes("densenet_40_12") == (64, 32)
    assert list(dict(features.named_children())) == [
        *("conv0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "norm5")
    ]
    assert list(features.denseblock1) == [f"denselayer{i}" for i in range(1, 13)]
    layer = features.denseblock2.denselayer3
    assert list(dict(layer.named_children())) == ["norm1", "relu1", "conv1"] and layer.memory_efficient
    assert layer.conv1.weight.shape == (12, 16 + 14 * 12, 3, 3) and layer.conv1.bias is None
    assert features.transition1.conv.weight.shape == (160, 160, 1, 1)  # no compression


@pytest.mark.parametrize(("name", "channels"), [("densenet_d2l", 1), ("densenet_40_12", 3)])
def test_synthetic_images_have_the_models_channels(name, channels):
    with torch.device("meta"):
        model = models.build(name, "naive").model
    images, labels = batch_for(WorkerConfig(name, 3, 8), model)
    assert images.shape == (3, channels, 8, 8) and labels.max() < 10


@pytest.mark.parametrize("form", [{}, {"bn_size": None, "bias": True, "compression": 1.0}])
def test_checkpointed_twin_computes_the_same(form):
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for memory_efficient in (False, True):
        twin = small_twin(memory_efficient=memory_efficient, **form)
        twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "new_layer", [lambda: densenet._DenseLayer(6, 4, 2, 0.0), lambda: densenet._PlainLayer(6, 4, 0.0)]
)
def test_twin_layer_takes_a_tensor_or_a_list(new_layer):
    layer = new_layer().eval()
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(layer(x), layer([x[:, :2], x[:, 2:]]))


@pytest.mark.parametrize("impl", ["checkpoint", "naive+channels-last"])
@pytest.mark.parametrize("name", ["densenet_bc_22_4", "densenet_13_4"])
def test_every_implementation_starts_from_the_same_weights(name, impl):
    naive, other = build_seeded(name, "naive"), build_seeded(name, impl)
    assert all(torch.equal(a, b) for a, b in zip(naive.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densnet121", "unknown model 'densnet121', did you mean 'densenet121'"),
        ("vgg16", "unknown model 'vgg16'; there are densenet121"),
        ("densenet_bc_101_12", "the nearest depth is 100"),
        ("densenet_bc_4_12", "the nearest depth is 10"),
        (
            "densenet_41_12",
            "depth 3 n + 4 (three blocks of n layers of 1 convolution); the nearest depth is 40",
        ),
        ("densenet_3_12", "the nearest depth is 7"),
        ("densenet_d2", "did you mean 'densenet_d2l'"),
        ("densenet169_tutorial", "cannot be measured yet"),
        (
            "timm:densenet131",
            "did you mean 'timm:densenet121'?; of libraries there are torchvision:NAME, timm:densenet121, ",
        ),
        ("torchvision:densenet12", "did you mean 'torchvision:densenet121'"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build(name, "naive")


@pytest.mark.parametrize(
    ("name", "message"),
    [("naiv", "did you mean 'naive'"), ("effdense", "did you mean 'effdense-"), ("naive+fast", "unknown")],
)
def test_unknown_implementations(name, message):
    with pytest.raises(ValueError, match=message):
        models.parse_impl(name)


# --- measurement


class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        torch.empty(3 * FLOATS)
        return grad_output


def in_backward():
    x = torch.ones(1, requires_grad=True)
    AllocatesInBackward.apply(x).backward()


def in_cpp():
    """The log-softmax is an intermediate that only C++ sees; it lives until the loss is there."""
    torch.nn.functional.cross_entropy(known_logits, known_labels)


known_logits = torch.zeros(FLOATS // 10, 10)
known_labels = torch.zeros(FLOATS // 10, dtype=torch.int64)


def one_after_the_other():
    torch.empty(FLOATS)
    torch.empty(FLOATS)


def both_at_once():
    _first, _second = torch.empty(FLOATS), torch.empty(FLOATS)


def freed_in_between():
    first = torch.empty(2 * FLOATS)
    second = torch.empty(FLOATS)
    del first
    third = torch.empty(FLOATS)
    return second, third


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: None, 0),
        (one_after_the_other, FLOAT_BYTES),
        (both_at_once, 2 * FLOAT_BYTES),
        (freed_in_between, 3 * FLOAT_BYTES),
        (in_backward, 3 * FLOAT_BYTES),
        (in_cpp, FLOAT_BYTES),
    ],
)
def test_peak_bytes_of_known_allocations(fn, expected):
    assert 0 <= measure.peak_bytes(fn) - expected < 4096


def test_peak_bytes_does_not_remember():
    """Memory of one measurement that is released between them, or in the next, must not count there."""
    kept = []
    measure.peak_bytes(lambda: kept.append(torch.empty(FLOATS)))
    assert measure.peak_bytes(kept.clear) == 0
    measure.peak_bytes(lambda: kept.append(torch.empty(FLOATS)))
    kept.clear()
    assert 0 <= measure.peak_bytes(both_at_once) - 2 * FLOAT_BYTES < 4096


def test_peak_bytes_counts_the_calling_thread_only():
    def in_another_thread():
        thread = threading.Thread(target=both_at_once)
        thread.start()
        thread.join()

    assert measure.peak_bytes(in_another_thread) < FLOAT_BYTES  # as its docstring says


def test_peak_rss_sees_what_is_touched():
    before = measure.peak_rss_bytes()
    touched = np.ones(before // 8 + 2**23)  # 64 MiB more than was ever there
    assert measure.peak_rss_bytes() - before >= 2**26 - 2**24, touched.size


def test_time_statistics():
    assert measure.time_statistics([5.0]) == {"median_ms": 5.0, "p20_ms": 5.0, "p80_ms": 5.0}
    assert measure.time_statistics([6, 1, 2, 3, 4, 5]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    with pytest.raises(ValueError, match="no times"):
        measure.time_statistics([])


# --- data


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """A folder with the test split's two files, of zeros."""
    monkeypatch.setenv("EFFDENSE_DATA", str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((10_000, 28, 28), np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10_000, np.uint8))
    return tmp_path


def test_cut_is_balanced_and_small():
    images, labels = data.load_cut()
    assert images.shape == (2000, 28, 28) and images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [200] * 10
    assert data.CUT.stat().st_size <= 1_000_000
    values, targets = data.to_tensors(images, labels)
    assert values.shape == (2000, 1, 32, 32) and targets.dtype == torch.int64
    inner = values[:, :, 2:-2, 2:-2]
    assert abs(inner.mean()) < 0.05 and abs(inner.std() - 1) < 0.05


def test_to_tensors_sizes():
    images, labels = (array[:3] for array in data.load_cut())
    for size in (28, 33, 96):
        assert data.to_tensors(images, labels, size)[0].shape == (3, 1, size, size)
    with pytest.raises(ValueError, match="image_size must be 28 or more"):
        data.to_tensors(images, labels, 27)


def test_loader_reads_the_files(data_root):
    images, labels = data.load_fashion_mnist("test")
    assert images.shape == (10_000, 28, 28) and labels.shape == (10_000,)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is missing"):
        data.load_fashion_mnist("train", data_root)
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        data.load_fashion_mnist("val")
    with pytest.raises(FileNotFoundError, match=r"no Fashion-MNIST in /nowhere \(--data-root\)"):
        data.load_fashion_mnist("test", "/nowhere")


def test_loader_refuses_damaged_files(data_root):
    path = data_root / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path} must hold 7840016 bytes when unpacked, found "):
        data.load_fashion_mnist("test")
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"is damaged or not gzip \(22 bytes on disk"):
        data.load_fashion_mnist("test")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match="must hold 7840016 bytes when unpacked, found 7840015"):
        data.load_fashion_mnist("test")
    write_idx(path, np.zeros((10_000, 28, 28), np.uint8), magic=2049)
    with pytest.raises(ValueError, match="magic number 2051, found 2049"):
        data.load_fashion_mnist("test")
    write_idx(path, np.zeros((10_000, 14, 56), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(10000, 28, 28\), its header says \(10000, 14, 56\)"):
        data.load_fashion_mnist("test")


# --- the comparison


def test_compare_writes_the_contract(tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    impls = ["naive", "checkpoint", "effdense-minimal-fallback"]
    arguments = [*TINY, "--impl", ",".join(impls), "--json", str(out), "--plot", str(picture)]
    status = compare.main(arguments)
    result = json.loads(out.read_text())
    rows = {row["impl"]: row for row in result["rows"]}
    assert status == 0, result["rows"]
    assert list(rows) == impls
    assert [row["memory"] for row in rows.values()] == [None, None, "minimal"]
    for row in rows.values():
        assert row.keys() >= CONTRACT
        assert row["mode"] == "train" and row["compiled"] is False and "note" not in row
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert 0 < row["peak_bytes"] < row["peak_rss_bytes"]
    assert rows["checkpoint"]["peak_bytes"] < rows["naive"]["peak_bytes"]
    assert result["environment"].keys() >= {"torch", "cpu", "cores", "threads", "effdense", "load_average"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "densenet_bc_22_4, training step, batch 2, 32x32, float32" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [out, picture]


def test_compare_measures_compiled_effdense():
    settings = WorkerConfig("densenet_bc_40_4", 4, 32, threads=1)
    naive, *fused = compare.run(settings, ["naive", "effdense-balanced", "effdense-minimal"], repeats=1)[
        "rows"
    ]
    for row, memory in zip(fused, ("balanced", "minimal"), strict=True):
        assert "error" not in row, row["error"]
        assert row["compiled"] is True and row["memory"] == memory and "note" not in row
        assert row["peak_bytes"] < naive["peak_bytes"] / 2


def test_compare_inference_on_real_images():
    settings = WorkerConfig("densenet_bc_22_4", 2, 32, mode="inference", data="fashion-mnist", threads=1)
    (row,) = compare.run(settings, ["naive+channels-last"], repeats=1)["rows"]
    assert row["mode"] == "inference" and row["channels_last"] and row["peak_bytes"] > 0


def test_a_failing_row_says_why_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setenv(models.FORCE_REFERENCE, "1")  # so that effdense is not compiled
    status = compare.main([*TINY, "--impl", "effdense-balanced,naive"])
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert "failed: effdense runs on its plain PyTorch fallback here" in shown
    assert "1.00x" in shown


def test_a_failing_batch_is_reported():
    settings = WorkerConfig("densenet_bc_22_4", 10**13, 32, threads=1)
    (row,) = compare.run(settings, ["naive"], repeats=1)["rows"]
    assert "allocate" in row["error"] and row["median_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "naiv"], "did you mean 'naive'"),
        (["--model", "densenet12"], "did you mean 'densenet121'"),
        (["--batch", "0"], "must be a whole number of 1 or more"),
        (["--json", "/nowhere/out.json"], "cannot write a file at '/nowhere/out.json'"),
        (["--impl", ","], "names no implementation"),
        (["--isa", "avx3"], "argument --isa: there is no 'avx3': this machine ("),
    ],
)
def test_compare_refuses_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_names_of_groups():
    peers = ["naive", "naive+channels-last", "checkpoint", "checkpoint+channels-last"]
    peers += ["compile", "compile+channels-last"]
    assert models.expand(["peers"], "train") == peers
    assert models.expand(["all"], "train") == models.expand(["peers", "effdense"], "train")
    assert models.expand(["naive", "all"], "inference") == [p for p in peers if "checkpoint" not in p] + [
        "effdense-balanced"
    ]
    assert all(models.parse_impl(name).base != "effdense" for name in peers)


def test_compare_writes_readmes_rows(tmp_path, monkeypatch, capsys):
    """Of a run with the baseline instruction set; ratios are those of what stands beside them."""
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    impls = ["naive", "checkpoint+channels-last", "effdense-minimal"]
    arguments = [*TINY, "--isa", "default", "--impl", ",".join(impls), "--json", str(out)]
    assert compare.main([*arguments, "--table", str(page)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert {(row["isa"], row["cpu_capability"]) for row in rows} == {("default", "DEFAULT")}
    environment = result["environment"]
    assert environment["isa"] == "default" and environment["isa_variables"]["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert environment["cpu_capability"] == environment["effdense"]["cpu_capability"] == "DEFAULT"
    assert "(DEFAULT, limited by --isa default)" in capsys.readouterr().out
    fastest = min(row["median_ms"] for row in rows[:2])
    assert [row["vs_fastest_peer"] for row in rows] == [fastest / row["median_ms"] for row in rows]
    heading, rule, what, *lines = page.read_text().splitlines()
    assert heading == "| | ms/step | vs fastest peer | peak MiB | vs naive |" and rule.count("---") == 5
    assert what == "| **DenseNet-BC-22-4, batch 2, 32x32, training, limited to DEFAULT, 1 thread** | | | | |"
    names = ["naive", "checkpoint, channels-last", 'effdense, `memory="minimal"`']
    for row, name, line in zip(rows, names, lines, strict=True):
        memory = row["peak_bytes"] / rows[0]["peak_bytes"]
        cells = [name, compare.milliseconds(row), f"{fastest / row['median_ms']:.2f}x as fast"]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{memory:.2f}x"]
        assert line == f"| {' | '.join(cells)} |"


def test_compiled_code_is_limited_too():
    """Its own processor would otherwise be what GCC writes scalar loops for."""
    settings = WorkerConfig("densenet_bc_10_4", 1, 32, threads=1, isa="default")
    (row,) = compare.run(settings, ["compile"], repeats=1)["rows"]
    assert "error" not in row, row["error"]
    assert row["cpu_capability"] == "DEFAULT"
    has_setting = hasattr(torch._inductor.config.cpp, "march")
    assert ("compiled for the machine" in row["label"]) == (not has_setting)


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(measure, "cpu_model", lambda: "AMD EPYC")
    message = r"avx512 is not there: this machine \(AMD EPYC\) has avx2, choose one of default, avx2"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        isa.argument("avx512")
    assert isa.variables("default")["MKL_CBWR"] == "COMPATIBLE"
    monkeypatch.setattr(measure, "cpu_model", lambda: "Intel(R) Xeon(R)")
    assert "MKL_CBWR" not in isa.variables("default")
    monkeypatch.setattr(isa.platform, "machine", lambda: "aarch64")
    with pytest.raises(argparse.ArgumentTypeError, match="is for x86-64 and this machine is aarch64"):
        isa.argument("default")


def test_an_instruction_set_is_checked_where_it_runs(monkeypatch):
    """A worker that does not run on it measures nothing, whatever the command line has found."""
    monkeypatch.setattr(isa, "variables", lambda name: {"ATEN_CPU_CAPABILITY": "default"})
    settings = WorkerConfig("densenet_bc_10_4", 1, 32, threads=1, isa="avx2")
    (row,) = compare.run(settings, ["naive"], repeats=1)["rows"]
    assert row["error"] == "isa: avx2 was asked for, and this process runs on default"


def test_demo(tmp_path, monkeypatch, capsys):
    small = {"TRAINED": "densenet_bc_10_4", "STEPS": 3, "BATCH": 4, "REPEATS": 1}
    for name, value in {**small, "MEASURED": "densenet_bc_22_4", "MEASURED_BATCH": 2}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    picture = tmp_path / "new" / "demo.png"
    assert demo.main(["--picture", str(picture)]) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert shown.count("agrees (at most 1e-09)") == 2
    assert "effdense-minimal" in shown and str(picture) in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_notices_a_difference():
    assert demo.largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert not demo.largest_difference([1.0], [float("nan")]) <= demo.FLOAT64_TOLERANCE
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--picture"])


def test_demo_names_missing_data(capsys):
    assert demo.main(["--data-root", "/nowhere"]) == 2
    assert "no Fashion-MNIST in /nowhere" in capsys.readouterr().err


def test_differing_losses_are_noted():
    row = {"dtype": "float32", "impl": "naive", "first_loss": 2.0}
    rows = [
        row,
        {**row, "first_loss": 2.001},
        {**row, "first_loss": 2.1},
        {**row, "first_loss": float("nan")},
    ]
    compare._note_differing_losses(rows, 1e-3)
    assert ["note" in row for row in rows] == [False, False, True, True]


def test_plot_shows_failed_rows(tmp_path):
    numbers = {"peak_bytes": 2**20, "median_ms": 3.0, "p20_ms": 2.0, "p80_ms": 4.0}
    rows = [
        {"impl": "naive", **numbers},
        {"impl": "compile", **dict.fromkeys(numbers), "error": "no compiler"},
    ]
    plots.comparison(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_killed_worker_is_reported():
    worker = Worker("naive")
    worker._process.kill()
    with pytest.raises(WorkerError, match="killed by SIGKILL during build, probably out of memory"):
        worker.build(WorkerConfig("densenet_bc_22_4", 2, 32))
    worker.close()


def test_a_worker_leaves_when_its_parent_is_gone():
    command = [sys.executable, "-m", "benchmarks.worker"]
    subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, timeout=60, check=True)
