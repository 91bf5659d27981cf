"""A step as the list of its calls of torch, to run it again with some of its values changed.

Options clamp a state where the step makes it, so that what the step makes of the state (an LSTM's h of its c) is made of the
clamped one. A step is a formula: it does the same calls every time, which check.py has made sure of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_rnn.formula.language import Cell, Phase, run_step


@dataclasses.dataclass(frozen=True)
class _Ref:
    """A value by its place on the tape."""

    place: int


@dataclasses.dataclass(frozen=True)
class Tape:
    """A step's calls. Values are counted: first the inputs, by their names in ``inputs``, then what each call gives."""

    inputs: tuple[str, ...]  # "x.<gate>", "r.<gate>", states, "self.<parameter>"
    calls: tuple[tuple[Callable[..., Any] | Phase, tuple[Any, ...], dict[str, Any]], ...]
    results: tuple[int, ...]  # of each state after the step its place

    def run(
        self,
        inputs: Mapping[str, Any],
        run_phase: Callable[[Phase, Any], Any],
        change: Callable[[int, Any], Any],
    ) -> list[Any]:
        """The states after the step. change: of a state's number and its value, the value to go on with, also in the step
        itself where the state is what a call has made there; of one value for several states that is the first one's."""
        states_at: dict[int, list[int]] = {}
        for state, place in enumerate(self.results):
            states_at.setdefault(place, []).append(state)
        values = [inputs[name] for name in self.inputs]
        after: dict[int, Any] = {}  # by the state's number

        def there(value: Any) -> Any:
            if isinstance(value, _Ref):
                return values[value.place]
            if isinstance(value, (tuple, list)):
                return type(value)(there(part) for part in value)
            return value

        for call, args, kwargs in self.calls:
            if isinstance(call, Phase):
                made = run_phase(call, there(args[0]))
            else:
                made = call(*there(args), **{name: there(value) for name, value in kwargs.items()})
            states = states_at.get(len(values), ())
            after |= {state: change(state, made) for state in states}
            values.append(after[states[0]] if states else made)
        return [after[state] if state in after else change(state, values[place]) for state, place in enumerate(self.results)]


def record(cell: Cell) -> Tape:
    """The tape of a cell's step."""
    with torch.inference_mode(False), torch.no_grad():
        return _Recorder(cell).tape


class _Recorder(TorchFunctionMode):
    def __init__(self, cell: Cell) -> None:
        super().__init__()
        says = cell.declaration
        self.places: dict[int, int] = {}  # id of a tensor -> its place
        self.kept: list[Tensor] = []  # alive, so that ids stay theirs
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        x = {gate: self.new(2, 3) for gate in says.input_gates}
        r = {gate: self.new(2, 3) for gate in says.recurrent_gates}
        states = [self.new(2, 3) for _ in says.states]
        parameters = {name: self.new(3) for name in says.units} | {name: self.new() for name in says.scalars}
        names = [*(f"x.{gate}" for gate in x), *(f"r.{gate}" for gate in r), *says.states]
        names += [f"self.{name}" for name in parameters]
        with self:
            result = run_step(cell, x, r, states, parameters, self.run_phase)
        after = result if isinstance(result, (tuple, list)) else [result]
        self.tape = Tape(tuple(names), tuple(self.calls), tuple(self.places[id(value)] for value in after))

    def new(self, *shape: int) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.kept_as_next(torch.full(shape, 0.5, dtype=torch.float64, device="cpu"))

    def kept_as_next(self, tensor: Tensor) -> Tensor:
        self.places[id(tensor)] = len(self.kept)
        self.kept.append(tensor)
        return tensor

    def ref(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Ref(self.places[id(value)])
        if isinstance(value, (tuple, list)):
            return type(value)(self.ref(part) for part in value)
        return value

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, self.ref(tuple(args)), {name: self.ref(value) for name, value in kwargs.items()}))
        # A result that is an argument (an operation may give one back) is a value of its own on the tape.
        return self.kept_as_next(result.view_as(result) if id(result) in self.places else result)

    def run_phase(self, phase: Phase, value: Tensor) -> Tensor:
        self.calls.append((phase, (self.ref(value),), {}))
        return self.new(2, 3)


def names_of_inputs(x: Mapping[str, Any], r: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The products and parameters of a step by their names on a tape."""
    named = {f"x.{gate}": value for gate, value in x.items()} | {f"r.{gate}": value for gate, value in r.items()}
    return named | {f"self.{name}": value for name, value in own.items()}


def listed(result: Any) -> list[Any]:
    """The states that a step returns, as a list."""
    return list(result) if isinstance(result, (tuple, list)) else [result]
