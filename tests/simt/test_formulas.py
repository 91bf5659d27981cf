"""Generated CUDA kernels of formulas on the simulated device, forward and backward, against ``step`` in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from formulas import Case, Everything, Kernels, Levels, NoRecurrentProduct, compare
from formulas import kernels_of_cell as kernels
from simulator import H100, TINY, Fault

from fused_rnn import zoo
from fused_rnn.formula import Cell

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


USUAL = Case()
RAGGED = Case(bidirectional=True, lengths=(4, 0, 2), resets=True)
PACKED = Case(batch_sizes=(3, 2, 2, 1), bidirectional=True, resets=True)
TILES = Case(B=9, units=18, bias=False, states=False)  # two tiles of rows and of units
EVERY = (USUAL, RAGGED, PACKED, TILES, Case(T=1), Case(training=False, bidirectional=True))
ALIGNED = Case(T=3, B=5, units=32)  # rows of which 16 bytes are copied at once

SHORT = [  # each cell and dtype takes its time to compile
    (zoo.LSTM, F16, RAGGED),
    (zoo.LSTM, F16, ALIGNED),
    (zoo.MGU, F64, PACKED),
    (Everything, F32, RAGGED),
    (Everything, F32, TILES),
    (Levels, F32, RAGGED),
]
ZOO = [value for name in zoo.__all__ if isinstance(value := getattr(zoo, name), type) and issubclass(value, Cell)]
LONG = [*((cell, F64, case) for cell in (Everything, NoRecurrentProduct) for case in EVERY)]
LONG += [
    (cell, dtype, case) for cell in (Everything, zoo.PeepholeLSTM) for dtype in (F16, BF16) for case in (RAGGED, ALIGNED)
]
LONG += [(cell, dtype, RAGGED) for cell in ZOO for dtype in (F64, F32)]
LONG += [(zoo.DreamerGRU, F16, ALIGNED), (zoo.LayerNormLSTM, F16, RAGGED), (Levels, F64, ALIGNED)]
LONG += [(zoo.GRU, F32, RAGGED), (zoo.GRU, F32, ALIGNED)]


def id_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("cell", "dtype", "case"), SHORT, ids=id_of)
def test_equal_to_step(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    compare(kernels(cell, dtype), case, seeds=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "dtype", "case"), LONG, ids=id_of)
def test_equal_to_step_everywhere(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    compare(kernels(cell, dtype), case, seeds=range(3))


@pytest.mark.parametrize("cell", [Everything, Levels], ids=id_of)
def test_the_medium_tile(cell: type[Cell]) -> None:
    """A device with few SMs takes it."""
    found = kernels(cell, F32)
    case = Case(T=2, B=35, units=18, bidirectional=True)
    assert "medium tile" in formulas.plan_text(found, case, TINY) and "medium" not in formulas.plan_text(found, case, H100)
    compare(found, case, seeds=(0,), device=TINY)


def test_launches_of_a_step() -> None:
    """One for a step, and one more for every level of products and norms inside of it."""
    assert formulas.plan_text(kernels(zoo.LSTM, F16), USUAL).startswith("1 launch a step")
    assert formulas.plan_text(kernels(Everything, F32), USUAL, backward=True).startswith("4 launches a step")
    for backward in (False, True):
        assert formulas.plan_text(kernels(Levels, F32), USUAL, backward=backward).startswith("3 launches a step")


# What takes away a wait, a mask or a copy, each with a case that shows it.
MUTANTS = [
    ("formula_forward.cuh", "  simt::pdl_wait();\n", "", Everything, RAGGED),
    ("formula_backward.cuh", "  simt::pdl_wait();\n", "", Everything, RAGGED),
    ("formula_norm.cuh", "    simt::sync_block();\n", "", Everything, USUAL),
    ("formula_forward.cuh", "if constexpr (!kFirst) simt::sync_block();", "", Levels, TILES),
    ("formula_backward.cuh", "if constexpr (!kFirst) simt::sync_block();", "", Levels, TILES),
    ("formula_forward.cuh", "    elements.store_results();\n", "", Levels, USUAL),
    ("formula_backward.cuh", "    elements.store_results();\n", "", Levels, USUAL),
    ("formula_geometry.cuh", "first_unit + unit_of(e) < units && ", "", Everything, USUAL),
    ("formula_forward.cuh", "if (info.flags & kReset) return Acc(0);", "", Everything, RAGGED),
    ("formula_forward.cuh", "if (info.flags & kReset) return nullptr;", "", Everything, RAGGED),
    ("formula_forward.cuh", "(step & 1) * s.p.D", "0 * s.p.D", Everything, TILES),
    ("formula_backward.cuh", "(s.step & 1) * s.p.D", "0 * s.p.D", Everything, TILES),
    ("formula_backward.cuh", "info.flags & kReset ? Acc(0) : in.d_states[i]", "in.d_states[i]", Everything, RAGGED),
    ("formula_backward.cuh", "!(flags & kHasNext) || next.reset", "!(flags & kHasNext)", Everything, RAGGED),
    ("formula_backward.cuh", "if (s.p.seq.offsets) return;", "", Everything, PACKED),
    ("formula_backward.cuh", "if (tile.dir) next.step", "if (false) next.step", Everything, RAGGED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "cell", "case"), MUTANTS, ids=id_of)
def test_mutants_are_caught(file: str, old: str, new: str, cell: type[Cell], case: Case, tmp_path: Path) -> None:
    mutant = Kernels(cell(), F32, replaced=(file, old, new), folder=tmp_path)
    with pytest.raises((Fault, AssertionError)):
        compare(mutant, case, seeds=range(6))
