"""Proof that the simulated tests find faults: every mutant of the kernels of family block is reported or gives wrong ones.

The table of all mutants is written to build/simt/block-mutants.txt.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_mutants import all_mutants, replacement
from cases import Case
from mutation_survey import check, survey
from simulator import Simulator
from test_kernels import Simulated, run, run_not_a_number, run_wild_lengths, run_without_d_h0, run_without_gradients
from test_persistent import run_cut

F16, F32 = torch.float16, torch.float32
ALL_ON = {"ragged": "lengths", "resets": True, "dtype": F16}
PACKED = {"ragged": "packed", "resets": True, "dtype": F16}
CASES = [
    Simulated(Case("LSTM", 6, 9, 4, 22, bidirectional=True, **ALL_ON), 3, "block"),
    Simulated(Case("GRU", 6, 5, 4, 34, bidirectional=True, **PACKED), 3, "block"),
    Simulated(Case("RNN_TANH", 6, 3, 4, 70, **PACKED), 2, "block"),
    Simulated(Case("LSTM", 3, 3, 4, 70, has_biases=False, states=False, dtype=F16), 1, "block"),
    Simulated(Case("GRU", 3, 3, 4, 22, ragged="lengths", dtype=F32), 2, "block"),
    Simulated(Case("LSTM", 2, 1, 4, 128, dtype=F32), 1, "block"),
    Simulated(Case("GRU", 2, 3, 4, 128, ragged="lengths", resets=True, dtype=F32), 1, "block"),  # weights in shared memory
]

# Mutants that no test can catch, because the program means the same without the line, and why.
EQUIVALENT: dict[str, str] = {
    "block_elements.cuh `made && modifier.resets && active(length, t)` -> `modifier.resets && active(length, t)`": (
        "nobody reads what is requested for a step that the launch does not make"
    ),
    "block_elements.cuh `x.reset && step + 1 < Base::steps` -> `x.reset`": (
        "the launch that makes the next step begins it from zeros itself"
    ),
    "block_kernels.cuh `if (backward.has_exchange(backward.steps - 1)) {` -> `{`": "it saves a product that nobody reads",
}


def work(sim: Simulator) -> None:
    for case in CASES:
        run(sim, case)
    for case in CASES[:2]:
        run_without_d_h0(sim, case)
        run_without_gradients(sim, case)
        run_cut(sim, case)
        run_cut(sim, case, wants_d_h0=False)
        run_not_a_number(sim, replace(case, case=replace(case.case, ragged="dense", bidirectional=False)))
    run_wild_lengths(sim, replace(CASES[0], case=replace(CASES[0].case, steps=3)))


@pytest.mark.slow
def test_block_mutants_are_caught() -> None:
    check(survey(all_mutants(), replacement, work, "block-mutants-progress.txt"), EQUIVALENT, "block-mutants.txt")
