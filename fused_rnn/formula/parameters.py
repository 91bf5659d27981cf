"""The parameters of a cell in a layer: their names, shapes and start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_rnn._ids import input_product
from fused_rnn._recipe import Recipe, StepOptions
from fused_rnn.formula.language import Cell, Init, Phase, run_step
from fused_rnn.reference import StepFunction

_NO_OPTIONS = StepOptions()
OWN_KIND = -1  # a recipe's number of a cell that is no kind of ours


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a direction of a layer; its full name has a suffix such as _l0_reverse."""

    name: str
    shape: tuple[int, ...]
    init: Init = None

    def start(self, parameter: Tensor, hidden: int) -> None:
        """Fills it: uniform within 1/sqrt(H), as torch.nn's, unless the cell says otherwise."""
        if callable(self.init):
            self.init(parameter)
        elif self.init is not None:
            nn.init.constant_(parameter, self.init)
        else:
            bound = 1.0 / math.sqrt(hidden)
            nn.init.uniform_(parameter, -bound, bound)


def specs_of(cell: Cell, inputs: int, hidden: int, bias: bool) -> list[ParameterSpec]:
    """The parameters of one direction in order: torch.nn's, then vectors, numbers, and those of products and norms."""
    says = cell.declaration
    in_rows, rec_rows = (len(gates) * hidden for gates in (says.weighted_gates, says.recurrent_gates))
    specs = [ParameterSpec("weight_ih", (in_rows, inputs))]
    if rec_rows:
        n = says.heads
        specs.append(ParameterSpec("weight_hh", (rec_rows, hidden) if n == 1 else (n, rec_rows // n, hidden // n)))
    if bias:
        specs.append(ParameterSpec("bias_ih", (in_rows,)))
        if rec_rows:
            specs.append(ParameterSpec("bias_hh", (rec_rows,)))
    specs += [ParameterSpec(name, (hidden,), init) for name, init in says.units.items()]
    specs += [ParameterSpec(name, (), init) for name, init in says.scalars.items()]
    for phase in cell.phases:
        shape, inits = ((hidden, hidden), (None,)) if phase.kind == "product" else ((hidden,), (1.0, 0.0))
        specs += [ParameterSpec(name, shape, init) for name, init in zip(phase.parameters, inits, strict=False)]
    return specs


def step_function(cell: Cell) -> StepFunction:
    """The cell's ``step`` in the form of fused_rnn.reference.step. Its states, before and after, begin with the output."""
    says = cell.declaration
    order = [says.output, *(index for index in range(len(says.states)) if index != says.output)]
    names = {bias: [spec.name for spec in specs_of(cell, 1, says.heads, bias)] for bias in (True, False)}  # of any sizes

    def step(
        x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], recipe: Recipe, options: StepOptions = _NO_OPTIONS
    ) -> list[Tensor]:
        named = dict(zip(names[recipe.has_biases], params, strict=True))
        before = [states[order.index(index)] for index in range(len(order))]
        gi = input_product(x, named["weight_ih"], named.get("bias_ih"))
        x_gates = dict(zip(says.weighted_gates, gi.chunk(len(says.weighted_gates), dim=-1), strict=True))
        if options.values is not None:
            x_gates.update(zip(says.given_gates, options.values.unbind(-2), strict=True))
        r_gates: dict[str, Tensor] = {}
        if says.recurrent_gates:
            gh = recurrent_product(before[says.recurrent], named["weight_hh"], named.get("bias_hh"))
            r_gates = dict(zip(says.recurrent_gates, gh.chunk(len(says.recurrent_gates), dim=-1), strict=True))
        own = {name: named[name] for name in (*says.units, *says.scalars)}
        result = run_step(cell, x_gates, r_gates, before, own, lambda phase, value: run_phase(phase, value, named))
        after = [result] if isinstance(result, Tensor) else list(result)
        return [after[index] for index in order]

    return step


def recurrent_product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h [..., H] times weight_hh, [G*H, H] or of n heads [n, G*H/n, H/n], plus bias_hh [G*H]: [..., G*H]."""
    if weight.dim() == 2:
        return nn.functional.linear(h, weight, bias)
    heads, rows, units = weight.shape
    product = torch.einsum("...nk,nrk->...nr", h.unflatten(-1, (heads, units)), weight)
    by_gate = product.unflatten(-1, (rows // units, units)).transpose(-3, -2).flatten(-3)
    return by_gate if bias is None else by_gate + bias


def run_phase(phase: Phase, value: Tensor, named: dict[str, Tensor]) -> Tensor:
    """A product or a norm inside of a step, with the parameters of its name."""
    weight = named[phase.parameters[0]]
    match phase.kind:
        case "product":
            return nn.functional.linear(value, weight)
        case "layer_norm":
            return nn.functional.layer_norm(value, weight.shape, weight, named[phase.parameters[1]])
        case "rms_norm":
            return nn.functional.rms_norm(value, weight.shape, weight, eps=1e-5)
    raise AssertionError(phase)


def outputs_first(cell: Cell, states: Sequence[Tensor]) -> list[Tensor]:
    """The states in the order of ``step_function``."""
    output = cell.declaration.output
    return [states[output], *states[:output], *states[output + 1 :]]


def as_declared(cell: Cell, states: Sequence[Tensor]) -> list[Tensor]:
    """The states in the cell's order, from that of ``step_function``."""
    output = cell.declaration.output
    return [*states[1 : output + 1], states[0], *states[output + 1 :]]


def empty(shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
