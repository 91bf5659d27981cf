"""Proof that the tests of PTX find faults: mutants of the inline PTX of simt.cuh are refused, reported or give other bits.

The table of all mutants is written to build/simt/ptx-mutants.txt.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache

import builder
import pytest
import torch
from mutation_survey import check, outcome
from simulator import Simulator

from . import build, primitives
from .loader import PtxSimulator
from .mutants import Mutant, mutants_of
from .source import Kernel, PtxError
from .translate import function

ARCH = "sm_90a"  # has every primitive
pytestmark = pytest.mark.skipif(build.nvcc() is None, reason=build.NO_NVCC)

_HINT = "a hint: no result depends on it"
_STRONGER = "orders more than is asked for"
# Mutants that no test can catch, because the program means the same, and why.
EQUIVALENT: dict[str, str] = {
    "convert prefetch.global.L2: left out": _HINT,
    "convert prefetch.global.L2: becomes prefetch.global.L1": _HINT,
    "conditional prefetch.global.L2: left out": _HINT,
    "conditional prefetch.global.L2: becomes prefetch.global.L1": _HINT,
    "conditional setp.ne.u32: becomes setp.ne.u16": "conditions are 0 or 1",
    "conditional setp.ne.u32: operands 1 and 2 swapped": "differs either way",
    "dependent griddepcontrol.launch_dependents: left out": "the next grid starts when this one ends",
    "copy cp.async.cg.shared.global of 16 bytes: becomes cp.async.ca.shared.global": "the same bytes, through L1",
    "copy cp.async.wait_group: -1 for its count": _STRONGER,
    "hand_over ld.relaxed.gpu.global.v2.b64: becomes ld.acquire.gpu.global.v2.b64": _STRONGER,
    "hand_over st.relaxed.gpu.global.b64: becomes st.release.gpu.global.b64": _STRONGER,
    **{
        f"hand_over {op}: becomes {op.replace('.gpu.', '.sys.')}": _STRONGER
        for op in (
            *("ld.acquire.gpu.global.u32", "ld.relaxed.gpu.global.v2.b64"),
            *("st.release.gpu.global.u32", "st.relaxed.gpu.global.b64"),
        )
    },
    "dependent griddepcontrol.launch_dependents: becomes griddepcontrol.wait": "waits for nothing: it is the first grid",
    "cluster mov.u32: becomes mov.u16": "ranks are small",
    # Every wait of this kernel is over at once here: try_wait returns when the phase has ended.
    "cluster selp.u32: left out": "the wait has ended, and the loop around it with any number but 0",
    "cluster selp.u32: becomes selp.u16": "1 or 0 in either width",
    "cluster mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64: becomes "
    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64": _STRONGER,
}


@cache
def kernels() -> dict[str, str]:
    """The kernels of primitives.cu that each run launches: symbol by name."""
    names = build.file_of(primitives.SOURCE, ARCH).names
    pairs = {"dependent": ("before", "after")}
    return {
        f"{run} {kernel}" if run in pairs else run: next(n for n in names if re.search(rf"\d+{kernel}_kernelE", n))
        for run in primitives.KERNELS
        for kernel in pairs.get(run, (run,))
    }


def mutants() -> Iterator[Mutant]:
    for name, symbol in kernels().items():
        yield from mutants_of(name.split()[0], build.file_of(primitives.SOURCE, ARCH).kernel(symbol))


def refusal(mutant: Mutant) -> str:
    try:
        function(mutant.kernel)
    except PtxError as error:
        return f"refused: {error}".replace(f"{mutant.symbol}: ", "")[:200]
    return ""


def run_mutant(mutant: Mutant, compiled: build.Compiled) -> str:
    """What is said of a mutant; "" when it gives what the unchanged kernel gives."""
    file = build.file_of(primitives.SOURCE, ARCH)
    canonical = {build.canonical(name): name for name in file.names}
    run = mutant.name.split()[0]

    def find(symbol: str) -> Kernel | build.Compiled:
        name = canonical[symbol]
        return compiled if name == mutant.symbol else file.kernel(name)

    def work(sim: Simulator) -> None:
        want = primitives.run(sim, run, primitives.DEVICES[ARCH])
        ptx = PtxSimulator(sim.library, find, "-O0")
        for seed in primitives.SEEDS:
            found = primitives.run(ptx, run, primitives.DEVICES[ARCH], seed)
            assert torch.equal(found, want), f"other bits under seed {seed}"

    # A loop that polls nothing any more has no end; others take less than a second.
    return outcome(primitives.library(ARCH), work, limit=20)


def test_every_asm_statement_has_mutants() -> None:
    """The instructions of the asm strings of simt.cuh, but for those that older compilers get, are all in primitives.cu."""
    text = (builder.ROOT / "csrc" / "cuda" / "device" / "simt.cuh").read_text()
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', re.sub(r"//[^\n]*", "", text))
    opcodes = {
        found[1]
        for string in strings
        for part in re.split(r";|\\n|[{}]\\n", string)
        if (found := re.match(r"\s*([a-z]\w*(?:\.[\w:]+)+)(?:\s|$)", part))
    }
    file = build.file_of(primitives.SOURCE, ARCH)
    found_there = {i.opcode for name in file.names for i in file.kernel(name).instructions if i.inline}
    assert opcodes - found_there == {"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"}


@pytest.mark.slow
def test_mutants_of_inline_ptx_are_caught() -> None:
    log = builder.CACHE / "ptx-mutants-progress.txt"
    log.unlink(missing_ok=True)
    results: dict[str, str] = {}
    for _, group in itertools.groupby(mutants(), key=lambda mutant: mutant.symbol):
        some = [*group]
        results |= {mutant.name: refusal(mutant) for mutant in some}
        others = [mutant for mutant in some if not results[mutant.name]]
        compiled = build.compile_kernels([m.kernel for m in others], primitives.library(ARCH), "-O0")
        for mutant, code in zip(others, compiled, strict=True):
            results[mutant.name] = run_mutant(mutant, code)
            with log.open("a") as lines:
                lines.write(f"{mutant.name}: {results[mutant.name] or 'SURVIVED'}\n")
    check(results, EQUIVALENT, "ptx-mutants.txt")
