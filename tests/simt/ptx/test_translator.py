"""The translator of PTX: what it reads, what it computes, what it refuses. Needs no nvcc."""

from __future__ import annotations

import ctypes
import struct

import pytest
import torch
from simulator import Fault, Simulator
from torch import Tensor

from . import build
from .loader import PtxSimulator
from .operands import Operands
from .source import Instruction, Kernel, Label, PtxError, PtxFile, split
from .translate import function

# A kernel by hand in the place of a compiled one of kernels/small.cu, whose parameters are in, out, scratch and n.
HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 smem[];
.visible .entry by_hand(.param .align 8 .b8 by_hand_param_0[32])
.maxntid 64, 1, 1
{
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<20>; .reg .f32 %f<20>; .reg .b64 %rd<12>; .reg .f64 %fd<4>;
ld.param.u64 %rd1, [by_hand_param_0];
ld.param.u64 %rd2, [by_hand_param_0+8];
cvta.to.global.u64 %rd1, %rd1;
cvta.to.global.u64 %rd2, %rd2;
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mad.lo.s32 %r4, %r2, %r3, %r1;
mul.wide.s32 %rd3, %r4, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
ld.global.b32 %r5, [%rd4];
"""
TAIL = "st.global.b32 [%rd5], %r6;\nret;\n}\n"


def by_hand(body: str) -> Kernel:
    return PtxFile(HEAD + body + TAIL).kernel("by_hand")


def translated(small: Simulator, body: str) -> PtxSimulator:
    kernel = by_hand(body)
    return PtxSimulator(small.library, lambda _: kernel, "-O0")


def run(sim: Simulator, words: Tensor) -> Tensor:
    """One block of 64 threads; the words that it has written."""
    sim.reset()
    places = sim.put("in", words), sim.out("out", 256), sim.out("scratch", 1024)
    shape = (ctypes.c_int * 5)(1, 64, 256, 1, False)
    sim.check(sim.lib.simt_run_small(b"reverse", shape, *map(ctypes.c_void_p, places)))
    return sim.get(places[1], (64,), torch.int32)


def word(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def test_reads_kernels() -> None:
    text = """
    .file 3 "/some/where/simt.cuh"
    .file 4 "/some/where/kernel.cuh"
    .entry k(.param .align 8 .b8 k_param_0[24]) .maxntid 32, 1, 1
    {
        .reg .pred %p<2>; .reg .b32 %r<3>;
        .loc 3 60 3, function_name $L__info, inlined_at 4 12 5
        // begin inline asm
        {
.reg .pred p;
setp.eq.u32 p, %r1, 0;
@!p bra $L_done;
}
        // end inline asm
    $L_done: .pragma "nounroll";
        st.global.v2.u32 [%r1+-8], {%r1, %r2}; // a comment; with a semicolon
        ret;
    }"""
    kernel = PtxFile(text).kernel("k")
    assert (kernel.param, kernel.param_bytes) == ("k_param_0", 24)
    assert kernel.registers == {"%p0": "pred", "%p1": "pred", "p": "pred", **{f"%r{i}": "b32" for i in range(3)}}
    assert kernel.body == [
        Instruction("setp.eq.u32", ("p", "%r1", "0"), "", "kernel.cuh:12", True),
        Instruction("bra", ("$L_done",), "!p", "kernel.cuh:12", True),
        Label("$L_done"),
        Instruction("st.global.v2.u32", ("[%r1+-8]", "{%r1, %r2}"), "", "kernel.cuh:12"),
        Instruction("ret", (), "", "kernel.cuh:12"),
    ]
    assert split("a, {b, c}, [d+4]") == ["a", "{b, c}", "[d+4]"]
    assert Operands(kernel, kernel.instructions[2], 0).base_and_offset(0) == ("%r1", -8)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("frobnicate.rn.f32 %f1, %f2;", r"frobnicate\.rn\.f32 %f1, %f2.*the instruction frobnicate\.rn\.f32 is unknown"),
        ("fma.rz.f32 %f1, %f2, %f3, %f4;", r"the instruction fma\.rz\.f32 is unknown"),
        ("add.s32 %r1, %r2;", "3 operands expected, 2 found"),
        ("add.s32 %r1, %r2, %nowhere;", "operand %nowhere is unknown"),
        ("add.f32 %f1, %f2, %rd1;", r"a \.b64 where a \.f32 is expected"),
        ("add.f32 %f1, %f2, 3;", r"3 where a \.f32 is expected"),
        ("mov.u64 %r1, %rd1;", r"a \.u64 for a \.b32"),
        ("@%r1 mov.u32 %r1, %r2;", "%r1 is not a predicate"),
        ("ld.param.u64 %rd1, [by_hand_param_0+28];", "beyond the 32 bytes of parameters"),
        ("ld.global.v4.f32 {%f1, %f2}, [%rd1];", "4 registers expected"),
        ("ld.global.f32 %f1, %rd1;", "%rd1 should be an address"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8, %r2;", r"cp\.async\.cg does not copy 8 bytes"),
        ("cp.async.ca.shared.global [%r1], [%rd1], %r2, 8;", "%r2 should be a constant"),
        ("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};", "is unknown"),
        ("mbarrier.arrive.shared::cta.b64 %rd1, [%r1];", "the state of an mbarrier"),
        ("st.release.gpu.global.v2.u32 [%rd1], {%r1, %r2};", "a flag's store of several words"),
        ("setp.lo.s32 %p1, %r1, %r2;", "is unknown"),
    ],
)
def test_refuses_what_it_does_not_know(line: str, why: str) -> None:
    with pytest.raises(PtxError, match=rf"^by_hand: .*{why}"):
        function(by_hand(line))


def test_refuses_other_parameters() -> None:
    with pytest.raises(PtxError, match="not one struct by value"):
        PtxFile(".entry k(.param .u64 a, .param .u64 b) { ret; }")
    with pytest.raises(PtxError, match=r"register %x has two types, \.b32 and \.f32"):
        PtxFile(".entry k(.param .u64 a) { .reg .b32 %x; .reg .f32 %x; ret; }").kernel("k")


ONE, MINUS_THREE, NAN, INFINITY = word(1.0), word(-3.0), 0x7FC00000, 0x7F800000
# PTX from %r5 to %r6; input and output words.
ANSWERS: list[tuple[str, list[tuple[int, int]]]] = [
    ("sub.s32 %r6, 7, %r5;", [(3, 4), (-1, 8)]),
    ("mul.hi.s32 %r6, %r5, 0x40000000;", [(-8, -2), (5, 1)]),
    ("mul.hi.u32 %r6, %r5, 0x40000000;", [(-8, 0x3FFFFFFE)]),
    ("mul.wide.s32 %rd6, %r5, -4; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r6, %rd6;", [(5, -1), (-5, 0)]),
    ("cvt.u16.u32 %rs1, %r5; mul.lo.s16 %rs1, %rs1, %rs1; cvt.u32.u16 %r6, %rs1;", [(0xFFFF, 1), (300, 24464)]),
    ("cvt.u16.u32 %rs1, %r5; cvt.s32.s16 %r6, %rs1;", [(0x8000, -32768), (5, 5)]),
    ("div.s32 %r6, %r5, 3; mad.lo.s32 %r6, %r6, 10, 1;", [(-7, -19), (7, 21)]),
    ("rem.u32 %r6, %r5, 7;", [(-1, 3)]),
    ("min.s32 %r6, %r5, 0; max.u32 %r6, %r6, 2;", [(-1, -1), (5, 2)]),
    ("shl.b32 %r6, %r5, 33;", [(-1, 0)]),
    ("shr.s32 %r6, %r5, 33;", [(-5, -1), (5, 0)]),
    ("shr.u32 %r6, %r5, 28;", [(-1, 15)]),
    ("bfi.b32 %r6, %r5, -1, 4, 8;", [(0xFF, -1), (0, -0xFF1)]),
    ("bfe.s32 %r6, %r5, 4, 4;", [(0x80, -8), (0x70, 7)]),
    ("bfe.u32 %r6, %r5, 28, 8;", [(-1, 15)]),
    ("prmt.b32 %r6, %r5, 0x77665544, 0x5410;", [(0x33221100, 0x55441100)]),
    ("shf.l.wrap.b32 %r6, %r5, 1, 36;", [(-0x10000000, 31)]),
    ("mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r6, {%rs2, %rs1};", [(0x12345678, 0x56781234)]),
    ("mov.b64 %rd6, {%r5, 1}; shr.u64 %rd6, %rd6, 16; cvt.u32.u64 %r6, %rd6;", [(0x12345678, 0x11234)]),
    ("setp.lt.s32 %p1, %r5, 0; selp.b32 %r6, 1, 2, %p1;", [(-1, 1), (0, 2)]),
    ("setp.lt.u32 %p1, %r5, 5; selp.b32 %r6, 1, 2, %p1;", [(-1, 2), (0, 1)]),
    ("setp.eq.s32 %p1, 1, 1; setp.gt.and.s32 %p2, %r5, 3, %p1; selp.b32 %r6, 1, 2, %p2;", [(4, 1), (3, 2)]),
    ("setp.gt.s32 %p1|%p2, %r5, 3; selp.b32 %r6, 1, 2, %p2;", [(4, 2), (3, 1)]),
    (
        "mov.b32 %f1, %r5; setp.ltu.f32 %p1, %f1, 0f00000000; selp.b32 %r6, 1, 2, %p1;",
        [(ONE, 2), (MINUS_THREE, 1), (NAN, 1)],
    ),
    ("mov.b32 %f1, %r5; setp.lt.f32 %p1, %f1, 0f00000000; selp.b32 %r6, 1, 2, %p1;", [(MINUS_THREE, 1), (NAN, 2)]),
    ("mov.b32 %f1, %r5; setp.ne.f32 %p1, %f1, %f1; selp.b32 %r6, 1, 2, %p1;", [(NAN, 2), (ONE, 2)]),
    ("mov.b32 %f1, %r5; setp.neu.f32 %p1, %f1, %f1; selp.b32 %r6, 1, 2, %p1;", [(NAN, 1), (ONE, 2)]),
    ("mov.b32 %f1, %r5; setp.nan.f32 %p1, %f1, %f1; selp.b32 %r6, 1, 2, %p1;", [(NAN, 1), (ONE, 2)]),
    ("mov.b32 %f1, %r5; fma.rn.f32 %f1, %f1, %f1, 0fBF800000; mov.b32 %r6, %f1;", [(MINUS_THREE, word(8.0))]),
    (  # of 1 + 2^-11 + 2^-24, and of the same below 0
        "mov.b32 %f1, %r5; fma.rm.f32 %f1, %f1, 0f3F800800, 0f00000000; mov.b32 %r6, %f1;",
        [(0x3F800800, 0x3F801000), (0xBF800800, 0xBF801001 - 2**32), (ONE, 0x3F800800), (INFINITY, INFINITY)],
    ),
    (
        "mov.b32 %f1, %r5; fma.rm.f32 %f1, %f1, 0f3F800000, 0f4B400001; mov.b32 %r6, %f1;",
        [(word(0.75), 0x4B400001), (word(-0.25), 0x4B400000), (MINUS_THREE, 0x4B3FFFFE)],
    ),
    ("mov.b32 %f1, %r5; fma.rm.f32 %f1, %f1, %f1, 0fBF800000; mov.b32 %r6, %f1;", [(ONE, -(2**31)), (INFINITY, INFINITY)]),
    (
        "mov.b32 %f1, %r5; cvt.sat.f32.f32 %f1, %f1; mov.b32 %r6, %f1;",
        [(word(0.25), word(0.25)), (word(2.0), ONE), (MINUS_THREE, 0), (NAN, 0), (INFINITY, ONE)],
    ),
    (
        "mov.b32 %f1, %r5; copysign.f32 %f1, %f1, 0f40000000; mov.b32 %r6, %f1;",
        [(MINUS_THREE, word(-2.0)), (ONE, word(2.0))],
    ),
    ("mov.b32 %f1, %r5; cvt.f64.f32 %fd1, %f1; rcp.rn.f64 %fd1, %fd1; mov.b64 {%r7, %r6}, %fd1;", [(word(4.0), 0x3FD00000)]),
    (
        "mov.b32 %f1, %r5; cvt.f64.f32 %fd1, %f1; rcp.approx.ftz.f64 %fd1, %fd1; mov.b64 {%r7, %r6}, %fd1;",
        [(word(4.0), 0x3FD00000), (0, 0x7FF00000), (word(3.0), 0x3FD55555)],
    ),
    ("mov.b32 %f1, %r5; cvt.rni.s32.f32 %r6, %f1;", [(word(2.5), 2), (word(-3.6), -4), (NAN, 0), (word(1e20), 2**31 - 1)]),
    ("mov.b32 %f1, %r5; max.f32 %f1, %f1, 0f3F800000; mov.b32 %r6, %f1;", [(NAN, ONE), (MINUS_THREE, ONE)]),
    ("mov.b32 %f1, %r5; cvt.rn.f16.f32 %rs1, %f1; cvt.u32.u16 %r6, %rs1;", [(ONE, 0x3C00)]),
    (
        "mov.u32 %r6, 0; @%p3 mov.u32 %r6, 5; setp.eq.s32 %p1, %r5, 1; @!%p1 bra $L_e; add.s32 %r6, %r6, 1; $L_e:",
        [(1, 1), (2, 0)],
    ),
    (
        "mov.u32 %r6, 0; $L_a: add.s32 %r6, %r6, 2; add.s32 %r5, %r5, -1; setp.gt.s32 %p1, %r5, 0; @%p1 bra $L_a;",
        [(3, 6), (0, 2)],
    ),
]


def test_known_answers(small: Simulator) -> None:
    """One kernel has all of ANSWERS: each thread takes one case, whose word goes in and whose answer comes out."""
    cases = [(ptx, given, want) for ptx, pairs in ANSWERS for given, want in pairs]
    for first in range(0, len(cases), 64):  # a case for each thread of a launch
        some = cases[first : first + 64]
        body = "mov.u32 %r6, -1;\n"
        for number, (ptx, _, _) in enumerate(some):
            body += f"setp.ne.s32 %p3, %r4, {number}; @%p3 bra $L_after_{number};\n"
            body += ptx.replace("$L_", f"$L_{number}_") + f"\n$L_after_{number}:\n"
        given = torch.zeros(64, dtype=torch.int32)
        given[: len(some)] = torch.tensor([g - 2**32 if g >= 2**31 else g for _, g, _ in some], dtype=torch.int32)
        found = run(translated(small, body), given).tolist()
        wrong = [(ptx, g, want, got) for (ptx, g, want), got in zip(some, found, strict=False) if got != want]
        assert not wrong


def test_faults_are_those_of_the_sources(small: Simulator) -> None:
    """A missing barrier is a race, at the place in the source; a barrier in its place is none."""
    exchange = """
    .loc 1 7 1
    shl.b32 %r7, %r1, 2; mov.u32 %r8, smem; add.s32 %r9, %r8, %r7;
    st.shared.b32 [%r9], %r5;
    BARRIER
    .loc 1 9 1
    xor.b32 %r10, %r9, 128;
    ld.shared.b32 %r6, [%r10];
    """
    given = torch.arange(64, dtype=torch.int32)
    found = run(translated(small, exchange.replace("BARRIER", "bar.sync 0;")), given)
    assert found.tolist() == (given ^ 32).tolist()
    with pytest.raises(Fault, match=r"at 1:\d < `.*` and .* at 1:\d < `.*` are unordered") as fault:
        run(translated(small, exchange.replace("BARRIER", "")), given)
    assert fault.value.kind == "data race"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("mov.u32 %r8, smem; ld.shared.b32 %r6, [%r8+256];", "out of bounds"),
        ("ld.global.b32 %r6, [%rd4+65536];", "out of bounds"),
        ("mov.u64 %rd6, 0; ld.global.b32 %r6, [%rd6];", "out of bounds"),
        ("mov.u32 %r8, smem; ld.global.b32 %r6, [%rd4+2];", "misaligned access"),
        ("barrier.cluster.wait.acquire.aligned; mov.u32 %r6, 0;", "bad barrier"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bar.warp.sync -1; mov.u32 %r6, 0; @!%p1 ret;", "divergent warp"),
        ("mov.u32 %r8, smem; mbarrier.arrive.shared::cta.b64 _, [%r8]; mov.u32 %r6, 0;", "bad mbarrier"),
        ("trap;", "trap"),
    ],
)
def test_faults(small: Simulator, line: str, kind: str) -> None:
    with pytest.raises(Fault) as fault:
        run(translated(small, line), torch.zeros(64, dtype=torch.int32))
    assert fault.value.kind == kind


def test_a_kernel_without_ptx_is_an_error(small: Simulator) -> None:
    """Never the compiled source in its place."""

    def find(symbol: str) -> Kernel:
        raise LookupError(f"nothing for {symbol}")

    with pytest.raises(LookupError, match=r"nothing for .*reverse_kernel"):
        run(PtxSimulator(small.library, find), torch.zeros(64, dtype=torch.int32))
    # Other simulators of the same library run what was compiled.
    found = run(Simulator(small.library), torch.arange(64, dtype=torch.int32))
    assert found.tolist() == list(range(63, -1, -1))


def test_names_of_anonymous_namespaces() -> None:
    by_nvcc = "_ZN9fused_rnn46_GLOBAL__N__b4087fc5_13_primitives_cu_70b8dc6b11copy_kernelENS0_9PrimitiveE"
    assert build.canonical(by_nvcc) == "_ZN9fused_rnn12_GLOBAL__N_111copy_kernelENS0_9PrimitiveE"
    assert build.canonical(build.canonical(by_nvcc)) == build.canonical(by_nvcc)
