"""Family `block`, forced, on the simulated device: results as for the other families."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import test_kernels
import torch
from cases import CELLS, Case, make_data
from simulator import DeviceInfo, Simulator
from test_kernels import Simulated, few_seeds, run
from test_persistent import ARITHMETIC, KIB, run_cut


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize(("dtype", "tf32"), ARITHMETIC)
def test_first(sim: Simulator, cell: str, dtype: torch.dtype, tf32: bool) -> None:
    case = Case(cell, steps=4, batch=9, hidden=21, ragged="lengths", bidirectional=True, resets=True, dtype=dtype)
    run(sim, Simulated(case, 2, "block", tf32=tf32))
