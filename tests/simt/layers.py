"""Runs one recurrent layer of tests/cases.py through the CUDA backend's host code on the simulated device."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re
from collections.abc import Callable
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from builder import ROOT
from cases import CELLS, Case, Data
from simulator import H100, DeviceInfo, Simulator
from torch import Tensor

from fused_rnn import reference
from fused_rnn._kinds import KINDS, NUMBER_OF_MODE
from fused_rnn._recipe import Recipe, Rows

CELL_NUMBER = NUMBER_OF_MODE
DTYPE_NUMBER = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
# What csrc/plan/family.h says of each family, in its order.
_LINE = r'^  X\(k\w+, "(\w+)", (true|false), (?:true|false), (?:true|false), (true|false),'
_LISTED = re.findall(_LINE, (ROOT / "csrc" / "plan" / "family.h").read_text(), re.M)
FAMILIES = tuple(name for name, _, stacks in _LISTED if stacks == "false")  # those with kernels of ours
PERSISTENT = tuple(name for name, persistent, _ in _LISTED if persistent == "true")
assert set(CELLS) == set(CELL_NUMBER)


SCALARS = {"bool": c_bool, "int": c_int, "int64_t": c_int64, "double": c_double, "CellKind": c_int, "DType": c_int}


def structure(name: str, header: str, **known: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """The struct `name` of a header in csrc, as a ctypes.Structure; known: structs among its fields."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())
    body = re.search(rf"^struct {name} \{{(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
    assert body, f"no struct {name} in {header}"
    types = {**SCALARS, **known}
    fields: list[tuple[str, Any]] = []
    for declaration in filter(None, (d.strip() for d in body[1].split(";"))):
        match = re.fullmatch(r"(?:const )?(\w+)\s*(\*?)\s*(.*)", declaration, re.DOTALL)
        assert match, declaration
        kind: Any = c_void_p if match[2] else types[match[1]]
        for field in match[3].split(","):
            parts = re.fullmatch(r"\s*\*?(\w+)(?:\[(\d+)\])?\s*(?:=.*)?", field, re.DOTALL)
            assert parts, declaration
            fields.append((parts[1], kind * int(parts[2]) if parts[2] else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Sequence = structure("Sequence", "core/active.h")
ResetState = structure("ResetState", "core/modifier.h")
Zoneout = structure("Zoneout", "core/modifier.h")
Modifier = structure("Modifier", "core/modifier.h", ResetState=ResetState, Zoneout=Zoneout)
WeightMatrix = structure("WeightMatrix", "core/params.h")
Weights = structure("Weights", "core/params.h", WeightMatrix=WeightMatrix)
_PARTS = {"Sequence": Sequence, "Modifier": Modifier, "Weights": Weights}
ForwardParams = structure("ForwardParams", "core/params.h", **_PARTS)
BackwardParams = structure("BackwardParams", "core/params.h", **_PARTS)
DualBackwardParams = structure("DualBackwardParams", "core/params.h", BackwardParams=BackwardParams)
Problem = structure("Problem", "plan/problem.h")


class NoPlan(ValueError):
    """make_plan refused; the message is its reason."""


@dataclasses.dataclass
class Layer:
    """A case of one layer with its data, and the steps' rows."""

    case: Case
    data: Data
    offsets: Tensor | None
    rows: int
    active: Tensor  # [N] bool
    step_of_row: Tensor  # [N]
    batch_of_row: Tensor  # [N]

    @staticmethod
    def of(case: Case, data: Data) -> Layer:
        offsets = None
        t, b = torch.meshgrid(torch.arange(case.steps), torch.arange(case.batch), indexing="ij")
        if data.batch_sizes is not None:
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), data.batch_sizes.cumsum(0)])
            keep = b < data.batch_sizes[:, None]
            t, b = t[keep], b[keep]
        t, b = t.flatten(), b.flatten()
        active = torch.ones_like(t, dtype=torch.bool) if data.lengths is None else t < data.lengths[b]
        return Layer(case, data, offsets, t.numel(), active, t, b)

    @property
    def gates(self) -> int:
        return KINDS[CELL_NUMBER[self.case.cell]].gates

    @property
    def slots(self) -> int:
        return KINDS[CELL_NUMBER[self.case.cell]].slots

    @property
    def c_dtype(self) -> torch.dtype:
        """Of c0 and c_n: the case's, or float32 where the data say so (csrc/core/params.h, wide_c)."""
        return self.case.dtype if self.data.c0 is None else self.data.c0.dtype

    def direction(self, d: int) -> list[Tensor]:
        n = len(self.data.weights) // self.case.directions
        return self.data.weights[d * n : (d + 1) * n]

    def row_before(self, d: int) -> Tensor:
        """[N]: the row of the state before each row's step, -1 for the initial state."""
        rows_in_order = list(zip(self.step_of_row.tolist(), self.batch_of_row.tolist(), strict=True))
        place = {row: r for r, row in enumerate(rows_in_order)}
        step = 1 if d else -1
        rows = []
        for r, (t, b) in enumerate(rows_in_order):
            before = place.get((t + step, b), -1)
            rows.append(before if before >= 0 and self.active[before] and self.active[r] else -1)
        return torch.tensor(rows, dtype=torch.int64)


class LayerRun:
    """One layer on one simulator: forward(), then backward() if it was training.

    tile: (size, stages) in the place of the plan's choice.
    """

    def __init__(
        self,
        sim: Simulator,
        layer: Layer,
        *,
        seed: int = 0,
        device: DeviceInfo = H100,
        family: str | None = None,
        tf32: bool = False,
        training: bool = True,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.sim, self.layer, self.seed, self.device, self.training = sim, layer, seed, device, training
        self.family = -1 if family is None else FAMILIES.index(family)
        self.tf32, self.tile = tf32, tile
        lib = sim.lib
        lib.simt_make_plan.restype = lib.simt_plan_text.restype = c_void_p
        lib.simt_plan_text.restype = ctypes.c_char_p
        lib.simt_plan_workspace.restype = c_int64
        for name in ("simt_plan_workspace", "simt_plan_reads_x", "simt_free_plan"):
            getattr(lib, name).argtypes = [c_void_p]
        lib.simt_force_tile.argtypes = [c_void_p, c_void_p, c_int, c_int]
        lib.simt_force_tile.restype = lib.simt_plan_reads_x.restype = c_bool
        for name in ("simt_forward", "simt_backward"):
            getattr(lib, name).argtypes = [c_void_p, c_void_p]
            getattr(lib, f"{name}_steps").argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_void_p]
        self.given_gradients = True  # False: dy, dh_n and dc_n are null
        self.wants_d_h0 = True  # False: d_h0 is null
        self.outputs: dict[str, tuple[int, tuple[int, ...]]] = {}  # address and shape
        self.cuts: list[int] = []  # steps at which a new launch takes over, for persistent families
        self.plan_text = ""
        self.finite = True  # whether the results have to be
        sizes = (c_int * 5)()
        lib.simt_sizes(sizes)
        here = [ctypes.sizeof(t) for t in (ForwardParams, BackwardParams, Problem, DeviceInfo, DualBackwardParams)]
        assert list(sizes) == here, "the structures here differ from those of csrc"

    @property
    def saves_gates(self) -> bool:
        """Whether forward keeps slots for backward."""
        return self.layer.slots > 1

    def plan(self, problem: Any) -> int:
        plan = self.sim.lib.simt_make_plan(ctypes.byref(problem), ctypes.byref(self.device), self.family)
        self.plan_text = self.sim.lib.simt_plan_text().decode()
        if not plan:
            raise NoPlan(self.plan_text)
        if self.tile is not None:
            if not self.sim.lib.simt_force_tile(plan, ctypes.byref(problem), *self.tile):
                self.sim.lib.simt_free_plan(plan)
                raise NoPlan("no such tile")
            self.plan_text = self.sim.lib.simt_plan_text().decode()
        return plan

    def plans(self) -> list[str]:
        """The texts of the plans of forward and backward; nothing runs."""
        self.sim.reset(self.seed, self.device)
        _, problem = self.arguments(projected=False)
        texts = []
        for problem.backward in (False, True):
            self.sim.lib.simt_free_plan(self.plan(problem))
            texts.append(self.plan_text)
        return texts

    def _weights(self, params: Any) -> None:
        case, put = self.layer.case, self.sim.put
        for d in range(case.directions):
            weights = self.layer.direction(d)
            biases = weights[2:4] if case.has_biases else [None, None]
            w_hr = weights[-1] if case.proj else None
            names = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
            addresses = [put(f"{n}[{d}]", t) for n, t in zip(names, [*weights[:2], *biases, w_hr], strict=True)]
            w_ih, w_hh, b_ih, b_hh, w_hr = addresses
            w_ih, w_hh, w_hr = (WeightMatrix(address, DTYPE_NUMBER[case.dtype]) for address in (w_ih, w_hh, w_hr))
            params.weights[d] = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)

    def _common(self, params: Any) -> None:
        case, data, put = self.layer.case, self.layer.data, self.sim.put
        params.cell, params.dtype, params.allow_tf32 = CELL_NUMBER[case.cell], DTYPE_NUMBER[case.dtype], self.tf32
        params.H, params.P, params.D = case.hidden, case.output, case.directions
        params.seq = Sequence(
            case.steps,
            case.batch,
            self.layer.rows,
            put("lengths", data.lengths),
            put("offsets", self.layer.offsets),
        )
        params.modifier = self.modifier()
        params.h0, params.c0 = put("h0", data.h0), put("c0", data.c0)
        self._weights(params)

    def modifier(self) -> Any:
        """Of steps and their rows (csrc/core/modifier.h), in device memory."""
        return Modifier(self.sim.put("resets", self.layer.data.resets))

    def _finish(self, call: str, params: Any, problem: Any) -> None:
        plan, case, lib = self.plan(problem), self.layer.case, self.sim.lib
        try:
            params.workspace = self.sim.out("workspace", lib.simt_plan_workspace(plan))
            if self.cuts:
                states = 2 if call == "simt_backward" else 1
                carry = self.sim.out("carry", 4 * states * case.directions * case.batch * case.hidden)
                bounds = [0, *self.cuts, case.steps]
                for first, end in itertools.pairwise(bounds):
                    self.steps(params, plan, first, end, carry)
            else:
                self.sim.check(getattr(lib, call)(ctypes.byref(params), plan))
        finally:
            self.sim.lib.simt_free_plan(plan)

    def steps(self, params: Any, plan: int, first: int, end: int, carry: int, given: bool = False) -> None:
        """Steps [first, end) of the scan. Another stream may be writing what is read in later steps (not if it is given)."""
        backward = isinstance(params, BackwardParams)
        if not given:
            self.close_later(params, backward, end)
        call = self.sim.lib.simt_backward_steps if backward else self.sim.lib.simt_forward_steps
        self.sim.check(call(ctypes.byref(params), plan, (c_int64 * 2)(first, end), 1, carry))
        self.sim.open_all()

    def close_later(self, params: Any, backward: bool, end: int) -> None:
        """Of the input projection [D, N, S, H], backward of dy [N, D, P]: the rows of the scan's steps from `end` on."""
        case, rows = self.layer.case, self.layer.rows
        base = params.dy if backward else params.gates
        size = case.dtype.itemsize * (case.output if backward else self.layer.slots * case.hidden)
        for d in range(case.directions if base else 0):
            forwards = bool(d) == backward
            step = self.layer.step_of_row if forwards else case.steps - 1 - self.layer.step_of_row
            for row in (step >= end).nonzero().flatten().tolist():
                place = row * case.directions + d if backward else d * rows + row
                self.sim.close(base + place * size, size)

    def _outputs(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        return {
            name: self.sim.out(name, self.dtype_of(name).itemsize * int(torch.tensor(shape).prod()))
            for name, shape in shapes.items()
        }

    def dtype_of(self, name: str) -> torch.dtype:
        return self.layer.c_dtype if name == "c_n" else self.layer.case.dtype

    def forward(self) -> dict[str, Tensor]:
        """y [N, D*P], h_n, c_n, and when training gates [D, N, S, H] and cs [D, N, H]."""
        self.sim.reset(self.seed, self.device)
        params, problem = self.arguments(projected=True)
        self._finish("simt_forward", params, problem)
        return self.results()

    def arguments(self, projected: bool) -> tuple[Any, Any]:
        """The parameters of forward, in device memory, and its problem; projected: gates holds the input projection."""
        case, layer = self.layer.case, self.layer
        sim, n, d, h = self.sim, self.layer.rows, case.directions, case.hidden
        params = ForwardParams(I=case.input_size, training=self.training, wide_c=layer.c_dtype != case.dtype)
        self._common(params)
        params.x = sim.put("x", layer.data.input)
        shapes = {"y": (n, d * case.output), "h_n": (d, case.batch, case.output)}
        if case.cell == "LSTM":
            shapes["c_n"] = (d, case.batch, h)
            if self.training:
                shapes["cs"] = (d, n, h)
        places = self._outputs(shapes)
        problem = Problem()
        sim.lib.simt_problem_forward(ctypes.byref(params), ctypes.byref(problem))
        plan = self.plan(problem)
        reads_x = sim.lib.simt_plan_reads_x(plan)
        sim.lib.simt_free_plan(plan)
        gates = (d, n, layer.slots, h)
        if not reads_x or (self.training and self.saves_gates):
            buffer = torch.full(gates, float("nan"), dtype=case.dtype)
            if not reads_x and projected:
                buffer[:, :, : layer.gates] = self.projection(layer.data.input)
            places["gates"] = sim.inout("gates", buffer)
            if self.training and self.saves_gates:
                shapes["gates"] = gates
        for name, address in places.items():
            setattr(params, name, address)
        self.outputs = {name: (places[name], shape) for name, shape in shapes.items()}
        return params, problem

    def results(self) -> dict[str, Tensor]:
        """What a call left in the memory that arguments() or backward_arguments() has given it."""
        layer, sim = self.layer, self.sim
        results = {name: sim.get(*place, self.dtype_of(name)) for name, place in self.outputs.items()}
        for name, tensor in results.items():
            sim.check_output(name, self.outputs[name][0], tensor, self.finite)
        for name in ("gates", "cs"):
            if name in results:
                assert not results[name][:, ~layer.active].any(), f"{name} is not 0 at an inactive row"
        return results

    def projection(self, x: Tensor) -> Tensor:
        """x W_ih^T + b_ih, [D, N, G, H], rounded once, with NaN at inactive rows (they may hold anything)."""
        case, layer = self.layer.case, self.layer
        parts = []
        for d in range(case.directions):
            weights = [w.double() for w in layer.direction(d)]
            rows = x.double().reshape(layer.rows, -1)
            part = torch.nn.functional.linear(rows, weights[0], weights[2] if case.has_biases else None)
            part[~layer.active] = float("nan")
            parts.append(part.reshape(layer.rows, layer.gates, case.hidden))
        return torch.stack(parts).to(case.dtype)

    def backward(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """d_gates [D, N, S, H], d_h0, d_c0, and with a projection d_h [D, N, P]."""
        self.sim.reset(self.seed, self.device)
        params, problem = self.backward_arguments(saved)
        self._finish("simt_backward", params, problem)
        return self.results()

    def backward_arguments(self, saved: dict[str, Tensor]) -> tuple[Any, Any]:
        """The parameters of backward, in device memory, and its problem."""
        case, data, layer, sim = self.layer.case, self.layer.data, self.layer, self.sim
        n, d, h = layer.rows, case.directions, case.hidden
        params = BackwardParams()
        self._common(params)
        params.y = sim.put("y", saved["y"])
        params.gates, params.cs = sim.put("gates", saved.get("gates")), sim.put("cs", saved.get("cs"))
        if self.given_gradients:
            params.dy, params.dh_n = sim.put("dy", data.dy), sim.put("dh_n", data.dh_n)
        shapes = {"d_gates": (d, n, layer.slots, h), **self.more_gradients(params)}
        if self.wants_d_h0:
            shapes["d_h0"] = (d, case.batch, case.output)
        if case.cell == "LSTM":
            params.dc_n = sim.put("dc_n", data.dc_n) if self.given_gradients else None
            shapes["d_c0"] = (d, case.batch, h)
        if case.proj:
            shapes["d_h"] = (d, n, case.output)
        places = self._outputs(shapes)
        for name, address in places.items():
            setattr(params, name, address)
        problem = Problem()
        sim.lib.simt_problem_backward(ctypes.byref(params), ctypes.byref(problem))
        self.outputs = {name: (places[name], shape) for name, shape in shapes.items()}
        return params, problem

    def more_gradients(self, params: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what backward writes beside; puts into params what it reads beside."""
        return {}

    def input_gradient(self, d_gates: Tensor) -> Tensor:
        """d_gates [D, N, S, H] times W_ih, [N, I], rounded once."""
        case, layer = self.layer.case, self.layer
        slots = [1, 2, 0] if case.cell == "GRU" else list(range(layer.slots))
        parts = [
            d_gates[d][:, slots].double().reshape(layer.rows, -1) @ layer.direction(d)[0].double()
            for d in range(case.directions)
        ]
        return torch.stack(parts).sum(0).to(case.dtype)


def previous_h(layer: Layer, saved: dict[str, Tensor], d: int) -> Tensor:
    """[N, P]: what each row's step multiplies with W_hh, in float64."""
    case, data = layer.case, layer.data
    before = layer.row_before(d)
    y = saved["y"].double()[:, d * case.output : (d + 1) * case.output]
    h0 = torch.zeros(case.batch, case.output, dtype=torch.float64) if data.h0 is None else data.h0[d].double()
    h = torch.where((before >= 0)[:, None], y[before.clamp(min=0)], h0[layer.batch_of_row])
    return h if data.resets is None else h.masked_fill(data.resets.reshape(-1, 1), 0)


def gradients(
    layer: Layer,
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
    previous: Callable[[Layer, dict[str, Tensor], int], Tensor] = previous_h,
) -> list[Tensor]:
    """The matrix products that the caller of backward makes, in float64: gradients of (x, h0, c0, *weights)."""
    case, data = layer.case, layer.data
    x = data.input.double().reshape(layer.rows, -1).masked_fill(~layer.active[:, None], 0)
    dx = torch.zeros_like(x)
    weight_grads: list[Tensor] = []
    for d in range(case.directions):
        d_gates = grads["d_gates"][d].double()
        assert not d_gates[~layer.active].any(), "d_gates is not 0 at an inactive row"
        input_slots = [1, 2, 0] if case.cell == "GRU" else list(range(layer.slots))
        d_in = d_gates[:, input_slots].reshape(layer.rows, -1)
        d_rec = d_gates[:, layer.slots - layer.gates :].reshape(layer.rows, -1)
        h = previous(layer, saved, d)
        weights = layer.direction(d)
        dx += d_in @ weights[0].double()
        weight_grads += [d_in.T @ x, d_rec.T @ h]
        if case.has_biases:
            weight_grads += [d_in.sum(0), d_rec.sum(0)]
        if case.proj:
            # The hidden state before the projection is o tanh(c), recomputed from what forward saved.
            full = saved["gates"][d, :, 3].double() * saved["cs"][d].double().tanh()
            full = full.masked_fill(~layer.active[:, None], 0)
            d_h = grads["d_h"][d].double()
            assert not d_h[~layer.active].any(), "d_h is not 0 at an inactive row"
            weight_grads.append(d_h.T @ full)
    results = [dx.reshape(data.input.shape)]
    if data.h0 is not None:
        results.append(grads["d_h0"])
    if data.c0 is not None:
        results.append(grads["d_c0"])
    return results + weight_grads


def relu_gradients(layer: Layer, saved: dict[str, Tensor]) -> list[Tensor]:
    """As gradients(), in float64, for RNN_RELU whose units were on where `saved` says so.

    The derivative jumps at 0: where a pre-activation is near 0, its rounding decides, and the gradient of a rounded forward
    pass is not near that of an exact one.
    """
    case, data = layer.case, layer.data
    dy = data.dy.double().reshape(layer.rows, case.directions, case.output)
    d_gates = torch.zeros(case.directions, layer.rows, 1, case.hidden, dtype=torch.float64)
    carry = data.dh_n.double().clone()
    for d in range(case.directions):
        w_hh = layer.direction(d)[1].double()
        on = saved["y"][:, d * case.output : (d + 1) * case.output] > 0
        steps = range(case.steps) if d else reversed(range(case.steps))
        for t in steps:
            rows = ((layer.step_of_row == t) & layer.active).nonzero().flatten()
            batch = layer.batch_of_row[rows]
            d_gates[d, rows, 0] = (dy[rows, d] + carry[d, batch]) * on[rows]
            carry[d, batch] = d_gates[d, rows, 0] @ w_hh
            if data.resets is not None:
                carry[d, batch[data.resets.flatten()[rows]]] = 0
    return gradients(layer, saved, {"d_gates": d_gates, "d_h0": carry})


def expected(layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
    """(y, h_n, c_n?) and the gradients of (x, h0, c0, *weights), by the fp64 reference on upcast inputs."""
    case = layer.case
    data = layer.data.to(torch.float64)
    inputs = data.differentiable()
    for t in inputs:
        t.requires_grad_()
    recipe = Recipe(CELL_NUMBER[case.cell], 1, case.has_biases, case.bidirectional)
    states = [state for state in (data.h0, data.c0) if state is not None]
    if not states and layer.offsets is not None:
        sizes = (case.output, case.hidden)[: recipe.kind.states]
        states = [torch.zeros(case.directions, case.batch, size, dtype=torch.float64) for size in sizes]
    rows = Rows(data.lengths, layer.offsets, data.resets)
    y, last = reference.layer(data.input, states, data.weights, rows, recipe)
    used = [y, *last]
    outer = [data.dy, data.dh_n, data.dc_n][: len(used)]
    grads = torch.autograd.grad(used, inputs, outer, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in used], list(grads)
