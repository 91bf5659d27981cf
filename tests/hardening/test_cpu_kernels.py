"""The CPU kernels without torch (harness/): under AddressSanitizer and UBSan with gaps in the workspace, between pages that
nobody may touch, under ThreadSanitizer, and with every allocation failing once.

FUSED_RNN_HARDENING=SEED[:FIRST[:SECONDS]] chooses the random cases of each test; a failure names its number.
"""

from __future__ import annotations

import os
from pathlib import Path

import native
import pytest

import fused_rnn
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

AVAILABLE = fused_rnn.build_info().get("cpu_instruction_sets", [])
# "parts": what AVX-512 and AMX do, in plain C++ (harness/parts.cpp).
SETS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in [*AVAILABLE, "parts"], reason=f"needs a CPU with {name}"))
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "portable", "parts")
]


def cases(seconds: float) -> list[object]:
    """Seed, first case and seconds of a run."""
    fields = os.environ.get("FUSED_RNN_HARDENING", "0").split(":")
    return [fields[0], fields[1] if len(fields) > 1 else 0, fields[2] if len(fields) > 2 else seconds]


@pytest.mark.parametrize("instruction_set", SETS)
def test_sanitized(instruction_set: str) -> None:
    """Every access of the source, between redzones, guard pages and gaps; results as in float64."""
    program = native.build("sanitized")
    native.run(program, "layers", instruction_set, *cases(5))
    native.run(program, "products", instruction_set, *cases(2))


@pytest.mark.parametrize("instruction_set", ["avx2", "parts"])
def test_failing_allocations(instruction_set: str) -> None:
    """Each allocation of a call fails once: std::bad_alloc, no leak, and the next call is right."""
    if instruction_set not in [*AVAILABLE, "parts"]:
        pytest.skip(f"needs a CPU with {instruction_set}")
    printed = native.run(native.build("sanitized"), "allocations", instruction_set)
    counts = [int(line.split(": ")[1].split()[0]) for line in printed.splitlines()]
    assert len(counts) == 8 and min(counts) > 3, printed


def threads_program() -> Path:
    """With the kernels of one instruction set: threads share work alike with all; each takes long to compile."""
    return native.build("threads", sets=["avx2"] if "avx2" in AVAILABLE else [])


def test_threads() -> None:
    """Layers on two to four threads, and callers that share the cache of weights, under ThreadSanitizer."""
    printed = native.run(threads_program(), "threads", *cases(10))
    kinds = dict(kind.split(": ") for kind in printed.splitlines()[-1].removeprefix("plans with ").split(", "))
    if "FUSED_RNN_HARDENING" not in os.environ:
        assert len(kinds) == 3 and min(map(int, kinds.values())) > 0, printed


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", SETS)
def test_guarded(instruction_set: str) -> None:
    """The kernels as they are shipped: optimised, masked accesses and tiles of AMX included, between guard pages."""
    program = native.build("guarded")
    native.run(program, "layers", instruction_set, *cases(120))
    native.run(program, "products", instruction_set, *cases(30))


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", SETS)
def test_sanitized_for_long(instruction_set: str) -> None:
    program = native.build("sanitized")
    seed, first, seconds = cases(180)
    native.run(program, "layers", instruction_set, int(str(seed)) + 1, first, seconds)
    native.run(program, "products", instruction_set, int(str(seed)) + 1, first, seconds)


@pytest.mark.slow
def test_threads_for_long() -> None:
    seed, first, seconds = cases(180)
    native.run(native.build("threads"), "threads", int(str(seed)) + 1, first, seconds)


FAULTS = {"gap": "AddressSanitizer", "page": "AddressSanitizer", "race": "ThreadSanitizer"}


@pytest.mark.parametrize(("fault", "report"), FAULTS.items())
def test_faults_are_found(fault: str, report: str) -> None:
    """The harness itself: an access to a gap of an arena, one past a guard page, and a race of two threads."""
    program = threads_program() if fault == "race" else native.build("sanitized")
    with pytest.raises(AssertionError, match=report):
        native.run(program, "fault", fault)
