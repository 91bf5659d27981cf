"""Cells that are formulas on the simulated device: their generated CUDA kernels, and one layer's outputs and gradients.

What csrc/torch makes by matrix products (input products, weight gradients) is made here by torch in float64.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import builder
import torch
from layers import Modifier, ResetState
from simulator import H100, DeviceInfo, Simulator
from torch import Tensor

from fused_rnn import reference, zoo
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn.formula import Cell, Gate
from fused_rnn.formula.cuda import header_of, kernels_of, traits_of, translation_unit
from fused_rnn.formula.options import Change, changed
from fused_rnn.formula.parameters import OWN_KIND, as_declared, outputs_first, specs_of, step_function
from fused_rnn.formula.plan import Plan, make_plan

STATES, PHASES = 8, 12  # csrc/core/formula.h
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class Everything(Cell):
    """Two heads, gates with one product, three states of which the second is multiplied, a product and both norms inside of
    the step, a vector and a number."""

    gates = ("f", Gate("g", recurrent=False), Gate("k", input=False), "o")
    states = ("y", "h", "c")
    recurrent = "h"
    heads = 2
    unit_parameters = ("p",)
    scalar_parameters = ("s",)

    def step(self, x: Any, r: Any, y: Any, h: Any, c: Any) -> Any:
        f = torch.sigmoid(self.layer_norm(x.f + r.f, "f") + self.p * c)
        c = f * c + (1 - f) * torch.tanh(x.g + self.product("u", f * h))
        h = torch.tanh(c + self.s * r.k)
        return torch.sigmoid(x.o * r.o) * self.rms_norm(h, "h") + 0.5 * y, h, c


class Levels(Cell):
    """Phases that share a launch: a product between two norms, then a norm and a product of what they gave."""

    gates = ("a", Gate("b", recurrent=False))
    heads = 2

    def step(self, x: Any, r: Any, h: Any) -> Any:
        u = self.layer_norm(x.a + r.a, "u")
        v = self.product("v", torch.tanh(x.b) + h)
        w = self.rms_norm(x.b * r.a, "w")
        return torch.tanh(self.rms_norm(u + v, "y") + self.product("z", torch.sigmoid(v - w)))


class NoRecurrentProduct(Cell):
    """No gate has one: IndRNN's kind, with a phase."""

    gates = (Gate("a", recurrent=False),)
    unit_parameters = ("u",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + self.u * h + self.product("v", h))


def everything_with_options() -> Cell:
    """Zoneout of all states but the second, which the recurrent product reads under a mask; a bound for the third."""
    return changed(Everything(), Change((True, False, True), (), (None, None, 0.2), drops=True))


def lstm_with_options() -> Cell:
    return changed(zoo.LSTM(), Change((True, True), (), (None, 0.2), drops=True))


class Traits(ctypes.Structure):
    """csrc/core/formula.h's FormulaTraits."""

    _fields_ = [
        *((name, c_int) for name in ("states", "output", "recurrent", "input_gates", "recurrent_gates")),
        *((name, c_int) for name in ("gradients", "saved", "parameters", "phases")),
        *((name, c_void_p) for name in ("input_gradients", "reads_series", "phase_kinds")),
        *((name, c_void_p) for name in ("forward_levels", "backward_levels")),
    ]


class Direction(ctypes.Structure):
    """csrc/cuda/formula/formula_params.h's FormulaDirection."""

    _fields_ = [
        *((name, c_void_p) for name in ("w_ih", "b_ih", "w_hh", "b_hh", "parameters")),
        ("weight", c_void_p * PHASES),
        ("bias", c_void_p * PHASES),
    ]


# Of the modifier behind its resets, in words: all 0, no options of steps.
REST = (ctypes.sizeof(Modifier) - ctypes.sizeof(c_void_p)) // ctypes.sizeof(c_int64)


class FormulaLayer(ctypes.Structure):
    _fields_ = [
        *(("H", c_int64), ("D", c_int), ("heads", c_int), ("T", c_int64), ("B", c_int64), ("N", c_int64)),
        *(("lengths", c_void_p), ("offsets", c_void_p), ("resets", c_void_p), ("rest_of_modifier", c_int64 * REST)),
        *(("reset_states", ResetState * STATES), ("weights", Direction * 2), ("initial", c_void_p * STATES)),
    ]


class FormulaForward(FormulaLayer):
    _fields_ = [
        *(("x", c_void_p), ("input", c_void_p), ("I", c_int64)),
        *(("y", c_void_p), ("last", c_void_p * STATES), ("series", c_void_p * STATES)),
        *(("v", c_void_p * PHASES), ("saved", c_void_p), ("working", c_void_p * (STATES + 2 + 2 * PHASES))),
    ]


class FormulaBackward(FormulaLayer):
    _fields_ = [
        *(("y", c_void_p), ("series", c_void_p * STATES), ("v", c_void_p * PHASES), ("saved", c_void_p)),
        *(("dy", c_void_p), ("d_last", c_void_p * STATES), ("d_series", c_void_p * STATES)),
        *(("d", c_void_p), ("d_initial", c_void_p * STATES), ("d_reset", c_void_p * STATES)),
        ("working", c_void_p * (STATES + 2 + 2 * PHASES)),
    ]


def write_source(plan: Plan, dtype: torch.dtype) -> Path:
    """The kernels of a cell with their interface to Python, to be compiled for the simulator."""
    listed = " ".join(f"X({k.role}, {k.segment}, {k.tile}, {k.name})" for k in kernels_of(plan))
    source = builder.CACHE / "formulas" / f"{type(plan.cell).__name__}-{str(dtype).removeprefix('torch.')}.cu"
    text = f"{translation_unit(plan, dtype)}\n#define SIMT_FORMULA_KERNELS(X) {listed}\n"
    text += '#include "../kernels/formula_capi.h"\n'
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return source


class Kernels:
    """The compiled kernels of a cell for one dtype."""

    def __init__(
        self,
        cell: Cell,
        dtype: torch.dtype,
        replaced: tuple[str, str, str] | None = None,
        folder: Path | None = None,
        simulator: Callable[[Path], Simulator] = Simulator,
    ) -> None:
        """replaced: (file of csrc/cuda/formula, text, what to put in its place), in a copy of csrc in the folder.
        simulator: of the library of the kernels."""
        self.cell, self.dtype, self.plan = cell, dtype, make_plan(cell)
        source = write_source(self.plan, dtype)
        csrc = builder.ROOT / "csrc"
        host = [csrc / "plan" / f"{name}.cpp" for name in ("formula", "formula_persistent", "machine")]
        host.append(csrc / "cuda" / "formula" / "scan.cpp")
        copies = {}
        if replaced is not None and folder is not None:
            copy = _copy_with(folder / "csrc", *replaced)
            copies = {source.stem: [(source, copy)]}
        self.sim = simulator(builder.build([source], replace=copies, host=host))
        lib = self.sim.lib
        pointers = (c_void_p, c_void_p, c_int)
        lib.simt_formula_workspace.restype = c_int64
        lib.simt_formula_workspace.argtypes = [*pointers, c_bool, c_void_p, c_char_p, c_int]
        lib.simt_formula_text.restype = c_char_p
        for name in ("simt_formula_forward", "simt_formula_backward"):
            getattr(lib, name).argtypes = [*pointers, c_void_p, c_void_p, c_char_p, c_int]
        sizes = (c_int * 3)()
        lib.simt_formula_sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(t) for t in (FormulaForward, FormulaBackward, Traits)]
        facts = traits_of(self.plan)
        self.lists = {
            "input_gradients": (c_int * 64)(*facts.pop("input_gradients")),
            "reads_series": (c_bool * STATES)(*map(bool, facts.pop("reads_series"))),
            **{name: (c_int * PHASES)(*facts.pop(name)) for name in ("phase_kinds", "forward_levels", "backward_levels")},
        }
        self.traits = Traits(**facts, **{name: ctypes.addressof(value) for name, value in self.lists.items()})


@functools.cache
def kernels_of_cell(cell: Callable[[], Cell], dtype: torch.dtype) -> Kernels:
    """Those of a cell with its default arguments, compiled once."""
    return Kernels(cell(), dtype)


def _copy_with(folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of the headers in which one is changed."""
    for part in ("core", "plan", "cuda"):
        shutil.copytree(builder.ROOT / "csrc" / part, folder / part)
    path = folder / "cuda" / "formula" / name
    text = path.read_text()
    assert old in text, f"{name} has no {old!r}: the kernels have changed, and the mutants must follow"
    path.write_text(text.replace(old, new))
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of one call."""

    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741
    units: int = 9  # of a head
    bidirectional: bool = False
    bias: bool = True
    states: bool = True
    lengths: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None  # packed rows
    resets: bool = False
    reset_state: str = ""  # what resets put: zeros, or "one" state of all rows, one of each of the "rows", or of all "steps"
    every: bool = False  # the states beside the output after every step are results too
    training: bool = True
    family: str = "step"
    ranks: int = 0  # of a persistent family the blocks of a team, 0: what the planner takes

    def __str__(self) -> str:
        usual = Case()
        differs = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return "-".join(f"{name}={getattr(self, name)}".replace(" ", "") for name in differs) or "plain"


@dataclasses.dataclass
class Data:
    """Numbers of a case in the dtype."""

    rows: Rows
    x: Tensor
    states: list[Tensor]
    params: list[Tensor]  # of all directions
    dy: Tensor
    d_last: list[Tensor]
    d_series: list[Tensor]  # [N, D * H] of each state but the output; none where they are no results
    H: int
    N: int

    def step_and_batch(self) -> list[tuple[int, int]]:
        """Of every row in memory."""
        if self.rows.offsets is None:
            steps, batch = self.x.shape[:2]
            return [(t, b) for t in range(steps) for b in range(batch)]
        sizes = self.rows.offsets.diff().tolist()
        return [(t, b) for t, size in enumerate(sizes) for b in range(size)]

    def reset_rows(self) -> list[tuple[int, int, int]]:
        """(row in memory, step, row of the batch) wherever a step that takes place is reset."""
        if self.rows.resets is None:
            return []
        lengths = self.rows.lengths
        places = [(row, t, b) for row, (t, b) in enumerate(self.step_and_batch()) if self.rows.resets.flatten()[row]]
        return [(row, t, b) for row, t, b in places if lengths is None or t < lengths[b]]


def of_reset(state: Tensor, t: int, direction: int, b: int) -> Tensor:
    """The view [H] of a reset state, or of its gradient, that is put at a step."""
    rows = state[t, direction] if state.dim() == 4 else state[direction]
    return rows[b if len(rows) > 1 else 0]


def make_data(cell: Cell, case: Case, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)

    H, D = case.units * cell.declaration.heads, 1 + case.bidirectional
    N = sum(case.batch_sizes) if case.batch_sizes else case.T * case.B
    leading = (N,) if case.batch_sizes else (case.T, case.B)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    offsets = None if case.batch_sizes is None else torch.tensor([0, *case.batch_sizes]).cumsum(0)
    resets = torch.rand(leading, generator=generator) < 0.3 if case.resets else None
    if resets is not None and case.reset_state:  # also the first and the last row, before the first step of both directions
        flat = resets.view(-1)
        flat[0] = flat[case.B - 1] = flat[-1 if case.batch_sizes else -case.B] = True
    count = len(cell.declaration.states)
    x = made(*leading, case.I)
    states = [made(D, case.B, H) if case.states else torch.zeros(D, case.B, H, dtype=dtype) for _ in range(count)]
    params = [made(*spec.shape) for _ in range(D) for spec in specs_of(cell, case.I, H, case.bias)]
    d_last = [made(D, case.B, H) for _ in range(count)]
    dy = made(*leading, D * H)
    d_series = [made(N, D * H) for _ in range(count - 1)] if case.every else []
    shapes = {"one": (D, 1, H), "rows": (D, case.B, H), "steps": (len(case.batch_sizes or range(case.T)), D, case.B, H)}
    # Above 0: what cells divide by (sLSTM's n) is then no difference of numbers that are almost the same.
    put = tuple(made(*shapes[case.reset_state]) + 0.5 for _ in range(count)) if case.reset_state else ()
    given = torch.rand((D, N, len(cell.declaration.given_gates), H), generator=generator, dtype=torch.float64) < 0.5
    options = StepOptions(values=given.double() if given.numel() else None)
    return Data(Rows(lengths, offsets, resets, put, options), x, states, params, dy, d_last, d_series, H, N)


def names_of(cell: Cell, case: Case) -> list[str]:
    specs = specs_of(cell, 1, cell.declaration.heads, case.bias)
    states = cell.declaration.states
    params = [spec.name + suffix for suffix in ("", "_reverse")[: 1 + case.bidirectional] for spec in specs]
    others = [s for s in states if s != states[cell.declaration.output]]
    results = ["y", *(f"last {s}" for s in states), *(f"every {s}" for s in others if case.every)]
    puts = [f"d reset {s}" for s in states if case.reset_state]
    return [*results, "d x", *(f"d {s}" for s in states), *(f"d {name}" for name in params), *puts]


def expected(cell: Cell, case: Case, data: Data) -> list[Tensor]:
    """Outputs and all gradients by ``step`` in float64, in the order of names_of."""
    leaves = [t.double().requires_grad_() for t in (data.x, *data.states, *data.params)]
    count = len(data.states)
    put = [t.double().requires_grad_() for t in data.rows.reset_states]
    rows = data.rows._replace(reset_states=tuple(outputs_first(cell, put) if put else ()))
    recipe = Recipe(OWN_KIND, has_biases=case.bias, bidirectional=case.bidirectional, all_states=case.every)
    first = outputs_first(cell, leaves[1 : 1 + count])
    y, last = reference.layer(leaves[0], first, leaves[1 + count :], rows, recipe, step_function(cell))
    # [D, N, H] of each state but the output, which is the first in the order of the step's function.
    results = [y, *as_declared(cell, last[:count]), *(series.transpose(0, 1).flatten(1) for series in last[count:])]
    outer = [t.double() for t in (data.dy, *data.d_last, *data.d_series)]
    grads = torch.autograd.grad(results, [*leaves, *put], outer, materialize_grads=True)
    return [t.detach() for t in (*results, *grads)]


class Run:
    """One layer on the simulated device."""

    def __init__(self, kernels: Kernels, case: Case, data: Data, seed: int, device: DeviceInfo) -> None:
        self.kernels, self.case, self.data, self.device = kernels, case, data, device
        self.plan, self.cell, self.sim = kernels.plan, kernels.cell, kernels.sim
        self.D, self.H, self.N, self.B = 1 + case.bidirectional, data.H, data.N, case.B
        self.size = kernels.dtype.itemsize
        self.sim.reset(seed, device)
        specs = specs_of(self.cell, case.I, self.H, case.bias)
        count = len(specs)
        self.params = [
            dict(zip((s.name for s in specs), data.params[d * count : (d + 1) * count], strict=True)) for d in range(self.D)
        ]

    # --- what both passes have ---

    def fill(self, p: FormulaLayer) -> None:
        rows, put = self.data.rows, self.sim.put
        p.H, p.D, p.heads = self.H, self.D, self.cell.declaration.heads
        p.T = len(self.case.batch_sizes) if self.case.batch_sizes else self.case.T
        p.B, p.N = self.B, self.N
        p.lengths, p.offsets, p.resets = (
            put("lengths", rows.lengths),
            put("offsets", rows.offsets),
            put("resets", rows.resets),
        )
        for i, state in enumerate(self.data.states):
            p.initial[i] = put(f"initial {i}", state) if self.case.states else None
        for i, given in enumerate(rows.reset_states):
            # Those of rows lie in a wider tensor, so that the distance of rows is less aligned than their length.
            state = torch.nn.functional.pad(given, (0, 1)) if self.case.reset_state == "rows" else given
            dim = state.dim() - 3  # of the direction
            of_step, of_row = state.stride(0) if dim else 0, state.stride(dim + 1) if state.shape[dim + 1] > 1 else 0
            strides = [elements * self.size for elements in (of_step, state.stride(dim), of_row)]
            p.reset_states[i] = ResetState(put(f"reset state {i}", state), *strides)
        for d, params in enumerate(self.params):
            weights = p.weights[d]
            if self.case.family == "single":
                weights.w_ih = put("w_ih", params["weight_ih"])
                weights.b_ih = put("b_ih", params.get("bias_ih"))
            weights.w_hh = put("w_hh", params.get("weight_hh"))
            weights.b_hh = put("b_hh", params.get("bias_hh"))
            own = [params[name].expand(self.H) for name in self.plan.parameters]
            weights.parameters = put("parameters", torch.stack(own)) if own else None
            for k, phase in enumerate(self.cell.phases):
                weights.weight[k] = put(phase.parameters[0], params[phase.parameters[0]])
                if len(phase.parameters) > 1:
                    weights.bias[k] = put(phase.parameters[1], params[phase.parameters[1]])

    def out(self, name: str, *shape: int) -> int:
        return self.sim.out(name, torch.Size(shape).numel() * self.size)

    def get(self, name: str, address: int, *shape: int) -> Tensor:
        tensor = self.sim.get(address, shape, self.kernels.dtype)
        self.sim.check_output(name, address, tensor)
        return tensor

    def call(self, name: str, p: FormulaForward | FormulaBackward) -> None:
        lib, dtype, traits = self.sim.lib, DTYPES[self.kernels.dtype], ctypes.byref(self.kernels.traits)
        where, backward = ctypes.byref(self.device), isinstance(p, FormulaBackward)
        family = (self.case.family.encode(), self.case.ranks)
        bytes_ = lib.simt_formula_workspace(ctypes.byref(p), traits, dtype, backward, where, *family)
        workspace = self.sim.out("workspace", bytes_)
        if self.case.family in ("cluster", "grid"):
            workspace = self.sim.inout("exchange", torch.zeros(bytes_, dtype=torch.uint8))
        self.sim.check(getattr(lib, name)(ctypes.byref(p), traits, dtype, where, workspace, *family))

    # --- forward ---

    def keeps(self, state: int) -> bool:
        says = self.cell.declaration
        return state != says.output and (self.plan.series[state] or (bool(says.recurrent_gates) and state == says.recurrent))

    def forward(self) -> list[Tensor]:
        p, D, N, H = FormulaForward(), self.D, self.N, self.H
        self.fill(p)
        x = self.data.x.reshape(N, -1).double()
        products = [x @ params["weight_ih"].double().T + params.get("bias_ih", torch.zeros(1)) for params in self.params]
        values = self.data.rows.options.values
        all_gates = torch.stack(products)
        if values is not None:
            all_gates = torch.cat([all_gates, values.flatten(2)], -1)
        if self.case.family == "single":
            p.input, p.I = self.sim.put("input", self.data.x), self.case.I
            if self.plan.phases:
                p.x = self.out("x", D, N, len(self.cell.declaration.input_gates), H)
        else:
            p.x = self.sim.put("x", all_gates.to(self.kernels.dtype))
        p.y = self.out("y", N, D * H)
        count = len(self.data.states)
        for i in range(count):
            p.last[i] = self.out(f"last {i}", D, self.B, H)
            if self.case.training and self.keeps(i) or self.case.every and i != self.cell.declaration.output:
                p.series[i] = self.out(f"series {i}", N, D * H)
        if self.case.training:
            for k in range(len(self.plan.phases)):
                p.v[k] = self.out(f"v {k}", D, N, H)
            p.saved = self.out("saved", D, N, len(self.plan.saved), H)
        self.call("simt_formula_forward", p)
        self.kept = p
        self.y = self.get("y", p.y, N, D * H)
        results = [self.y.view(self.data.dy.shape), *(self.get(f"last {i}", p.last[i], D, self.B, H) for i in range(count))]
        others = [i for i in range(count) if self.case.every and i != self.cell.declaration.output]
        return [*results, *(self.get(f"series {i}", p.series[i], N, D * H) for i in others)]

    # --- backward ---

    def backward(self) -> list[Tensor]:
        p, D, N, H = FormulaBackward(), self.D, self.N, self.H
        self.fill(p)
        kept, count = self.kept, len(self.data.states)
        p.y, p.saved, p.v = kept.y, kept.saved, kept.v
        p.dy = self.sim.put("dy", self.data.dy)
        for i in range(count):
            p.series[i] = kept.series[i]
            p.d_last[i] = self.sim.put(f"d_last {i}", self.data.d_last[i])
            p.d_initial[i] = self.out(f"d_initial {i}", D, self.B, H)
            if self.case.reset_state:
                p.d_reset[i] = self.out(f"d_reset {i}", D, N, H)
        others = [i for i in range(count) if i != self.cell.declaration.output]
        for i, d_series in zip(others, self.data.d_series, strict=False):
            p.d_series[i] = self.sim.put(f"d_series {i}", d_series)
        blocks = len(self.plan.gradients) + len(self.plan.parameters) + len(self.plan.phases)
        p.d = self.out("d", D, N, blocks, H)
        self.call("simt_formula_backward", p)
        d = self.get("d", p.d, D, N, blocks, H).double()
        d_states = [self.get(f"d_initial {i}", p.d_initial[i], D, self.B, H).double() for i in range(count)]
        dx, params = torch.zeros(N, self.case.I, dtype=torch.float64), []
        for direction in range(D):
            params += self.gradients(direction, d[direction], dx)
        return [dx.view(self.data.x.shape), *d_states, *params, *self.reset_gradients(p, d)]

    def reset_gradients(self, p: FormulaBackward, d: Tensor) -> list[Tensor]:
        """Of what resets put, from d [D, N, blocks, H] and d_reset, which is there at resets alone."""
        says, found = self.cell.declaration, []
        slots, gates = len(self.plan.gradients), len(says.recurrent_gates)
        for i, state in enumerate(self.data.rows.reset_states):
            sums = torch.zeros(state.shape, dtype=torch.float64)
            of_rows = self.sim.get(p.d_reset[i], (self.D, self.N, self.H), self.kernels.dtype).double()
            for direction in range(self.D):
                for row, t, b in self.data.reset_rows():
                    total = of_rows[direction, row]
                    if gates and i == says.recurrent:
                        rec = d[direction, row, slots - gates : slots]
                        total = total + self.through_weights(self.params[direction]["weight_hh"].double(), rec)
                    of_reset(sums, t, direction, b).add_(total)
            found.append(sums)
        return found

    def through_weights(self, weight: Tensor, rec: Tensor) -> Tensor:
        """d_rec [Gr, H] of a row times weight_hh: [H]."""
        heads = self.cell.declaration.heads
        units = self.H // heads
        of_heads = weight.view(heads, len(rec), units, units)
        return torch.einsum("gku,kguj->kj", rec.unflatten(1, (heads, units)), of_heads).flatten()

    def gradients(self, direction: int, d: Tensor, dx: Tensor) -> list[Tensor]:
        """Of a direction's parameters, from d [N, blocks, H]; adds the input's to dx."""
        plan, says, params, H = self.plan, self.cell.declaration, self.params[direction], self.H
        x = self.data.x.reshape(self.N, -1).double()
        of_input = d[:, list(plan.input_gradients[: len(says.weighted_gates)])].flatten(1)
        dx += of_input @ params["weight_ih"].double()
        made = {"weight_ih": of_input.T @ x, "bias_ih": of_input.sum(0)}
        slots, gates = len(plan.gradients), len(says.recurrent_gates)
        if gates:
            rec = d[:, slots - gates : slots]
            made["bias_hh"] = rec.flatten(1).sum(0)
            before = self.before(direction)
            heads = says.heads
            rec = rec.unflatten(2, (heads, H // heads))
            weight = torch.einsum("ngku,nkj->kguj", rec, before.unflatten(1, (heads, H // heads))).flatten(1, 2)
            made["weight_hh"] = weight[0] if heads == 1 else weight
        for i, name in enumerate(plan.parameters):
            gradient = d[:, slots + i].sum(0)
            made[name] = gradient if params[name].dim() else gradient.sum()
        for k, phase in enumerate(self.cell.phases):
            gradient = d[:, slots + len(plan.parameters) + k]
            v = self.sim.get(self.kept.v[k], (self.D, self.N, H), self.kernels.dtype)[direction].double()
            if phase.kind == "product":
                made[phase.parameters[0]] = gradient.T @ v
                continue
            norm = torch.nn.functional.layer_norm if phase.kind == "layer_norm" else torch.nn.functional.rms_norm
            made[phase.parameters[0]] = (gradient * norm(v, (H,), eps=1e-5)).sum(0)
            if len(phase.parameters) > 1:
                made[phase.parameters[1]] = gradient.sum(0)
        return [made[name] for name in params]

    def before(self, direction: int) -> Tensor:
        """The recurrent state before every row's step [N, H]; zeros where the row takes no part."""
        says, H = self.cell.declaration, self.H
        put = self.data.rows.reset_states
        zeros = torch.zeros(H, dtype=torch.float64)
        resets = {
            row: of_reset(put[says.recurrent], t, direction, b).double() if put else zeros
            for row, t, b in self.data.reset_rows()
        }
        address = self.kept.y if says.recurrent == says.output else self.kept.series[says.recurrent]
        series = self.get("series", address, self.N, self.D, H)[:, direction].double()
        result = torch.zeros(self.N, H, dtype=torch.float64)
        sizes = self.case.batch_sizes
        starts = torch.tensor([0, *(sizes or [])]).cumsum(0)
        for b in range(self.B):
            steps = self.case.T if sizes is None else sum(size > b for size in sizes)
            if self.case.lengths:
                steps = self.case.lengths[b]
            row_of = (lambda t: int(starts[t]) + b) if sizes else (lambda t: t * self.B + b)  # noqa: B023
            state = self.data.states[says.recurrent][direction, b].double()
            for t in range(steps) if direction == 0 else reversed(range(steps)):
                row = row_of(t)
                result[row] = resets.get(row, state)
                state = series[row]
        return result


LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def compare(kernels: Kernels, case: Case, seeds: Sequence[int] = (0,), device: DeviceInfo = H100) -> None:
    """Outputs and all gradients against ``step`` in float64, the same bits under every seed."""
    data = make_data(kernels.cell, case, kernels.dtype)
    wanted = expected(kernels.cell, case, data)
    earlier: list[Tensor] | None = None
    for seed in seeds:
        run = Run(kernels, case, data, seed, device)
        try:
            got = run.forward()
            if case.training:
                got += run.backward()
        finally:
            kernels.sim.unmap_stacks()
        for name, mine, want in zip(names_of(kernels.cell, case), got, wanted, strict=case.training):
            limit = LIMITS[kernels.dtype] * max(1 / 16, want.abs().max().item())
            torch.testing.assert_close(
                mine.double(), want, atol=limit, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert earlier is None or all(torch.equal(a, b) for a, b in zip(got, earlier, strict=True))
        earlier = got


def plan_text(kernels: Kernels, case: Case, device: DeviceInfo = H100, backward: bool = False) -> str:
    """What the planner says of a layer."""
    p = FormulaBackward() if backward else FormulaForward()
    p.H, p.D, p.heads = case.units * kernels.cell.declaration.heads, 1 + case.bidirectional, kernels.cell.declaration.heads
    p.T, p.B, p.N = case.T, case.B, case.T * case.B
    lib = kernels.sim.lib
    traits = ctypes.byref(kernels.traits)
    family, where = case.family.encode(), ctypes.byref(device)
    lib.simt_formula_workspace(ctypes.byref(p), traits, DTYPES[kernels.dtype], backward, where, family, case.ranks)
    text: bytes = lib.simt_formula_text()
    return text.decode()


if __name__ == "__main__":  # for torch_host/build.py, whose process must not import fused_rnn yet
    everything = make_plan(Everything() if sys.argv[1:] == ["plain"] else everything_with_options())
    made = write_source(everything, torch.float32)
    made.with_suffix(".kernels").write_bytes(header_of(everything, torch.float32, 90))
    print(made)
