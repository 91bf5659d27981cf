"""The persistent families of generated kernels, ``cluster`` and ``grid``, on the simulated device, against ``step`` in
float64. One launch makes all steps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from formulas import Case, Everything, Kernels, Levels, NoRecurrentProduct, compare
from formulas import kernels_of_cell as kernels
from simulator import A100, H100, TINY, DeviceInfo, Fault

from fused_rnn import zoo
from fused_rnn.formula import Cell

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class Heads(zoo.BlockGRU):
    """BlockGRU with as many heads as it has in the paper's code."""

    def __init__(self) -> None:
        super().__init__(heads=8)


class SmallHeads(zoo.SLSTM):
    """sLSTM, whose heads are clusters of their own."""

    def __init__(self) -> None:
        super().__init__(heads=3)


# A block has a multiple of 16 units: with 18 units of a head there are two of them, of which one has 2 units.
PLAIN = Case(units=18, family="cluster", ranks=2)
RAGGED = dataclasses.replace(PLAIN, bidirectional=True, lengths=(4, 0, 2), resets=True)
PACKED = dataclasses.replace(PLAIN, batch_sizes=(3, 2, 2, 1), bidirectional=True, resets=True)
ROWS = dataclasses.replace(PLAIN, B=9, bias=False, states=False)  # two clusters
RESETS = dataclasses.replace(ROWS, resets=True)  # also before the first step
ALONE = dataclasses.replace(RAGGED, ranks=1)
WIDE = Case(
    T=3, B=5, units=64, resets=True, family="cluster", ranks=4
)  # rows of weights that are copied by pieces of 16 bytes
EVERY = (
    PLAIN,
    RAGGED,
    PACKED,
    ROWS,
    ALONE,
    WIDE,
    dataclasses.replace(PLAIN, T=1),
    dataclasses.replace(ROWS, training=False),
)

SHORT = [
    (zoo.LSTM, F16, RAGGED),
    (zoo.LSTM, F16, WIDE),
    (Everything, F32, ALONE),
    (Everything, F32, dataclasses.replace(RAGGED, ranks=4)),
    (Levels, F32, ROWS),
]
ZOO = [value for name in zoo.__all__ if isinstance(value := getattr(zoo, name), type) and issubclass(value, Cell)]
LONG = [(cell, F64, case) for cell in (Everything, Levels) for case in EVERY[:-3]]
LONG += [(NoRecurrentProduct, F64, case) for case in EVERY]
LONG += [(zoo.LSTM, dtype, case) for dtype in (F64, F32, BF16) for case in EVERY]
LONG += [(cell, dtype, WIDE) for cell in (zoo.SLSTM, zoo.MGU) for dtype in (F32, F16, BF16)]
UNEVEN = Case(
    T=3, units=72, resets=True, family="cluster", ranks=3
)  # 5 times 16 units, in float32: blocks of 2, 2 and 1 of these
LONG += [(cell, F32, UNEVEN) for cell in (zoo.LSTM, zoo.DreamerGRU, zoo.LayerNormLSTM)]
HEADS = Case(B=9, units=16, bidirectional=True, family="cluster")
LONG += [(Heads, BF16, dataclasses.replace(HEADS, ranks=ranks)) for ranks in (1, 2, 4, 8)]
# sLSTM divides by a state, which random numbers may bring next to zero; there bfloat16 says nothing (torch's own loop in
# bfloat16 is three times as far off as the kernels), so teams of heads are compared in float64.
LONG += [(SmallHeads, F64, dataclasses.replace(case, units=48)) for case in (RAGGED, ALONE, WIDE)]
LONG += [(SmallHeads, BF16, dataclasses.replace(WIDE, units=48))]
LONG += [(cell, dtype, case) for cell in ZOO for dtype, case in ((F32, RAGGED), (F16, ALONE))]


# In family `grid` a few are enough where blocks exchange nothing; and a team can be larger than a cluster.
GRID_SHORT = [(zoo.LSTM, F16, RAGGED), (zoo.LSTM, F16, WIDE), (Everything, F32, dataclasses.replace(RAGGED, ranks=4))]
GRID_SHORT += [(Levels, F32, ROWS)]
LARGE = Case(T=2, units=320, resets=True, ranks=20)
GRID_LONG = [(zoo.LSTM, F16, LARGE), (Heads, BF16, dataclasses.replace(LARGE, units=40))]
GRID_LONG += [one for one in LONG if one[2].ranks > 1]


def in_grid(case: Case) -> Case:
    return dataclasses.replace(case, family="grid")


def id_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("torch.")


@functools.cache
def ranks_of(cell: type[Cell], dtype: torch.dtype, case: Case) -> int:
    """The case's ranks, or fewer: a cluster has no block without units."""
    found = kernels(cell, dtype)
    return next(ranks for ranks in range(case.ranks, 0, -1) if _runs(found, dataclasses.replace(case, ranks=ranks)))


def _runs(found: Kernels, case: Case) -> bool:
    return "no team of so many blocks" not in formulas.plan_text(found, case)


@pytest.mark.parametrize(("cell", "dtype", "case"), SHORT, ids=id_of)
def test_equal_to_step(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    assert f"of {case.ranks} block" in formulas.plan_text(kernels(cell, dtype), case)
    compare(kernels(cell, dtype), case, seeds=(0, 1))


@pytest.mark.parametrize(("cell", "dtype", "case"), GRID_SHORT, ids=id_of)
def test_grid_equal_to_step(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    test_equal_to_step(cell, dtype, in_grid(case))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "dtype", "case"), GRID_LONG, ids=id_of)
def test_grid_equal_to_step_everywhere(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    assert ranks_of(cell, dtype, in_grid(case)) > 1  # they exchange something
    test_equal_to_step_everywhere(cell, dtype, in_grid(case))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "dtype", "case"), LONG, ids=id_of)
def test_equal_to_step_everywhere(cell: type[Cell], dtype: torch.dtype, case: Case) -> None:
    case = dataclasses.replace(case, ranks=ranks_of(cell, dtype, case))
    compare(kernels(cell, dtype), case, seeds=range(3))


def test_a_device_without_clusters() -> None:
    """It has clusters of one block, and no instruction for others is reached (the simulator refuses a push there)."""
    case = dataclasses.replace(RAGGED, ranks=0)
    assert "cluster" in formulas.plan_text(kernels(zoo.LSTM, F16), case, A100)
    assert "of 1 block " in formulas.plan_text(kernels(zoo.LSTM, F16), case, A100)
    compare(kernels(zoo.LSTM, F16), case, device=A100)


def test_what_does_not_fit_is_refused() -> None:
    """With the bytes that are missing; clusters make room."""
    large = Case(T=100, B=16, units=256, family="cluster")
    found = kernels(zoo.LSTM, F16)
    assert formulas.plan_text(found, large, H100).startswith("1 launch for all steps")
    refused = formulas.plan_text(found, large, A100)
    assert refused.startswith("weights and states of a block need at least ")
    assert refused.endswith(
        "and a block has 166912; the device or the code for it has no clusters, among which to divide them"
    )
    assert "of 2 blocks" in formulas.plan_text(found, dataclasses.replace(large, units=128), TINY)


@pytest.mark.parametrize(
    ("case", "launches"), [(RAGGED, 2), (dataclasses.replace(ROWS, bidirectional=True, resets=True), 4)], ids=str
)
def test_teams_in_turn(case: Case, launches: int) -> None:
    """Two SMs hold one team of two blocks: a launch for each direction, and for each row tile of it."""
    found, case = kernels(zoo.LSTM, F16), in_grid(case)
    assert formulas.plan_text(found, case, TINY).startswith(f"{launches} launches for all steps")
    compare(found, case, seeds=(0, 1), device=TINY)
    two = dataclasses.replace(case, family="cluster")  # which wait inside of one launch
    assert formulas.plan_text(found, two, TINY).startswith("1 launch for all steps")


def test_heads_in_turn() -> None:
    """sLSTM's heads are teams of their own; four SMs hold one of them."""
    case = Case(T=3, units=48, resets=True, family="grid", ranks=4)
    device = DeviceInfo.from_buffer_copy(TINY)
    device.sm_count = 4
    found = kernels(SmallHeads, BF16)
    assert formulas.plan_text(found, case, device).startswith("3 launches for all steps")
    compare(found, case, seeds=(0, 1), device=device)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compiled_for": 75}, "needs compute capability 8.0"),
        ({"resident_blocks": -1}, "the device runs no block of its kernels"),
        ({"sm_count": 1}, "no team of so many blocks has work for all of them"),
    ],
    ids=str,
)
def test_what_grid_refuses(change: dict[str, int], reason: str) -> None:
    device = DeviceInfo.from_buffer_copy(H100)
    for name, value in change.items():
        setattr(device, name, value)
    assert formulas.plan_text(kernels(zoo.LSTM, F16), in_grid(PLAIN), device) == reason
    assert "numbers all exchanges" in formulas.plan_text(kernels(zoo.LSTM, F16), in_grid(Case(T=1 << 31, units=18)))


IN_TURN = dataclasses.replace(in_grid(ROWS), T=3)  # on two SMs

# What takes away a wait, a barrier, a mask or a copy, each with a case that shows it.
COMMON, MEMORY, FORWARD, BACKWARD = (f"formula_persistent{name}.cuh" for name in ("", "_memory", "_forward", "_backward"))
EXCHANGE = "formula_exchange.cuh"
MUTANTS = [
    (EXCHANGE, "      simt::sync_cluster();\n", "      simt::sync_block();\n", Everything, RAGGED),
    (EXCHANGE, "simt::mbarrier_wait(barrier(exchange), static_cast<int>(exchange >> 1 & 1));", "", Everything, RAGGED),
    (MEMORY, "(number & 1 ? s.vectors_bytes - vectors * vector_bytes() : 0)", "0", zoo.LSTM, PLAIN),
    (EXCHANGE, "static_cast<int>(number & 1);\n", "0;\n", zoo.LSTM, PLAIN),
    (MEMORY, "unit < s.units && within < head_units", "unit < s.units", zoo.LSTM, PLAIN),
    (COMMON, " + static_cast<Acc>(count_of(r)) * off * off", "", Everything, PLAIN),
    (MEMORY, "    clear(s.vectors, s.vectors_bytes);\n", "", zoo.LSTM, PLAIN),
    (MEMORY, "    simt::cp_async_wait<0>();\n", "", zoo.LSTM, WIDE),
    (COMMON, "    });\n    simt::sync_block();\n", "    });\n", Everything, PLAIN),
    (FORWARD, "        this->multiply_recurrent(vector);\n        simt::sync_block();\n",
     "        this->multiply_recurrent(vector);\n", zoo.LSTM, PLAIN),
    (FORWARD, "    });\n    simt::sync_block();\n", "    });\n", zoo.LSTM, PLAIN),
    (COMMON, "    if constexpr (kNorms > 0) simt::sync_block();\n", "", Everything, ALONE),
    (FORWARD, "const bool reset = info.flags & kReset;", "const bool reset = false;", zoo.LSTM, RAGGED),
    (FORWARD, "exchanged && step + 1 < p.seq.T", "exchanged", zoo.LSTM, PLAIN),
    (FORWARD, "if (p.seq.offsets) return;", "", zoo.LSTM, PACKED),
    (BACKWARD, " && !(info.flags & kNextReset)", "", zoo.LSTM, RAGGED),
    (BACKWARD, "if (e.real && info.flags & kHasNext", "if (active && info.flags & kHasNext", zoo.LSTM, RAGGED),
    (BACKWARD, "info.flags & kReset ? Acc(0) : in.d_states[i]", "in.d_states[i]", zoo.LSTM, RAGGED),
    (BACKWARD, "    });\n    simt::sync_block();\n", "    });\n", zoo.LSTM, PLAIN),
    (BACKWARD, "p.seq.T > 0 && !(this->table(0)[e.b].flags & kReset)", "true", zoo.LSTM, RESETS),
    (EXCHANGE, "{piece.v[i], exchange + 1}", "{piece.v[i], 1}", zoo.LSTM, in_grid(PLAIN)),
    (EXCHANGE, "        while (missing(words[i])) request(words[i], words_of(places[i]));\n", "", zoo.LSTM, in_grid(PLAIN)),
    (EXCHANGE, "words[1][0].tag != tag || words[1][1].tag != tag", "words[1][0].tag != tag", zoo.LSTM, in_grid(PLAIN)),
    (EXCHANGE, "      });\n      simt::sync_block();\n", "      });\n", zoo.LSTM, in_grid(PLAIN)),
    (EXCHANGE, "unit >= first && unit < end", "unit >= first && unit <= end", zoo.LSTM, in_grid(PLAIN)),
    (EXCHANGE, "if (i / (kRows * kOfMoments) % s.ranks == rank) return nullptr;", "if (rank == 0) return nullptr;",
     Everything, in_grid(PLAIN)),
    (EXCHANGE, "static_cast<int64_t>(team.number) * (formula_exchange_bytes(shape) / 4)", "0", zoo.LSTM, in_grid(ROWS)),
    (EXCHANGE, "s.ranks > 1 && sent", "s.ranks > 1", zoo.LSTM, in_grid(PLAIN)),
    (MEMORY, "teams.first + simt::block_x()", "simt::block_x()", zoo.LSTM, IN_TURN),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "cell", "case"), MUTANTS, ids=id_of)
def test_mutants_are_caught(file: str, old: str, new: str, cell: type[Cell], case: Case, tmp_path: Path) -> None:
    mutant = Kernels(cell(), F32, replaced=(file, old, new), folder=tmp_path)
    with pytest.raises((Fault, AssertionError)) as caught:
        compare(mutant, case, seeds=range(6), device=TINY if case == IN_TURN else H100)
    print(caught.value)
