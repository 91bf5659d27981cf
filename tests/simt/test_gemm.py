"""Family `gemm`, forced, on the simulated device: results as for the other families.

Products are made by the plain kernel of benchmarks/torch_free.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import CELLS, DTYPES, Case, make_data
from layers import Layer, LayerRun, NoPlan
from options import OPTIONS, PUT, has_option
from simulator import H100, T4, Simulator
from test_kernels import (
    ARITHMETIC,
    Simulated,
    run,
    run_not_a_number,
    run_wild_lengths,
    run_without_d_h0,
    run_without_gradients,
    test_wide_c,
)
from test_options import Optional, rounds
from test_options import run as run_optional

F16, BF16 = torch.float16, torch.bfloat16


def cases() -> Iterator[Simulated]:
    """Every cell and arithmetic: ragged or not, in both directions or one, one step and many, one block and several."""
    ragged = itertools.cycle(("lengths", "packed", "dense"))
    for index, (cell, (dtype, tf32)) in enumerate(itertools.product(CELLS, ARITHMETIC)):
        for bidirectional in (True, False):
            case = Case(
                cell,
                steps=(4, 1, 6)[index % 3],
                batch=(9, 3, 17)[index // 2 % 3],
                hidden=(37, 9, 32, 66)[index % 4],
                ragged=next(ragged),
                states=index % 4 != 1,
                has_biases=index % 4 != 2,
                bidirectional=bidirectional,
                resets=index % 3 != 2,
                dtype=dtype,
            )
            yield Simulated(case, 2, "gemm", tf32=tf32)


def projected() -> Iterator[Simulated]:
    """Kinds of batches in both directions and in one."""
    kinds = itertools.product(("dense", "lengths", "packed"), (False, True))
    for (ragged, bidirectional), (dtype, tf32) in zip(kinds, itertools.cycle(ARITHMETIC), strict=False):
        case = Case("LSTM", 4, 9, 4, 37, proj=10, ragged=ragged, bidirectional=bidirectional, resets=True, dtype=dtype)
        yield Simulated(case, 2, "gemm", tf32=tf32)


CASES, PROJECTED = [*cases()], [*projected()]


@pytest.mark.parametrize("simulated", [*CASES, *PROJECTED], ids=str)
def test_gemm(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [dataclasses.replace(s, seeds=20) for s in [*CASES, *PROJECTED]], ids=str)
def test_gemm_sweep(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


def modified() -> Iterator[Optional]:
    """Every cell with each option alone; every cell and arithmetic with all of them."""
    ragged = itertools.cycle(("lengths", "packed", "dense"))
    dtypes = itertools.cycle(DTYPES)
    for cell, name in itertools.product(CELLS, (*PUT, *OPTIONS)):
        dtype = next(dtypes)
        if cell == "RNN_RELU" and rounds(dtype, False):
            dtype = torch.float32
        case = Case(cell, 4, 3, 4, 9, ragged=next(ragged), resets=True, bidirectional=True, dtype=dtype)
        if has_option(case, name):
            yield Optional(case, (name,), family="gemm")
    for index, (cell, (dtype, tf32)) in enumerate(itertools.product(("RNN_TANH", "GRU", "LSTM"), ARITHMETIC)):
        case = Case(cell, 3, 11, 5, 37, ragged=next(ragged), resets=True, bidirectional=index % 2 == 0, dtype=dtype)
        names = [PUT[index % 3], ("masks", "shares")[index % 2], *OPTIONS[2:]]
        names = [n for n in names if has_option(case, n) and not (n == "clip" and rounds(dtype, tf32))]
        yield Optional(case, tuple(names), 1, tf32, family="gemm")
    for dtype, names in itertools.product((torch.float64, F16), (("rows",), ("product", "clip"), ("steps", *OPTIONS[3:]))):
        case = Case("LSTM", 3, 5, 4, 20, proj=7, ragged=next(ragged), resets=True, bidirectional=True, dtype=dtype)
        yield Optional(case, names, family="gemm")


@pytest.mark.parametrize("optional", [*modified()], ids=str)
def test_options(sim: Simulator, optional: Optional) -> None:
    run_optional(sim, optional)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_may_be_missing_or_wrong(sim: Simulator, cell: str, bidirectional: bool) -> None:
    """No gradient of a result or of the initial state, lengths out of range, rows that are not numbers."""
    case = Case(cell, steps=3, batch=9, hidden=22, ragged="lengths", resets=True, bidirectional=bidirectional, dtype=F16)
    lengths = Simulated(case, 2, "gemm")
    run_without_d_h0(sim, lengths)
    run_without_gradients(sim, lengths)
    run_wild_lengths(sim, lengths)
    dense = dataclasses.replace(case, steps=5, ragged="dense", bidirectional=False)
    run_not_a_number(sim, dataclasses.replace(lengths, case=dense))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_wide_c_of_gemm(sim: Simulator, dtype: torch.dtype) -> None:
    test_wide_c(sim, "gemm", dtype)


def test_same_as_step(sim: Simulator) -> None:
    """In float64, where products are summed in another order alone, results are those of step but for the last places."""
    case = Case("LSTM", 5, 9, 4, 37, ragged="packed", bidirectional=True, resets=True, dtype=torch.float64)
    layer = Layer.of(case, make_data(case))
    found = []
    for family in ("gemm", "step"):
        layer_run = LayerRun(sim, layer, family=family)
        saved = layer_run.forward()
        found.append(saved | layer_run.backward(saved))
        assert layer_run.plan_text.startswith(f"family {family}")
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-14, msg=name)


def test_bfloat16_needs_an_ampere(sim: Simulator) -> None:
    case = Case("GRU", steps=2, batch=3, hidden=22, dtype=BF16)
    with pytest.raises(NoPlan, match=r"no products of bfloat16 below compute capability 8\.0"):
        LayerRun(sim, Layer.of(case, make_data(case)), family="gemm", device=T4).plans()


def test_plan_says_what_a_step_is(sim: Simulator) -> None:
    case = Case("LSTM", steps=2, batch=3, hidden=22, proj=9, bidirectional=True, dtype=F16)
    forward, backward = LayerRun(sim, Layer.of(case, make_data(case)), family="gemm", device=H100).plans()
    for plan, kernel in ((forward, "project"), (backward, "state_grad")):
        assert "a step is 4 products by cuBLAS" in plan and f"{kernel}: fp16, tile 32 units x 8 rows, grid 1 x 1 x 2" in plan
