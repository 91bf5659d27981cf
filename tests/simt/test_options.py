"""The kernels of modified steps on the simulated device: options of steps, reset states and gradients of every c, forward
and backward, against the fp64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from cases import CELLS, DTYPES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case
from layers import NoPlan
from options import OPTIONS, PUT, OptionLayer, OptionRun, all_gradients, expected, has_option
from simulator import H100, T4, DeviceInfo, Simulator
from test_kernels import ARITHMETIC, TF32_TOLERANCE, assert_near
from torch import Tensor

F16 = torch.float16


@dataclasses.dataclass(frozen=True)
class Optional:
    """A case with what it has beside, and how it is carried out."""

    case: Case
    names: tuple[str, ...]
    seeds: int = 2
    tf32: bool = False
    tile: tuple[int, int] | None = None
    device: DeviceInfo = H100
    exact: bool = False  # rounding does not decide on which side of a bound any state of the case is
    family: str | None = None

    def __str__(self) -> str:
        tile = "" if self.tile is None else f"tile{self.tile[0]}x{self.tile[1]}"
        return "-".join(filter(None, [str(self.case), "+".join(self.names), self.family, "tf32" * self.tf32, tile]))


def rounds(dtype: torch.dtype, tf32: bool) -> bool:
    """Whether rounding decides in a random case which side of a bound a state is on, where derivatives jump."""
    return tf32 or dtype.itemsize == 2


def run(sim: Simulator, s: Optional) -> None:
    """Forward and backward under every seed: near the reference, and bitwise the same. No gradients near the reference of
    states that are clipped after rounding."""
    case = s.case
    layer = OptionLayer.make(case, s.names)
    want, want_grads = expected(layer)
    output_tolerance, gradient_tolerance = OUTPUT_TOLERANCE[case.dtype], GRADIENT_TOLERANCE[case.dtype]
    if s.tf32:
        output_tolerance, gradient_tolerance = TF32_TOLERANCE
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    first: dict[str, Tensor] = {}
    for seed in range(s.seeds):
        options = {"seed": seed, "tf32": s.tf32, "tile": s.tile, "device": s.device, "family": s.family}
        trainer = OptionRun(sim, layer, **options)
        saved = trainer.forward()
        if seed == 0:
            inference = OptionRun(sim, layer, training=False, **options).forward()
            for name in inference:
                assert torch.equal(inference[name], saved[name]), f"{name} depends on training"
        results = saved | trainer.backward(saved)
        if not first:
            first = results
            found = [saved[name] for name in ("y", "h_n", "c_n", "cs") if name in saved]
            for index, (actual, wanted) in enumerate(zip(found, want, strict=False)):
                assert_near(f"result {index}", actual, wanted, output_tolerance * growth)
            exact = s.exact or "clip" not in s.names or not rounds(case.dtype, s.tf32)
            pairs = zip(all_gradients(layer, saved, results), want_grads, strict=True)
            for index, pair in enumerate(pairs if exact else []):
                assert_near(f"gradient {index}", *pair, gradient_tolerance * growth)
        for name, tensor in results.items():
            assert torch.equal(tensor.view(torch.uint8), first[name].view(torch.uint8)), f"{name} of seed {seed}"


def one_at_a_time() -> Iterator[Optional]:
    """Every cell with every option alone."""
    ragged = itertools.cycle(("lengths", "packed", "dense"))
    dtypes = itertools.cycle(DTYPES)
    for cell, name in itertools.product(CELLS, (*PUT, *OPTIONS)):
        dtype = next(dtypes)
        if cell == "RNN_RELU" and rounds(dtype, False):
            dtype = torch.float32
        case = Case(cell, 4, 3, 4, 9, ragged=next(ragged), resets=True, bidirectional=True, dtype=dtype)
        if has_option(case, name):
            yield Optional(case, (name,))


def together() -> Iterator[Optional]:
    """Every kernel: each cell, arithmetic and tile, with all options at once."""
    for cell, (dtype, tf32), tile in itertools.product(("RNN_TANH", "GRU", "LSTM"), ARITHMETIC, range(3)):
        if tile == 2 and not (tf32 or dtype.itemsize == 2):
            continue
        case = Case(cell, 2, (11, 35, 67)[tile], 5, 37, ragged="lengths", resets=True, dtype=dtype)
        names = [PUT[tile], "masks" if tile else "shares", *OPTIONS[2:]]
        names = [n for n in names if has_option(case, n) and not (n == "clip" and rounds(dtype, tf32))]
        yield Optional(case, tuple(names), 1, tf32, (tile, 2 + tile))


def projected() -> Iterator[Optional]:
    for dtype, names in itertools.product((torch.float64, F16), (("rows",), ("product", "clip"), ("steps", *OPTIONS[3:]))):
        case = Case("LSTM", 3, 5, 4, 20, proj=7, ragged="packed", resets=True, bidirectional=True, dtype=dtype)
        yield Optional(case, names)


@pytest.mark.parametrize("optional", [*one_at_a_time(), *together(), *projected()], ids=str)
def test_options(sim: Simulator, optional: Optional) -> None:
    run(sim, optional)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_options_of_sm75(sim_sm75: Simulator, cell: str) -> None:
    case = Case(cell, 3, 5, 4, 19, ragged="lengths", resets=True, dtype=F16)
    names = tuple(n for n in ("rows", "masks", *OPTIONS[2:]) if has_option(case, n))
    run(sim_sm75, Optional(case, names, device=T4))


@pytest.mark.parametrize("name", [*PUT, *OPTIONS])
@pytest.mark.parametrize("family", ["single", "grid", "cluster"])
def test_other_families_refuse(sim: Simulator, family: str, name: str) -> None:
    """With the reason; the planner takes the family step."""
    case = Case("LSTM", 1, 3, 4, 9, resets=True)
    layer = OptionLayer.make(case, (name,))
    forced = OptionRun(sim, layer, family=family, device=H100)
    if name == "every_c":  # forward gives every c as it does in training
        with pytest.raises(NoPlan, match="gradients of every c"):
            forced.backward(forced.forward())
        return
    with pytest.raises(
        NoPlan, match=f"{family} has no kernels with zoneout, recurrent dropout, clipped states, reset states"
    ):
        forced.forward()
    chosen = OptionRun(sim, layer, device=H100)
    chosen.forward()
    assert chosen.plan_text.startswith("family step") and f"not {family}: has no kernels" in chosen.plan_text
