"""What threads do together: barriers, shuffles, tensor cores, clusters."""

from __future__ import annotations

import re
from collections.abc import Callable

from .operands import Operands

Fixed = Callable[[Operands], str]


def _barrier(o: Operands) -> str:
    if len(o) == 1:
        return f"simt_host::barrier(int({o.source(0, 'u32')}), 0, nullptr, {o.pc});"
    o.expect(2)
    return f"simt_host::barrier(int({o.source(0, 'u32')}), int({o.source(1, 'u32')}), nullptr, {o.pc});"


def _barrier_any(o: Operands) -> str:
    """p, id, {threads,} q"""
    threads = o.source(2, "u32") if len(o) == 4 else "0"
    o.expect(4 if len(o) == 4 else 3)
    answer = f"simt_ptx::barrier_any({o.source(1, 'u32')}, {threads}, {o.source(len(o) - 1, 'pred')}, {o.pc})"
    return o.target("pred", answer)


def _sync_warp(o: Operands) -> str:
    o.expect(1)
    return f"simt_ptx::sync_warp({o.source(0, 'u32')}, {o.pc});"


def _ballot(o: Operands) -> str:
    o.expect(3)
    return o.target("b32", f"simt_ptx::ballot({o.source(1, 'pred')}, {o.source(2, 'u32')}, {o.pc})")


def _shuffle(o: Operands) -> str:
    """d|p, a, b, c, mask"""
    o.expect(5)
    mode = {"idx": "kIdx", "bfly": "kBfly", "up": "kUp", "down": "kDown"}[o.instruction.opcode.split(".")[2]]
    target, _, valid = o[0].partition("|")
    arguments = ", ".join(o.source(i, "u32") for i in range(1, 5))
    code = f"bool valid; const uint32_t d = simt_ptx::shuffle(simt_ptx::Shuffle::{mode}, {arguments}, &valid, {o.pc}); "
    return code + o.write(target, "b32", "d") + (o.write(valid, "pred", "valid") if valid else "")


_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32")
# Registers of a and b: 16 K and 8 K elements by 32 lanes.
_MMA_TYPES = {("f16", 8): (2, 1), ("f16", 16): (4, 2), ("bf16", 8): (2, 1), ("bf16", 16): (4, 2), ("tf32", 8): (4, 2)}


def _mma(o: Operands) -> str | None:
    """d, a, b, c"""
    found = _MMA.fullmatch(o.instruction.opcode)
    if not found or (found[2], int(found[1])) not in _MMA_TYPES:
        return None
    o.expect(4)
    k, kind = int(found[1]), found[2]
    a_count, b_count = _MMA_TYPES[kind, k]
    d, a, b, c = o.vector(0, 4), o.vector(1, a_count), o.vector(2, b_count), o.vector(3, 4)
    code = f"float d[] = {{{', '.join(o.read(n, 'f32') for n in c)}}}; "
    for name, registers in (("a", a), ("b", b)):
        code += f"const uint32_t {name}[] = {{{', '.join(o.read(n, 'b32') for n in registers)}}}; "
    name = {"f16": "kF16", "bf16": "kBf16", "tf32": "kTf32"}[kind]
    code += f"simt_host::mma(simt_host::MmaType::{name}, {k}, d, a, b, {o.pc}); "
    return code + " ".join(o.write(n, "f32", f"d[{i}]") for i, n in enumerate(d))


def _ldmatrix(o: Operands) -> str | None:
    found = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", o.instruction.opcode)
    if not found:
        return None
    o.expect(2)
    count = int(found[1])
    names = o.vector(0, count)
    transpose = "true" if found[2] else "false"
    code = f"uint32_t m[{count}]; simt_ptx::ldmatrix({transpose}, {count}, m, {o.address(1, 'u32')}, {o.pc}); "
    return code + " ".join(o.write(n, "b32", f"m[{i}]") for i, n in enumerate(names))


def _mbarrier(o: Operands, index: int) -> str:
    return f"simt_ptx::mbarrier_at({o.address(index, 'u32')})"


def _mbarrier_init(o: Operands) -> str:
    o.expect(2)
    return f"simt_host::mbarrier_init({_mbarrier(o, 0)}, int({o.source(1, 'u32')}), {o.pc});"


def _sink(o: Operands) -> None:
    if o[0] != "_":
        raise o.error("the state of an mbarrier is not translated, only `_`")


def _mbarrier_arrive(o: Operands) -> str:
    o.expect(2)
    _sink(o)
    return f"simt_host::mbarrier_expect({_mbarrier(o, 1)}, 0, {o.pc});"


def _mbarrier_expect(o: Operands) -> str:
    o.expect(3)
    _sink(o)
    return f"simt_host::mbarrier_expect({_mbarrier(o, 1)}, int({o.source(2, 'u32')}), {o.pc});"


def _mbarrier_wait(acquire: bool) -> Fixed:
    """try_wait may return before the phase ends; here it waits, and others run."""

    def rule(o: Operands) -> str:
        o.expect(3)
        wait = f"simt_host::mbarrier_wait({_mbarrier(o, 1)}, int({o.source(2, 'u32')}), {str(acquire).lower()}, {o.pc});"
        return f"{wait} {o.target('pred', 'true')}"

    return rule


def _store_async(o: Operands) -> str | None:
    """[to], value, [mbarrier]"""
    prefix = r"st\.async(?:\.weak)?\.shared::cluster\.mbarrier::complete_tx::bytes"
    found = re.fullmatch(prefix + r"(?:\.v([24]))?\.[bu]32", o.instruction.opcode)
    if not found:
        return None
    o.expect(3)
    names = o.vector(1, int(found[1] or 1))
    code = f"const uint32_t v[] = {{{', '.join(o.read(n, 'b32') for n in names)}}}; "
    arguments = f"{o.address(0, 'u32')}, v, {4 * len(names)}, {o.address(2, 'u32')}, {o.pc}"
    return code + f"simt_host::store_async({arguments});"


def _map_to_rank(o: Operands) -> str:
    o.expect(3)
    return o.target("u32", f"simt_ptx::map_to_rank({o.source(1, 'u32')}, {o.source(2, 'u32')}, {o.pc})")


def _plain(code: str) -> Fixed:
    def rule(o: Operands) -> str:
        o.expect(0)
        return code.replace("PC", o.pc)

    return rule


_FIXED: dict[str, Fixed] = {
    "bar.sync": _barrier,
    "barrier.sync": _barrier,
    "bar.red.or.pred": _barrier_any,
    "barrier.red.or.pred": _barrier_any,
    "bar.warp.sync": _sync_warp,
    "vote.sync.ballot.b32": _ballot,
    **{f"shfl.sync.{mode}.b32": _shuffle for mode in ("idx", "bfly", "up", "down")},
    "griddepcontrol.wait": _plain("simt_host::grid_wait(PC);"),
    "griddepcontrol.launch_dependents": _plain("simt_host::grid_launch_dependents();"),
    "mapa.shared::cluster.u32": _map_to_rank,
    "mbarrier.init.shared::cta.b64": _mbarrier_init,
    "mbarrier.arrive.shared::cta.b64": _mbarrier_arrive,
    "mbarrier.arrive.expect_tx.shared::cta.b64": _mbarrier_expect,
    "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64": _mbarrier_wait(acquire=False),
    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64": _mbarrier_wait(acquire=True),
    "fence.acquire.sync_restrict::shared::cluster.cluster": _plain("simt_host::fence_acquire();"),
    "fence.mbarrier_init.release.cluster": _plain("simt_host::fence_mbarrier_init();"),
    # Both halves of one barrier: a thread that has arrived does nothing before it waits.
    "barrier.cluster.arrive.release.aligned": _plain("simt_ptx::cluster_arrive(arrived, PC);"),
    "barrier.cluster.wait.acquire.aligned": _plain("simt_ptx::cluster_wait(arrived, PC);"),
    "trap": _plain('simt_ptx::stop("__trap()", PC);'),
}


def _fixed(o: Operands) -> str | None:
    rule = _FIXED.get(o.instruction.opcode)
    return rule(o) if rule else None


RULES: list[Callable[[Operands], str | None]] = [_fixed, _mma, _ldmatrix, _store_async]
