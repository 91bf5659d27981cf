"""A layer on the simulated device with what calls have beyond torch.nn's arguments: options of steps, reset states, and
gradients of every c."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cases import Case, Data, make_data
from layers import CELL_NUMBER, Layer, LayerRun, Modifier, ResetState, Zoneout, gradients, previous_h
from torch import Tensor

from fused_rnn import reference
from fused_rnn._recipe import Recipe, Rows, StepOptions

PUT = ("one", "rows", "steps")  # reset states for all rows, for each, and for each at every step
OPTIONS = ("masks", "shares", "clip", "product", "candidate", "every_c")


@dataclasses.dataclass
class Extras:
    """Reset states [D, 1 or B, .] or [T, D, B, .]; options of steps; the gradient of every c [D, N, H], or None."""

    reset_states: tuple[Tensor, ...] = ()
    options: StepOptions = StepOptions()
    d_cs: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Extras:
        def convert(t: Any) -> Any:
            return t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        states = tuple(convert(t) for t in self.reset_states)
        return Extras(states, StepOptions(*map(convert, self.options)), convert(self.d_cs))


def has_option(case: Case, name: str) -> bool:
    """Whether a case can have one of PUT or OPTIONS."""
    if name in PUT:
        return case.resets
    if name == "candidate":
        return case.cell in ("LSTM", "GRU")
    if name == "every_c":
        return case.cell == "LSTM"
    return not (case.proj and name in ("masks", "shares"))


def make_extras(case: Case, rows: int, names: tuple[str, ...], seed: int = 1) -> Extras:
    """Random ones. Numbers are such that clipping cuts some states and not all."""
    g = torch.Generator().manual_seed(seed)
    d, b, h, p = case.directions, case.batch, case.hidden, case.output

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    def factors(size: int) -> Tensor:
        return ((torch.rand(d, b, size, generator=g) < 0.7).double() / 0.7).to(case.dtype)

    has_c = case.cell == "LSTM"
    sizes = (p, h) if has_c else (p,)
    before = {"one": (d, 1), "rows": (d, b), "steps": (case.steps, d, b)}
    states = [randn(*before[name], size) for name in names if name in PUT for size in sizes]
    zoneout: list[Any] = [None, None]
    if "masks" in names:
        zoneout = [torch.rand(d, rows, h, generator=g) < 0.4 for _ in range(2)]
    if "shares" in names:
        zoneout = [0.3, 0.6]
    options = StepOptions(
        zoneout[0],
        zoneout[1] if has_c else None,
        0.35 if "clip" in names else None,
        factors(p) if "product" in names else None,
        factors(h) if "candidate" in names else None,
    )
    return Extras(tuple(states), options, randn(d, rows, h) if "every_c" in names else None)


@dataclasses.dataclass
class OptionLayer(Layer):
    """A layer with extras."""

    extras: Extras = dataclasses.field(default_factory=Extras)

    @staticmethod
    def make(case: Case, names: tuple[str, ...]) -> OptionLayer:
        data: Data = make_data(case)
        layer = Layer.of(case, data)
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
        return OptionLayer(**fields, extras=make_extras(case, layer.rows, names))

    @property
    def reset_rows(self) -> Tensor:
        """[N] bool: where a state is put before a step that takes place."""
        assert self.data.resets is not None
        return self.data.resets.flatten() & self.active

    def put(self, state: int, d: int) -> Tensor:
        """[N, .] in float64: what a reset of each row would put."""
        values = self.extras.reset_states[state].double()
        if values.dim() == 4:
            return values[self.step_of_row, d, self.batch_of_row]
        return values[d].expand(self.case.batch, -1)[self.batch_of_row]


class OptionRun(LayerRun):
    """A LayerRun of an OptionLayer."""

    layer: OptionLayer

    @property
    def saves_gates(self) -> bool:
        return self.layer.slots > 1 or self.layer.extras.options.any()

    def modifier(self) -> Any:
        extras, put = self.layer.extras, self.sim.put
        made = Modifier(put("resets", self.layer.data.resets))
        for name, t in zip("hc", extras.reset_states, strict=False):
            bytes_, dim = t.element_size(), t.dim() - 3
            step = t.stride(0) * bytes_ if dim else 0
            row = 0 if t.shape[dim + 1] == 1 else t.stride(dim + 1) * bytes_
            setattr(made, name, ResetState(put(f"reset {name}", t), step, t.stride(dim) * bytes_, row))
        for name, value in zip(("zoneout_h", "zoneout_c"), extras.options, strict=False):
            masked = isinstance(value, Tensor)
            setattr(made, name, Zoneout(put(name, value) if masked else None, 0.0 if masked else value or 0.0))
        made.clip = extras.options.clip or 0.0
        made.product, made.candidate = put("product", extras.options.product), put("candidate", extras.options.candidate)
        return made

    def more_gradients(self, params: Any) -> dict[str, tuple[int, ...]]:
        case, extras, shapes = self.layer.case, self.layer.extras, {}
        params.d_cs = self.sim.put("d_cs", extras.d_cs)
        if extras.reset_states:
            every = (case.directions, self.layer.rows)
            if case.cell == "GRU" or extras.options.zoneout_h is not None:
                shapes["d_reset_h"] = (*every, case.output)
            if case.cell == "LSTM":
                shapes["d_reset_c"] = (*every, case.hidden)
        return shapes

    def results(self) -> dict[str, Tensor]:
        """Gradients of reset states are there at resets alone."""
        of_resets = {name: self.outputs.pop(name) for name in ("d_reset_h", "d_reset_c") if name in self.outputs}
        found = super().results()
        for name, place in of_resets.items():
            rows = self.sim.get(*place, self.dtype_of(name))[:, self.layer.reset_rows]
            assert rows.isfinite().all(), f"{name} was not written at a reset"
            found[name] = torch.zeros(place[1], dtype=rows.dtype)
            found[name][:, self.layer.reset_rows] = rows
        return found


def _previous(layer: Layer, saved: dict[str, Tensor], d: int) -> Tensor:
    assert isinstance(layer, OptionLayer)
    h, extras = previous_h(layer, saved, d), layer.extras
    if extras.reset_states:
        h = torch.where(layer.reset_rows[:, None], layer.put(0, d), h)
    factors = extras.options.product
    return h if factors is None else h * factors[d].double()[layer.batch_of_row]


def all_gradients(layer: OptionLayer, saved: dict[str, Tensor], grads: dict[str, Tensor]) -> list[Tensor]:
    """As layers.gradients, then the gradients of the reset states."""
    case, extras = layer.case, layer.extras
    found = gradients(layer, saved, grads, _previous)
    sums = [torch.zeros(t.shape, dtype=torch.float64) for t in extras.reset_states]
    for d in range(case.directions if sums else 0):
        of_product = grads["d_gates"][d][:, layer.slots - layer.gates :].double().reshape(layer.rows, -1)
        dh = of_product @ layer.direction(d)[1].double()
        if extras.options.product is not None:
            dh = dh * extras.options.product[d].double()[layer.batch_of_row]
        if "d_reset_h" in grads:
            dh = dh + grads["d_reset_h"][d].double()
        for total, of_rows in zip(sums, (dh, grads["d_reset_c"][d].double() if len(sums) > 1 else dh), strict=False):
            for row in layer.reset_rows.nonzero().flatten().tolist():
                t, b = layer.step_of_row[row], layer.batch_of_row[row]
                place = total[t, d] if total.dim() == 4 else total[d]
                place[b if place.shape[0] > 1 else 0] += of_rows[row]
    return found + sums


def expected(layer: OptionLayer) -> tuple[list[Tensor], list[Tensor]]:
    """(y, h_n, c_n?) and the gradients of (x, h0, c0, *weights, *reset states), by the fp64 reference."""
    case, extras = layer.case, layer.extras.to(torch.float64)
    data = layer.data.to(torch.float64)
    inputs = [*data.differentiable(), *extras.reset_states]
    for t in inputs:
        t.requires_grad_()
    recipe = Recipe(CELL_NUMBER[case.cell], 1, case.has_biases, case.bidirectional, all_states=extras.d_cs is not None)
    states = [state for state in (data.h0, data.c0) if state is not None]
    rows = Rows(data.lengths, layer.offsets, data.resets, extras.reset_states, extras.options)
    y, last = reference.layer(data.input, states, data.weights, rows, recipe)
    count = recipe.kind.states
    used, outer = [y, *last[:count]], [data.dy, data.dh_n, data.dc_n][: 1 + count]
    if extras.d_cs is not None:
        used.append(last[count].reshape(extras.d_cs.shape))
        outer.append(extras.d_cs)
    grads = torch.autograd.grad(used, inputs, outer, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in used], list(grads)
