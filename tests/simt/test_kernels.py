"""The CUDA kernels, executed on the simulated device: results against the fp64 reference, the same for every seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from ctypes import byref, c_bool

import pytest
import torch
from cases import CELLS, DTYPES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, layer_cases, make_data
from layers import CELL_NUMBER, DTYPE_NUMBER, FAMILIES, Layer, LayerRun, NoPlan, Problem, expected, gradients, relu_gradients
from simulator import A100, H100, T4, TINY, DeviceInfo, Simulator
from torch import Tensor

# TF32 has the mantissa of fp16: products of operands rounded to 11 bits.
TF32_TOLERANCE = (OUTPUT_TOLERANCE[torch.float16], GRADIENT_TOLERANCE[torch.float16])


def assert_near(name: str, actual: Tensor, want: Tensor, tolerance: float) -> None:
    actual, want = actual.double().flatten(), want.double().flatten()
    assert actual.shape == want.shape, name
    if not want.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= tolerance, f"{name}: error {error:.3g}, tolerance {tolerance:.3g}"


@dataclasses.dataclass(frozen=True)
class Simulated:
    """One simulated case: a configuration, how it is carried out, and under how many seeds."""

    case: Case
    seeds: int = 2
    family: str | None = None
    device: str = "H100"
    tf32: bool = False
    tile: tuple[int, int] | None = None

    def __str__(self) -> str:
        flags = [self.device * (self.device != "H100"), self.family or "", "tf32" * self.tf32]
        tile = "" if self.tile is None else f"tile{self.tile[0]}x{self.tile[1]}"
        return "-".join([str(self.case), *filter(None, [*flags, tile]), f"{self.seeds}seeds"])


DEVICES = {"H100": H100, "A100": A100, "T4": T4, "TINY": TINY}


def run(sim: Simulator, s: Simulated) -> None:
    """Forward (training and not) and backward under every seed: near the reference, and bitwise the same."""
    case = s.case
    layer = Layer.of(case, make_data(case))
    want, want_grads = expected(layer)
    output_tolerance, gradient_tolerance = OUTPUT_TOLERANCE[case.dtype], GRADIENT_TOLERANCE[case.dtype]
    if s.tf32:
        output_tolerance, gradient_tolerance = TF32_TOLERANCE
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    first: dict[str, Tensor] = {}
    only = os.environ.get("FUSED_RNN_SIMT_SEED")
    for seed in range(s.seeds) if only is None else [int(only)]:
        options = {"seed": seed, "device": DEVICES[s.device], "tf32": s.tf32, "tile": s.tile}
        trainer = LayerRun(sim, layer, training=True, family=s.family, **options)
        saved = trainer.forward()
        if seed < 2:
            inference = LayerRun(sim, layer, training=False, family=s.family, **options).forward()
            for name in inference:
                assert torch.equal(inference[name], saved[name]), f"{name} depends on training, seed {seed}"
        grads = trainer.backward(saved)
        results = saved | grads
        if not first:
            first = results
            for name, actual in zip(("y", "h_n", "c_n"), want, strict=False):
                assert_near(name, saved[name], actual, output_tolerance * growth)
            if case.cell == "RNN_RELU" and (s.tf32 or case.dtype.itemsize == 2):
                want_grads = relu_gradients(layer, saved)
            names = itertools.count()
            for actual, wanted in zip(gradients(layer, saved, grads), want_grads, strict=True):
                assert_near(f"gradient {next(names)}", actual, wanted, gradient_tolerance * growth)
        for name, tensor in results.items():
            assert torch.equal(tensor.view(torch.uint8), first[name].view(torch.uint8)), f"{name} of seed {seed}"


def run_without_gradients(sim: Simulator, s: Simulated) -> None:
    """Null gradients of the results mean zeros."""
    data = make_data(s.case)
    data.dy, data.dh_n, data.dc_n = (torch.zeros_like(t) for t in (data.dy, data.dh_n, data.dc_n))
    layer_run = LayerRun(sim, Layer.of(s.case, data), family=s.family, device=DEVICES[s.device], tile=s.tile)
    saved = layer_run.forward()
    zeros = layer_run.backward(saved)
    layer_run.given_gradients = False
    for name, tensor in layer_run.backward(saved).items():
        assert torch.equal(tensor, zeros[name]), name


def run_without_d_h0(sim: Simulator, s: Simulated) -> None:
    """A null d_h0 changes nothing else; with the family step it saves a launch, else an exchange."""
    layer_run = LayerRun(sim, Layer.of(s.case, make_data(s.case)), family=s.family, device=DEVICES[s.device], tile=s.tile)
    saved = layer_run.forward()
    everything = layer_run.backward(saved)
    layer_run.wants_d_h0 = False
    for layer_run.seed in range(s.seeds):
        found = layer_run.backward(saved)
        assert set(everything) - set(found) == {"d_h0"}
        for name, tensor in found.items():
            assert torch.equal(tensor, everything[name]), name


def run_wild_lengths(sim: Simulator, s: Simulated) -> None:
    """Lengths below 0 mean 0, lengths beyond T mean T."""
    data = make_data(s.case)
    layer = Layer.of(s.case, data)
    options = {"family": s.family, "device": DEVICES[s.device], "tile": s.tile}
    tame = LayerRun(sim, layer, **options)
    saved = tame.forward()
    want = saved | tame.backward(saved)
    lengths = data.lengths
    assert (lengths == 0).any() and (lengths == s.case.steps).any()
    wild = torch.where(lengths == 0, -2, torch.where(lengths == s.case.steps, s.case.steps + 3, lengths))
    runner = LayerRun(sim, dataclasses.replace(layer, data=dataclasses.replace(data, lengths=wild)), **options)
    saved = runner.forward()
    for name, tensor in (saved | runner.backward(saved)).items():
        assert torch.equal(tensor, want[name]), name


def run_not_a_number(sim: Simulator, s: Simulated) -> None:
    """A row of the batch that is not a number is one again from its next reset on, backward before it; no other notices."""
    data, clean = make_data(s.case), make_data(s.case)
    for d in (data, clean):
        d.resets[:] = False
        d.resets[2, 0] = True
    data.input[0, 0], data.dy[-1, 0] = math.nan, math.nan
    layer = Layer.of(s.case, data)
    early = (layer.batch_of_row == 0) & (layer.step_of_row < 2)
    late = (layer.batch_of_row == 0) & (layer.step_of_row >= 2)
    options = {"family": s.family, "device": DEVICES[s.device], "tf32": s.tf32, "tile": s.tile}
    want_run, layer_run = LayerRun(sim, Layer.of(s.case, clean), **options), LayerRun(sim, layer, **options)
    layer_run.finite = False
    want = want_run.forward()
    found, untouched = layer_run.forward(), {"y": ~early, "gates": (slice(None), ~early), "cs": (slice(None), ~early)}
    want_grads, grads = want_run.backward(want), layer_run.backward(want)
    untouched |= {"d_gates": (slice(None), ~late)}
    assert found["y"][early].isnan().all() and grads["d_gates"][:, late].isnan().any()
    for name, tensor in (found | grads).items():
        places = untouched.get(name, ...)
        assert torch.equal(tensor[places], (want | want_grads)[name][places]), name


@pytest.mark.parametrize("cell", ["RNN_TANH", "RNN_RELU", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_not_a_number_ends_with_a_reset(sim: Simulator, cell: str, dtype: torch.dtype) -> None:
    run_not_a_number(sim, Simulated(Case(cell, steps=5, batch=3, hidden=21, resets=True, dtype=dtype), family="step"))


F32 = torch.float32
ARITHMETIC = [*((dtype, False) for dtype in DTYPES), (F32, True)]


def many_seeds() -> Iterator[Simulated]:
    """Every cell, arithmetic and family, with all options on, under 20 seeds."""
    for cell, (dtype, tf32) in itertools.product(CELLS, ARITHMETIC):
        options = {"bidirectional": True, "resets": True, "ragged": "lengths", "dtype": dtype}
        yield Simulated(Case(cell, steps=3, batch=3, hidden=9, **options), 20, "step", tf32=tf32)
        yield Simulated(Case(cell, steps=1, batch=3, hidden=9, input_size=5, **options), 20, "single", tf32=tf32)
    for dtype, tf32 in ARITHMETIC:
        case = Case("LSTM", steps=3, proj=5, hidden=9, bidirectional=True, resets=True, ragged="packed", dtype=dtype)
        yield Simulated(case, 20, tf32=tf32)


def tiles() -> Iterator[Simulated]:
    """Every kernel that is compiled: each cell, arithmetic and tile, with few and with many stages, more than one tile."""
    for cell, (dtype, tf32), tile in itertools.product(("RNN_TANH", "GRU", "LSTM"), ARITHMETIC, range(3)):
        if tile == 2 and not (tf32 or dtype.itemsize == 2):
            continue
        stages = 2 + (tile + len(cell)) % 3
        case = Case(cell, steps=2, hidden=37, batch=(11, 35, 67)[tile], input_size=19, ragged="lengths", dtype=dtype)
        yield Simulated(case, 1, "step", tf32=tf32, tile=(tile, stages))
        yield Simulated(dataclasses.replace(case, steps=1), 1, "single", tf32=tf32, tile=(tile, stages))
        if cell == "LSTM":
            yield Simulated(dataclasses.replace(case, proj=18), 1, tf32=tf32, tile=(tile, 4 - tile))
    for dtype, tf32 in ARITHMETIC:
        yield Simulated(Case("LSTM", steps=2, hidden=64, batch=8, dtype=dtype), 2, tf32=tf32, tile=(0, 8))


def _largest_product(case: Case) -> int:
    return case.steps * case.batch * case.hidden * max(case.hidden, case.input_size)


def generated() -> Iterator[Simulated]:
    """The cases of tests/cases.py, one layer each, in the plan's own choice of family and tiles."""
    seen = set()
    for index, case in enumerate(layer_cases()):
        case = dataclasses.replace(case, layers=1, batch_first=False)
        if case in seen or case.batch == 0:
            continue
        seen.add(case)
        seeds = 2 if _largest_product(case) < 20000 else 1
        yield Simulated(case, seeds, device=("H100", "A100", "TINY")[index % 3])
        if case.dtype == F32 and _largest_product(case) < 20000:
            yield Simulated(case, seeds, tf32=True)


ALL = [*many_seeds(), *tiles(), *generated()]
MOST_SEEDS = 5  # of the default run


def few_seeds(cases: Iterable[Simulated]) -> list[Simulated]:
    return [dataclasses.replace(s, seeds=min(s.seeds, MOST_SEEDS)) for s in cases]


HEAVY = 1_000_000
# Of the generated cases every third, which is not in step with their cells and arithmetic.
DEFAULT = few_seeds(s for s in [*many_seeds(), *tiles(), *[*generated()][::3]] if _largest_product(s.case) < HEAVY)


@pytest.mark.parametrize("simulated", DEFAULT, ids=str)
def test_kernels(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)


OLDER = [
    Simulated(Case(cell, steps, batch, hidden=19, ragged="lengths", resets=True, dtype=torch.float16), 3, device="T4")
    for cell, steps, batch in itertools.product(CELLS, (1, 3), (3, 33))
]


@pytest.mark.parametrize("simulated", OLDER, ids=str)
def test_kernels_of_sm75(sim_sm75: Simulator, simulated: Simulated) -> None:
    run(sim_sm75, simulated)


@pytest.mark.parametrize(("cell", "proj"), [*((cell, 0) for cell in CELLS), ("LSTM", 4)])
def test_null_gradients(sim: Simulator, cell: str, proj: int) -> None:
    run_without_gradients(sim, Simulated(Case(cell, steps=2, proj=proj, ragged="lengths")))


@pytest.mark.parametrize("family", ["step", "grid", "cluster"])
def test_lengths_out_of_range(sim: Simulator, family: str) -> None:
    run_wild_lengths(sim, Simulated(Case("LSTM", steps=3, ragged="lengths", bidirectional=True), family=family))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["single", "step", "grid", "cluster"])
def test_wide_c(sim: Simulator, family: str, dtype: torch.dtype) -> None:
    """c0 and c_n in float32: two calls, the second with the states that the first left, are one call over both halves."""
    steps = 1 if family == "single" else 4
    case = Case("LSTM", steps=steps, batch=5, hidden=24, dtype=dtype, resets=True, ragged="lengths")
    data = make_data(case)
    data.c0 = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    data.lengths = torch.tensor([steps, 0, steps, steps // 2, steps])

    def run(first: int, end: int, h0: Tensor, c0: Tensor) -> dict[str, Tensor]:
        part = dataclasses.replace(case, steps=end - first)
        lengths = (data.lengths - first).clamp(0, end - first)
        cut = dataclasses.replace(data, lengths=lengths, h0=h0, c0=c0)
        cut.input, cut.resets, cut.dy = data.input[first:end], data.resets[first:end], data.dy[first:end]
        return LayerRun(sim, Layer.of(part, cut), training=False, family=family).forward()

    whole = run(0, steps, data.h0, data.c0)
    assert whole["c_n"].dtype == torch.float32 and torch.equal(whole["c_n"][0, 1], data.c0[0, 1])
    assert not torch.equal(whole["c_n"], whole["c_n"].to(dtype).float())
    want = expected(Layer.of(case, data))[0]
    assert_near("c_n", whole["c_n"], want[2], OUTPUT_TOLERANCE[dtype])
    if steps == 1:
        return
    first = run(0, 2, data.h0, data.c0)
    second = run(2, 4, first["h_n"], first["c_n"])
    assert torch.equal(torch.cat([first["y"], second["y"]]), whole["y"])
    assert torch.equal(second["h_n"], whole["h_n"]) and torch.equal(second["c_n"], whole["c_n"])


def test_tile_beyond_the_device_is_refused(sim: Simulator) -> None:
    case = Case("LSTM", steps=2, hidden=64, batch=8)
    layer_run = LayerRun(sim, Layer.of(case, make_data(case)), device=TINY, tile=TOO_LARGE_FOR_TINY)
    with pytest.raises(RuntimeError, match=r"bytes of shared memory: invalid argument \(a block has at most 102400\)"):
        layer_run.forward()


def test_device_is_asked_once(sim: Simulator) -> None:
    """The limits of the simulated device as the backend finds them, clusters included; later they are what they were."""
    sim.lib.simt_device_info.restype = c_bool
    found = DeviceInfo()
    for number, device in ((70, TINY), (71, H100)):
        sim.reset(device=device)
        assert sim.lib.simt_device_info(number, byref(found))
        fields = ("compute_capability", "sm_count", "smem_per_block", "threads_per_sm", "max_cluster")
        assert [getattr(found, field) for field in fields] == [getattr(device, field) for field in fields]
        assert found.compiled_for == 90
        clusters = [device.sm_count // blocks if 1 <= blocks <= device.max_cluster else 0 for blocks in range(17)]
        assert list(found.active_clusters) == clusters
    assert sim.lib.simt_device_info(70, byref(found)) and found.sm_count == TINY.sm_count
    assert not sim.lib.simt_device_info(128, byref(found))


def test_kept_plans(sim: Simulator) -> None:
    """Only the choice of the cheapest family depends on the number of steps, once there are several."""
    sim.reset(device=H100)
    lstm, f16 = CELL_NUMBER["LSTM"], DTYPE_NUMBER[torch.float16]

    def ask(steps: int, choice: bytes) -> tuple[str, bool]:
        problem, same = Problem(lstm, f16, False, steps, 8, 64, 512, 512, 1), c_bool()
        return FAMILIES[sim.lib.simt_plan_for(byref(problem), 72, choice, byref(same))], same.value

    assert [ask(steps, b"") for steps in (1, 2, 100, 3)] == [
        *(("single", False), ("step", False), ("step", True), ("step", True))
    ]
    assert [ask(steps, b"grid") for steps in (2, 100)] == [("grid", False), ("grid", True)]
    assert [ask(steps, b"cheapest") for steps in (2, 100, 2, 1, 1)] == [
        *(("step", False), ("cluster", False), ("step", False), ("single", False), ("single", True))
    ]


def test_empty_batch(sim: Simulator) -> None:
    case = Case("LSTM", batch=0)
    run = LayerRun(sim, Layer.of(case, make_data(case)))
    with pytest.raises(NoPlan, match="needs T, B, H, P >= 1"):
        run.forward()


TOO_LARGE_FOR_TINY = (0, 8)  # this tile with as many stages needs more shared memory
SWEEP = [
    dataclasses.replace(s, seeds=seeds if _largest_product(s.case) < 20000 else 2, device=device)
    for s, (device, seeds) in itertools.product(ALL, (("H100", 50), ("A100", 10), ("TINY", 10)))
    if device != "TINY" or s.tile != TOO_LARGE_FOR_TINY
]


@pytest.mark.slow
@pytest.mark.parametrize("simulated", SWEEP, ids=str)
def test_sweep(sim: Simulator, simulated: Simulated) -> None:
    run(sim, simulated)
