"""Run in the edited copy of the tree, by tests/test_new_cell.py: the new cell's CUDA kernels in the simulator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import builder
import pytest
import torch
from cases import Case
from layers import FAMILIES, PERSISTENT
from new_cell.steps import MODE
from simulator import Simulator
from test_kernels import Simulated, run


def simulated() -> Iterator[Simulated]:
    """Every family, forward and backward: dense, with lengths and resets, packed, two directions."""
    for family, dtype in itertools.product(FAMILIES, (torch.float32, torch.float16)):
        steps = 1 if family == "single" else 4
        odd = family != "block"  # which has even numbers of units alone
        yield Simulated(Case(MODE, steps, 3, 5, 22 - odd, dtype=dtype), 2, family)
        options = {"bidirectional": family != "cluster", "resets": True, "ragged": "lengths", "dtype": dtype}
        yield Simulated(Case(MODE, steps, 3, 5, 22 - odd, **options), 2, family)
        if family != "single":
            yield Simulated(Case(MODE, steps, 9, 19, 38 - odd, ragged="packed", dtype=dtype), 2, family)
    for family in FAMILIES:
        if family not in PERSISTENT:  # those have no fp64 kernels
            yield Simulated(Case(MODE, 1 if family == "single" else 3, 3, 5, 9, resets=True, dtype=torch.float64), 2, family)


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return Simulator(builder.build())


@pytest.mark.parametrize("case", list(simulated()), ids=str)
def test_new_cell(sim: Simulator, case: Simulated) -> None:
    run(sim, case)
