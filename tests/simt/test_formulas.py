"""Generated CUDA kernels of formulas on the simulated device, forward and backward, against ``step`` in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from formulas import (
    Case,
    Everything,
    Kernels,
    Levels,
    NoRecurrentProduct,
    compare,
    everything_with_options,
    lstm_with_options,
)
from formulas import kernels_of_cell as kernels
from simulator import H100, TINY, Fault

from fused_rnn import zoo
from fused_rnn.formula import Cell

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class SmallHeads(zoo.SLSTM):
    """sLSTM with four states and three heads."""

    def __init__(self) -> None:
        super().__init__(heads=3)


USUAL = Case()
RAGGED = Case(bidirectional=True, lengths=(4, 0, 2), resets=True)
PACKED = Case(batch_sizes=(3, 2, 2, 1), bidirectional=True, resets=True)
TILES = Case(B=9, units=18, bias=False, states=False)  # two tiles of rows and of units
EVERY = (USUAL, RAGGED, PACKED, TILES, Case(T=1), Case(training=False, bidirectional=True))
ALIGNED = Case(T=3, B=5, units=32)  # rows of which 16 bytes are copied at once
# Resets that put states of their own, and states of every step, with the gradients of both.
ONE = dataclasses.replace(RAGGED, reset_state="one", every=True)
OF_ROWS = dataclasses.replace(PACKED, reset_state="rows")
OF_STEPS = dataclasses.replace(RAGGED, reset_state="steps", every=True)
PACKED_STEPS = dataclasses.replace(PACKED, reset_state="steps", every=True)
PUT_TILES = dataclasses.replace(TILES, resets=True, reset_state="steps", every=True)
PUT_ALIGNED = dataclasses.replace(ALIGNED, resets=True, reset_state="rows", every=True)
FIRST_STEP = Case(T=1, resets=True, reset_state="one", every=True)
PUT = (ONE, OF_ROWS, OF_STEPS, PACKED_STEPS, PUT_TILES, PUT_ALIGNED, FIRST_STEP)
PUT += (dataclasses.replace(OF_STEPS, training=False), dataclasses.replace(USUAL, every=True))

# Family `single`: one time step, of which the kernels make the input products too.
SINGLE = Case(T=1, family="single")
SINGLE_RAGGED = dataclasses.replace(SINGLE, bidirectional=True, lengths=(1, 0, 1), resets=True)
SINGLE_PACKED = dataclasses.replace(SINGLE, batch_sizes=(3,), bidirectional=True)
SINGLE_TILES = dataclasses.replace(SINGLE, B=9, units=18, I=37, bias=False, states=False)
SINGLE_ALIGNED = dataclasses.replace(SINGLE, B=5, units=32, I=64)
SINGLE_PUT = dataclasses.replace(SINGLE, resets=True, reset_state="one", every=True)
OF_SINGLE = (SINGLE, SINGLE_RAGGED, SINGLE_PACKED, SINGLE_TILES, SINGLE_ALIGNED, SINGLE_PUT)

SHORT = [  # each cell and dtype takes its time to compile
    (zoo.LSTM, F16, RAGGED),
    (zoo.LSTM, F16, ALIGNED),
    (zoo.MGU, F64, PACKED),
    (Everything, F32, RAGGED),
    (Everything, F32, TILES),
    (Levels, F32, RAGGED),
    (zoo.LSTM, F16, ONE),
    (zoo.LSTM, F16, PUT_ALIGNED),
    (zoo.MGU, F64, PACKED_STEPS),
    (Everything, F32, OF_STEPS),
    (Everything, F32, PUT_TILES),
    (Levels, F32, OF_ROWS),
    (zoo.LSTM, F16, SINGLE_RAGGED),
    (zoo.LSTM, F16, SINGLE_ALIGNED),
    (Everything, F32, SINGLE_RAGGED),
    (Everything, F32, SINGLE_TILES),
    (Levels, F32, SINGLE_PUT),
    (everything_with_options, F32, RAGGED),
]
ZOO = [value for name in zoo.__all__ if isinstance(value := getattr(zoo, name), type) and issubclass(value, Cell)]
LONG = [*((cell, F64, case) for cell in (Everything, NoRecurrentProduct) for case in EVERY)]
LONG += [
    (cell, dtype, case) for cell in (Everything, zoo.PeepholeLSTM) for dtype in (F16, BF16) for case in (RAGGED, ALIGNED)
]
LONG += [(cell, dtype, RAGGED) for cell in ZOO for dtype in (F64, F32)]
LONG += [(zoo.DreamerGRU, F16, ALIGNED), (zoo.LayerNormLSTM, F16, RAGGED), (Levels, F64, ALIGNED)]
LONG += [(cell, F64, case) for cell in (everything_with_options, lstm_with_options) for case in EVERY]
LONG += [(lstm_with_options, F16, ALIGNED), (everything_with_options, BF16, RAGGED)]
LONG += [(zoo.GRU, F32, RAGGED), (zoo.GRU, F32, ALIGNED)]
LONG += [(cell, F64, case) for cell in (Everything, NoRecurrentProduct) for case in PUT]
LONG += [(cell, dtype, case) for cell in (zoo.LSTM, SmallHeads) for dtype in (F64, F32, F16) for case in PUT]
LONG += [(cell, F32, case) for cell in (zoo.DreamerGRU, zoo.LayerNormLSTM, zoo.IndRNN) for case in PUT]
LONG += [(cell, F32, OF_STEPS) for cell in ZOO]
LONG += [(cell, F64, case) for cell in (Everything, NoRecurrentProduct, zoo.GRU) for case in OF_SINGLE]
LONG += [(cell, dtype, SINGLE_RAGGED) for cell in ZOO for dtype in (F64, F32)]
LONG += [(zoo.GRU, F32, SINGLE_ALIGNED), (zoo.DreamerGRU, F16, SINGLE_ALIGNED), (zoo.SLSTM, F16, SINGLE)]


def id_of(value: Any) -> str:
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("cell", "dtype", "case"), SHORT, ids=id_of)
def test_equal_to_step(cell: Callable[[], Cell], dtype: torch.dtype, case: Case) -> None:
    compare(kernels(cell, dtype), case, seeds=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "dtype", "case"), LONG, ids=id_of)
def test_equal_to_step_everywhere(cell: Callable[[], Cell], dtype: torch.dtype, case: Case) -> None:
    compare(kernels(cell, dtype), case, seeds=range(3))


@pytest.mark.parametrize("cell", [Everything, Levels], ids=id_of)
def test_the_medium_tile(cell: type[Cell]) -> None:
    """A device with few SMs takes it."""
    found = kernels(cell, F32)
    case = Case(T=2, B=35, units=18, bidirectional=True)
    assert "medium tile" in formulas.plan_text(found, case, TINY) and "medium" not in formulas.plan_text(found, case, H100)
    compare(found, case, seeds=(0,), device=TINY)
    single = dataclasses.replace(case, T=1, family="single")
    assert "medium tile" in formulas.plan_text(found, single, TINY)
    compare(found, single, seeds=(0,), device=TINY)


def test_launches_of_a_step() -> None:
    """One for a step, and one more for every level of products and norms inside of it."""
    assert formulas.plan_text(kernels(zoo.LSTM, F16), USUAL).startswith("1 launch a step")
    assert formulas.plan_text(kernels(Everything, F32), USUAL, backward=True).startswith("4 launches a step")
    for backward in (False, True):
        assert formulas.plan_text(kernels(Levels, F32), USUAL, backward=backward).startswith("3 launches a step")


ODD = Case(bidirectional=True, lengths=(4, 1, 3))  # a row that begins backwards at an odd step of the scan
# What takes away a wait, a mask or a copy, each with a case that shows it.
FORWARD, BACKWARD, GEOMETRY, NORM = (f"formula_{name}.cuh" for name in ("forward", "backward", "geometry", "norm"))
MATMUL = "../step/matmul.cuh"
MUTANTS = [
    (FORWARD, "s.input_copy_bytes, s.p.H}", "s.input_copy_bytes, tile.units}", Everything, SINGLE),
    (FORWARD, " = a[slot] - stored[slot];", " = a[slot];", zoo.MGU, SINGLE),
    (FORWARD, "(weights.w_ih) + head * s.p.I", "(weights.w_ih)", Everything, SINGLE),
    (FORWARD, "      if (weights.b_ih) a[C::input_slot(g)]", "      if (false) a[C::input_slot(g)]", Everything, SINGLE),
    (GEOMETRY, "return phase == 0 ? C::kInputGates : C::kRecurrentGates;", "return 2;", Levels, SINGLE),
    # Of a product's two phases: rows of all groups in both, and groups one after the other.
    (MATMUL, "if (group >= G::groups(phase)) return false;", "", Levels, SINGLE),
    (MATMUL, "G::kStrided ? operand.stride : operand.units", "operand.units", Everything, SINGLE),
    (GEOMETRY, "    simt::pdl_wait();\n", "", Everything, RAGGED),
    (NORM, "    simt::sync_block();\n", "", Everything, USUAL),
    (GEOMETRY, "if constexpr (!kFirst) simt::sync_block();", "", Levels, TILES),
    (FORWARD, "    elements.store_results();\n", "", Levels, USUAL),
    (BACKWARD, "    elements.store_results();\n", "", Levels, USUAL),
    (GEOMETRY, "first_unit + unit_of(e) < units && ", "", Everything, USUAL),
    (FORWARD, "if (info.flags & kReset) return formula_reset_state", "if (false) return formula_reset_state",
     Everything, RAGGED),
    (FORWARD, "if (info.flags & kReset) {\n      const auto* put", "if (false) {\n      const auto* put",
     Everything, RAGGED),
    (FORWARD, "(step & 1) * s.p.D", "0 * s.p.D", Everything, TILES),
    (BACKWARD, "(s.step & 1) * s.p.D", "0 * s.p.D", Everything, TILES),
    (BACKWARD, "info.flags & kReset ? Acc(0) : in.d_states[i]", "in.d_states[i]", Everything, RAGGED),
    (BACKWARD, "!(flags & kHasNext) || next.reset", "!(flags & kHasNext)", Everything, RAGGED),
    (BACKWARD, "if (s.p.seq.offsets) return;", "", Everything, PACKED),
    (BACKWARD, "if (tile.dir) next.step", "if (false) next.step", Everything, ODD),
    # Of what resets put: zeros, another state's, that of another row, step or head; in backward zeros, the states before, no
    # gradient of it; of states after each step no gradient, or the output's.
    (FORWARD, "return formula_reset_state<Storage>(s.p, tile, kState, s.step, e)", "return Acc(0)", Everything,
     ONE),
    (FORWARD, "(s.p, tile, kState, s.step, e)", "(s.p, tile, 0, s.step, e)", Everything, ONE),
    (FORWARD, "return put ? put + of_head : nullptr", "return nullptr", Everything, ONE),
    (FORWARD, "return put ? put + of_head : nullptr", "return put", Everything, ONE),
    (FORWARD, "(s.p, tile, C::kRecurrent, s.step, b)", "(s.p, tile, C::kOutput, s.step, b)", Everything, ONE),
    (GEOMETRY, "time_of_step(p.seq, step, tile.dir), tile.dir, b", "step, tile.dir, b", Everything, OF_STEPS),
    (GEOMETRY, "time_of_step(p.seq, step, tile.dir), tile.dir, b", "time_of_step(p.seq, step, tile.dir), 0, b",
     Everything, ONE),
    (GEOMETRY, "tile.first_row + FormulaTile<G>::batch_of(e));", "tile.first_row);", Everything, OF_STEPS),
    (BACKWARD, "= formula_reset_state<Storage>(s.p, tile, kState, s.step, e)", "= Acc(0)", Everything, ONE),
    (BACKWARD, "if (info.flags & kReset) {\n        in.before", "if (false) {\n        in.before", Everything,
     ONE),
    (BACKWARD, "info.flags & kReset && s.p.d_reset[i]", "false", Everything, ONE),
    (BACKWARD, "kept_index(e, info.row, 1), in.d_states[i]", "kept_index(e, info.row, 1), in.d_states[0]",
     Everything, ONE),
    (BACKWARD, "s.p.d_reset[i], this->kept_index", "s.p.d_reset[0], this->kept_index", Everything, ONE),
    (BACKWARD, "kState == C::kOutput ? s.p.dy : s.p.d_series[kState]", "kState == C::kOutput ? s.p.dy : nullptr",
     Everything, ONE),
    (BACKWARD, "if (d_after) in.d_states[kState] += ", "if (d_after) in.d_states[kState] = ", Everything, ONE),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "cell", "case"), MUTANTS, ids=id_of)
def test_mutants_are_caught(file: str, old: str, new: str, cell: type[Cell], case: Case, tmp_path: Path) -> None:
    mutant = Kernels(cell(), F32, replaced=(file, old, new), folder=tmp_path)
    with pytest.raises((Fault, AssertionError)):
        compare(mutant, case, seeds=range(6))
