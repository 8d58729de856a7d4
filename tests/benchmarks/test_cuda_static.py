"""The static check of the CUDA kernels: what it reads from cuobjdump, and that every requirement can fail."""

from __future__ import annotations

import json

import pytest

from benchmarks import cuda_library, cuda_static
from benchmarks.cuda_library import Bounds, Code, Kernel, LibraryError
from harness.simt.compiler import cuda_include

pytestmark = pytest.mark.tools

ROWS = "_ZN8effdense7kernels11rows_kernelI6__halfLi8ENS0_12_GLOBAL__N_110StatisticsIfLb1EEEEEvT1_"
RESOURCES = f"""
Fatbin ptx code:
================
arch = sm_120

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function {ROWS}:
  REG:124 STACK:8 SHARED:2048 LOCAL:16 CONSTANT[2]:8 CONSTANT[0]:448 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTX = f"""
.extern .shared .align 128 .b8 effdense_dynamic_shared[];
.visible .entry {ROWS}(
.param .align 8 .b8 {ROWS}_param_0[40]
)
.maxntid 256
.minnctapersm 2
{{
.visible .entry other(
)
.maxntid 16, 4, 1
mov.b32 %r1, effdense_dynamic_shared;
"""
SASS = f"""
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : {ROWS}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0010*/              @!P1 BRA 0x40 ;                               /* 0x00005e0000057a13 */
        /*0020*/                   STG.E.128 [R2.64], R4 ;                  /* 0x00005e0000057a13 */
        /*0030*/               @P0 BRA.U 0x20 ;                             /* 0x00005e0000057a13 */
        /*0040*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0050*/                   BRA 0x50;                                /* 0xfffffff000007947 */
		..........
"""
NAME = "rows_kernel<__half, 8, Statistics<float, true>>"


def test_names_are_as_the_source_has_them():
    assert cuda_library.short_name(ROWS) == NAME
    assert cuda_library.short_name("not_mangled") == "not_mangled"


def test_resources():
    ((place, numbers),) = cuda_library.parse_resources(RESOURCES.splitlines(True))
    assert place == (1, ROWS)
    assert (numbers["REG"], numbers["STACK"], numbers["SHARED"], numbers["LOCAL"]) == (124, 8, 2048, 16)


def test_launch_bounds():
    bounds = cuda_library.parse_ptx(PTX.splitlines(True))
    assert bounds == {NAME: Bounds(256, 2, False), "other": Bounds(64, 1, True)}


def test_code_and_its_loops():
    ((place, code),) = cuda_library.parse_sass(SASS.splitlines(True))
    assert place == (1, ROWS) and code.bytes == 0x60
    assert code.opcodes == {"LDG.E.128", "BRA", "STG.E.128", "BRA.U", "EXIT"}
    assert code.loops == (frozenset({"STG.E.128", "BRA.U"}),)


@pytest.mark.skipif(cuda_include() is None, reason="needs the CUDA toolkit's headers")
def test_dynamic_shared_memory_is_what_the_headers_say():
    name = "bottleneck_kernel<Tf32, 64, 128>"
    # Three stages, or two, of 16 floats, and 16 bytes between rows, for 128 pixels and 64 out channels, and two vectors.
    stage = 4 * ((128 + 64) * 20 + 2 * 16)
    assert cuda_library.dynamic_shared([name], "ampere") == {name: 3 * stage}
    assert cuda_library.dynamic_shared([name], "turing") == {name: 2 * stage}
    with pytest.raises(LibraryError, match="unheard_of<float> has dynamic shared memory"):
        cuda_library.dynamic_shared([name, "unheard_of<float>"], "ampere")


# ---- Requirements

GEMM = "bottleneck_kernel<TensorCore<__half>, 64, 128>"
WRITER = "rows_kernel<float, 4, BnRelu<float>, Nothing>"
READER = "rows_kernel<float, 4, Statistics<float, false>, Moments<float>>"
OTHERS = ["avg_pool_kernel<float, 4>", "avg_pool_backward_kernel<float, 4>", "max_pool_kernel<float, 4>"]
OTHERS += ["max_pool_backward_kernel<float, 4>", "bottleneck_backward_kernel<Tf32, 64>"]
OTHERS += ["channels_kernel<AccumulateCorrection<float>>", "merge_kernel<float, Moments<float>>"]
OTHERS += [
    "fold_kernel<float>",
    "add_parts_kernel<float>",
    "rows_kernel<float, 1, BnRelu<float>, Nothing>",
]


def good(name: str, architecture: str = "8.0", without: str = "") -> Kernel:
    opcodes = {"HMMA.16816.F32", "HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128"}
    if architecture == "7.5":
        opcodes = {"HMMA.1688.F32", "FFMA", "LDG.E.128", "STS.128", "STG.E.128"}
    if name == READER or name in OTHERS[5:]:
        opcodes = {"LDG.E.128"} if name == READER else {"LDG.E"}
    loop = frozenset(opcodes - {without})
    return Kernel(name, architecture, 128, 0, 0, 1024, 0, Bounds(256, 2, False), Code(4096, loop, (loop,)))


def failures(*changed: Kernel, library_bytes: int = 10**6) -> list[str]:
    """Of a library that is in order but for these."""
    names = {kernel.name for kernel in changed}
    rest = [good(name) for name in [GEMM, WRITER, READER, *OTHERS] if name not in names]
    return cuda_static.failures([*changed, *rest], library_bytes)


@pytest.mark.parametrize("architecture", ["7.5", "8.0"])
def test_nothing_fails_where_all_is_good(architecture):
    names = [GEMM, GEMM.replace("half", "nv_bfloat16"), WRITER, READER, *OTHERS]
    kernels = [good(name, architecture) for name in names if architecture == "7.5" or "bfloat16" not in name]
    assert cuda_static.failures(kernels, 10**6) == []


def test_what_is_too_large_to_be_launched_must_have_no_code():
    kernel = good(GEMM, "7.5")._replace(dynamic_shared=66_000)
    assert any("are more than a block's 64 KB" in line for line in failures(kernel))
    empty = kernel._replace(code=Code(32, frozenset({"MOV", "EXIT"}), ()))
    assert not any("64 KB" in line or "HMMA" in line for line in failures(empty))
    (row,) = [
        line for line in cuda_static.markdown([empty], ["7.5"], "").splitlines() if "bottleneck" in line
    ]
    assert row.endswith("| 65.5 KB | - |")


@pytest.mark.parametrize(
    "kernel, message",
    [
        (good(WRITER)._replace(stack=8), "has a stack of 8 and local memory of 0 bytes"),
        (good(WRITER)._replace(local=16), "has a stack of 0 and local memory of 16 bytes"),
        (good(WRITER)._replace(code=Code(1, frozenset({"STL.64"}), good(WRITER).code.loops)), "(STL.64)"),
        (good(WRITER)._replace(code=Code(1, frozenset({"LDL"}), good(WRITER).code.loops)), "(LDL)"),
        (good(WRITER)._replace(registers=129), "registers permit 1 blocks"),
        (good(WRITER)._replace(bounds=Bounds(768, 1, False)), "are more than 65,536"),
        (good(WRITER)._replace(bounds=Bounds(256, 9, False), registers=24), "threads permit 8 blocks"),
        (good(GEMM)._replace(dynamic_shared=166_000), "of shared memory are more than a block's 163 KB"),
        (good(GEMM)._replace(bounds=Bounds(256, 33, True)), "blocks permit 32 blocks"),
        (good(GEMM, without="HMMA.16816.F32"), "has no HMMA.16816.F32 in a loop"),
        (good(OTHERS[4], without="HMMA.1688.F32.TF32"), "has no HMMA.1688.F32.TF32 in a loop"),
        (good(GEMM, without="LDGSTS.E.BYPASS.128"), "has no asynchronous copy of 16 bytes"),
        (good(GEMM, without="STG.E.128"), "has no store of 16 bytes"),
        (good(WRITER, without="LDG.E.128"), "has no load of 16 bytes"),
        (good(READER, without="LDG.E.128"), "has no load of 16 bytes"),
        (good(WRITER, without="STG.E.128"), "has no store of 16 bytes"),
        (good(WRITER)._replace(code=Code(1, good(WRITER).code.opcodes, ())), "has no load of 16 bytes"),
        (good(GEMM, "7.5", without="HMMA.1688.F32"), "has no HMMA.1688.F32 in a loop"),
        (good(OTHERS[4], "7.5", without="FFMA"), "has no FFMA in a loop"),
        (good(GEMM, "7.5", without="STS.128"), "has no copy of 16 bytes (LDG.128, STS.128)"),
        (good(WRITER, "9.0"), "for 8.0: is missing"),
        (good("unheard_of<float>"), "is unknown: FAMILIES"),
        (good("bottleneck_kernel<Unheard<float>, 64, 32>"), "PRODUCTS has for Unheard<float>"),
    ],
)
def test_every_requirement_can_fail(kernel, message):
    lines = failures(kernel)
    assert any(message in line for line in lines), lines
    name = kernel.name.replace("__half", "half")
    assert all(line.startswith(name) for line in lines if message in line)


def test_the_library_is_small_and_has_every_kernel():
    (line,) = failures(library_bytes=25 * 10**6)
    assert line == "the library has 25,000,000 bytes, 25,000,000 or more"
    lines = cuda_static.failures([good(GEMM)], 1)
    assert "rows_kernel: no such kernel is in the library" in lines


def test_shared_memory_must_permit_the_promised_blocks_where_there_is_most_of_it():
    kernel = good(GEMM, "9.0")._replace(dynamic_shared=120_000)
    assert cuda_static.resident(kernel)["shared memory"] == 1
    assert any("shared memory permit 1 blocks" in line for line in failures(kernel))
    small = kernel._replace(architecture="8.0")
    assert cuda_static.resident(small)["shared memory"] == 1 and failures(small) == []


def test_a_kernel_that_nobody_knows_is_shown_too():
    rows = cuda_static.by_name([good(GEMM), good("unheard_of<float>")])
    assert list(rows) == ["unheard_of<float>", "bottleneck_kernel<TensorCore<half>, 64, 128>"]


def test_occupancy_is_counted_as_the_toolkit_does():
    # 80 registers: 6 warps a partition, 24 in all, 3 blocks of 8
    kernel = good(WRITER)._replace(registers=80, dynamic_shared=30 * 1024)
    blocks = {"registers": 3, "threads": 8, "shared memory": 5, "blocks": 32}
    assert cuda_static.resident(kernel) == blocks and cuda_static.occupancy(kernel) == 3 * 256 / 2048


# ---- The command


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A cuobjdump that prints what is planted in files."""
    texts = {"-lelf": "ELF file    1: a.1.sm_80.cubin\n", "-res-usage": RESOURCES, "-sass": SASS, "-ptx": PTX}
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace("effdense_dynamic_shared", "static"))
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        f'#!/bin/sh\nfor word; do [ -e "{tmp_path}/$word" ] && cat "{tmp_path}/$word"; done\nexit 0\n'
    )
    tool.chmod(0o755)
    (tmp_path / "nvdisasm").symlink_to(tool)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    library = tmp_path / "library.so"
    library.write_bytes(b"1234")
    return library


def test_end_to_end(planted, tmp_path, capsys):
    table, out = tmp_path / "table.md", tmp_path / "out.json"
    row = "| `rows_kernel<half, 8, Statistics<float, true>>` | 256 | 2.0 KB | 124/2/25% |"
    arguments = ["--library", str(planted), "--table", str(table), "--json", str(out)]
    assert cuda_static.main(arguments) == 1
    shown = capsys.readouterr()
    spilled = (
        "rows_kernel<half, 8, Statistics<float, true>> for 8.0: has a stack of 8 and local memory of 16 bytes"
    )
    assert spilled in shown.err and "1 kernels for 8.0" in shown.out
    assert row in table.read_text()
    result = json.loads(out.read_text())
    assert result["library_bytes"] == 4 and len(result["failures"]) == len(shown.err.splitlines())
    (kernel,) = result["kernels"]
    assert (kernel["registers"], kernel["resident_blocks"], kernel["sass_bytes"]) == (124, 2, 0x60)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "7.0"], "unknown architecture '7.0'"),
        (["--arch", "9.0"], "has code for 8.0"),
        (["--library", "/nowhere"], "cannot read a file at '/nowhere'"),
    ],
)
def test_wrong_arguments(planted, arguments, message, capsys):
    with pytest.raises(SystemExit):
        cuda_static.main(["--library", str(planted), *arguments])
    assert message in capsys.readouterr().err


def test_a_missing_tool_is_named(planted, monkeypatch, capsys):
    monkeypatch.setattr(cuda_library.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        cuda_static.main(["--library", str(planted)])
    assert "cuobjdump was found neither on the PATH" in capsys.readouterr().err
