"""The tangents of a step as a cell of their own, whose kernels make what forward-mode AD and second derivatives need.

Of a cell with the states s and the products a = W x + b, r = U s + b' the tangents of a step are

    s' after = J (a', r', s', p'),  a' = W x' + W' x,  r' = U s' + U' s,  J the step's derivative at (a, r, s, p)

with p the cell's own vectors and numbers, and ' for a tangent. All of a, r and s are known once the cell itself has run.
So the tangents are a cell of the same gates, states and weights: it reads tangents in place of values, and what J depends on
comes with the call, as values of gates without weights (language.GivenGate). Its gradients, those of the values among them,
are second derivatives of the cell (second_order.py). J is torch's own derivative of ``step``, so corners are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.formula.alone import alone
from fused_rnn.formula.language import Cell, GivenGate, Phase, run_step
from fused_rnn.formula.options import unused_name
from fused_rnn.formula.tape import listed


class NoTangents(Exception):
    """Why a cell has no tangents as a formula, as a clause."""


class Layout:
    """What the values of a tangent's cell are, in the order of their gates: (kind, name).

    kind: "sum" of a gate's both products, "x" and "r" one of them, "state", "phase" the result of a product inside of the
    step, "source" and "source_of_phase" what the tangents of weight_hh or of a phase's matrix add to a product; "given"
    values of the cell's own.
    """

    def __init__(self, cell: Cell, weights: bool, read: frozenset[tuple[str, str]] | None, merged: set[str]) -> None:
        says = cell.declaration
        gates = [gate for gate in says.gates if not isinstance(gate, GivenGate)]
        # As BackwardParams::d_gates has their gradients.
        products = [("x", gate.name) for gate in gates if gate.input and gate.name not in merged]
        products += [("sum" if gate.name in merged else "r", gate.name) for gate in gates if gate.recurrent]
        known = [*products, *(("state", state) for state in says.states)]
        known += [("phase", phase.name) for phase in cell.phases]
        sources = [("source", gate.name) for gate in gates if gate.recurrent]
        sources += [("source_of_phase", phase.name) for phase in cell.phases]
        self.values = [value for value in known if read is None or value in read] + sources * weights
        # What follows from the states before each step alone.
        self.of_steps = [value for value in self.values if value[0] in ("state", "source")]
        self.has_all_products = read is None or all(value in read for value in products)
        self.given = [("given", gate) for gate in says.given_gates if read is None or ("given", gate) in read]


class Tangent(Cell):
    """The tangents of a cell. weights: whether its parameters, beside weight_ih and biases, have tangents too.

    Its unit and scalar parameters are those of the cell and, with ``weights``, their tangents behind them.
    """

    _is_written = False

    def __init__(self, base: Cell, weights: bool, read: frozenset[tuple[str, str]] | None, merged: frozenset[str]) -> None:
        says = base.declaration
        self._base, self._weights, self._merged = base, weights, merged
        self._layout = Layout(base, weights, read, set(merged))
        taken = {*says.states, *(gate.name for gate in says.gates), *says.units, *says.scalars}
        self._values = {value: unused_name("_".join(value), taken) for value in (*self._layout.values, *self._layout.given)}
        flags = {value[1] for value in self._layout.given}
        self.gates = (
            *(gate for gate in says.gates if not isinstance(gate, GivenGate)),
            *(GivenGate(name, differentiates=value[0] != "given") for value, name in self._values.items()),
        )
        assert len(flags) == len(self._layout.given)
        self.states = says.states
        self.output, self.recurrent = says.states[says.output], says.states[says.recurrent]
        self.heads = says.heads
        own = [*says.units, *says.scalars] if weights else []
        self._own = {name: unused_name(f"tangent_{name}", taken) for name in own}
        self.unit_parameters = dict(says.units) | {self._own[name]: None for name in says.units if weights}
        self.scalar_parameters = dict(says.scalars) | {self._own[name]: None for name in says.scalars if weights}

    def __reduce__(self) -> Any:
        return tangent_of, (self._base, self._weights)

    def __repr__(self) -> str:
        return f"tangents of {self._base!r}{' and its parameters' * self._weights}"

    def _checked(self) -> tuple[tuple[Phase, ...], str]:
        norm = next((phase for phase in self._base.phases if phase.kind != "product"), None)
        if norm is not None:
            raise NoTangents(f"tangents of {norm.kind} inside of a step are not compiled")
        return self._base.phases, f"tangents{' by parameters' * self._weights} of {self._base.__dict__['_text']}"

    @property
    def _written_step(self) -> Any:
        return self._base._written_step

    @property
    def layout(self) -> Layout:
        return self._layout

    def step(self, x: Any, r: Any, *states: Any) -> Any:
        """The tangents of the states after the step, from those of the states before it."""
        base, says = self._base, self._base.declaration
        zero = torch.zeros_like(states[0])

        def value(kind: str, name: str) -> Tensor:
            gate = self._values.get((kind, name))
            return zero if gate is None else getattr(x, gate)

        # Of every input of the step its name, its value and its tangent (None: it has none).
        leaves: dict[str, tuple[Tensor, Tensor | None]] = {}
        for gate in says.gates:
            name = gate.name
            if isinstance(gate, GivenGate):
                leaves[f"x.{name}"] = value("given", name), None
                continue
            of_x: Any = getattr(x, name) if gate.input else None
            of_r: Any = getattr(r, name) if gate.recurrent else None
            if of_r is not None and self._weights:
                of_r = of_r + value("source", name)
            if name in self._merged:
                leaves[f"x.{name}"] = value("sum", name), of_x + of_r
                leaves[f"r.{name}"] = zero, None
                continue
            if gate.input:
                leaves[f"x.{name}"] = value("x", name), of_x
            if gate.recurrent:
                leaves[f"r.{name}"] = value("r", name), of_r
        leaves |= {name: (value("state", name), tangent) for name, tangent in zip(says.states, states, strict=True)}
        for name in (*says.units, *says.scalars):
            leaves[f"self.{name}"] = getattr(self, name), getattr(self, self._own[name]) if self._weights else None
        for phase in base.phases:
            leaves[f"ph.{phase.name}"] = value("phase", phase.name), None
        for number, phase in enumerate(base.phases):  # in the order of the step: a later one may read an earlier one
            (taken,) = self._tangents(leaves, [number])
            tangent = self._run_phase(phase, taken)
            if self._weights:
                tangent = tangent + value("source_of_phase", phase.name)
            leaves[f"ph.{phase.name}"] = leaves[f"ph.{phase.name}"][0], tangent
        return tuple(self._tangents(leaves, None))

    def _tangents(self, leaves: Mapping[str, tuple[Tensor, Tensor | None]], phases: Sequence[int] | None) -> list[Tensor]:
        """Tangents of the states after the base's step, or of what these of its phases take."""

        def results(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            after, taken = run_base(self._base, inputs)
            return after if phases is None else [taken[number] for number in phases]

        moving = {name: tangent for name, (_, tangent) in leaves.items() if tangent is not None}
        fixed = {name: value for name, (value, tangent) in leaves.items() if tangent is None}
        at = {name: leaves[name][0] for name in moving}
        if torch._C._functorch.peek_interpreter_stack() is not None:  # whose tensors autograd.grad does not take
            tangents = {name: tangent.expand(at[name].shape) for name, tangent in moving.items()}
            return torch.func.jvp(lambda inputs: results({**fixed, **inputs}), (at,), (tangents,))[1]
        with torch.enable_grad():
            at = {name: t.expand_as(t) if t.requires_grad else t.detach().requires_grad_() for name, t in at.items()}
            return pushed(results({**fixed, **at}), list(at.values()), list(moving.values()))


def run_base(base: Cell, inputs: Mapping[str, Tensor], run_phase: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """A step of the cell: the states after it, and what its products and norms take.

    inputs: "x.<gate>", "r.<gate>", the states, "self.<parameter>" and, without run_phase, "ph.<phase>", their results.
    """
    says = base.declaration
    taken: list[Tensor] = []

    def phase_of(phase: Phase, value: Tensor) -> Tensor:
        taken.append(value)
        return inputs[f"ph.{phase.name}"] if run_phase is None else run_phase(phase, value)

    result = run_step(
        base,
        {gate: inputs[f"x.{gate}"] for gate in says.input_gates},
        {gate: inputs[f"r.{gate}"] for gate in says.recurrent_gates},
        [inputs[state] for state in says.states],
        {name: inputs[f"self.{name}"] for name in (*says.units, *says.scalars)},
        phase_of,
    )
    return listed(result), taken


def pushed(results: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """Tangents of the results: the gradients of the inputs are linear in those of the results, and what they are
    multiplied with is the derivative. So it is torch's backward that says what the derivative is, as in all kernels."""
    reached = [place for place, result in enumerate(results) if result.requires_grad]
    cotangents = [torch.zeros_like(results[place]).requires_grad_() for place in reached]
    found: list[Tensor] = [torch.zeros_like(result) for result in results]
    if not reached:
        return found
    pulled = torch.autograd.grad(
        [results[place] for place in reached], inputs, cotangents, create_graph=True, allow_unused=True
    )
    pairs = [(g, t.expand_as(g)) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
    if pairs:
        pushed = torch.autograd.grad(
            [g for g, _ in pairs], cotangents, [t for _, t in pairs], create_graph=True, allow_unused=True
        )
        for place, tangent in zip(reached, pushed, strict=True):
            if tangent is not None:
                found[place] = tangent
    return found


@functools.lru_cache(maxsize=256)
def _known(identity: str, weights: bool, base: _Same) -> Tangent:
    """identity: of the cell. Of equal cells the first one's tangents serve."""
    return alone(_derived, base.cell, weights)


class _Same:
    """A cell that equals any other one, so that its identity alone decides."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same)

    def __hash__(self) -> int:
        return 0


def tangent_of(base: Cell, weights: bool) -> Tangent:
    """The tangents of a cell as a cell.

    Raises:
        NoTangents: there is none.
    """
    return _known(f"{type(base).__name__}-{base.identity}", weights, _Same(base))


@functools.cache
def _class_of(name: str) -> type[Tangent]:
    """The class of tangents of a class of this name, which kernels are named after."""
    return type(f"{name}Tangents", (Tangent,), {"__module__": __name__})


def _derived(base: Cell, weights: bool) -> Tangent:
    from fused_rnn.formula.graph import ordered
    from fused_rnn.formula.plan import sums_of
    from fused_rnn.formula.trace import trace

    of = _class_of(type(base).__name__)
    try:
        merged = frozenset(sums_of(trace(base), base.declaration))
        whole = of(base, weights, None, merged)
        traced = trace(whole)  # with everything given that the step reads
    except (RuntimeError, NotImplementedError) as error:
        raise NoTangents(f"torch has no second derivative of its step ({str(error).splitlines()[0]})") from error
    leaves = {value.name for value in ordered(traced.forward_roots) if value.op == "input"}
    read = frozenset(value for value, gate in whole._values.items() if f"x.{gate}" in leaves)
    return of(base, weights, read, merged)
