"""Proof that the simulated tests find faults: every mutant of family gemm is reported or gives wrong results.

The table of all mutants is written to build/simt/gemm-mutants.txt.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from gemm_mutants import all_mutants, replacement
from mutation_survey import check, survey
from simulator import Simulator
from test_kernels import Simulated, run, run_without_d_h0
from test_options import Optional
from test_options import run as run_optional

F16 = torch.float16
ALL_ON = {"ragged": "lengths", "resets": True, "bidirectional": True, "dtype": F16}
PACKED = {**ALL_ON, "ragged": "packed"}
DENSE = {"bidirectional": True, "resets": True, "dtype": F16}
CASES = [
    Simulated(Case("LSTM", 4, 11, 5, 37, **ALL_ON), 2, "gemm"),
    Simulated(Case("GRU", 4, 11, 5, 37, **PACKED), 2, "gemm"),
    Simulated(Case("GRU", 3, 11, 5, 37, **DENSE), 2, "gemm"),
    Simulated(Case("RNN_TANH", 3, 3, 5, 9, ragged="lengths", states=False, dtype=F16), 1, "gemm"),
    Simulated(Case("LSTM", 3, 3, 5, 9, ragged="packed", states=False, has_biases=False, dtype=F16), 1, "gemm"),
    Simulated(Case("LSTM", 3, 11, 5, 37, proj=18, **PACKED), 2, "gemm"),
    Simulated(Case("LSTM", 3, 11, 5, 37, proj=18, **DENSE), 2, "gemm"),
]
MODIFIED = [
    Optional(Case("LSTM", 3, 11, 5, 37, **PACKED), ("steps", "masks", "candidate", "every_c"), 2, family="gemm"),
    Optional(Case("GRU", 3, 11, 5, 37, **DENSE), ("rows",), 1, family="gemm"),
    Optional(Case("RNN_TANH", 3, 3, 5, 9, dtype=F16), ("product",), 1, family="gemm"),
    Optional(Case("LSTM", 3, 11, 5, 37, proj=18, resets=True, dtype=F16), ("one", "product"), 1, family="gemm"),
]

# Mutants that no test can catch, because the program means the same without the line, and why.
EQUIVALENT: dict[str, str] = {}


def work(sim: Simulator) -> None:
    for case in CASES:
        run(sim, case)
    for optional in MODIFIED:
        run_optional(sim, optional)
    run_without_d_h0(sim, CASES[0])


@pytest.mark.slow
def test_gemm_mutants_are_caught() -> None:
    check(survey(all_mutants(), replacement, work, "gemm-mutants-progress.txt"), EQUIVALENT, "gemm-mutants.txt")
