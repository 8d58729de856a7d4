"""nvcc's PTX of the CUDA kernels, interpreted on the CPU (harness/ptx): against float64, and with planted mutations.

Run by `pytest -m ptx`; EFFDENSE_PTX_ARCH=90,100,120 for other architectures than 7.5 and 8.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from harness.ptx import interpreter
from harness.ptx.compiler import can_compile
from harness.ptx.interpreter import MODES, Interpreter, architectures
from tests.harness._ptx_calls import every_call

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(not can_compile(), reason="needs nvcc"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", architectures())
def test_every_kernel_against_float64(architecture: int, mode: str) -> None:
    ops = Interpreter(architecture, mode)
    interpreter._operators().forget()
    wrong = []
    for call in every_call():
        try:
            call.run(ops)
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{call.name}: {error}")
    assert not wrong, f"{len(wrong)} calls: " + "\n".join(wrong[:10])
    left_out = set(ops.kernels()) - set(ops.launched())
    # Tiles that an architecture has no room for are kernels without code.
    assert [name for name in left_out if "st.global" in ops.text(name)] == []


class Mutation(NamedTuple):
    kernel: str  # part of the mangled name
    calls: str  # a pattern of the calls that run it
    find: str  # a pattern in its PTX
    replace: str
    architecture: int = 80
    occurrence: int = 0


HALF, TF32 = "bottleneck_kernelINS0_10TensorCoreI6__halfEELi64", "bottleneck_kernelINS0_4Tf32ELi64"
HALF_BACKWARD = "bottleneck_backward_kernelINS0_10TensorCoreI6__halfEELi64"
OF_HALF, OF_HALF_BACKWARD, OF_TF32 = r"bottleneck half", r"bottleneck_backward half", r"bottleneck tf32"
FOUR = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"
MMA = r"(mma\.sync\.\S+\s+\{[^}]*\},\s*)"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+[^,]+, [^,]+, )"
BARRIER = r"bar\.sync\s+0;"
MUTATIONS = {
    "the second and third register of A swapped": Mutation(HALF, OF_HALF, MMA + FOUR, r"\1{\2, \4, \3, \5}"),
    "the registers of B swapped": Mutation(
        HALF_BACKWARD, OF_HALF_BACKWARD, MMA + r"(\{[^}]*\},\s*)\{(%\w+), (%\w+)\}", r"\1\2{\4, \3}"
    ),
    "two registers of TF32's A swapped": Mutation(TF32, OF_TF32, MMA + FOUR, r"\1{\2, \4, \3, \5}"),
    "the registers of 7.5's A swapped": Mutation(
        HALF, OF_HALF, MMA + r"\{(%\w+), (%\w+)\}", r"\1{\3, \2}", 75
    ),
    "two sums of mma swapped": Mutation(
        HALF, OF_HALF, r"(mma\.sync\.\S+\s+)\{(%\w+),\s*(%\w+),", r"\1{\3, \2,"
    ),
    "ldmatrix without .trans": Mutation(HALF_BACKWARD, OF_HALF_BACKWARD, r"\.x4\.trans\.", ".x4."),
    "ldmatrix with .trans": Mutation(HALF, OF_HALF, r"\.x4\.shared", ".x4.trans.shared"),
    "two results of ldmatrix swapped": Mutation(
        HALF, OF_HALF, r"(ldmatrix\S+\s+)\{(%\w+), (%\w+),", r"\1{\3, \2,", occurrence=1
    ),
    "cp.async of 16 bytes whatever there is": Mutation(
        HALF, OF_HALF, r"(cp\.async\.cg\.shared\.global \[%\w+\], \[%\w+\], 16, )%\w+;", r"\g<1>16;"
    ),
    "a copy that nobody waits for": Mutation(HALF, OF_HALF, r"cp\.async\.wait_group \d;", ""),
    "one group too many outstanding": Mutation(
        TF32, OF_TF32, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"
    ),
    "a shuffle with another lane": Mutation(
        HALF_BACKWARD, OF_HALF_BACKWARD, SHUFFLE + r"[^,]+, ([^,]+, [^,;]+);", r"\g<1>1, \2;"
    ),
    "a shuffle with half of the warp": Mutation(
        HALF, OF_HALF, SHUFFLE + r"([^,]+, [^,]+), [^,;]+;", r"\1\2, 65535;"
    ),
    "the halves of cvt swapped": Mutation(
        HALF, OF_HALF, r"(cvt\.rn\.relu\.f16x2\.f32 %\w+, )(%\w+), (%\w+);", r"\1\3, \2;"
    ),
    "cvt without relu": Mutation(HALF, OF_HALF, r"cvt\.rn\.relu\.f16x2", "cvt.rn.f16x2"),
    "numbers that are not rounded to TF32": Mutation(TF32, OF_TF32, r"cvt\.rna\.tf32\.f32", "mov.b32"),
    "rounding to zero": Mutation(
        "rows_kernelI6__halfLi8", "rounding torch.float16", r"cvt\.rn\.f16\.f32", "cvt.rz.f16.f32"
    ),
    "the first bar.sync left out": Mutation(HALF, OF_HALF, BARRIER, ""),
    "the last bar.sync left out": Mutation(HALF, OF_HALF, BARRIER, "", occurrence=-1),
    "bar.sync left out between the products": Mutation(
        HALF_BACKWARD, OF_HALF_BACKWARD, BARRIER, "", occurrence=1
    ),
    "bar.sync left out of a sum": Mutation(
        "merge_kernelIfNS0_7Moments", r"channel_statistics torch.float16 \(1, \(8200", BARRIER, ""
    ),
    "bar.warp.sync left out": Mutation(HALF, OF_HALF, r"bar\.warp\.sync\s+[^;]+;", ""),
    "a wrong offset of a load": Mutation(
        HALF, OF_HALF, r"(ld\.shared\.v2\.f32\s+[^;]*\[%\w+)\+(\d+)\]", r"\1+4]"
    ),
    "a wrong offset of a parameter": Mutation(
        "channels_kernelINS1_20AccumulateCorrectionIfE",
        "accumulate_correction torch.float32",
        r"_param_0\+8\]",
        "_param_0+16]",
    ),
    "a guard left out": Mutation(
        "channels_kernelINS1_20AccumulateCorrectionIfE",
        "accumulate_correction torch.float32",
        r"@%p1 bra\s+\S+;",
        "",
    ),
    "the opposite comparison": Mutation(HALF, OF_HALF, r"setp\.lt\.s32", "setp.ge.s32"),
    "one channel too many": Mutation(
        "channels_kernelINS1_20AccumulateCorrectionIfE",
        "accumulate_correction torch.float32",
        r"setp\.ge\.s64",
        "setp.gt.s64",
    ),
}


def mutated(text: str, mutation: Mutation) -> str:
    """The PTX with the change in one place."""
    places = list(re.finditer(mutation.find, text))
    assert places, f"nothing like {mutation.find} in the PTX"
    place = places[mutation.occurrence]
    changed = text[: place.start()] + place.expand(mutation.replace) + text[place.end() :]
    assert changed != text
    return changed


@pytest.fixture
def replaced() -> Iterator[list[tuple[Any, str]]]:
    """Kernels that have another text; they get their own back."""
    kernels: list[tuple[Any, str]] = []
    yield kernels
    for ops, name in kernels:
        ops.replace(name, "")


@pytest.mark.skipif(architectures() != (75, 80), reason="mutations are of 7.5's and 8.0's PTX")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, replaced: list[tuple[Any, str]]) -> None:
    mutation = MUTATIONS[name]
    calls = [call for call in every_call() if re.search(mutation.calls, call.name)]
    assert calls
    caught = None
    for mode in MODES:
        ops = Interpreter(mutation.architecture, mode)
        for kernel in ops.kernels():
            if mutation.kernel in kernel and re.search(mutation.find, ops.text(kernel)):
                replaced.append((ops, kernel))
                ops.replace(kernel, mutated(ops.text(kernel), mutation))
        assert replaced
        for call in calls:
            try:
                call.run(ops)
            except (AssertionError, RuntimeError) as error:
                caught = error
                break
        for _, kernel in replaced:
            ops.replace(kernel, "")
        if caught is not None:
            break
    assert caught is not None and 'instruction "' not in str(caught), caught


def test_an_unknown_instruction_is_named(replaced: list[tuple[Any, str]]) -> None:
    ops = Interpreter(architectures()[-1], "late")
    (kernel,) = [name for name in ops.kernels() if "channels_kernelINS1_20AccumulateCorrectionIfE" in name]
    replaced.append((ops, kernel))
    ops.replace(kernel, ops.text(kernel).replace("ret;", "wgmma.fence.sync.aligned;\nret;", 1))
    vector, a, b = torch.ones(3), torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"line \d+: instruction \"wgmma.fence.sync.aligned\" is unknown"):
        ops.accumulate_correction(vector, vector, vector, vector, 3, a, b)


# Every block writes a number, and the one that is the last to count adds them up. The counter starts at -1.
LAST_BLOCK = """
.entry {name}(
.param .align 8 .b8 all[56],
.param .u64 channels
)
{{
.reg .pred %p<4>;
.reg .b32 %r<8>;
.reg .f32 %f<4>;
.reg .b64 %rd<8>;
ld.param.u64 %rd1, [all+40];
ld.param.u64 %rd2, [all+48];
ld.param.u64 %rd3, [all+16];
mov.u32 %r1, %tid.x;
setp.ne.s32 %p1, %r1, 0;
@%p1 bra $DONE;
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %nctaid.x;
add.s32 %r4, %r2, 1;
cvt.rn.f32.s32 %f1, %r4;
mul.wide.u32 %rd4, %r2, 4;
add.s64 %rd5, %rd1, %rd4;
st.global.f32 [%rd5], %f1;
{fence}
{count}.global.add.u32 %r5, [%rd2], 1;
add.s32 %r6, %r3, -2;
setp.ne.s32 %p2, %r5, %r6;
@%p2 bra $DONE;
mov.u32 %r7, 0;
mov.f32 %f2, 0f00000000;
$LOOP:
mul.wide.u32 %rd6, %r7, 4;
add.s64 %rd7, %rd1, %rd6;
ld.global.f32 %f3, [%rd7];
add.f32 %f2, %f2, %f3;
add.s32 %r7, %r7, 1;
setp.lt.s32 %p3, %r7, %r3;
@%p3 bra $LOOP;
st.global.f32 [%rd3], %f2;
$DONE:
ret;
}}
"""


@pytest.mark.parametrize(
    "fence, count",
    [
        ("membar.gl;", "atom"),
        ("fence.acq_rel.gpu;", "atom.relaxed.gpu"),
        ("", "atom.acq_rel.gpu"),
        ("", "atom"),
        ("membar.cta;", "atom"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_last_block_sees_what_a_fence_has_published(
    mode: str, fence: str, count: str, replaced: list[tuple[Any, str]]
) -> None:
    ops = Interpreter(architectures()[-1], mode)
    (kernel,) = [name for name in ops.kernels() if "channels_kernelINS1_20AccumulateCorrectionIfE" in name]
    replaced.append((ops, kernel))
    ops.replace(kernel, LAST_BLOCK.format(name=kernel, fence=fence, count=count))
    vector, numbers, total = torch.ones(600), torch.zeros(600), torch.zeros(600)  # three blocks
    counter = torch.full((600,), -1, dtype=torch.int32)
    ops.accumulate_correction(vector, vector, total, vector, 600, numbers, counter.view(torch.float32))
    assert numbers[:3].tolist() == [1, 2, 3] and counter[0] == 2
    is_published = "gl" in fence or "gpu" in fence or "acq_rel" in count
    assert (total[0] == 6) == (is_published or mode == "backwards")
