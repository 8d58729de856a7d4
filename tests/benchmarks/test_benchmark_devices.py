"""The benchmarks on a GPU, without one: torch.cuda is replaced by functions that only write down how they are called."""

from __future__ import annotations

import dataclasses
import inspect
import types

import pytest
import torch

from benchmarks import compare, depth_sweep, devices, kernels, models
from benchmarks.worker import WorkerConfig, _Session, _train_step

TINY = WorkerConfig("densenet_bc_10_4", 2, 8, device="cuda:1")
GPU = types.SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=2**33)
ANSWERS = {  # of torch.cuda's functions
    "set_device": None,
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "memory_allocated": 1000,
    "max_memory_allocated": 5000,
    "max_memory_reserved": 8000,
    "mem_get_info": (2**20, 2**33),
    "get_device_properties": GPU,
}
CUDA_KERNELS = {*kernels.OPERATORS} - {"bn_relu_conv3x3", "bn_relu_conv3x3_backward"}


@pytest.fixture
def calls(monkeypatch):
    """What has been called, in order; everything in torch.cuda that the benchmarks use takes part."""
    calls = []

    def replace(name, answer):
        signature = inspect.signature(getattr(torch.cuda, name))

        def function(*args, **kwargs):
            signature.bind(*args, **kwargs)
            calls.append(" ".join([name, *args]))
            return answer

        monkeypatch.setattr(torch.cuda, name, function)

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("event.synchronize")

        def elapsed_time(self, end):
            assert calls[-2:] == ["record", "event.synchronize"] and end is not self
            return 12.5

    for name, answer in ANSWERS.items():
        replace(name, answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield calls
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.fixture
def cuda(calls, monkeypatch):
    """The device that find returns: a GPU whose tensors lie on the CPU."""
    device = devices.Cuda(1)
    device.name = "cpu"
    device._flushed = types.SimpleNamespace(zero_=lambda: calls.append("flush"))  # type: ignore[assignment]
    monkeypatch.setattr(devices, "find", lambda name: device)
    return device


@pytest.fixture
def one_gpu(calls, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


class InProcess:
    """A worker without a process of its own."""

    def __init__(self, impl, force_reference=False, isa=None):
        self._impl, session = impl, _Session()
        self.warm_up, self.step, self.finish, self._build = (
            session.warm_up,
            session.step,
            session.finish,
            session.build,
        )

    def build(self, settings):
        return self._build(self._impl, dataclasses.asdict(settings))

    def close(self):
        pass


# --- the device


def test_a_step_is_timed_from_an_idle_gpu_to_its_end(calls):
    assert devices.Cuda(1).time_step(lambda: calls.append("step")) == 12.5
    assert calls == ["synchronize cuda:1", "record", "step", "record", "event.synchronize"]


def test_a_call_is_timed_behind_a_write(calls, cuda):
    assert cuda.time_call(lambda: calls.append("call")) == 12.5
    assert calls == ["flush", "record", "call", "record", "event.synchronize"]


def test_bytes_are_counted_above_what_was_there(calls):
    assert devices.Cuda(1).count(lambda: calls.append("step")) == {
        "peak_bytes": 4000,
        "peak_reserved_bytes": 8000,
    }
    before = [
        "synchronize cuda:1",
        "empty_cache",
        "reset_peak_memory_stats cuda:1",
        "memory_allocated cuda:1",
    ]
    after = ["synchronize cuda:1", "max_memory_allocated cuda:1", "max_memory_reserved cuda:1"]
    assert calls == [*before, "step", *after]


@pytest.mark.parametrize("tf32", [False, True])
def test_every_process_is_set_up_the_same(calls, tf32):
    torch.backends.cudnn.allow_tf32 = tf32
    device = devices.Cuda()
    device.use()
    assert calls == ["set_device cuda:0"]
    assert torch.backends.cudnn.benchmark and torch.backends.cuda.matmul.allow_tf32 == tf32
    gpu = device.environment()["gpu"]
    assert gpu["tf32"] == tf32 and gpu["cudnn_benchmark"]
    assert gpu["name"] == "Some GPU" and gpu["compute_capability"] == "9.0" and gpu["memory_bytes"] == 2**33
    assert gpu["cuda"] == torch.version.cuda and gpu.keys() >= {"driver", "cudnn"}


def test_the_cpu_is_as_it_was():
    cpu = devices.find("cpu")
    cpu.use()
    assert cpu.name == "cpu" and cpu.environment() == {}
    assert cpu.time_step(lambda: None) >= 0 and cpu.time_call(lambda: None) >= 0
    assert 4000 <= cpu.count(lambda: torch.empty(1000))["peak_bytes"] < 8192
    assert 2**20 < cpu.available_bytes() < 2**50


def test_gpus_by_name(one_gpu):
    assert [devices.find(name).name for name in ("cuda", "cuda:0")] == ["cuda:0"] * 2
    with pytest.raises(ValueError, match="cuda:1 is not there: torch sees 1 CUDA device, from cuda:0 on"):
        devices.find("cuda:1")


@pytest.mark.parametrize("command", [compare.main, kernels.main, depth_sweep.main])
def test_without_cuda_the_commands_say_what_is_missing(command, monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit, match="2"):
            command(["--device", *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore")

    assert "must be cpu, cuda or cuda:N, got 'cuda0'" in message("cuda0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert f"cuda needs a torch that is built with CUDA, and this is torch {torch.__version__}" in message(
        "cuda"
    )
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert message("cuda:1").endswith("cuda:1 cannot be used: Found no NVIDIA driver on your system.")


# --- steps


def test_compare_on_a_gpu(calls, cuda, monkeypatch, capsys):
    monkeypatch.setattr(compare, "Worker", InProcess)
    result = compare.run(TINY, ["naive", "effdense-minimal+channels-last"], repeats=2)
    for row in result["rows"]:
        assert "error" not in row and "note" not in row, row
        assert row["device"] == "cuda:1" and row["times_ms"] == [12.5, 12.5]
        assert (row["peak_bytes"], row["peak_reserved_bytes"]) == (4000, 8000) and row["peak_rss_bytes"] > 0
    timed, counted = ["synchronize cpu", "record", "record", "event.synchronize"], "max_memory_reserved cpu"
    assert calls[:3] == ["get_device_properties cpu", "set_device cpu", "set_device cpu"]
    assert calls[3:19] == 4 * timed and calls.count(counted) == 2 and calls[-1] == counted
    assert result["environment"]["gpu"]["name"] == "Some GPU"
    compare.console().print(compare.table(result, compare.title(TINY)))
    shown = capsys.readouterr().out
    assert "float32, cuda:1" in shown and "Some GPU (compute capability 9.0, driver " in shown


def test_settings_of_a_gpu(one_gpu, capsys):
    _, settings, _ = compare._parse(["--device", "cuda", "--dtype", "float16"])
    assert settings.device == "cuda:0" and settings.dtype == "float16"
    with pytest.raises(SystemExit, match="2"):
        compare._parse(["--dtype", "float16"])
    assert "--dtype float16 needs --device cuda" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        compare._parse(["--device", "cuda", "--isa", "default"])
    assert "--isa default is for --device cpu" in capsys.readouterr().err.splitlines()[-1]


def test_float16_steps_have_scaled_gradients():
    torch.manual_seed(0)
    model, dtypes, gradients = torch.nn.Linear(3, 5), [], []  # type: ignore[var-annotated]

    def watch(module, inputs, output):
        dtypes.append(output.dtype)
        output.register_hook(gradients.append)

    model.register_forward_hook(watch)
    before = model.weight.clone()
    step = _train_step(model, torch.randn(4, 3), torch.arange(4), "float16")
    losses = [step() for _ in range(3)]
    assert dtypes == [torch.float16] * 3
    assert 1000 < gradients[0].float().abs().max() < float("inf")
    assert losses[2] < losses[0] and 0 < (model.weight - before).abs().max() < 0.1


def test_effdense_is_refused_where_it_has_no_operators():
    with pytest.raises(RuntimeError, match=r"plain PyTorch fallback here \(cpu, float16\)"):
        models.build("densenet_bc_10_4", "effdense-balanced", device="cpu", dtype="float16")


def test_a_failed_worker_gives_its_memory_back(monkeypatch):
    closed = []

    class Failing(InProcess):
        def build(self, settings):
            raise compare.WorkerError("CUDA out of memory")

        def close(self):
            closed.append(self._impl)

    monkeypatch.setattr(compare, "Worker", Failing)
    rows = compare.run(
        dataclasses.replace(TINY, device="cpu"), ["naive", "checkpoint"], 1, lambda what: closed.append(what)
    )["rows"]
    assert closed[:4] == ["naive: build and warm up", "naive", "checkpoint: build and warm up", "checkpoint"]
    assert [row["error"] for row in rows] == ["CUDA out of memory"] * 2


def test_the_search_for_the_deepest_asks_the_gpu(calls, cuda):
    point = {"impl": "naive", "depth": 34, "peak_bytes": 2**20, "peak_rss_bytes": 2**20}
    (row,) = depth_sweep.within_budget({"rows": [point]}, TINY, 4, 2**30)["rows"]
    assert row["depth"] == 34 and row["stopped"] == "depth 40 would need 1 MiB of 1 free here"
    assert calls == ["mem_get_info cpu"]


# --- operators


@pytest.fixture
def cuda_kernels(monkeypatch):
    there = {(f"effdense::{name}", "CUDA") for name in CUDA_KERNELS}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *key: key in there)


def test_operators_on_a_gpu(calls, cuda, cuda_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "GEMM_SIZE", {"cuda": 32})
    monkeypatch.setattr(kernels, "COPY_BYTES", 2**12)
    parsed = kernels._parse(["--device", "cuda", "--shape", "2,4,4,6,8,4"])
    assert set(parsed.op) == CUDA_KERNELS
    result = kernels.run(parsed.shape, parsed.op, repeats=1, device="cuda")
    assert {row["op"] for row in result["rows"]} == CUDA_KERNELS
    assert all(row["times_ms"] == [12.5] and row["device"] == "cpu" for row in result["rows"])
    assert result["ceilings"]["gemm"]["flops"] == 2 * 32**3 and "gpu" in result["environment"]
    once = ["flush", "record", "record", "event.synchronize"]
    assert calls[2:] == 2 * (len(CUDA_KERNELS) + 2) * once


def test_operators_that_a_gpu_lacks(cuda, cuda_kernels, monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit, match="2"):
            kernels._parse(["--device", "cuda", *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    assert "no cuda kernel for bn_relu_conv3x3; there are bottleneck, " in message(
        "--op", "bn_relu,bn_relu_conv3x3"
    )
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *key: False)
    assert "effdense's operators are not compiled for cuda: install it where nvcc is" in message()
