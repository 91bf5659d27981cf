"""Proof that the simulated tests find faults: every mutant of the persistent kernels is reported or gives wrong results.

The table of all mutants is written to build/simt/persistent-mutants.txt.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case
from mutation_survey import check, survey
from persistent_mutants import all_mutants, replacement
from simulator import Simulator
from test_kernels import DEVICES, Simulated, run, run_not_a_number, run_wild_lengths, run_without_d_h0, run_without_gradients
from test_persistent import run_cut  # and its devices

F16, F32 = torch.float16, torch.float32
ALL_ON = {"ragged": "lengths", "resets": True, "dtype": F16}
PACKED = {"ragged": "packed", "resets": True, "dtype": F16}
CASES = [
    Simulated(Case("LSTM", 3, 9, 4, 21, bidirectional=True, **ALL_ON), 3, "grid"),
    Simulated(Case("LSTM", 3, 9, 4, 21, bidirectional=True, **ALL_ON), 3, "cluster"),
    Simulated(Case("RNN_TANH", 3, 3, 4, 21, **PACKED), 3, "cluster"),
    Simulated(Case("GRU", 6, 9, 4, 40, **ALL_ON), 3, "grid"),
    Simulated(Case("GRU", 6, 9, 4, 40, **ALL_ON), 3, "cluster"),
    Simulated(Case("RNN_TANH", 3, 3, 4, 21, has_biases=False, states=False, **PACKED), 3, "grid"),
    Simulated(Case("LSTM", 3, 3, 4, 21, has_biases=False, states=False, **PACKED), 3, "cluster"),
    Simulated(Case("LSTM", 3, 3, 4, 21, dtype=F16), 1, "grid"),
    Simulated(Case("GRU", 3, 3, 4, 21, ragged="lengths", dtype=F32), 3, "grid"),
    Simulated(Case("GRU", 3, 3, 4, 21, ragged="lengths", dtype=F32), 3, "cluster"),
    # A cluster of one block.
    Simulated(Case("LSTM", 3, 9, 4, 12, **ALL_ON), 3, "cluster"),
    # Several launches over one workspace.
    Simulated(Case("RNN_TANH", 2, 75, 4, 20, bidirectional=True, **ALL_ON), 2, "grid", "FOUR"),
    # Groups of several tiles in a cluster: one block, whose threads have half a tile's elements each; blocks of 48 units.
    Simulated(Case("LSTM", 3, 17, 4, 16, bidirectional=True, **ALL_ON), 1, "cluster", "FOUR"),
    Simulated(Case("RNN_TANH", 3, 17, 4, 16, bidirectional=True, **PACKED), 1, "cluster", "FOUR"),
    Simulated(Case("LSTM", 3, 17, 4, 150, **ALL_ON), 1, "cluster", "FOUR"),
    # Packed sequences longer than the distance of the prefetch; in one direction, its guess goes beyond the last row.
    Simulated(Case("LSTM", 6, 9, 4, 21, bidirectional=True, **PACKED), 1, "cluster"),
    Simulated(Case("GRU", 6, 9, 4, 21, **PACKED), 1, "cluster"),
    # Clusters of more than 4 and of more than 8 blocks.
    Simulated(Case("GRU", 2, 1, 4, 70, dtype=F16), 1, "cluster"),
    Simulated(Case("LSTM", 2, 1, 4, 140, dtype=F16), 1, "cluster"),
    # More chunks, and weights in shared memory.
    Simulated(Case("LSTM", 3, 3, 4, 150, **ALL_ON), 1, "cluster", "CLUSTERS_OF_4"),
    Simulated(Case("LSTM", 2, 1, 4, 285, dtype=F32), 1, "cluster", "CLUSTERS_OF_8", tf32=True),
    Simulated(Case("GRU", 1, 3, 4, 517, dtype=F32), 1, "grid"),
    # Blocks of 32 units: registers hold the states of the first of several tiles.
    Simulated(Case("RNN_TANH", 3, 17, 4, 50, **ALL_ON), 1, "cluster", "FOUR"),
]

# Mutants that no test can catch, because the program means the same without the line, and why.
_BATCHES = "saves a branch for each chunk of a batch that the warp does not have"
EQUIVALENT: dict[str, str] = {
    "persistent_elements.cuh `return e.unit % 8 == 0 &&` -> `return`": "saves hints: neighbours give the same",
    "persistent_scatter.cuh `if (tile_of(j) < all_tiles()) load_fragment` -> `load_fragment`": (
        "fragments beyond the last are zeros by their own masks; the branch saves their making"
    ),
    "persistent_product.cuh `if (first >= chunks_) break;` -> ``": _BATCHES,
    "persistent_product.cuh `if (first >= chunks_) break;` -> `` #2": _BATCHES,
    "exchange_grid.cuh `if (missing()) request` -> `request`": "saves loads: words that have come stay as they are",
}


def work(sim: Simulator) -> None:
    for case in CASES:
        run(sim, case)
    for case in [*CASES[:3], CASES[-1]]:  # every schedule of a thread's elements
        run_without_d_h0(sim, case)
    for case in CASES[:5]:
        run_without_gradients(sim, case)
    for case in CASES[:2]:
        run_wild_lengths(sim, case)
        run_cut(sim, case)
        run_cut(sim, case, wants_d_h0=False)
    for case in CASES[2:4]:
        run_cut(sim, case)
    for case in CASES[3:5]:
        run_not_a_number(sim, replace(case, case=replace(case.case, ragged="dense")))


@pytest.mark.slow
def test_persistent_mutants_are_caught() -> None:
    assert {"FOUR", "CLUSTERS_OF_4", "CLUSTERS_OF_8"} <= set(DEVICES)
    results = survey(all_mutants(), replacement, work, "persistent-mutants-progress.txt")
    check(results, EQUIVALENT, "persistent-mutants.txt")
