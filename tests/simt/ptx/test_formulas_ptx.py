"""The compiler's PTX of cells that are formulas, forward and backward, against ``step`` in float64. Needs nvcc."""

from __future__ import annotations

import itertools

import pytest
import torch
from formulas import Case, Everything, Levels, compare

from fused_rnn import zoo
from fused_rnn.formula import Cell

from . import build
from .formulas_ptx import DEVICES, FAMILIES, file_of, kernels
from .loader import PtxSimulator
from .translate import function

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason=build.NO_NVCC)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Each family runs with both: all that a formula may have, and matrix instructions.
CELLS = [(Everything, F32), (zoo.LSTM, F16)]
LONG = [*CELLS, (zoo.LSTM, F64), (zoo.LSTM, BF16), (Levels, F32), (zoo.LayerNormLSTM, F16)]


def case_of(family: str, ragged: str) -> Case:
    rows: dict[str, tuple[int, ...]] = {"lengths": (3, 0, 2)} if ragged == "lengths" else {"batch_sizes": (3, 2, 1)}
    if family == "single":
        return Case(T=1, bidirectional=True, resets=True, family=family)
    ranks = 0 if family == "step" else 2
    return Case(T=3, bidirectional=True, resets=True, family=family, ranks=ranks, **rows)  # type: ignore[arg-type]


def run(cell: type[Cell], dtype: torch.dtype, arch: str, case: Case, seeds: range) -> None:
    found = kernels(cell, dtype, arch)
    assert isinstance(found.sim, PtxSimulator)
    before = found.sim.launched.total()
    compare(found, case, seeds, DEVICES[arch])
    roles = {symbol for symbol, count in found.sim.launched.items() if count}
    assert found.sim.launched.total() >= before + 2 * len(seeds) and len(roles) >= 2, "forward and backward"


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "dtype"), CELLS, ids=str)
@pytest.mark.parametrize("family", FAMILIES["sm_90a"])
def test_each_family(family: str, cell: type[Cell], dtype: torch.dtype) -> None:
    run(cell, dtype, "sm_90a", case_of(family, "lengths"), range(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "family", "cell", "dtype"),
    [
        (arch, family, *cell)
        for arch, cell in itertools.product(build.ARCHITECTURES, LONG)
        for family in FAMILIES[arch]
        if arch != "sm_90a" or cell not in CELLS
    ],
    ids=str,
)
def test_other_architectures_and_dtypes(arch: str, family: str, cell: type[Cell], dtype: torch.dtype) -> None:
    run(cell, dtype, arch, case_of(family, "packed"), range(3))


@pytest.mark.slow
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
@pytest.mark.parametrize(("cell", "dtype"), LONG, ids=str)
def test_every_kernel_is_translated(cell: type[Cell], dtype: torch.dtype, arch: str) -> None:
    """Those of the medium tile too, which no small layer launches."""
    file = file_of(cell, dtype, arch)
    assert len(file.names) >= 2 * len(FAMILIES[arch])
    for name in file.names:
        function(file.kernel(name))
