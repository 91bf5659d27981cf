"""The language of cells: what a cell declares, and ``step``, its formula.

A cell is a value: its declaration and its constants. It holds no tensors. Learnable parameters belong to the Layer or the
Step that runs it, which hands them to ``step`` as attributes of a bound copy of the cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_rnn.formula.errors import FormulaError

# How a parameter starts: None (uniform within 1/sqrt(H), as torch.nn's), a number, or a function that fills the tensor.
Init = float | Callable[[Tensor], Any] | None


@dataclasses.dataclass(frozen=True)
class Gate:
    """A row block of the weights.

    Attributes:
        name: of ``x.<name>`` and ``r.<name>`` in ``step``.
        input: whether weight_ih has a block for it, ``x.<name> = W x + b``.
        recurrent: whether weight_hh has a block for it, ``r.<name> = U h + b'``.
    """

    name: str
    input: bool = True
    recurrent: bool = True


@dataclasses.dataclass(frozen=True)
class GivenGate(Gate):
    """A gate without weights: ``x.<name>`` is what the call gives (StepOptions.values). For cells that are made of others
    (options.py, tangents.py), behind all other gates.

    Attributes:
        differentiates: whether the values have gradients; those that have come first.
    """

    recurrent: bool = False
    differentiates: bool = False


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a step computes over all units of a row: a product with a matrix [H, H], or a norm. It ends a pointwise phase."""

    kind: str  # "product", "layer_norm" or "rms_norm"
    name: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters, without the layer's suffix."""
        return (f"weight_{self.name}", f"bias_{self.name}") if self.kind == "layer_norm" else (f"weight_{self.name}",)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a cell's class says, checked."""

    gates: tuple[Gate, ...]
    states: tuple[str, ...]
    output: int  # index of the state that is the layer's output
    recurrent: int  # index of the state that the recurrent product reads
    units: Mapping[str, Init]  # learnable vectors [H]
    scalars: Mapping[str, Init]  # learnable numbers
    heads: int  # blocks on the diagonal of the recurrent weights of each gate

    @property
    def input_gates(self) -> tuple[str, ...]:
        return tuple(gate.name for gate in self.gates if gate.input)

    @property
    def weighted_gates(self) -> tuple[str, ...]:
        """The input gates with weights, which come before those that are given."""
        return tuple(gate.name for gate in self.gates if gate.input and not isinstance(gate, GivenGate))

    @property
    def given_gates(self) -> tuple[str, ...]:
        return self.input_gates[len(self.weighted_gates) :]

    @property
    def recurrent_gates(self) -> tuple[str, ...]:
        return tuple(gate.name for gate in self.gates if gate.recurrent)

    @property
    def values_differentiate(self) -> bool:
        """Whether the values of a given gate have gradients."""
        return any(isinstance(gate, GivenGate) and gate.differentiates for gate in self.gates)


class _CellType(type):
    """Checks a cell once its constructor has run; from then on the cell cannot be changed."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cell = super().__call__(*args, **kwargs)
        cell.__dict__["_declaration"] = declaration_of(cell)
        cell.__dict__["_phases"], cell.__dict__["_text"] = cell._checked()
        return cell


class Cell(metaclass=_CellType):
    """A recurrent cell written as a formula. Subclasses set the attributes below and define ``step``.

    ::

        class LiGRU(Cell):
            gates = ("z", "g")
            states = ("h",)

            def step(self, x, r, h):
                z = torch.sigmoid(x.z + r.z)
                return z * h + (1 - z) * torch.relu(x.g + r.g)

    Attributes:
        gates: names of the row blocks of weight_ih and weight_hh, in this order; a :class:`Gate` where one of the two
            lacks the block.
        states: names of the states, in the order of ``step``'s arguments and results, of hx and of the last states.
        output: name of the state that is the layer's output; the first if not given.
        recurrent: name of the state that the recurrent product reads; the first if not given.
        unit_parameters: names of learnable vectors [H], or a dict of names with how each starts. ``step`` reads them as
            ``self.<name>``.
        scalar_parameters: the same for learnable numbers.
        heads: n blocks of units that see no other block's state: weight_hh is [n, G*H/n, H/n], of each head the rows of all
            its gates.

    Numbers that the constructor sets on the instance are constants of the formula.

    Raises:
        FormulaError: at construction, for a declaration or a step that is no formula. The error says what was met, at
            which line, and what to write instead.
    """

    gates: tuple[str | Gate, ...] = ()
    states: tuple[str, ...] = ("h",)
    output: str | None = None
    recurrent: str | None = None
    unit_parameters: Sequence[str] | Mapping[str, Init] = ()
    scalar_parameters: Sequence[str] | Mapping[str, Init] = ()
    heads: int = 1
    _is_written = True  # by a user, who is told of states that nothing reads

    def step(self, x: Any, r: Any, *states: Any) -> Any:
        """One step of one unit.

        Args:
            x: the input products, ``x.<gate> = W_gate input + b_gate``, each [B, H].
            r: the recurrent products, ``r.<gate> = U_gate h + b'_gate``, each [B, H].
            states: the states before the step, each [B, H].

        Returns:
            The states after the step, each [B, H]: a tensor, or a tuple in the order of ``states``.
        """
        raise NotImplementedError

    def product(self, name: str, value: Any) -> Any:
        """In ``step``: ``value`` [B, H] times a learnable matrix [H, H], the layer's ``weight_<name>_l0`` and so on."""
        return self._run_phase(Phase("product", name), value)

    def layer_norm(self, value: Any, name: str) -> Any:
        """In ``step``: torch.nn.LayerNorm over the units of a row, with the layer's weight_<name> and bias_<name>."""
        return self._run_phase(Phase("layer_norm", name), value)

    def rms_norm(self, value: Any, name: str) -> Any:
        """In ``step``: torch.nn.RMSNorm (eps 1e-5) over the units of a row, with the layer's weight_<name>."""
        return self._run_phase(Phase("rms_norm", name), value)

    def _checked(self) -> tuple[tuple[Phase, ...], str]:
        """The products and norms inside of the step, and its text: the same for cells that compute the same."""
        from fused_rnn.formula.check import check_step  # it needs this module

        return check_step(self)

    @property
    def _written_step(self) -> Any:
        """The function that the user wrote."""
        return type(self).step

    def _run_phase(self, phase: Phase, value: Any) -> Any:
        run = self.__dict__.get("_run_phases")
        if run is None:
            raise FormulaError(f"{type(self).__name__}.{phase.kind}: to be called inside of step only")
        return run(phase, value)

    @property
    def declaration(self) -> Declaration:
        """What the class declares."""
        found: Declaration = self.__dict__["_declaration"]
        return found

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The products and norms inside of the step, in its order."""
        found: tuple[Phase, ...] = self.__dict__["_phases"]
        return found

    @property
    def identity(self) -> str:
        """The same for cells that compute the same: a hash of the declaration and of step's calls of torch."""
        says = self.declaration
        facts = (says.gates, says.states, says.output, says.recurrent, list(says.units), list(says.scalars), says.heads)
        return hashlib.sha256(f"{facts}\n{self.__dict__['_text']}".encode()).hexdigest()[:32]

    def __setattr__(self, name: str, value: Any) -> None:
        if "_declaration" in self.__dict__:
            raise FormulaError(
                f"{type(self).__name__}.{name}: a cell does not change once it is made, and step keeps nothing on self; "
                "make another cell, or declare another state"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        declared = ("gates", "states", "output", "recurrent", "unit_parameters", "scalar_parameters")
        constants = (
            f"{name}={value!r}" for name, value in self.__dict__.items() if not name.startswith("_") and name not in declared
        )
        return f"{type(self).__name__}({', '.join(constants)})"


class Products:
    """``x`` or ``r`` of a step: one attribute a gate."""

    def __init__(self, letter: str, cell: Cell, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
        self.__dict__["_of"] = (letter, cell)

    def __getattr__(self, name: str) -> Any:
        letter, cell = self.__dict__["_of"]
        gate = next((gate for gate in cell.declaration.gates if gate.name == name), None)
        if gate is None:
            known = ", ".join(gate.name for gate in cell.declaration.gates)
            raise FormulaError.at_step(cell, f"{letter}.{name}: no such gate", f"one of gates: {known}")
        missing = "input" if letter == "x" else "recurrent"
        raise FormulaError.at_step(
            cell, f"{letter}.{name}: the gate is declared without {missing} product", f'Gate("{name}", {missing}=True)'
        )

    def __setattr__(self, name: str, value: Any) -> None:
        letter, cell = self.__dict__["_of"]
        raise FormulaError.at_step(cell, f"{letter}.{name} is assigned to", f"a variable of its own: {name} = ...")


def run_step(
    cell: Cell,
    x: Mapping[str, Any],
    r: Mapping[str, Any],
    states: Sequence[Any],
    parameters: Mapping[str, Any],
    run_phases: Callable[[Phase, Any], Any],
) -> Any:
    """Calls the cell's ``step`` with these products, states and parameters (vectors and numbers by name)."""
    bound = object.__new__(type(cell))
    bound.__dict__.update(cell.__dict__, **parameters, _run_phases=run_phases)
    return bound.step(Products("x", cell, x), Products("r", cell, r), *states)


# --- the declaration ---


def declaration_of(cell: Cell) -> Declaration:
    """The checked declaration of a cell."""
    who = type(cell).__name__
    gates = tuple(gate if isinstance(gate, Gate) else Gate(gate) for gate in _names_or_gates(who, cell.gates))
    _check_names(who, "gates", [gate.name for gate in gates])
    for gate in gates:
        if not gate.input and not gate.recurrent:
            raise FormulaError(f"{who}.gates: gate {gate.name} has neither an input nor a recurrent product")
    if not any(gate.input for gate in gates):
        raise FormulaError(f"{who}.gates: expected at least one gate with an input product, got none")
    states = tuple(_sequence(who, "states", cell.states))
    _check_names(who, "states", states)
    if not states:
        raise FormulaError(f"{who}.states: expected at least one name, got none")
    units = _with_inits(who, "unit_parameters", cell.unit_parameters)
    scalars = _with_inits(who, "scalar_parameters", cell.scalar_parameters)
    _check_names(who, "unit_parameters and scalar_parameters", [*units, *scalars])
    for name in [*units, *scalars]:
        if hasattr(cell, name) or name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            raise FormulaError(f"{who}: parameter {name} has the name of something else; choose another name")
    if not isinstance(cell.heads, int) or isinstance(cell.heads, bool) or cell.heads < 1:
        raise FormulaError(f"{who}.heads: expected an int of at least 1, got {cell.heads!r}")
    _check_signature(cell, states)
    return Declaration(
        gates,
        states,
        _index_of(who, "output", cell.output, states),
        _index_of(who, "recurrent", cell.recurrent, states),
        units,
        scalars,
        cell.heads,
    )


def _sequence(who: str, field: str, value: Any) -> list[Any]:
    if not isinstance(value, (tuple, list)):
        raise FormulaError(f"{who}.{field}: expected a tuple of names, got {value!r}")
    return list(value)


def _names_or_gates(who: str, value: Any) -> list[Any]:
    gates = _sequence(who, "gates", value)
    if not gates:
        raise FormulaError(f'{who}.gates: expected at least one name, as in gates = ("z", "g"), got none')
    return gates


def _check_names(who: str, field: str, names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise FormulaError(f"{who}.{field}: expected names (identifiers without a leading _), got {name!r}")
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise FormulaError(f"{who}.{field}: {twice[0]} is there twice")


def _with_inits(who: str, field: str, value: Any) -> dict[str, Init]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(_sequence(who, field, value))
    for name, init in value.items():
        if init is not None and not callable(init) and (not isinstance(init, (int, float)) or isinstance(init, bool)):
            raise FormulaError(f"{who}.{field}: {name}: expected None, a number or a function of the tensor, got {init!r}")
    return dict(value)


def _index_of(who: str, field: str, name: str | None, states: Sequence[str]) -> int:
    if name is None:
        return 0
    if name not in states:
        raise FormulaError(f"{who}.{field}: expected one of states ({', '.join(states)}), got {name!r}")
    return states.index(name)


def _check_signature(cell: Cell, states: Sequence[str]) -> None:
    if type(cell).step is Cell.step:
        raise FormulaError(f"{type(cell).__name__}: no step; define step(self, x, r, {', '.join(states)})")
    if not inspect.isfunction(type(cell).step):
        raise FormulaError(f"{type(cell).__name__}.step: expected a function, got {type(cell).step!r}")
    try:
        inspect.signature(cell.step).bind(None, None, *states)
    except TypeError:
        raise FormulaError.at_step(
            cell,
            f"step{inspect.signature(type(cell).step)} does not take x, r and the {len(states)} state(s) declared",
            f"step(self, x, r, {', '.join(states)})",
        ) from None
