"""The scans of tangents and of dual numbers, executed on the simulated device: against float64, the same for every seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from cases import CELLS, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case
from layers import CELL_NUMBER, NoPlan, Problem
from mutation_survey import check, survey
from second_order import Problems, Second, SecondRun, Tensors, expected_dual, run_dual, run_tangents
from second_order_mutants import all_mutants, replacement
from simulator import Simulator
from test_kernels import assert_near

F64, F32 = torch.float64, torch.float32
PUT = ("one", "rows", "steps")


def cases() -> Iterator[Second]:
    """Every cell with every kind of batch and of resets, then what can be missing, every kernel, and 20 seeds."""
    for cell, ragged in itertools.product(CELLS, ("dense", "lengths", "packed")):
        case = Case(cell, 4, 5, 3, 9, bidirectional=True, ragged=ragged, resets=True, dtype=F64)
        yield Second(case)
        yield Second(case, PUT[len(cell + ragged) % 3])
        yield Second(Case(cell, 3, 3, 3, 7, ragged=ragged, states=False, has_biases=False, dtype=F64))
        yield Second(Case(cell, 4, 5, 3, 20, ragged=ragged, resets=True, dtype=F32), "rows")
    for put, ragged in itertools.product(("", *PUT), ("dense", "lengths", "packed")):
        for cell, proj in (("LSTM", 5), ("LSTM", 0), ("GRU", 0)):
            case = Case(cell, 3, 5, 3, 9, proj=proj, bidirectional=True, ragged=ragged, resets=True, dtype=F64)
            yield Second(case, put)
    for cell, proj in (*((cell, 0) for cell in CELLS), ("LSTM", 5)):
        case = Case(cell, 3, 3, 3, 9, proj=proj, resets=True, ragged="lengths", dtype=F64)
        for nulls in (
            ("w_hh",),
            ("source",),
            ("dy",),
            ("dh_n",),
            ("dc_n",),
            ("d_cs",),
            ("d_h0",),
            ("w_hh", "w_hr", "dy", "dh_n"),
        ):
            if cell == "LSTM" or not {"dc_n", "d_cs"} & set(nulls):
                yield Second(case, nulls=nulls)
        if proj:
            yield Second(case, nulls=("w_hr",))
        else:
            yield Second(case, keeps_dh=True)
    for cell, (dtype, tf32), tile in itertools.product(
        ("RNN_TANH", "GRU", "LSTM"), ((F64, False), (F32, False), (F32, True)), range(3)
    ):
        if tile == 2 and not tf32:
            continue
        batch = (11, 35, 67)[tile]
        case = Case(cell, 2, batch, 3, 37, ragged="lengths", resets=True, dtype=dtype)
        yield Second(case, tf32=tf32, tile=(tile, 2 + (tile + len(cell)) % 3), seeds=1)
        if cell == "LSTM":
            yield Second(Case(cell, 2, batch, 3, 37, proj=18, dtype=dtype), tf32=tf32, tile=(tile, 3), seeds=1)
    for cell, proj in (("RNN_RELU", 0), ("GRU", 0), ("LSTM", 0), ("LSTM", 5)):
        case = Case(cell, 3, 3, 3, 9, proj=proj, bidirectional=True, resets=True, ragged="lengths", dtype=F64)
        yield Second(case, "one", seeds=20)
    yield Second(Case("GRU", 1, 1, 1, 1, dtype=F64))
    yield Second(Case("LSTM", 3, 2, 3, 130, dtype=F32))


def run_second(sim: Simulator, second: Second) -> None:
    """Both scans under every seed."""
    case = second.case
    p = Problems.of(second)
    output, gradient = OUTPUT_TOLERANCE[case.dtype], GRADIENT_TOLERANCE[case.dtype]
    if second.tf32:
        output, gradient = OUTPUT_TOLERANCE[torch.float16], GRADIENT_TOLERANCE[torch.float16]
    # Tangents are products of random numbers, and grow with the steps.
    growth = 4 * max(1.0, math.sqrt(case.hidden / 8))
    first: Tensors = {}
    for seed in range(second.seeds):
        run = SecondRun(sim, p.layer, seed=seed, tf32=second.tf32, tile=second.tile)
        results = run_tangents(run, p, second)
        assert "tangents" in run.plan_text
        dual = run_dual(run, p, second)
        assert "dual_backward" in run.plan_text
        if not first:
            for name, found in results.items():
                assert_near(f"{name}'", found, p.tangents[name], output * growth)
            want = expected_dual(p)
            for name, found in dual.items():
                if name in want:
                    assert_near(name, found, want[name], gradient * growth)
            first = results | dual
        for name, found in (results | dual).items():
            assert torch.equal(found, first[name]), f"{name} of seed {seed}"


@pytest.mark.parametrize("second", list(cases()), ids=str)
def test_scans(sim: Simulator, second: Second) -> None:
    run_second(sim, second)


OPTIONS = {"bidirectional": True, "resets": True, "dtype": F64}
CAUGHT_BY = [
    *(Second(Case(cell, 3, 5, 3, 9, ragged="lengths", **OPTIONS), "rows", seeds=3) for cell in ("RNN_TANH", "GRU", "LSTM")),
    *(Second(Case(cell, 3, 5, 3, 9, ragged="packed", **OPTIONS), seeds=1) for cell in ("GRU", "LSTM")),
    Second(Case("LSTM", 3, 5, 3, 9, proj=5, ragged="lengths", **OPTIONS), seeds=3),
    Second(Case("GRU", 3, 5, 3, 9, **OPTIONS), keeps_dh=True, seeds=1),
    Second(Case("GRU", 3, 5, 3, 9, **OPTIONS), nulls=("w_hh",), seeds=1),
    Second(Case("LSTM", 3, 5, 3, 9, states=False, ragged="lengths", dtype=F64), seeds=1),
]
EQUIVALENT = {
    "dual_backward.cuh `wants_values ? value : nullptr` -> `value`": "saves copies: what the product makes is not read",
}


def catch(sim: Simulator) -> None:
    for second in CAUGHT_BY:
        run_second(sim, second)


@pytest.mark.slow
def test_mutants_are_caught() -> None:
    check(survey(all_mutants(), replacement, catch, "second-order-progress.txt"), EQUIVALENT, "second-order-mutants.txt")


def test_only_family_step_serves(sim: Simulator) -> None:
    p = Problems.of(Second(Case("LSTM", 1, 3, 4, 16, dtype=F32)))
    for family in ("single", "grid", "cluster", "block"):
        run = SecondRun(sim, p.layer, family=family)
        for backward in (False, True):
            sizes = {"T": 1, "B": 3, "I": 4, "H": 16, "P": 16, "D": 1}
            problem = Problem(cell=CELL_NUMBER["LSTM"], dtype=1, training=True, backward=backward, dual=True, **sizes)
            with pytest.raises(NoPlan, match="has no kernels of tangents"):
                run.plan(problem)
