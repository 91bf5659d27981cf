"""The CUDA backend under AddressSanitizer and UBSan: every family, cell, direction and arithmetic, forward and backward.

Little kernels with faults that the sanitizers must find are in test_simulator.py.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import builder
import pytest
import test_persistent  # its devices
import torch
from cases import CELLS, Case
from simulator import Simulator
from test_kernels import ARITHMETIC, DEVICES, Simulated, run

FAMILIES = ("single", "step", "grid", "cluster", "block", "gemm")


def cases(family: str) -> Iterator[Simulated]:
    """Each cell in two kinds of arithmetic, both directions in one, ragged, with resets."""
    kinds = [a for a in ARITHMETIC if family in ("single", "step", "gemm") or a[0] != torch.float64]
    take = itertools.cycle(kinds)
    for cell in CELLS:
        for _ in range(2):
            dtype, tf32 = next(take)
            steps = 1 if family == "single" else 3
            case = Case(
                cell,
                steps,
                9,
                5,
                38 if family == "block" else 37,
                bidirectional=True,
                ragged="lengths",
                resets=True,
                dtype=dtype,
            )
            yield Simulated(case, 1, family, tf32=tf32)
    for dtype, tf32 in kinds:
        if family in ("step", "gemm"):
            case = Case("LSTM", 2, 9, 5, 37, proj=18, bidirectional=True, ragged="packed", dtype=dtype)
            yield Simulated(case, 1, family, tf32=tf32)
        if family == "grid":
            case = Case("GRU", 2, 75, 4, 20, bidirectional=True, ragged="packed", dtype=dtype)
            yield Simulated(case, 1, family, "FOUR", tf32=tf32)


def main(library: str, family: str) -> None:
    assert "FOUR" in DEVICES, test_persistent
    sim = Simulator(Path(library))
    for simulated in cases(family):
        run(sim, simulated)
        print(f"ran {simulated}", flush=True)


@pytest.fixture(scope="module", params=["asan", "ubsan"])
def sanitized(request: pytest.FixtureRequest) -> tuple[str, Path]:
    library = builder.build(sanitize=request.param)
    assert {"asan": b"__asan_report_load", "ubsan": b"__ubsan_handle_add_overflow"}[request.param] in library.read_bytes()
    return request.param, library


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_backend_under_sanitizer(sanitized: tuple[str, Path], family: str) -> None:
    sanitize, library = sanitized
    find = [builder.CXX, f"-print-file-name=lib{sanitize}.so"]
    preload = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), str(builder.ROOT)])
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": paths}
    code = f"import test_sanitizers; test_sanitizers.main({str(library)!r}, {family!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-8000:]
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-8000:]
    assert result.stdout.count("ran ") == len(list(cases(family)))
