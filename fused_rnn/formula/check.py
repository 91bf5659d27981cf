"""Whether a step is a formula: it runs once on small tensors, and each call of torch inside of it is looked up in a table.

Why a ``TorchFunctionMode`` and not torch.fx's symbolic tracing: it sees the calls as the user wrote them (operators,
methods, functions, factories, ``bool(h)``, ``h.shape``, in-place operators) on tensors that have shapes and dtypes, while
the user's line is still on the stack. A proxy of torch.fx has neither shape nor dtype, takes ``h += 1`` for ``h = h + 1``
and does not see ``torch.rand(3)``. The graph that code is generated from is made by make_fx (trace.py), in ATen's
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from fused_rnn.formula.errors import FormulaError, place_in_step
from fused_rnn.formula.language import Cell, Phase, run_step
from fused_rnn.formula.operations import ALLOWED, LISTED, MAKERS_OF_MASKS, hint_for

_SHAPE = (2, 3)  # [B, H] of the trial


def check_step(cell: Cell) -> tuple[tuple[Phase, ...], str]:
    """Runs the step on trial and returns the products and norms in it, and the calls of torch as text.

    Two cells of one declaration and one text compute the same.

    Raises:
        FormulaError: the step is no formula.
    """
    first = _Trial(cell)
    first.run()
    again = _Trial(cell)
    again.run()
    for (call, place), (other, _) in zip(first.calls, again.calls, strict=False):
        if call != other:
            raise FormulaError.at_step(
                cell, f"two runs of the step differ: {call}, then {other}", "constants that stay as they are", place
            )
    if len(first.calls) != len(again.calls):
        raise FormulaError.at_step(cell, "two runs of the step differ", "a step that does the same every time")
    return tuple(first.phases), "\n".join(first.text)


class _Trial(TorchFunctionMode):
    """One run of a step: what each tensor was made of, what was called."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.sources: dict[int, frozenset[str]] = {}  # id of a tensor -> names of the step's arguments that it depends on
        self.kept: list[Tensor] = []  # alive, so that ids stay theirs
        self.calls: list[tuple[str, tuple[str, int] | None]] = []
        self.phases: list[Phase] = []
        self.names: dict[int, str] = {}  # id of a tensor -> its name in the text
        self.text: list[str] = []
        self.read: set[str] = set()  # arguments that an operation has taken
        self.values = torch.Generator().manual_seed(0)

    def new(self, source: str | frozenset[str], shape: tuple[int, ...] = _SHAPE) -> Tensor:
        """A tensor that is an argument of the step, or depends on these."""
        with torch._C.DisableTorchFunction():
            tensor = torch.rand(shape, generator=self.values, dtype=torch.float64, device="cpu")
        self.kept.append(tensor)
        self.names[id(tensor)] = source if isinstance(source, str) else f"%{len(self.kept)}"
        self.sources[id(tensor)] = frozenset([source]) if isinstance(source, str) else source
        return tensor

    def run(self) -> None:
        with torch.inference_mode(False):  # its tensors do not say whether they were changed
            self.run_outside_inference()

    def run_outside_inference(self) -> None:
        cell, says = self.cell, self.cell.declaration
        x = {name: self.new(f"x.{name}") for name in says.input_gates}
        r = {name: self.new(f"r.{name}") for name in says.recurrent_gates}
        states = [self.new(name) for name in says.states]
        parameters = {name: self.new(f"self.{name}", _SHAPE[1:]) for name in says.units}
        parameters |= {name: self.new(f"self.{name}", ()) for name in says.scalars}
        with self:
            result = run_step(cell, x, r, states, parameters, self.run_phase)
        self.check_results(result)
        self.check_all_is_used([f"x.{name}" for name in x], [f"r.{name}" for name in r], list(parameters))

    # --- calls ---

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if func not in ALLOWED:
            self.refuse(f"{name} is no operation of a formula", hint_for(name))
        for keyword in ("out", "rounding_mode"):
            if kwargs.get(keyword) is not None:
                self.refuse(f"{name} with {keyword}", "the call without it")
        tensors = list(_tensors([args, kwargs]))
        sources = [self.sources_of(tensor, name) for tensor in tensors]
        condition = args[0] if func is torch.where and args else kwargs.get("condition")
        for tensor in tensors:
            if tensor.dtype == torch.bool and not (tensor is condition and func is torch.where):
                self.refuse(f"{name} of a comparison", "torch.where(a > b, u, v), one inside the other where there are two")
        versions = [tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        if [tensor._version for tensor in tensors] != versions:
            self.refuse(f"{name} changes a tensor in place", "the operation that returns a new tensor")
        self.read.update(*sources)
        self.check_value(name, result)
        numbers = [value for value in _leaves([args, kwargs]) if not isinstance(value, Tensor)]
        self.calls.append((f"{name} with {numbers}" if numbers else name, place_in_step(self.cell._written_step.__code__)))
        self.kept.append(result)
        self.names.setdefault(id(result), f"%{len(self.kept)}")
        self.text.append(f"{self.names[id(result)]} = {name}({self.shown(args)}, {self.shown(kwargs)})")
        self.sources[id(result)] = frozenset().union(*sources)
        return result

    def shown(self, value: Any) -> str:
        """Arguments of a call with the names of tensors."""
        if isinstance(value, Tensor):
            return self.names[id(value)]
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {self.shown(value[key])}" for key in sorted(value)) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.shown, value)) + "]"
        return repr(value)

    def sources_of(self, tensor: Tensor, name: str) -> frozenset[str]:
        if id(tensor) not in self.sources:
            self.refuse(
                f"{name} of a tensor that is neither a gate, a state nor a declared parameter (shape {list(tensor.shape)})",
                'a number; or self.name with unit_parameters = ("name",) for a learnable vector of the units, '
                "scalar_parameters for a learnable number",
            )
        return self.sources[id(tensor)]

    def check_value(self, name: str, result: Any) -> None:
        if not isinstance(result, Tensor):
            self.refuse(f"{name} returns {type(result).__name__}, no tensor", f"operations of the table: {LISTED}")
        if result.dtype not in (torch.float64, torch.bool) or (
            result.dtype == torch.bool and name.rsplit(".", 1)[-1] not in MAKERS_OF_MASKS
        ):
            numbers = (
                "torch.where(condition, a, 0.0) with a tensor for one of both: numbers alone have no dtype of the layer"
            )
            usual = "floating-point numbers; the layer chooses the dtype"
            self.refuse(f"{name} gives {result.dtype}", numbers if name == "torch.where" else usual)
        if tuple(result.shape) not in (_SHAPE, _SHAPE[1:], ()):
            self.refuse(f"{name} gives another shape than [B, H]", "operations of the table, unit by unit")

    def run_phase(self, phase: Phase, value: Any) -> Tensor:
        what = f"self.{phase.kind}"
        with torch._C.DisableTorchFunction():
            fits = isinstance(value, Tensor) and value.dtype == torch.float64 and tuple(value.shape) == _SHAPE
        if not fits:
            self.refuse(f"{what} of no value of the units", f"{what} of an expression of gates and states")
        clash = next((other for other in self.phases if set(other.parameters) & set(phase.parameters)), None)
        if not phase.name.isidentifier() or phase.name in ("ih", "hh") or clash is not None:
            self.refuse(f'{what}: the name "{phase.name}" is taken or no identifier', "a name of its own for each")
        sources = self.sources_of(value, what)
        self.read.update(sources)
        self.phases.append(phase)
        result = self.new(sources)
        self.text.append(f"{self.names[id(result)]} = self.{phase.kind}({self.names[id(value)]}, {phase.name})")
        return result

    def refuse(self, met: str, instead: str) -> NoReturn:
        raise FormulaError.at_step(self.cell, met, instead)

    # --- after the run ---

    def check_results(self, result: Any) -> None:
        states = self.cell.declaration.states
        values = list(result) if isinstance(result, (tuple, list)) else [result]
        listed = ", ".join(states)
        if len(values) != len(states):
            self.refuse(f"returns {len(values)} value(s) for the {len(states)} state(s) {listed}", f"return {listed}")
        for name, value in zip(states, values, strict=True):
            if not isinstance(value, Tensor):
                self.refuse(f"state {name} is a {type(value).__name__}, no tensor", "an expression of gates and states")
            if value.dtype != torch.float64:
                self.refuse(f"state {name} is a comparison", f"{name} = torch.where(comparison, u, v)")
            sources = self.sources_of(value, f"state {name}")
            if not any(not source.startswith("self.") for source in sources):
                self.refuse(f"state {name} depends on no gate and no state", "an expression of gates and states")
            if tuple(value.shape) != _SHAPE:
                self.refuse(f"state {name} has shape {list(value.shape)}, not [B, H]", "an expression of gates and states")
            self.read.update(sources - {name})  # a state that is only handed on is not read
            self.text.append(f"{name} = {self.names[id(value)]}")

    def check_all_is_used(self, inputs: list[str], recurrent: list[str], parameters: list[str]) -> None:
        says = self.cell.declaration
        for name in inputs:
            if name not in self.read:
                self.refuse(f"{name} is not used", f'Gate("{name[2:]}", input=False) in gates')
        for name in recurrent:
            if name not in self.read:
                self.refuse(f"{name} is not used", f'Gate("{name[2:]}", recurrent=False) in gates')
        for name in parameters:
            if f"self.{name}" not in self.read:
                self.refuse(f"parameter {name} is not used", "a declaration without it")
        for index, name in enumerate(says.states):
            needed = index == says.output or (recurrent and index == says.recurrent) or not self.cell._is_written
            if name not in self.read and not needed:
                self.refuse(f"state {name} is not read", "states without it")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for element in value:
            yield from _leaves(element)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))
