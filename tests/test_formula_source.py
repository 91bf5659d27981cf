"""Cells as C++: compiled as they are printed, and compared with `step` in float64, forward and backward."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula_cells as cells
import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from torch import Tensor

from fused_rnn._kinds import KINDS
from fused_rnn.formula import Cell, source
from fused_rnn.formula.language import run_step
from fused_rnn.formula.plan import Plan, make_plan
from fused_rnn.formula.writer import source_of_plan

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++").split()[0]
UNITS = 64

# One operation each, of a = x.a + r.a and b = x.b + r.b.
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: 1 - a * b,
    "div": lambda a, b: a / (2 + b * b),
    "rdiv": lambda a, b: 1 / (2 + a * a) + b,
    "abs": lambda a, b: abs(a) * b,
    "sqrt": lambda a, b: torch.sqrt(1 + a * a) * b,
    "exp": lambda a, b: torch.exp(a) * b,
    "log": lambda a, b: torch.log(1 + a * a) * b,
    "log1p": lambda a, b: torch.log1p(a * a) * b,
    "expm1": lambda a, b: torch.expm1(a) * b,
    "erf": lambda a, b: torch.erf(a) * b,
    "sin": lambda a, b: torch.sin(a) * b,
    "cos": lambda a, b: torch.cos(a) * b,
    "square": lambda a, b: torch.square(a) * b,
    "reciprocal": lambda a, b: torch.reciprocal(2 + a * a) * b,
    "minimum": lambda a, b: torch.minimum(a, b),
    "maximum": lambda a, b: torch.maximum(a, b),
    "clamp": lambda a, b: torch.clamp(a, -0.5, 0.5) * b,
    "clamp_tensors": lambda a, b: torch.clamp(a, b - 0.1, b + 0.1),
    "clamp_min": lambda a, b: torch.clamp_min(a, 0.1) * b,
    "clamp_max": lambda a, b: torch.clamp(a, max=0.1) * b,
    "where": lambda a, b: torch.where(a < b, a * 2, b * 3),
    "where_numbers": lambda a, b: torch.where(a >= b, 1.0, a) + torch.where(b <= 0, b, 0.0),
    "where_equal": lambda a, b: torch.where(a == b, a, b * 2) + torch.where(a != 0, a, b),
    "softplus": lambda a, b: F.softplus(a) * b,
    "softplus_cut": lambda a, b: F.softplus(a, 3.0, 1.0) * b,
    "silu": lambda a, b: F.silu(a) * b,
    "gelu": lambda a, b: F.gelu(a) * b,
    "gelu_tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "hardtanh": lambda a, b: F.hardtanh(a, -0.3, 0.6) * b,
    "hardsigmoid": lambda a, b: F.hardsigmoid(4 * a) * b,
    "softsign": lambda a, b: F.softsign(a) * b,
    "elu": lambda a, b: F.elu(a, 0.7) * b,
    "leaky_relu": lambda a, b: F.leaky_relu(a, 0.2) * b,
    "relu6": lambda a, b: F.relu6(6 * a) * b,
    "logsigmoid": lambda a, b: F.logsigmoid(a) * b,
    "relu": lambda a, b: torch.relu(a) * b,
    "alpha": lambda a, b: torch.add(a, b, alpha=0.3) * torch.sub(a, b, alpha=2),
}


def cell_of(name: str) -> Cell:
    def step(self: Any, x: Any, r: Any, h: Any) -> Any:
        return OPERATIONS[name](x.a + r.a, x.b + r.b)

    return type(f"Op_{name}", (Cell,), {"gates": ("a", "b"), "step": step})()


ALL = {type(cell).__name__: cell for cell in (*cells.CELLS, *map(cell_of, OPERATIONS))}
# Of cells.h, by the same harness.
BY_HAND = {"Lstm": "kLstm", "Gru": "kGru", "Rnn": "kRnnTanh", "ReluRnn": "kRnnRelu"}


@functools.cache
def plan_of(name: str) -> Plan:
    return make_plan(ALL[name])


class Units(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int)] + [
        (name, ctypes.c_void_p)
        for name in "accumulators before parameters d_after after saved d d_before d_parameters".split()
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every cell in one library, compiled without a warning."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs a C++ compiler ({COMPILER})")
    folder = tmp_path_factory.mktemp("formula")
    text = [
        '#include "formula_harness.h"',
        "namespace fused_rnn::generated {",
        *(source_of_plan(plan_of(name)) for name in ALL),
    ]
    text += [f"struct Hand{name} : Cell<CellKind::{kind}> {{}};" for name, kind in BY_HAND.items()]
    text += ["}", "using namespace fused_rnn::generated;", "using namespace fused_rnn;"]
    names = [*ALL, *(f"Hand{name}" for name in BY_HAND)]
    text += [f'extern "C" void {name}_run(Units* units, bool wide) {{ run<{name}>(*units, wide); }}' for name in names]
    (folder / "cells.cpp").write_text("\n".join(text))
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT}/csrc", f"-I{ROOT}/tests"]
    command = [COMPILER, *flags, str(folder / "cells.cpp"), "-o", str(folder / "cells.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    return ctypes.CDLL(str(folder / "cells.so"))


def values(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Inputs of a step, of bfloat16's precision; of the first units zeros and equal numbers, where branches meet."""
    says = plan.cell.declaration
    names = [f"x.{gate}" for gate in says.input_gates] + [f"r.{gate}" for gate in says.recurrent_gates]
    names += [*says.states, *(f"self.{name}" for name in plan.parameters), *(f"d.{state}" for state in says.states)]
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        value = torch.randn(UNITS, generator=generator, dtype=torch.float64).to(torch.bfloat16).double()
        if not name.startswith("d."):
            value[:2] = 0
            value[2:4] = 0.5
            if name == "n":  # of an sLSTM: a sum of positive numbers
                value = value.abs()
        found[name] = value
    return found


def expected(plan: Plan, inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The states after the step and the gradients of its inputs, by `step` and autograd."""
    says = plan.cell.declaration
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items() if not name.startswith("d.")}
    result = run_step(
        plan.cell,
        {gate: leaves[f"x.{gate}"] for gate in says.input_gates},
        {gate: leaves[f"r.{gate}"] for gate in says.recurrent_gates},
        [leaves[state] for state in says.states],
        {name: leaves[f"self.{name}"] for name in plan.parameters},
        lambda phase, value: value,
    )
    after = [result] if isinstance(result, Tensor) else list(result)
    gradients = torch.autograd.grad(
        after, list(leaves.values()), [inputs[f"d.{state}"] for state in says.states], materialize_grads=True
    )
    return [value.detach() for value in after], dict(zip(leaves, gradients, strict=True))


def run(library: ctypes.CDLL, symbol: str, plan: Plan, inputs: dict[str, Tensor], wide: bool) -> dict[str, Tensor]:
    """The results of the compiled cell, each [units, .]."""
    says = plan.cell.declaration
    slots, states = len(plan.accumulators), len(says.states)
    accumulators = torch.zeros(UNITS, slots, dtype=torch.float64)
    for gate, slot in zip(says.input_gates, plan.input_slots, strict=True):
        accumulators[:, slot] += inputs[f"x.{gate}"]
    for gate, slot in zip(says.recurrent_gates, plan.recurrent_slots, strict=True):
        accumulators[:, slot] += inputs[f"r.{gate}"]

    def stacked(names: list[str]) -> Tensor:
        return torch.stack([inputs[name] for name in names], 1) if names else torch.zeros(UNITS, 0, dtype=torch.float64)

    tensors = {
        "accumulators": accumulators,
        "before": stacked([*says.states]),
        "parameters": stacked([f"self.{name}" for name in plan.parameters]),
        "d_after": stacked([f"d.{state}" for state in says.states]),
    }
    outs = {"after": states, "saved": len(plan.saved), "d": slots, "d_before": states, "d_parameters": len(plan.parameters)}
    tensors |= {name: torch.full((UNITS, size), torch.nan, dtype=torch.float64) for name, size in outs.items()}
    units = Units(UNITS, **{name: tensor.data_ptr() for name, tensor in tensors.items()})
    getattr(library, f"{symbol}_run")(ctypes.byref(units), ctypes.c_bool(wide))
    return tensors


def assert_close(what: str, value: Tensor, reference: Tensor, tolerance: float) -> None:
    worst = (value - reference).abs().max() / max(1.0, float(reference.abs().max()))
    assert worst <= tolerance, f"{what}: error {float(worst):.3g}, tolerance {tolerance}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("name", ALL)
def test_equal_to_step(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    plan = plan_of(name)
    says = plan.cell.declaration
    output, gradient = OUTPUT_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    for seed in range(3):
        inputs = values(plan, seed)
        after, gradients = expected(plan, inputs)
        got = run(library, name, plan, inputs, dtype == torch.float64)
        for index, state in enumerate(says.states):
            assert_close(f"state {state}", got["after"][:, index], after[index], output)
            assert_close(f"d {state}", got["d_before"][:, index], gradients[state], gradient)
        for gate, place in zip(says.input_gates, plan.input_gradients, strict=True):
            assert_close(f"d x.{gate}", got["d"][:, place], gradients[f"x.{gate}"], gradient)
        first = len(plan.gradients) - len(says.recurrent_gates)
        for place, gate in enumerate(says.recurrent_gates, first):
            assert_close(f"d r.{gate}", got["d"][:, place], gradients[f"r.{gate}"], gradient)
        for index, parameter in enumerate(plan.parameters):
            reference = gradients[f"self.{parameter}"]
            assert_close(f"d {parameter}", got["d_parameters"][:, index], reference, gradient)


@pytest.mark.parametrize("name", BY_HAND)
def test_equal_to_cells_h(library: ctypes.CDLL, name: str) -> None:
    """The same states, saved values and gradients in the same places as the struct written by hand."""
    plan = plan_of(name)
    inputs = values(plan, 0)
    ours, theirs = (run(library, symbol, plan, inputs, True) for symbol in (name, f"Hand{name}"))
    for what, value in ours.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, theirs[what], atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_constants_of_cells_h(name: str) -> None:
    """Gates, slots and saved values as params.h lists them: as much memory as the cell written by hand."""
    mode = {"Lstm": "LSTM", "Gru": "GRU", "Rnn": "RNN_TANH", "ReluRnn": "RNN_RELU"}[name]
    kind = next(kind for kind in KINDS if kind.mode == mode)
    plan = plan_of(name)
    text = source(ALL[name])
    assert f"kSlots = {kind.slots}, kSaved = {kind.saved};" in text
    assert f"kInputGates = {kind.gates}, kRecurrentGates = {kind.gates};" in text
    assert plan.saved_per_unit == kind.saved + kind.has_c
    assert len(plan.gradients) == kind.slots
    assert plan.input_gradients == ((1, 2, 0) if name == "Gru" else tuple(range(kind.gates)))


# Numbers a unit keeps of a step beside its output: saved values and the series of states that backward reads.
SAVED = {
    "LiGru": 2,
    "Janet": 2,
    "PeepholeLstm": 5,
    "SLstm": 7,
    "MinimalRnn": 2,
    "IndRnn": 0,
    "FastRnn": 1,
    "RecurrentOnly": 2,
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_values(name: str) -> None:
    assert plan_of(name).saved_per_unit == SAVED[name]


def test_printed_as_one_would_write_it() -> None:
    body = source(cells.Gru()).split("  template <class V>\n")
    assert body[1] == (
        "  static FUSED_RNN_HD void forward(V (&a)[kValues], const V (&before)[kStates], V (&after)[kStates]) {\n"
        "    using namespace math;\n"
        "    const V h_prev = before[0];\n"
        "    const V reset = sigmoid(a[0]);\n"
        "    const V n = tanh(a[2] + reset * a[3]);\n"
        "    const V z = sigmoid(a[1]);\n"
        "    a[0] = reset;\n"
        "    a[1] = z;\n"
        "    a[2] = n;\n"
        "    after[0] = n + z * (h_prev - n);\n"
        "  }\n\n"
    )
    assert "const V reset = a[0], z = a[1], n = a[2], r_n = a[3];" in body[2]
    assert "    d[2] = d_h * (h_prev - n) * z * (V(1) - z);\n" in body[2]
    lstm = source(cells.Lstm())
    assert "//         c = f * c + i * g\n" in lstm  # the formula is the comment
    assert "const V t2 = d_c + d_h * o * (V(1) - t1 * t1);\n    d[0] = t2 * g * i * (V(1) - i);\n" in lstm


@pytest.mark.parametrize("name", ALL)
def test_text(name: str) -> None:
    """The same at every trace, no line over 125 columns but the user's own."""
    text = source_of_plan(plan_of(name))
    assert name not in ("SLstm", "Gru") or text == source(ALL[name])
    assert all(len(line) <= 125 for line in text.split("\n") if not line.startswith("//     "))


def test_source_of_no_cell() -> None:
    with pytest.raises(TypeError, match="cell: expected a fused_rnn Cell, got 'lstm'"):
        source("lstm")  # type: ignore[arg-type]
