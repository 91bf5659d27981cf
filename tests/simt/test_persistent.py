"""The persistent families `grid` and `cluster`, forced, on the simulated device: results as for the other families."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import test_kernels
import torch
from cases import CELLS, Case, make_data
from layers import Layer, LayerRun
from simulator import DeviceInfo, Simulator
from test_kernels import Simulated, few_seeds, run, run_not_a_number, run_without_d_h0

KIB = 1024
# Devices that never were: 4 SMs, on which groups of 2 blocks take turns; little shared memory, which limits a group's rows.
test_kernels.DEVICES["FOUR"] = DeviceInfo(90, 4, 227 * KIB, 228 * KIB, 65536, 2048, 50 << 20, 16, 90)
test_kernels.DEVICES["SMALL"] = DeviceInfo(90, 40, 100 * KIB, 101 * KIB, 65536, 2048, 50 << 20, 4, 90)
test_kernels.DEVICES["CLUSTERS_OF_4"] = DeviceInfo(90, 40, 227 * KIB, 228 * KIB, 65536, 2048, 50 << 20, 4, 90)
test_kernels.DEVICES["CLUSTERS_OF_8"] = DeviceInfo(90, 40, 227 * KIB, 228 * KIB, 65536, 2048, 50 << 20, 8, 90)


def one_group(family: str, hidden: int, units: int) -> str:
    """A device that runs one group at a time, of blocks of so many units: groups then take all tiles of rows that fit."""
    blocks = -(-hidden // units)
    name = f"ONE_{family.upper()}_OF_{blocks}"
    active = (ctypes.c_int * 17)()
    if family == "cluster":
        active[1] = active[blocks] = 1
    test_kernels.DEVICES[name] = DeviceInfo(90, blocks, 227 * KIB, 228 * KIB, 65536, 2048, 50 << 20, 16, 90, active)
    return name


F32 = torch.float32
ARITHMETIC = [(F32, False), (F32, True), (torch.float16, False), (torch.bfloat16, False)]
FAMILIES = ("grid", "cluster")  # whose blocks exchange states


def many_seeds() -> Iterator[Simulated]:
    """Every cell, arithmetic and family with all options on, more than one block, under 20 seeds."""
    for family, cell, (dtype, tf32) in itertools.product(FAMILIES, CELLS, ARITHMETIC):
        both = cell == "LSTM" and family == "grid"
        case = Case(cell, steps=3, batch=3, hidden=21, ragged="lengths", bidirectional=both, resets=True, dtype=dtype)
        yield Simulated(case, 20, family, tf32=tf32)


def options() -> Iterator[Simulated]:
    """Ragged or not, biases, initial states, sizes around a tile; one step; many steps."""
    for index, (family, cell, ragged) in enumerate(itertools.product(FAMILIES, CELLS, ("dense", "lengths", "packed"))):
        dtype, tf32 = ARITHMETIC[index % 4]
        for hidden, batch in ((1, 1), (16, 8), (33, 17 if family == "grid" else 9)):
            case = Case(
                cell,
                steps=3,
                batch=batch,
                hidden=hidden,
                ragged=ragged,
                states=hidden != 16,
                has_biases=hidden != 33,
                bidirectional=batch == 1,
                resets=hidden == 33,
                dtype=dtype,
            )
            yield Simulated(case, 2, family, tf32=tf32)
        yield Simulated(Case(cell, steps=1, batch=3, hidden=18, ragged=ragged, dtype=dtype), 2, family, tf32=tf32)
        steps = 25 if family == "grid" else 7
        yield Simulated(Case(cell, steps=steps, batch=2, hidden=18, ragged=ragged, dtype=dtype), 2, family, tf32=tf32)


def groups() -> Iterator[Simulated]:
    """Several groups in a launch, several launches over the same workspace, groups of several tiles."""
    for family, cell, device in itertools.product(FAMILIES, ("LSTM", "GRU", "RNN_RELU"), ("FOUR", "SMALL")):
        for batch, bidirectional in ((20, False), (75, True)):
            case = Case(
                cell, steps=3, batch=batch, hidden=20, ragged="lengths", bidirectional=bidirectional, dtype=torch.float16
            )
            yield Simulated(case, 2, family, device)
    # More directions than SMs hold at once.
    yield Simulated(Case("LSTM", steps=3, batch=9, hidden=50, bidirectional=True), 2, "grid", "FOUR")


def wide_blocks() -> Iterator[Simulated]:
    """Clusters whose blocks have 32 and 48 units."""
    for cell, (dtype, tf32), hidden in itertools.product(("LSTM", "GRU", "RNN_TANH"), ARITHMETIC, (70, 130)):
        case = Case(cell, steps=3, batch=3, hidden=hidden, ragged="lengths", resets=True, dtype=dtype)
        yield Simulated(case, 1, "cluster", "CLUSTERS_OF_4", tf32=tf32)
    for cell, hidden in itertools.product(("LSTM", "GRU"), (50, 100)):
        case = Case(cell, steps=3, batch=9, hidden=hidden, ragged="lengths", resets=True, dtype=torch.float16)
        yield Simulated(case, 20, "cluster", "CLUSTERS_OF_4")


def every_kernel() -> Iterator[tuple[Simulated, str]]:
    """Every kernel on groups of one tile and of several, and what the texts of its plans say."""
    arithmetic = enumerate(itertools.product(("LSTM", "GRU", "RNN_TANH"), ARITHMETIC))
    for (index, (cell, (dtype, tf32))), tiles in itertools.product(arithmetic, (1, 3)):
        options = {"ragged": ("lengths", "packed", "dense")[index % 3], "resets": True, "dtype": dtype}
        for family, units in (("grid", 16), ("cluster", 16), ("cluster", 32), ("cluster", 48)):
            case = Case(cell, steps=3, batch=8 * tiles - 7, hidden=66, **options)
            simulated = Simulated(case, 1, family, one_group(family, case.hidden, units), tf32=tf32)
            yield simulated, f"each of {units} units and {tiles} tile"


def every_kernel_with_shared_weights() -> Iterator[tuple[Simulated, str]]:
    """Every kernel whose weights, in the largest layers that some device holds, go beyond the registers, with the
    smallest hidden size at which those of forward and of backward do (RNN, TF32, grid: of backward only)."""
    sizes = {
        ("grid", 16): {"LSTM": (386, 514, 1026, 1026), "GRU": (514, 642, 1282, 1282), "RNN_TANH": (1538, 1538)},
        ("cluster", 32): {"LSTM": (258, 258), "GRU": (258, 386)},
        ("cluster", 48): {"LSTM": (98, 194, 434, 434), "GRU": (98, 242, 482, 482), "RNN_TANH": (482, 626)},
    }
    for ((family, units), cells), tiles in itertools.product(sizes.items(), (1, 2)):
        for cell, hidden in cells.items():
            for (dtype, tf32), size in zip(ARITHMETIC, hidden, strict=False):
                case = Case(cell, steps=2, batch=8 * tiles - 7, hidden=size, ragged="lengths", dtype=dtype)
                simulated = Simulated(case, 1, family, one_group(family, size, units), tf32=tf32)
                yield simulated, f"each of {units} units and {tiles} tile"


def alone() -> Iterator[Simulated]:
    """One block holds the layer: nothing is pushed."""
    for (cell, (dtype, tf32)), hidden in zip(
        itertools.product(("LSTM", "GRU", "RNN_TANH"), ARITHMETIC), itertools.cycle((16, 9)), strict=False
    ):
        case = Case(cell, steps=4, batch=9, hidden=hidden, ragged="lengths", resets=True, dtype=dtype)
        yield Simulated(case, 4, "cluster", tf32=tf32)


def whole_chip() -> Iterator[Simulated]:
    """The largest layers that 16 blocks hold."""
    for cell, dtype in (("LSTM", torch.float16), ("LSTM", torch.bfloat16), ("GRU", torch.float16)):
        yield Simulated(Case(cell, steps=2, batch=3, hidden=768, dtype=dtype), 1, "cluster")


def whole_device() -> Iterator[Simulated]:
    """The largest layers that the blocks of a whole device hold."""
    for cell, dtype in (("LSTM", torch.float16), ("GRU", torch.bfloat16)):
        yield Simulated(Case(cell, steps=2, batch=9, hidden=2048, ragged="lengths", dtype=dtype), 1, "grid")
        yield Simulated(Case(cell, steps=2, batch=9, hidden=1024, ragged="lengths", dtype=dtype), 1, "grid", "A100")


ALL = [*many_seeds(), *options(), *groups(), *wide_blocks(), *alone(), *whole_chip()]


# Every third case is run by default: 3 has no factor in common with the four kinds of arithmetic that the lists cycle
# through, so all of them, and all cells, are among them.
DEFAULT = few_seeds(ALL[::3])
OTHERS = [s for s in ALL if s not in DEFAULT]


@pytest.mark.parametrize("simulated", DEFAULT, ids=str)
def test_persistent(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


EVERY_KERNEL = [*every_kernel()]
SHARED_WEIGHTS = [*every_kernel_with_shared_weights()]


def plans(sim: Simulator, s: Simulated) -> list[str]:
    layer = Layer.of(s.case, make_data(s.case))
    return LayerRun(sim, layer, family=s.family, device=test_kernels.DEVICES[s.device], tf32=s.tf32).plans()


@pytest.mark.parametrize(("simulated", "text"), [*EVERY_KERNEL, *SHARED_WEIGHTS], ids=str)
def test_plan_of_every_kernel(sim: Simulator, simulated: Simulated, text: str) -> None:
    for plan in plans(sim, simulated):
        assert text in plan


@pytest.mark.parametrize("simulated", [s for s, _ in SHARED_WEIGHTS], ids=str)
def test_plan_has_shared_weights(sim: Simulator, simulated: Simulated) -> None:
    forward, backward = plans(sim, simulated)
    fits_always = simulated.case.cell == "RNN_TANH" and simulated.family == "grid" and simulated.tf32
    assert (" 0 in shared memory" in forward) == fits_always
    assert " 0 in shared memory" not in backward


@pytest.mark.parametrize("simulated", [s for s, _ in [*EVERY_KERNEL, *SHARED_WEIGHTS] if s.case.hidden < 300], ids=str)
def test_every_kernel(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


@pytest.mark.slow
@pytest.mark.parametrize(
    "simulated",
    [
        *(dataclasses.replace(s, seeds=20) for s, _ in EVERY_KERNEL),
        *(s for s, _ in SHARED_WEIGHTS if s.case.hidden >= 300),
        *whole_device(),
    ],
    ids=str,
)
def test_every_kernel_sweep(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


def dense(s: Simulated) -> Simulated:
    return dataclasses.replace(s, case=dataclasses.replace(s.case, steps=5, ragged="dense"))


NOT_A_NUMBER = [dense(s) for s, _ in EVERY_KERNEL]


@pytest.mark.parametrize("simulated", NOT_A_NUMBER[::5], ids=str)
def test_not_a_number_ends_with_a_reset(sim: Simulator, simulated: Simulated) -> None:
    run_not_a_number(sim, simulated)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [s for index, s in enumerate(NOT_A_NUMBER) if index % 5], ids=str)
def test_not_a_number_ends_with_a_reset_sweep(sim: Simulator, simulated: Simulated) -> None:
    run_not_a_number(sim, simulated)


@pytest.mark.parametrize("family", ["step", *FAMILIES])
@pytest.mark.parametrize(
    "case", [Case("LSTM", steps=3, batch=9, hidden=20), Case("GRU", 1, 3, hidden=18), Case("RNN_TANH")], ids=str
)
def test_without_gradient_of_the_initial_state(sim: Simulator, case: Case, family: str) -> None:
    run_without_d_h0(sim, Simulated(case, family=family))


def run_cut(sim: Simulator, s: Simulated, wants_d_h0: bool = True) -> None:
    """Launches of some steps each, whatever the steps, give bit by bit what one launch gives, forward and backward."""
    steps = s.case.steps
    layer_run = LayerRun(
        sim, Layer.of(s.case, make_data(s.case)), family=s.family, device=test_kernels.DEVICES[s.device], tf32=s.tf32
    )
    layer_run.wants_d_h0 = wants_d_h0
    saved = layer_run.forward()
    want = saved | layer_run.backward(saved)
    for layer_run.seed, cuts in itertools.product(range(s.seeds), [[1], [steps - 1], [*range(1, steps)]]):
        layer_run.cuts = cuts
        for name, tensor in (layer_run.forward() | layer_run.backward(saved)).items():
            assert torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)), f"{name}, cut at {cuts}"


def cut() -> Iterator[Simulated]:
    """Every cell, arithmetic and family; ragged or not; both directions; groups of several tiles, several launches."""
    for index, (family, cell, (dtype, tf32)) in enumerate(
        itertools.product(FAMILIES, ("LSTM", "GRU", "RNN_TANH"), ARITHMETIC)
    ):
        ragged = ("dense", "lengths", "packed")[index % 3]
        case = Case(
            cell, steps=5, batch=3, hidden=21, ragged=ragged, bidirectional=index % 2 == 1, resets=index % 5 > 1, dtype=dtype
        )
        yield Simulated(case, 2, family, tf32=tf32)
        yield Simulated(dataclasses.replace(case, ragged="lengths", states=False), 1, family, tf32=tf32)
    for family, cell in itertools.product(FAMILIES, ("LSTM", "GRU", "RNN_RELU")):
        case = Case(cell, steps=4, batch=75, hidden=20, ragged="lengths", bidirectional=True, dtype=torch.float16)
        yield Simulated(case, 1, family, "FOUR")
    for cell in ("LSTM", "GRU"):
        case = Case(cell, steps=4, batch=9, hidden=100, ragged="lengths", resets=True, dtype=torch.float16)
        yield Simulated(case, 2, "cluster", "CLUSTERS_OF_4")


CUT = [*cut()]


@pytest.mark.parametrize("simulated", CUT[::3], ids=str)
def test_cut_at_any_step(sim: Simulator, simulated: Simulated) -> None:
    run_cut(sim, simulated)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", [s for index, s in enumerate(CUT) if index % 3], ids=str)
def test_cut_at_any_step_sweep(sim: Simulator, simulated: Simulated) -> None:
    run_cut(sim, simulated)


def test_default_run_is_large_enough() -> None:
    assert len(DEFAULT) + len(EVERY_KERNEL) + len(CUT[::3]) + len(test_kernels.DEFAULT) + len(test_kernels.OLDER) >= 300


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_cut_without_gradient_of_the_initial_state(sim: Simulator, cell: str, family: str) -> None:
    run_cut(sim, Simulated(Case(cell, steps=4, batch=9, hidden=20), 2, family), wants_d_h0=False)


@pytest.mark.slow
@pytest.mark.parametrize("simulated", OTHERS, ids=str)
def test_persistent_sweep(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)
