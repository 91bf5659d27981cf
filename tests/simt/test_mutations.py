"""Proof that the simulated tests find faults: every mutant of the step kernels is reported or gives wrong results.

The table of all mutants is written to build/simt/mutants.txt.
"""

from __future__ import annotations

import builder
import pytest
import torch
from cases import Case
from mutants import all_mutants, replacement
from mutation_survey import check, outcome, survey
from simulator import Simulator
from test_kernels import Simulated, run, run_wild_lengths, run_without_gradients
from test_options import Optional
from test_options import run as run_optional

F16 = torch.float16
SMALL, LARGE = (0, 3), (2, 2)
BOTH = {"resets": True, "bidirectional": True, "dtype": F16}
CASES = [
    Simulated(Case("LSTM", 3, 11, 5, 37, ragged="lengths", **BOTH), 3, "step", tile=SMALL),
    Simulated(Case("GRU", 3, 11, 5, 37, ragged="packed", **BOTH), 3, "step", tile=SMALL),
    Simulated(Case("RNN_TANH", 3, 11, 5, 136, ragged="lengths", dtype=F16), 2, "step", tile=(0, 2)),
    *(Simulated(Case("RNN_TANH", 2, 3, 5, 40, dtype=F16), 1, "step", tile=(0, stages)) for stages in (4, 6, 8)),
    Simulated(Case("LSTM", 2, 11, 37, 37, ragged="lengths", proj=18, dtype=F16), 2, "step", tile=SMALL),
    Simulated(Case("LSTM", 2, 67, 5, 72, ragged="packed", proj=40, resets=True, dtype=F16), 2, "step", tile=LARGE),
    Simulated(Case("LSTM", 1, 11, 37, 140, ragged="lengths", dtype=F16), 3, "single", tile=SMALL),
    Simulated(Case("GRU", 1, 11, 37, 37, has_biases=False, states=False, resets=True, dtype=F16), 2, "single", tile=SMALL),
    Simulated(Case("LSTM", 2, 67, 5, 72, ragged="lengths", dtype=F16), 1, "step", tile=LARGE),
    Simulated(Case("LSTM", 2, 3, 5, 40, states=False, has_biases=False, dtype=F16), 1, "step", tile=(0, 2)),
    Simulated(Case("LSTM", 2, 3, 5, 9, ragged="lengths", states=False, dtype=F16), 1, "step", tile=(0, 2)),
]

MODIFIED = [
    Optional(Case("LSTM", 3, 11, 5, 37, ragged="packed", **BOTH), ("steps", "masks", "candidate", "every_c"), 2, tile=SMALL),
    Optional(Case("GRU", 3, 11, 5, 37, ragged="lengths", **BOTH), ("rows", "shares", "product", "candidate"), 2, tile=SMALL),
    Optional(Case("RNN_TANH", 3, 11, 5, 37, ragged="packed", **BOTH), ("one", "masks", "product"), 2, tile=SMALL),
    Optional(Case("RNN_TANH", 3, 3, 5, 37, dtype=F16), ("shares",), 1, tile=SMALL),
    Optional(Case("LSTM", 3, 3, 5, 9, resets=True, dtype=F16), ("shares",), 1, tile=SMALL),
    Optional(Case("LSTM", 3, 11, 5, 37, proj=18, ragged="lengths", dtype=F16), ("product", "every_c"), 1, tile=SMALL),
    Optional(Case("LSTM", 2, 3, 5, 9, dtype=F16), ("clip",), 1, tile=SMALL, exact=True),
    Optional(Case("GRU", 2, 3, 5, 9, resets=True, dtype=F16), ("clip",), 1, tile=SMALL, exact=True),
]

# Mutants that no test can catch, because the program means the same without the line, and why.
_LAST = "saves stores: every active step writes the final state, and the last one is right"
EQUIVALENT: dict[str, str] = {
    "matmul.cuh `if (next < chunks) {` -> `{`": "saves copies: beyond the last chunk they are zeros that nobody reads",
    "matmul.cuh `any_row ? chunks_ : 0` -> `chunks_`": "saves the product of states that are all zero",
    "forward.cuh `if (active && !(info.flags & kHasNext))` -> `if (active)`": _LAST,
    "forward.cuh `if (!(info.flags & kHasNext)) store_c_n` -> `store_c_n`": _LAST,
    "backward.cuh `C::kHasC && !(info.flags & kHasPrevious)` -> `C::kHasC`": _LAST,
}


def work(sim: Simulator) -> None:
    for case in CASES:
        run(sim, case)
    for optional in MODIFIED:
        run_optional(sim, optional)
    run_without_gradients(sim, CASES[0])
    run_wild_lengths(sim, CASES[0])


def test_unchanged_kernels_pass() -> None:
    assert outcome(builder.build(replace=replacement(None)), work) == ""


@pytest.mark.slow
def test_mutants_are_caught() -> None:
    check(survey(all_mutants(), replacement, work, "mutants-progress.txt"), EQUIVALENT, "mutants.txt")
