"""A cell as C++: a struct with forward and backward of one unit at one step, as csrc/cpu/isa/formula_pointwise.h calls them.

    forward(a, before, after, p)
        a [kValues]: accumulators in (the first kSlots), saved values out (the first kSaved)
        before, after [kStates]: the states; p [kParameters]: vectors and numbers of the cell at this unit
    backward(a, before, after, p, d_states, d, d_parameters)
        d_states [kStates]: gradients of the states after the step in (the output's is the total), of those before it out,
        without what goes through the recurrent weights
        d [kSlots]: gradients of the products in the order of BackwardParams::d_gates
        d_parameters [kParameters]: gradients of p for this row and step
    reads_state(s): whether backward reads before[s] or after[s]; if not, they may hold anything
    forward_reads(s): whether forward reads before[s]
    input_slot(k), recurrent_slot(k): the accumulator of the k-th gate that has such a product
    input_gradient(k): the place in d of the gradient of the k-th input product. The last kRecurrentGates of d are those of
        the recurrent products.

Without parameters p and d_parameters are left out. A step with products or norms inside has phases. Before each of them

    phase_input<k>(a, before, p, ph, v)
        ph [kPhases]: results of the phases before, v: what phase k takes

runs, and ``forward`` after all of them, with ph behind its other arguments. Backward goes the other way:

    phase_gradient<k>(a, before, after, p, v, d_states, dv, d)
        v [kPhases]: what the phases took; dv [kPhases]: gradients of it, there for the phases behind k; d: the gradient of
        phase k's result

and ``backward`` after all of them, with v and dv behind p. forward_level(k), backward_level(k): Plan.forward_levels and
backward_levels.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Container, Sequence

from fused_rnn.formula.expressions import Block, Names
from fused_rnn.formula.graph import Value, leaves_of, ordered
from fused_rnn.formula.language import Cell
from fused_rnn.formula.plan import Plan, make_plan

PHASE_KINDS = {"product": 0, "layer_norm": 1, "rms_norm": 2}  # csrc/core/formula.h's FormulaPhase


def source_of(cell: Cell) -> str:
    """The cell's struct as C++, to be included after core/formula_math.h in a namespace inside of fused_rnn.

    Raises:
        TypeError: ``cell`` is no Cell.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell: expected a fused_rnn Cell, got {cell!r}")
    return source_of_plan(make_plan(cell))


def source_of_plan(plan: Plan) -> str:
    """The struct of a planned cell."""
    return _Writer(plan).struct()


def struct_name(cell: Cell) -> str:
    """The name of the cell's struct: that of its class, where C++ allows it."""
    return Names(()).of(re.sub(r"[^A-Za-z0-9_]", "", type(cell).__name__).strip("_") or "Unnamed")


def _in_memory(plan: Plan) -> dict[Value, None]:
    """What backward does not make: saved values, and states whose series it reads."""
    kept = [index for index, reads in enumerate(plan.series) if reads]
    inputs = {leaf.name: leaf for leaf in ordered([*plan.backward_roots, *plan.after]) if leaf.op == "input"}
    states = plan.cell.declaration.states
    before = [inputs[states[index]] for index in kept if states[index] in inputs]
    return dict.fromkeys([*plan.saved, *before, *(plan.after[index] for index in kept), *plan.phases])


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.states = plan.cell.declaration.states
        values = ordered([*plan.backward_roots, *plan.forward_roots, *plan.accumulators])
        self.inputs = {value.name: value for value in values if value.op == "input"}

    # --- the struct ---

    def struct(self) -> str:
        parts = [self._comment(), f"struct {struct_name(self.plan.cell)} {{", *_indented(self._constants()), ""]
        functions = [self._forward(), self._backward()]
        if self.plan.phases:
            functions = [self._phases(), self._forward(), self._phase_gradients(), self._backward()]
        for function in functions:
            parts += [*_indented(function), ""]
        parts[-1] = "};"
        return "\n".join(parts) + "\n"

    def _comment(self) -> str:
        plan, says = self.plan, self.plan.cell.declaration
        try:
            text = textwrap.dedent(inspect.getsource(plan.cell._written_step)).rstrip()
        except OSError:  # a cell typed into an interpreter has no file
            text = "(the text of step is not at hand)"
        slots = ", ".join(f"a[{slot}] {_product(value)}" for slot, value in enumerate(plan.accumulators))
        shown = Block({value: _product(value) for value in self.inputs.values()}, {}, Names(()))
        saved = ", ".join(f"a[{place}] {self._described(value, shown)}" for place, value in enumerate(plan.saved))
        kept = [state for state, reads in zip(says.states, plan.series, strict=True) if reads]
        lines = [
            f"{plan.cell!r}",
            *(f"    {line.removesuffix(chr(92))}" for line in text.split("\n")),  # a backslash would join lines
            *textwrap.wrap(f"Accumulators: {slots}.", 120),
            *textwrap.wrap(
                f"Saved for backward: {saved or 'nothing'}; states that it reads: {', '.join(kept) or 'none'}.", 120
            ),
        ]
        return "\n".join(f"// {line}".rstrip() for line in lines)

    def _described(self, value: Value, shown: Block) -> str:
        text = self.plan.names.get(value) or shown.text(value)
        return text if len(text) < 60 else "(an expression)"

    def _constants(self) -> list[str]:
        plan, says = self.plan, self.plan.cell.declaration
        slots, saved, states = len(plan.accumulators), len(plan.saved), len(says.states)
        read = leaves_of(plan.forward_roots, set(self.inputs.values()))
        lines = [f"static constexpr int kSlots = {slots}, kSaved = {saved};"]
        inputs, recurrent = len(says.input_gates), len(says.recurrent_gates)
        forward, backward = plan.forward_levels, plan.backward_levels
        return [
            *lines,
            f"static constexpr int kStates = {states}, kParameters = {len(plan.parameters)}, kOutput = {says.output}, "
            f"kRecurrent = {says.recurrent};",
            f"static constexpr int kInputGates = {inputs}, kRecurrentGates = {recurrent};",
            f"static constexpr int kValues = {max(slots, saved)};  // of a",
            f"static constexpr int kPhases = {len(plan.phases)}, kForwardLevels = {max(forward, default=-1) + 1}, "
            f"kBackwardLevels = {max(backward, default=-1) + 1};",
            _table("forward_level", "phase", forward),
            _table("backward_level", "phase", backward),
            _table("phase_kind", "phase", [PHASE_KINDS[phase.kind] for phase in plan.cell.phases]),
            _table("input_slot", "gate", plan.input_slots),
            _table("recurrent_slot", "gate", plan.recurrent_slots),
            _table("input_gradient", "gate", plan.input_gradients),
            _table("reads_state", "state", plan.series),
            _table("forward_reads", "state", [self.inputs.get(state) in read for state in says.states]),
        ]

    def _signature(self, name: str, arguments: str, body: Sequence[str]) -> list[str]:
        head = _wrapped(f"static FUSED_RNN_HD void {name}(", arguments.split(", "), ") {")
        return (
            ["template <class V>", *head, *_indented(body), "}"]
            if body
            else ["template <class V>", *head[:-1], f"{head[-1]}}}"]
        )

    # --- forward ---

    def _forward_arguments(self) -> str:
        return f"V (&a)[kValues], const V (&before)[kStates], V (&after)[kStates]{self._p}{self._ph}"

    @property
    def _p(self) -> str:
        return ", const V (&p)[kParameters]" if self.plan.parameters else ""

    @property
    def _ph(self) -> str:
        return ", const V (&ph)[kPhases]" if self.plan.phases else ""

    def _phases(self) -> list[str]:
        """phase_input."""
        plan = self.plan
        places = {value: f"a[{slot}]" for slot, value in enumerate(plan.accumulators)}
        branches = []
        for value in plan.phases:
            leaves = leaves_of([value], {*places, *self.inputs.values()})
            block = Block(places, plan.names, self._names())
            block.load([*self._loads(leaves), *self._parameter_loads(leaves), *self._phase_loads(leaves)])
            block.compute([value])
            branches.append([*block.lines, f"v = {block.text(value)};"])
        arguments = f"const V (&a)[kValues], const V (&before)[kStates]{self._p}{self._ph}, V& v"
        return self._by_phase("phase_input", arguments, branches)

    def _phase_gradients(self) -> list[str]:
        """phase_gradient."""
        branches = []
        for value in self.plan.d_phases:
            block = self._backward_block([value])
            branches.append([*block.lines, f"d = {block.text(value)};"])
        arguments = f"{self._backward_inputs()}, const V (&d_states)[kStates], const V (&dv)[kPhases], V& d"
        return self._by_phase("phase_gradient", arguments, branches)

    def _by_phase(self, name: str, arguments: str, branches: Sequence[Sequence[str]]) -> list[str]:
        """A function of kPhase with a body for each."""
        lines: list[str] = []
        for k, branch in enumerate(branches):
            start = f"if constexpr (kPhase == {k})" if k + 1 < len(branches) else ""
            head = f"{'} else ' if k else ''}{start}".rstrip() + " {"
            lines += [head, *_indented(branch)] if len(branches) > 1 else branch
        lines += ["}"] if len(branches) > 1 else []
        body = _using(lines)
        signature = _wrapped(f"static FUSED_RNN_HD void {name}(", _without_unused(arguments, body).split(", "), ") {")
        return ["template <int kPhase, class V>", *signature, *_indented(body), "}"]

    def _forward(self) -> list[str]:
        plan = self.plan
        roots = [*plan.after, *plan.saved]
        places = {value: f"a[{slot}]" for slot, value in enumerate(plan.accumulators)}
        leaves = leaves_of(roots, {*places, *self.inputs.values()})
        block = Block(places, plan.names, self._names())
        block.load([*self._loads(leaves), *self._parameter_loads(leaves), *self._phase_loads(leaves)])
        block.compute(roots)
        moved = [value for place, value in enumerate(plan.saved) if places.get(value) != f"a[{place}]"]
        block.make_safe([*moved, *plan.after] if moved else [], "a")
        block.lines += [f"a[{place}] = {block.text(value)};" for place, value in enumerate(plan.saved) if value in moved]
        block.lines += [f"after[{place}] = {block.text(value)};" for place, value in enumerate(plan.after)]
        return self._signature("forward", _without_unused(self._forward_arguments(), block.lines), _using(block.lines))

    def _names(self) -> Names:
        return Names("a d before after p ph v dv d_states d_parameters".split())

    def _loads(self, leaves: set[Value]) -> list[tuple[Value, str, str]]:
        return [
            (self.inputs[state], f"{state}_prev", f"before[{index}]")
            for index, state in enumerate(self.states)
            if self.inputs.get(state) in leaves
        ]

    def _parameter_loads(self, leaves: set[Value]) -> list[tuple[Value, str, str]]:
        return [
            (self.inputs[f"self.{name}"], name, f"p[{index}]")
            for index, name in enumerate(self.plan.parameters)
            if self.inputs.get(f"self.{name}") in leaves
        ]

    def _phase_loads(self, leaves: set[Value]) -> list[tuple[Value, str, str]]:
        phases = self.plan.cell.phases
        given = [(self.inputs.get(f"ph.{k}"), f"ph_{phase.name}", f"ph[{k}]") for k, phase in enumerate(phases)]
        return [(value, name, where) for value, name, where in given if value is not None and value in leaves]

    # --- backward ---

    def _backward(self) -> list[str]:
        plan = self.plan
        block = self._backward_block([*plan.gradients, *plan.d_states, *plan.d_parameters])
        block.lines += self._outputs(block)
        return self._signature("backward", _without_unused(self._backward_arguments(), block.lines), _using(block.lines))

    def _backward_block(self, roots: list[Value]) -> Block:
        """The statements that make these gradients."""
        plan = self.plan
        leaves = leaves_of(roots, {*_in_memory(plan), *self.inputs.values()})
        block = Block({}, plan.names, self._names())
        saved = [(value, self._name_of_saved(value, i), f"a[{i}]") for i, value in enumerate(plan.saved) if value in leaves]
        block.load(saved)
        # Of a state without a series backward has what a phase took, if anything.
        kept = {self.inputs[s] for s, series in zip(self.states, plan.series, strict=True) if series and s in self.inputs}
        block.load(self._loads(leaves & kept))
        there = {value: i for i, value in enumerate(plan.after) if plan.series[i] and value in leaves and value.args}
        block.load([(v, self.states[i], f"after[{i}]") for v, i in there.items() if v not in plan.saved])
        in_out = [(self.inputs.get(f"d.{s}"), f"d_{s}", f"d_states[{i}]") for i, s in enumerate(self.states)]
        block.load([(value, name, where) for value, name, where in in_out if value is not None and value in leaves])
        block.load(self._loads_of_phases(leaves, {*plan.saved, *there, *kept}))
        block.load(self._parameter_loads(leaves))
        block.compute(roots)
        return block

    def _loads_of_phases(self, leaves: set[Value], known: Container[Value | None]) -> list[tuple[Value, str, str]]:
        """What phases took, and the gradients of it; known: values that are there already."""
        loads: list[tuple[Value, str, str]] = []
        for k, phase in enumerate(self.plan.cell.phases):
            value, gradient = self.plan.phases[k], self.inputs.get(f"d.ph.{k}")
            if value in leaves and value not in known and all(value is not other for other, _, _ in loads):
                loads.append((value, self.plan.names.get(value, f"v_{phase.name}"), f"v[{k}]"))
            if gradient is not None and gradient in leaves:
                loads.append((gradient, f"d_{phase.name}", f"dv[{k}]"))
        return loads

    def _name_of_saved(self, value: Value, place: int) -> str:
        if value in self.plan.accumulators:  # as it came: r.n of a GRU
            return self.plan.names.get(value, value.name.replace(".", "_"))
        return self.plan.names.get(value, f"s{place}")

    def _backward_arguments(self) -> str:
        dv = ", const V (&dv)[kPhases]" if self.plan.phases else ""
        own = ", V (&d_parameters)[kParameters]" if self.plan.parameters else ""
        return f"{self._backward_inputs()}, V (&d_states)[kStates]{dv}, V (&d)[kSlots]{own}"

    def _backward_inputs(self) -> str:
        v = ", const V (&v)[kPhases]" if self.plan.phases else ""
        return f"const V (&a)[kValues], const V (&before)[kStates], const V (&after)[kStates]{self._p}{v}"

    def _outputs(self, block: Block) -> list[str]:
        """Assignments of the results."""
        plan = self.plan
        named = (("d", plan.gradients), ("d_states", plan.d_states), ("d_parameters", plan.d_parameters))
        return [f"{name}[{i}] = {block.text(value)};" for name, values in named for i, value in enumerate(values)]


# --- text ---


def _product(value: Value) -> str:
    letter, _, gate = value.name.partition(".")
    return f"x.{gate} + r.{gate}" if letter == "a" else value.name


def _is_not_zero(value: Value) -> bool:
    return not (value.op == "const" and value.number == 0)


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _table(name: str, argument: str, values: Sequence[int] | Sequence[bool]) -> str:
    """A constexpr function with these values for 0, 1, ..."""
    flags = all(isinstance(value, bool) for value in values)
    result = "bool" if flags and values else "int"
    if not flags and list(values) == list(range(len(values))):
        body = f"return {argument};"
    elif len(set(values)) <= 1:
        argument, body = "", f"return {_bool(bool(values[0])) if flags and values else values[0] if values else 0};"
    elif flags:
        body = f"return {' || '.join(f'{argument} == {index}' for index, value in enumerate(values) if value)};"
    else:
        own = [index == value for index, value in enumerate(values)]  # the argument itself
        told = [f"{argument} == {index} ? {value} : " for index, value in enumerate(values) if not own[index]]
        last = argument if any(own) else str(values[-1])
        body = f"return {''.join(told if any(own) else told[:-1])}{last};"
    return f"static constexpr FUSED_RNN_HD {result} {name}(int{' ' * bool(argument)}{argument}) {{ {body} }}"


def _wrapped(start: str, parts: Sequence[str], end: str) -> list[str]:
    """start, the parts with commas between them and end, in lines of at most 122 columns."""
    lines = [start]
    for index, part in enumerate(parts):
        text = part + (", " if index + 1 < len(parts) else end)
        if len(lines[-1]) + len(text.rstrip()) > 122:
            lines.append(" " * len(start))
        lines[-1] += text
    return [line.rstrip() for line in lines]


def _using(lines: Sequence[str]) -> list[str]:
    """A body, with the functions of fused_rnn::math where it calls one."""
    calls = any("(" in line.replace("V(", "") for line in lines)
    return ["using namespace math;", *lines] if calls else list(lines)


def _without_unused(arguments: str, lines: Sequence[str]) -> str:
    """The parameters, those without a name that the body does not read: compilers warn of them."""
    body = "\n".join(lines)

    def shown(part: str) -> str:
        array = re.fullmatch(r"(.*\(&)(\w+)(\)\[\w+\])", part)
        name = array[2] if array else part.split()[-1]
        if re.search(rf"\b{name}\b", body):
            return part
        return f"{array[1]}{array[3]}" if array else part.rsplit(" ", 1)[0]

    return ", ".join(shown(part) for part in arguments.split(", "))


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]
