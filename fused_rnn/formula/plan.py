"""From the graph of a cell to what its kernel struct needs: accumulators, saved values, gradients.

Slots. Gate k has accumulator k. Where a step reads ``x.g`` and ``r.g`` only as a sum, one accumulator holds the sum; else
the recurrent product has an accumulator of its own behind those of the gates, as hn of a GRU (csrc/core/cells.h).

Saved values. Backward needs some values of forward: each is saved, or made again of values that are. The cheapest choice is
a minimum cut of the graph. torch's own partitioner (torch._functorch.partitioners.min_cut_rematerialization_partition) is
not used, because its prices are those of tensors: it cannot be told that the output before and after a step is in memory
anyway, that one series of a state serves as the state before a step and after it, or that a tanh is worth a quarter of a
slot; and what it forbids (fused chains, far-apart uses) is about kernels launched one by one. The cut itself is the same, by
the same networkx.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import networkx  # type: ignore[import-untyped]

from fused_rnn.formula.graph import Graph, Value, leaves_of, ordered, users_of
from fused_rnn.formula.language import Cell, Declaration, GivenGate
from fused_rnn.formula.trace import Traced, trace

_SLOT = 100  # the price of a saved value; others relative to it, in integers


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cell as its struct has it.

    Attributes:
        cell: the cell.
        accumulators: of each slot the graph's input in it, in the order of params.h's ``gates``.
        input_slots, recurrent_slots: of each input gate and of each recurrent gate its slot.
        after: the states after the step.
        saved: the values kept for backward, in the order of their places in ``a``.
        series: of each state whether backward reads it, before or after a step, without having it among ``saved``.
        gradients: of the accumulators in the order of params.h's ``d_gates``: first those of input products alone, then
            those of the recurrent products.
        input_gradients: of each input gate its place in ``gradients``.
        d_states: gradients of the states before the step, without what goes through the recurrent weights.
        d_parameters: gradients of vectors and numbers, for one unit of one row.
        names: the user's names of values.
        phases: what each product or norm inside of the step takes.
        d_phases: gradients of the results of these.
    """

    cell: Cell
    accumulators: tuple[Value, ...]
    input_slots: tuple[int, ...]
    recurrent_slots: tuple[int, ...]
    after: tuple[Value, ...]
    saved: tuple[Value, ...]
    series: tuple[bool, ...]
    gradients: tuple[Value, ...]
    input_gradients: tuple[int, ...]
    d_states: tuple[Value, ...]
    d_parameters: tuple[Value, ...]
    names: Mapping[Value, str]
    phases: tuple[Value, ...]
    d_phases: tuple[Value, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The cell's vectors and numbers in the order of ``d_parameters``."""
        return (*self.cell.declaration.units, *self.cell.declaration.scalars)

    @property
    def backward_roots(self) -> tuple[Value, ...]:
        return (*self.gradients, *self.d_states, *self.d_parameters, *self.d_phases)

    @property
    def forward_roots(self) -> tuple[Value, ...]:
        return (*self.after, *self.phases, *self.saved)

    @property
    def forward_levels(self) -> tuple[int, ...]:
        """Of each phase the number of phases that it waits for in forward, one behind the other: those of a level do not
        depend on each other.
        """
        return _levels(self.phases, "ph.")

    @property
    def backward_levels(self) -> tuple[int, ...]:
        """The same in backward, of the gradients of the phases' results."""
        return _levels(self.d_phases, "d.ph.")

    @property
    def saved_per_unit(self) -> int:
        """How many numbers a unit keeps for a step's backward, beside the output: saved values and series of states."""
        says = self.cell.declaration
        free = {says.output, says.recurrent}
        kept_states = sum(kept and index not in free for index, kept in enumerate(self.series))
        return len(self.saved) + kept_states + len(self.phases)


def make_plan(cell: Cell) -> Plan:
    """Traces the cell and plans its struct."""
    traced = trace(cell)
    says = cell.declaration
    for gate in says.gates:
        if isinstance(gate, GivenGate) and not gate.differentiates:  # nobody asks for its gradient
            traced.gradients[f"x.{gate.name}"] = traced.graph.const(0)
    merged = sums_of(traced, says)
    traced = _with_sums(traced, merged)
    accumulators, slots = _accumulators(traced.graph, says, merged)
    gradients, input_gradients = _gradients(traced, says, merged)
    after = tuple(traced.after[state] for state in says.states)
    d_states = tuple(traced.gradients[state] for state in says.states)
    d_parameters = tuple(traced.gradients[f"self.{name}"] for name in (*says.units, *says.scalars))
    d_phases = tuple(traced.gradients[f"ph.{k}"] for k in range(len(cell.phases)))
    saved, series = choose_saved(traced, says, [*gradients, *d_states, *d_parameters, *d_phases])
    return Plan(
        cell,
        accumulators,
        tuple(slots[f"x.{gate}"] for gate in says.input_gates),
        tuple(slots[f"r.{gate}"] for gate in says.recurrent_gates),
        after,
        _in_places(saved, accumulators),
        series,
        gradients,
        input_gradients,
        d_states,
        d_parameters,
        traced.names,
        traced.phases,
        d_phases,
    )


def _levels(roots: Sequence[Value], prefix: str) -> tuple[int, ...]:
    """Of each phase its level, from what it takes and the prefix of what phases give."""
    names = [[value.name for value in ordered([root]) if value.name.startswith(prefix)] for root in roots]
    waits = [{int(name.removeprefix(prefix)) for name in of_root} for of_root in names]
    levels: dict[int, int] = {}
    while len(levels) < len(roots):
        ready = [k for k in range(len(roots)) if k not in levels and all(other in levels for other in waits[k])]
        levels |= {k: max((levels[other] + 1 for other in waits[k]), default=0) for k in ready}
    return tuple(levels[k] for k in range(len(roots)))


# --- accumulators ---


def sums_of(traced: Traced, says: Declaration) -> set[str]:
    """The gates of which the step reads only the sum of both products."""
    return {gate.name for gate in says.gates if gate.input and gate.recurrent and _is_sum(traced, gate.name)}


def _is_sum(traced: Traced, gate: str) -> bool:
    """Whether the step reads x.<gate> and r.<gate> only as terms of one sum."""
    users = users_of(ordered(traced.forward_roots))

    def sums(name: str) -> list[Value]:
        """The additions that the product is a term of, from the inside; all but the last have no other use."""
        found: list[Value] = []
        at = traced.graph.input(name)
        while len(users.get(at, [])) == 1 and users[at][0].op == "add" and at not in traced.forward_roots:
            at = users[at][0]
            found.append(at)
        return found

    other = sums(f"r.{gate}")
    return any(addition in other for addition in sums(f"x.{gate}"))


def _with_sums(traced: Traced, merged: Iterable[str]) -> Traced:
    """The same with "a.<gate>", the sum of both products, for each of these gates."""
    graph = traced.graph
    replaced = {graph.input(f"x.{gate}"): graph.input(f"a.{gate}") for gate in merged}
    dropped = {graph.input(f"r.{gate}") for gate in merged}
    done: dict[Value, Value] = {}

    def rebuilt(value: Value) -> Value:
        if value in replaced:
            return replaced[value]
        if value in done or not value.args:
            return done.get(value, value)
        args = [rebuilt(arg) for arg in value.args if not (value.op == "add" and arg in dropped)]
        done[value] = args[0] if len(args) < len(value.args) else graph.make(value.op, *args)
        return done[value]

    result = Traced(
        graph,
        {name: rebuilt(value) for name, value in traced.after.items()},
        {name: rebuilt(value) for name, value in traced.gradients.items()},
        {rebuilt(value): name for value, name in traced.names.items()},
        tuple(rebuilt(value) for value in traced.phases),
    )
    left = [value for value in ordered([*result.forward_roots, *result.gradients.values()]) if value in dropped]
    assert not left, f"backward reads {left} outside of the sum"
    return result


def _accumulators(graph: Graph, says: Declaration, merged: set[str]) -> tuple[tuple[Value, ...], dict[str, int]]:
    """What each slot holds as the step begins, and the slot of each product."""
    accumulators: list[Value] = []
    slots: dict[str, int] = {}
    for gate in says.gates:
        letter = "a" if gate.name in merged else "x" if gate.input else "r"
        slots[f"x.{gate.name}"] = slots[f"r.{gate.name}"] = len(accumulators)
        accumulators.append(graph.input(f"{letter}.{gate.name}"))
    for gate in says.gates:
        if gate.input and gate.recurrent and gate.name not in merged:
            slots[f"r.{gate.name}"] = len(accumulators)
            accumulators.append(graph.input(f"r.{gate.name}"))
    return tuple(accumulators), slots


def _gradients(traced: Traced, says: Declaration, merged: set[str]) -> tuple[tuple[Value, ...], tuple[int, ...]]:
    """Gradients of the products in the order of d_gates, and the place of each input gate's."""
    alone = [gate.name for gate in says.gates if gate.input and not (gate.recurrent and gate.name in merged)]
    gradients = [traced.gradients[f"x.{gate}"] for gate in alone]
    gradients += [traced.gradients[f"r.{gate}"] for gate in says.recurrent_gates]
    places = [
        alone.index(gate) if gate in alone else len(alone) + says.recurrent_gates.index(gate) for gate in says.input_gates
    ]
    return tuple(gradients), tuple(places)


# --- saved values ---


def choose_saved(traced: Traced, says: Declaration, roots: Sequence[Value]) -> tuple[list[Value], tuple[bool, ...]]:
    """The values to save for these gradients, and of each state whether backward reads its series."""
    everything = ordered(roots)
    backward = {value for value in everything if value.op == "input" and value.name.startswith("d.")}
    for value in everything:
        if any(arg in backward for arg in value.args):
            backward.add(value)
    forward = [value for value in everything if value not in backward]
    needed = {arg for value in backward for arg in value.args if arg not in backward}
    needed |= {root for root in roots if root not in backward}
    free = {says.output, says.recurrent}
    choices = [index for index in range(len(says.states)) if index not in free]
    best: tuple[int, list[Value], set[int]] | None = None
    for count in range(len(choices), -1, -1):
        for chosen in itertools.combinations(choices, count):
            kept = free | set(chosen)
            price, saved = _cut(forward, needed, _in_memory(traced, says, kept))
            if best is None or price + _SLOT * count < best[0]:
                best = (price + _SLOT * count, saved, kept)
    assert best is not None
    _, saved, kept = best
    read = leaves_of(needed, {*saved, *_in_memory(traced, says, kept)})
    series = tuple(
        index in kept and bool(read & {traced.graph.input(state), traced.after[state]})
        for index, state in enumerate(says.states)
    )
    return saved, series


def _in_memory(traced: Traced, says: Declaration, kept: Iterable[int]) -> set[Value]:
    """States before and after a step whose series are kept."""
    names = [says.states[index] for index in kept]
    values = {traced.graph.input(name) for name in names} | {traced.after[name] for name in names} | set(traced.phases)
    return {value for value in values if value.op != "const"}


def _cut(forward: Sequence[Value], needed: set[Value], in_memory: set[Value]) -> tuple[int, list[Value]]:
    """The cheapest set of values that all needed ones can be made of, and its price with that of making them.

    Each value is an edge (in, out). Out on the sink's side: backward has the value. In on the sink's side: it makes it.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for value in forward:
        if value.op == "const" or (value.op == "input" and value.name.startswith("self.")):
            continue  # always there
        into, out = (value, "in"), (value, "out")
        if value in in_memory:
            graph.add_edge(into, out, capacity=0)
        elif value.is_mask:
            graph.add_edge(into, out)  # no edge's capacity: infinite; a comparison is made again
        else:
            graph.add_edge(into, out, capacity=_SLOT)
        if value.op == "input":
            graph.add_edge("source", into)
        else:
            graph.add_edge("source", into, capacity=round(_SLOT * value.cost))
            for arg in value.args:
                if arg.op != "const" and not (arg.op == "input" and arg.name.startswith("self.")):
                    graph.add_edge((arg, "out"), into)
        if value in needed:
            graph.add_edge(out, "sink")
    price, (kept, _) = networkx.minimum_cut(graph, "source", "sink")
    saved = [
        value
        for value in forward
        if (value, "in") in graph and (value, "in") in kept and (value, "out") not in kept and value not in in_memory
    ]
    return int(price), saved


def _in_places(saved: Sequence[Value], accumulators: Sequence[Value]) -> tuple[Value, ...]:
    """The saved values in the order of their places: each, where possible, in that of an accumulator it is made of."""
    sources = {value: [accumulators.index(leaf) for leaf in ordered([value]) if leaf in accumulators] for value in saved}
    places: dict[int, Value] = {}
    left: list[Value] = []
    for value in sorted(saved, key=lambda value: (len(sources[value]), min(sources[value], default=0))):
        place = next((slot for slot in sorted(sources[value]) if slot < len(saved) and slot not in places), None)
        if place is None:
            left.append(value)
        else:
            places[place] = value
    for value in left:
        places[next(place for place in range(len(saved)) if place not in places)] = value
    return tuple(places[place] for place in range(len(saved)))
