"""The scans of tangents and of dual numbers on the simulated device, and what they compute by torch.func in float64.

The oracle is a loop over rows whose accumulators get `delta`, projected outputs `eps`, and the states that a step reads
beside its product `rho`: all that the kernels give is a derivative by these and by the arguments.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from ctypes import c_void_p
from typing import Any

import torch
from cases import Case, make_data
from layers import _PARTS, DualBackwardParams, ForwardParams, Layer, LayerRun, Problem, structure
from options import Extras, OptionLayer, OptionRun, make_extras
from torch import Tensor

Primal = structure("Primal", "core/params.h", **_PARTS)

Tensors = dict[str, Tensor]
# Slots of d_gates as slots of `gates` (csrc/core/params.h).
D_SLOTS = {"GRU": [2, 0, 1, 3], "LSTM": [0, 1, 2, 3]}
# The slot that each gate of the recurrent product is added to.
RECURRENT = {"GRU": [0, 1, 3], "LSTM": [0, 1, 2, 3]}


@dataclasses.dataclass(frozen=True)
class Second:
    """A case, which reset states it has ("", or one of options.PUT), and what is null: names of arguments."""

    case: Case
    put: str = ""
    nulls: tuple[str, ...] = ()
    keeps_dh: bool = False
    tf32: bool = False
    tile: tuple[int, int] | None = None
    seeds: int = 2

    def __str__(self) -> str:
        flags = [self.put, "no-" + "-".join(self.nulls) if self.nulls else "", "dh" * self.keeps_dh, "tf32" * self.tf32]
        tile = "" if self.tile is None else f"tile{self.tile[0]}x{self.tile[1]}"
        return "-".join([str(self.case), *filter(None, [*flags, tile])])


def _cell(cell: str, a: Tensor, h_prev: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulators [rows, S, H] -> (slots as they are saved, h, c)."""
    if cell == "LSTM":
        i, f, o = (a[:, s].sigmoid() for s in (0, 1, 3))
        g = a[:, 2].tanh()
        c = f * c_prev + i * g
        return torch.stack([i, f, g, o], 1), o * c.tanh(), c
    if cell == "GRU":
        r, z, hn = a[:, 0].sigmoid(), a[:, 1].sigmoid(), a[:, 3]
        n = (a[:, 2] + r * hn).tanh()
        return torch.stack([r, z, n, hn], 1), n + z * (h_prev - n), c_prev
    h = {"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu, "RNN_IDENTITY": lambda t: t}[cell](a[:, 0])
    return h.unsqueeze(1), h, c_prev


class Oracle:
    """A layer as a function of tensors in float64: arguments() in, results by name out."""

    def __init__(self, layer: OptionLayer) -> None:
        self.layer, self.case = layer, layer.case
        n, d = layer.rows, self.case.directions
        self.active = layer.active.nonzero().flatten()
        self.shapes = {
            "delta": (d, n, layer.slots, self.case.hidden),
            "eps": (d, n, self.case.output),
            "rho": (d, n, self.case.hidden),
        }

    def arguments(self) -> Tensors:
        data, case, layer = self.layer.data.to(torch.float64), self.case, self.layer
        found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        for d in range(case.directions):
            weights = [w.double() for w in layer.direction(d)]
            found["delta"][d, :, : layer.gates] = torch.nn.functional.linear(
                data.input.reshape(layer.rows, -1), weights[0], weights[2] if case.has_biases else None
            ).reshape(layer.rows, layer.gates, case.hidden)
            found[f"w_hh{d}"] = weights[1]
            if case.has_biases:
                recurrent = RECURRENT.get(case.cell, [0])
                found["delta"][d][:, recurrent] += weights[3].reshape(layer.gates, case.hidden)
            if case.proj:
                found[f"w_hr{d}"] = weights[-1]
        given: list[tuple[str, Tensor | None]] = [("h0", data.h0), ("c0", data.c0)]
        given += zip(("put_h", "put_c"), layer.extras.to(torch.float64).reset_states, strict=False)
        return found | {name: t for name, t in given if t is not None}

    def __call__(self, given: Tensors) -> Tensors:
        made: dict[str, list[Tensor]] = {name: [] for name in ("y", "h_n", "c_n", "gates", "cs")}
        for d in range(self.case.directions):
            for name, t in self._direction(given, d).items():
                made[name].append(t)
        found = {name: torch.stack(parts) for name, parts in made.items() if parts}
        found["y"] = found["y"].transpose(0, 1).reshape(self.layer.rows, -1)
        return found

    def _direction(self, given: Tensors, d: int) -> Tensors:
        case, layer = self.case, self.layer
        recurrent = RECURRENT.get(case.cell, [0])

        def start(name: str, size: int) -> Tensor:
            return given[name][d] if name in given else torch.zeros(case.batch, size, dtype=torch.float64)

        h, c = start("h0", case.output), start("c0", case.hidden)
        order: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {"y": [], "gates": [], "cs": []}
        for t in reversed(range(case.steps)) if d else range(case.steps):
            rows = ((layer.step_of_row == t) & layer.active).nonzero().flatten()
            if not len(rows):
                continue
            batch = layer.batch_of_row[rows]
            h_prev, c_prev = self._put(given, "put_h", h[batch], rows, d), self._put(given, "put_c", c[batch], rows, d)
            product = (h_prev @ given[f"w_hh{d}"].T).reshape(len(rows), layer.gates, case.hidden)
            a = given["delta"][d][rows].index_add(1, torch.tensor(recurrent), product)
            beside = given["rho"][d][rows]
            direct = h_prev + beside if case.cell == "GRU" else h_prev
            gates, h_new, c_new = _cell(case.cell, a, direct, c_prev + beside)
            if case.proj:
                h_new = h_new @ given[f"w_hr{d}"].T
            h_new = h_new + given["eps"][d][rows]
            h, c = h.index_copy(0, batch, h_new), c.index_copy(0, batch, c_new)
            order.append(rows)
            for name, part in (("y", h_new), ("gates", gates), ("cs", c_new)):
                parts[name].append(part)
        places = torch.cat(order)
        found = {}
        for name, several in parts.items():
            every = torch.cat(several)
            found[name] = torch.zeros(layer.rows, *every.shape[1:], dtype=torch.float64).index_copy(0, places, every)
        return found | {"h_n": h, "c_n": c}

    def _put(self, given: Tensors, name: str, before: Tensor, rows: Tensor, d: int) -> Tensor:
        resets = self.layer.data.resets
        if resets is None:
            return before
        value = torch.zeros_like(before)
        if name in given:
            values, batch = given[name], self.layer.batch_of_row[rows]
            if values.dim() == 4:
                value = values[self.layer.step_of_row[rows], d, batch]
            else:
                value = values[d].expand(self.case.batch, -1)[batch]
        return torch.where(resets.flatten()[rows][:, None], value, before)

    def gradients(self, given: Tensors, outer: Tensors) -> Tensors:
        """By all arguments, from gradients of y, h_n, c_n and cs ("dy", "dh_n", "dc_n", "d_cs")."""

        names = {"y": "dy", "h_n": "dh_n", "c_n": "dc_n", "cs": "d_cs"}

        def results(args: Tensors) -> Tensors:
            made = self(args)
            return {name: made[name] for name in names}

        made, pull = torch.func.vjp(results, given)
        return pull({name: outer.get(names[name], torch.zeros_like(t)) for name, t in made.items()})[0]


class SecondRun(OptionRun):
    """Both scans of an OptionLayer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("simt_dual_backward", "simt_problem_dual_backward"):
            getattr(self.sim.lib, name).argtypes = [c_void_p, c_void_p]

    def put_all(self, params: Any, tensors: Tensors) -> None:
        for name, t in tensors.items():
            setattr(params, name, self.sim.put(name, t))


def random_tangents(given: Tensors, outer: Tensors, seed: int = 3) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    scales = {"w": 0.3}
    return {
        name: scales.get(name[0], 1.0) * torch.randn(t.shape, generator=g, dtype=torch.float64)
        for name, t in (given | outer).items()
    }


def _layer_of_tangents(layer: OptionLayer, v: Tensors, dtype: torch.dtype) -> OptionLayer:
    """The layer with tangents in the place of what may be differentiated."""
    data = dataclasses.replace(layer.data)
    data.h0, data.c0 = (v[name].to(dtype) if name in v else None for name in ("h0", "c0"))
    states = tuple(v[name].to(dtype) for name in ("put_h", "put_c") if name in v)
    return dataclasses.replace(layer, data=data, extras=dataclasses.replace(layer.extras, reset_states=states))


def layer_of(second: Second) -> OptionLayer:
    case = second.case
    data = make_data(case)
    layer = Layer.of(case, data)
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    extras = make_extras(case, layer.rows, (second.put,)) if second.put else Extras()
    return OptionLayer(**fields, extras=extras)


@dataclasses.dataclass
class Problems:
    """Of a Second what the kernels are given and what they should make of it, in float64."""

    layer: OptionLayer
    given: Tensors
    outer: Tensors
    v: Tensors
    values: Tensors
    tangents: Tensors
    grads: Tensors
    grad_tangents: Tensors

    @staticmethod
    def of(second: Second) -> Problems:
        layer = layer_of(second)
        oracle, data = Oracle(layer), layer.data.to(torch.float64)
        given = oracle.arguments()
        outer = {"dy": data.dy.reshape(layer.rows, -1), "dh_n": data.dh_n}
        every_c = (second.case.directions, layer.rows, second.case.hidden)
        if second.case.cell == "LSTM":
            outer["dc_n"] = data.dc_n
            outer["d_cs"] = torch.randn(every_c, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        outer = {name: torch.zeros_like(t) if name in second.nulls else t for name, t in outer.items()}
        v = random_tangents(given, outer)
        v["rho"].zero_()
        for d in range(second.case.directions):
            v["delta"][d][~layer.active] = 0
        if not second.case.proj:
            v["eps"].zero_()
        if "w_hr" in second.nulls:
            v["eps"].zero_()
        for name in second.nulls:
            for place in (name, f"{name}0", f"{name}1"):
                if place in v:
                    v[place].zero_()
        if "source" in second.nulls:  # all of the accumulators' tangents come from the input product
            v["delta"][:, :, layer.gates :] = 0
            for d in range(second.case.directions):
                v[f"w_hh{d}"].zero_()
        v_given, v_outer = ({name: v[name] for name in of} for of in (given, outer))
        # The kernel of tangents is given what the tangents of W_hh make as a part of `delta`.
        values, tangents = torch.func.jvp(oracle, (given,), (v_given,))
        grads, grad_tangents = torch.func.jvp(oracle.gradients, (given, outer), (v_given, v_outer))
        return Problems(layer, given, outer, v, values, tangents, grads, grad_tangents)


def h_before(p: Problems, d: int) -> Tensor:
    """[N, P]: what the step of each row multiplies with W_hh."""
    layer, case = p.layer, p.layer.case
    before = layer.row_before(d)
    y = p.values["y"][:, d * case.output : (d + 1) * case.output]
    start = p.given["h0"][d] if "h0" in p.given else torch.zeros(case.batch, case.output, dtype=torch.float64)
    h = torch.where((before >= 0)[:, None], y[before.clamp(min=0)], start[layer.batch_of_row])
    if layer.data.resets is None:
        return h
    put = layer.put(0, d) if layer.extras.reset_states else torch.zeros_like(h)
    return torch.where(layer.data.resets.flatten()[:, None], put, h)


def source_of(p: Problems) -> Tensor:
    """What the caller adds to the accumulators [D, N, S, H]: all but the product of h' with W_hh."""
    source = p.v["delta"].clone()
    case, layer = p.layer.case, p.layer
    for d in range(case.directions):
        more = (h_before(p, d) @ p.v[f"w_hh{d}"].T).reshape(layer.rows, layer.gates, case.hidden)
        source[d] = source[d].index_add(1, torch.tensor(RECURRENT.get(case.cell, [0])), more)
    return source


def source_of_outputs(p: Problems) -> Tensor:
    """The same of projected outputs [D, N, P]."""
    source = p.v["eps"].clone()
    for d in range(p.layer.case.directions):
        unprojected = p.values["gates"][d, :, 3] * p.values["cs"][d].tanh()
        source[d] += unprojected @ p.v[f"w_hr{d}"].T
    return source


def run_tangents(run: SecondRun, p: Problems, second: Second) -> Tensors:
    """y, h_n, c_n, gates and cs: their tangents, by the kernels."""
    run.sim.reset(run.seed, run.device)
    layer, case, sim = p.layer, p.layer.case, run.sim
    dtype, n, d, h = case.dtype, layer.rows, case.directions, case.hidden
    v_layer = _layer_of_tangents(layer, p.v, dtype)
    v_run = SecondRun(sim, v_layer, seed=run.seed, device=run.device, tile=run.tile)
    v_run.tf32 = run.tf32
    params = ForwardParams(I=case.input_size, training=True)
    v_run._common(params)
    g = torch.Generator().manual_seed(5)
    has_source = "source" not in second.nulls
    has_biases = case.has_biases and has_source
    biases = torch.randn(d, layer.gates, h, generator=g, dtype=torch.float64) * has_biases
    for k in range(d):
        params.weights[k].b_hh = sim.put("b_hh'", biases[k].to(dtype)) if has_biases else None
    source = source_of(p)
    projection = source[:, :, : layer.gates].clone()
    if has_source:
        projection = torch.randn(projection.shape, generator=g, dtype=torch.float64)
        source[:, :, : layer.gates] -= projection
        source[:, :, RECURRENT.get(case.cell, [0])] -= biases.unsqueeze(1)
    source[:, ~layer.active] = math.nan
    buffer = torch.full((d, n, layer.slots, h), math.nan, dtype=dtype)
    buffer[:, :, : layer.gates] = projection.to(dtype)
    buffer[:, ~layer.active] = math.nan
    shapes: dict[str, tuple[int, ...]] = {"y": (n, d * case.output), "h_n": (d, case.batch, case.output)}
    if case.cell == "LSTM":
        shapes |= {"c_n": (d, case.batch, h), "cs": (d, n, h)}
    places = run._outputs(shapes)
    places["gates"] = sim.inout("gates", buffer)
    if layer.slots > 1:
        shapes["gates"] = tuple(buffer.shape)
    for name, address in places.items():
        setattr(params, name, address)
    values = {name: t.to(dtype) for name, t in (p.values | p.given).items()}
    primal = Primal(modifier=run.modifier())
    run.put_all(primal, {name: values[name] for name in ("h0", "c0", "y", "gates", "cs") if name in values})
    if has_source:
        primal.source = sim.put("source", source.to(dtype))
    if case.proj and "w_hr" not in second.nulls:
        of_outputs = source_of_outputs(p)
        of_outputs[:, ~layer.active] = math.nan
        primal.source_y = sim.put("source_y", of_outputs.to(dtype))
    params.primal = ctypes.addressof(primal)
    problem = Problem()
    sim.lib.simt_problem_forward(ctypes.byref(params), ctypes.byref(problem))
    run.outputs = {name: (places[name], shape) for name, shape in shapes.items()}
    run._finish("simt_forward", params, problem)
    return run.results()


def run_dual(run: SecondRun, p: Problems, second: Second) -> Tensors:
    """Values of d_gates and d_h; of d_gates, d_h, d_h0, d_c0, d_reset_h, d_reset_c the tangents, named with a '."""
    run.sim.reset(run.seed, run.device)
    layer, case, sim = p.layer, p.layer.case, run.sim
    dtype, n, d, h = case.dtype, layer.rows, case.directions, case.hidden
    v_layer = _layer_of_tangents(layer, p.v, dtype)
    v_run = SecondRun(sim, v_layer, seed=run.seed, device=run.device, tile=run.tile)
    v_run.tf32 = run.tf32
    params = DualBackwardParams()
    run._common(params.value)
    v_run._common(params.tangent)
    params.dtype = params.value.dtype
    for k in range(d):
        for name in ("w_hh", "w_hr"):
            null = name in second.nulls or f"{name}{k}" not in p.v
            address = None if null else sim.put(f"{name}'[{k}]", p.v[f"{name}{k}"].to(dtype))
            getattr(params.tangent.weights[k], name).data = address
    for half, saved, outer in ((params.value, p.values, p.outer), (params.tangent, p.tangents, p.v)):
        names = {"y": saved["y"]} | {name: saved[name] for name in ("gates", "cs") if layer.slots > 1}
        if case.cell == "GRU":
            names.pop("cs")
        names |= {name: outer[name] for name in p.outer if name not in second.nulls}
        cast = {name: t.to(dtype) for name, t in names.items()}
        if "dy" in cast:
            cast["dy"] = cast["dy"].masked_fill(~layer.active[:, None], math.nan)
        if "d_cs" in cast:
            cast["d_cs"][:, ~layer.active] = math.nan
        run.put_all(half, cast)
    shapes: dict[str, tuple[int, ...]] = {"d_gates": (d, n, layer.slots, h), "d_gates'": (d, n, layer.slots, h)}
    if "d_h0" not in second.nulls:
        shapes["d_h0'"] = (d, case.batch, case.output)
    if case.cell == "LSTM":
        shapes["d_c0'"] = (d, case.batch, h)
    if case.proj:
        shapes |= {"d_h": (d, n, case.output), "d_h'": (d, n, case.output)}
    if layer.extras.reset_states:
        if case.cell == "GRU":
            shapes["d_reset_h'"] = (d, n, h)
        if case.cell == "LSTM":
            shapes["d_reset_c'"] = (d, n, h)
    places = run._outputs(shapes)
    for name, address in places.items():
        setattr(params.tangent if name.endswith("'") else params.value, name.rstrip("'"), address)
    if second.keeps_dh:
        params.value.d_h = sim.put("d_h", p.grads["eps"].to(dtype))
    problem = Problem()
    sim.lib.simt_problem_dual_backward(ctypes.byref(params), ctypes.byref(problem))
    run.outputs = {name: (places[name], shape) for name, shape in shapes.items()}
    run._finish("simt_dual_backward", params, problem)
    of_resets = {name: run.outputs.pop(name) for name in list(run.outputs) if "reset" in name}
    found = LayerRun.results(run)
    for name, place in of_resets.items():
        rows = sim.get(*place, dtype)[:, layer.reset_rows]
        assert rows.isfinite().all(), f"{name} was not written at a reset"
        found[name] = rows
    return found


def expected_dual(p: Problems) -> Tensors:
    """The same by the oracle."""
    slots = D_SLOTS.get(p.layer.case.cell, [0])
    found = {"d_gates": p.grads["delta"][:, :, slots], "d_gates'": p.grad_tangents["delta"][:, :, slots]}
    found |= {"d_h": p.grads["eps"], "d_h'": p.grad_tangents["eps"]}
    for name in ("h0", "c0"):
        if name in p.grads:
            found[f"d_{name}'"] = p.grad_tangents[name]
    rows = p.layer.reset_rows if p.layer.data.resets is not None else None
    if rows is not None:
        of_states = p.grad_tangents["rho"][:, rows]
        found |= {"d_reset_h'": of_states, "d_reset_c'": of_states}
    return found
