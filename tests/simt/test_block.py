"""Family `block`, forced, on the simulated device: results as for the other families."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import CELLS, Case, make_data
from layers import Layer, LayerRun, NoPlan
from simulator import H100, Simulator
from test_kernels import Simulated, run, run_not_a_number, run_wild_lengths, run_without_d_h0, run_without_gradients
from test_persistent import ARITHMETIC, run_cut

F16, F32 = torch.float16, torch.float32


def options() -> Iterator[Simulated]:
    """Ragged or not, biases, initial states, one step and many, one block and several, sizes around a warp's units."""
    ragged = itertools.cycle(("lengths", "packed", "dense"))
    for index, (cell, (dtype, tf32)) in enumerate(itertools.product(CELLS, ARITHMETIC)):
        case = Case(
            cell,
            steps=(1, 4, 7)[index % 3],
            batch=(9, 3, 4)[index // 2 % 3],
            hidden=(22, 16, 2, 34)[index % 4 if index % 5 else 0],
            ragged=next(ragged),
            states=index % 4 != 1,
            has_biases=index % 4 != 2,
            bidirectional=index % 2 == 1,
            resets=index % 3 != 2,
            dtype=dtype,
        )
        yield Simulated(case, 3, "block", tf32=tf32)
        yield Simulated(
            dataclasses.replace(case, steps=5, batch=6, hidden=50, ragged=next(ragged), bidirectional=False),
            2,
            "block",
            tf32=tf32,
        )


def largest() -> Iterator[Simulated]:
    """The largest layers of one block: in fp32 a part of the weights lies in shared memory."""
    for cell, (dtype, tf32) in itertools.product(("LSTM", "GRU", "RNN_TANH"), ARITHMETIC):
        hidden = 256 if cell == "RNN_TANH" else 128
        case = Case(cell, steps=2, batch=3, hidden=hidden, ragged="lengths", resets=True, dtype=dtype)
        yield Simulated(case, 1, "block", tf32=tf32)


OPTIONS, LARGEST = [*options()], [*largest()]


@pytest.mark.parametrize("simulated", [*OPTIONS[::3], *LARGEST[::4]], ids=str)
def test_block(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


@pytest.mark.slow
@pytest.mark.parametrize(
    "simulated",
    [
        *(dataclasses.replace(s, seeds=20) for s in OPTIONS),
        *(s for index, s in enumerate(LARGEST) if index % 4),
    ],
    ids=str,
)
def test_block_sweep(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


@pytest.mark.parametrize("simulated", LARGEST, ids=str)
def test_where_the_weights_lie(sim: Simulator, simulated: Simulated) -> None:
    layer = Layer.of(simulated.case, make_data(simulated.case))
    plans = LayerRun(sim, layer, family="block", device=H100, tf32=simulated.tf32).plans()
    for plan in plans:
        assert f"1 block, each of {simulated.case.hidden} units and 1 tile of 4 rows" in plan
        assert (" 0 in shared memory" in plan) == (simulated.case.dtype.itemsize == 2)


@pytest.mark.parametrize(("cell", "hidden"), [("LSTM", 130), ("GRU", 130), ("RNN_TANH", 258), ("LSTM", 21)])
def test_what_does_not_fit(sim: Simulator, cell: str, hidden: int) -> None:
    case = Case(cell, steps=2, batch=3, hidden=hidden, dtype=F16)
    with pytest.raises(NoPlan, match="even numbers" if hidden % 2 else f"up to {hidden - 2} hidden units in a block"):
        LayerRun(sim, Layer.of(case, make_data(case)), family="block").plans()


CUT = [
    Simulated(
        Case(cell, steps=5, batch=5, hidden=22, ragged=ragged, bidirectional=index % 2 == 1, resets=True, dtype=dtype),
        2, "block", tf32=tf32,
    )
    for index, ((cell, ragged), (dtype, tf32)) in enumerate(
        zip(
            itertools.product(("LSTM", "GRU", "RNN_TANH"), ("dense", "lengths", "packed")),
            itertools.cycle(ARITHMETIC),
            strict=False,
        )
    )
]  # fmt: skip


@pytest.mark.parametrize("simulated", CUT[::2], ids=str)
def test_cut_at_any_step(sim: Simulator, simulated: Simulated) -> None:
    run_cut(sim, simulated)
    run_cut(sim, simulated, wants_d_h0=False)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_what_may_be_missing_or_wrong(sim: Simulator, cell: str) -> None:
    """No gradient of a result or of the initial state, lengths out of range, rows that are not numbers."""
    lengths = Simulated(Case(cell, steps=3, batch=9, hidden=22, ragged="lengths", resets=True, dtype=F16), 2, "block")
    run_without_d_h0(sim, lengths)
    run_without_gradients(sim, lengths)
    run_wild_lengths(sim, lengths)
    run_not_a_number(sim, dataclasses.replace(lengths, case=dataclasses.replace(lengths.case, steps=5, ragged="dense")))
