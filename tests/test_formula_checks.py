"""What is no formula is refused when the cell is made: the error names what was met, the line of step, what to write."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import formula_cells
import pytest
import torch
import torch.nn.functional as F
from formula_cells import Lstm

from fused_rnn.formula import Cell, FormulaError, Gate

# (cell, what the error says was met, what it says to write instead)
WRONG: list[tuple[type[Cell], str, str]] = []
COUNTER = itertools.count()
TABLE = torch.ones(3, dtype=torch.float64)


def wrong(met: str, instead: str) -> Callable[[type[Cell]], type[Cell]]:
    def register(cell: type[Cell]) -> type[Cell]:
        WRONG.append((cell, met, instead))
        return cell

    return register


class One(Cell):
    gates = ("a",)


class Two(Cell):
    gates = ("a",)
    states = ("h", "c")


# --- states ---


@wrong("does not take x, r and the 2 state(s)", "step(self, x, r, h, c)")
class MissingState(Two):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a), h


@wrong("returns 1 value(s) for the 2 state(s) h, c", "return h, c")
class TooFewResults(Two):
    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        return torch.tanh(x.a + r.a + c)


@wrong("returns 2 value(s) for the 1 state(s) h", "return h")
class TooManyResults(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return h * x.a, r.a


@wrong("state h is a NoneType, no tensor", "an expression of gates and states")
class NothingReturned(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        torch.tanh(x.a + r.a)


@wrong("state c is a float, no tensor", "an expression of gates and states")
class NumberAsState(Two):
    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        return torch.tanh(x.a + r.a + c), 1.0


@wrong("state c depends on no gate and no state", "an expression of gates and states")
class StateOfNothing(Two):
    unit_parameters = ("w",)

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        return torch.tanh(x.a + r.a + c), torch.exp(self.w)


@wrong("state c is not read", "states without it")
class StateNotRead(Two):
    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        h = torch.tanh(x.a + r.a)
        return h, h


@wrong("state c is not read", "states without it")
class StateHandedOn(Two):
    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        return torch.tanh(x.a + r.a), c


@wrong("state h is a comparison", "h = torch.where(comparison, u, v)")
class ComparisonAsState(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return x.a > r.a


@wrong("torch.unsqueeze is no operation", "one gate a value")
class ShapesThatDiffer(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(torch.unsqueeze(x.a, 1) + r.a)


@wrong("torch.Tensor.__getitem__ is no operation", "one gate a value")
class Index(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a[:, :1])


@wrong("torch.cat is no operation", "one gate a value")
class Joined(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(torch.cat([x.a, r.a], dim=-1))


@wrong("torch.Tensor.shape", "sizes, dtype and device are the layer's")
class AsksForShape(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) / h.shape[-1]


# --- gates and parameters ---


@wrong("x.b: no such gate", "one of gates: a")
class UnknownGate(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.b + r.a)


@wrong("r.b: the gate is declared without recurrent product", 'Gate("b", recurrent=True)')
class GateWithoutProduct(Cell):
    gates = ("a", Gate("b", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a + x.b + r.b)


@wrong("r.a is not used", 'Gate("a", recurrent=False)')
class ProductNotUsed(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a) + h


@wrong("x.b is not used", 'Gate("b", input=False)')
class InputNotUsed(Cell):
    gates = ("a", "b")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a + r.b)


@wrong("parameter w is not used", "a declaration without it")
class ParameterNotUsed(One):
    unit_parameters = ("w",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a)


@wrong("neither a gate, a state nor a declared parameter (shape [3])", 'unit_parameters = ("name",)')
class TensorFromOutside(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * TABLE


@wrong("x.a is assigned to", "a = ...")
class GateAssigned(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        x.a = torch.tanh(x.a + r.a)
        return x.a


# --- operations ---


@wrong("torch.Tensor.add_ is no operation", "h = h + a, not h += a")
class InPlaceOperator(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        h += torch.tanh(x.a + r.a)
        return h


@wrong("torch.Tensor.tanh_ is no operation", "the operation that returns a new tensor")
class InPlaceMethod(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return (x.a + r.a).tanh_()


@wrong("torch.nn.functional.relu changes a tensor in place", "the operation that returns a new tensor")
class InPlaceKeyword(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return F.relu(x.a + r.a, inplace=True)


@wrong("torch.add with out", "the call without it")
class OutKeyword(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.add(x.a, r.a, out=h)


@wrong("torch.Tensor.float is no operation", "the layer chooses the dtype")
class Cast(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh((x.a + r.a).float())


@wrong("torch.Tensor.to is no operation", "the layer chooses the dtype")
class CastByTo(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh((x.a + r.a).to(torch.float32))


@wrong("torch.Tensor.matmul is no operation", 'self.product("name", value)')
class Matmul(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a @ TABLE)


@wrong("torch.nn.functional.linear is no operation", 'self.product("name", value)')
class Linear(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + F.linear(r.a, TABLE))


@wrong("torch.Tensor.sum is no operation", "a norm over the units")
class Reduction(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) / h.sum(-1, keepdim=True)


@wrong("torch.softmax is no operation", "self.layer_norm or self.rms_norm")
class Softmax(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.softmax(x.a + r.a, -1)


@wrong("torch.nn.functional.layer_norm is no operation", 'self.layer_norm(value, "name")')
class TorchsNorm(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return F.layer_norm(x.a + r.a, (3,))


@wrong("torch.Tensor.__bool__ is no operation", "torch.where(condition, a, b)")
class ControlFlow(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        if x.a > 0:
            return torch.tanh(r.a)
        return h


@wrong("torch.Tensor.item is no operation", "torch.where(condition, a, b)")
class ReadsAValue(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a * h.item())


@wrong("torch.rand_like is no operation", "a formula without random numbers")
class Random(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * torch.rand_like(h)


@wrong("torch.nn.functional.dropout is no operation", "dropout is Layer(dropout=..., recurrent_dropout=..., zoneout=...)")
class Dropout(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return F.dropout(torch.tanh(x.a + r.a), 0.5)


@wrong("two runs of the step differ: torch.Tensor.mul with", "constants that stay as they are")
class RandomNumberOfPython(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * random.random()


@wrong("two runs of the step differ", "a step that does the same every time")
class OneMoreEachTime(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        for _ in range(next(COUNTER) + 1):
            h = torch.tanh(x.a + r.a) + h
        return h


@wrong("torch.zeros_like is no operation", "the number itself")
class Factory(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.maximum(x.a + r.a, torch.zeros_like(h))


@wrong("torch.tensor is no operation", "the number itself")
class TensorOfANumber(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * torch.tensor(0.5)


@wrong("torch.Tensor.mul of a comparison", "torch.where(a > b, u, v)")
class ArithmeticOfMasks(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return (x.a > 0) * r.a + h


@wrong("torch.where gives torch.float32", "with a tensor for one of both")
class WhereOfNumbers(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * torch.where(h > 0, 1.0, 0.0)


@wrong("torch.Tensor.__pow__ is no operation", "a * a, torch.sqrt(a)")
class Power(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return (x.a + r.a) ** 3


@wrong("torch.max is no operation", "torch.maximum(a, b)")
class Maximum(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.max(x.a, r.a)


@wrong("torch.Tensor.detach is no operation", "gradients flow through all of a formula")
class Detach(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) + h.detach()


@wrong("torch.lgamma is no operation", "operations of the table: + - * /, sigmoid")
class Unknown(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.lgamma(x.a + r.a)


@wrong('self.product: the name "u" is taken', "a name of its own for each")
class ProductTwice(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a + self.product("u", self.product("u", h)))


@wrong("self.layer_norm of no value of the units", "an expression of gates and states")
class NormOfANumber(One):
    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a) * self.layer_norm(1.0, "v")


@pytest.mark.parametrize(("cell", "met", "instead"), WRONG, ids=[cell.__name__ for cell, _, _ in WRONG])
def test_wrong_step(cell: type[Cell], met: str, instead: str) -> None:
    with pytest.raises(FormulaError) as caught:
        cell()
    message = str(caught.value)
    first, at, *_, last = message.split("\n")
    assert first.startswith(f"{cell.__name__}.step: ") and met in first
    assert last.startswith("  write instead: ") and instead in last
    file, line = re.fullmatch(r"  at (.*):(\d+)", at).groups()  # type: ignore[union-attr]
    code = cell.step.__code__
    lines = [number for _, _, number in code.co_lines() if number is not None]
    assert file == __file__ and min(lines) <= int(line) <= max(lines)


def test_the_line_is_that_of_the_operation() -> None:
    with pytest.raises(FormulaError, match=r"\n    h \+= torch.tanh\(x.a \+ r.a\)\n"):
        InPlaceOperator()


def helper(value: Any) -> Any:
    return value.sum()


def test_the_line_may_be_in_a_function_that_step_calls() -> None:
    class Calls(One):
        def step(self, x: Any, r: Any, h: Any) -> Any:
            return torch.tanh(x.a + r.a) * helper(h)

    with pytest.raises(FormulaError, match=r"\n    return value\.sum\(\)\n"):
        Calls()


# --- declarations ---

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"gates": ()}, r"gates: expected at least one name, .* got none"),
    ({"gates": "ab"}, r"gates: expected a tuple of names, got 'ab'"),
    ({"gates": ("a", "a")}, r"gates: a is there twice"),
    ({"gates": ("a b",)}, r"gates: expected names .* got 'a b'"),
    ({"gates": (3,)}, r"gates: expected names .* got 3"),
    ({"gates": ("lambda",)}, r"gates: expected names .* got 'lambda'"),
    ({"gates": (Gate("a", input=False, recurrent=False),)}, r"gate a has neither an input nor a recurrent product"),
    ({"gates": (Gate("a", input=False),)}, r"expected at least one gate with an input product"),
    ({"states": ()}, r"states: expected at least one name, got none"),
    ({"states": ("h", "h")}, r"states: h is there twice"),
    ({"output": "y"}, r"output: expected one of states \(h\), got 'y'"),
    ({"recurrent": "c"}, r"recurrent: expected one of states \(h\), got 'c'"),
    ({"step": 3}, r"step: expected a function, got 3"),
    ({"heads": 0}, r"heads: expected an int of at least 1, got 0"),
    ({"heads": 2.0}, r"heads: expected an int of at least 1, got 2.0"),
    ({"unit_parameters": ("step",)}, r"parameter step has the name of something else"),
    ({"unit_parameters": ("w",), "scalar_parameters": ("w",)}, r"w is there twice"),
    ({"unit_parameters": {"w": "ones"}}, r"w: expected None, a number or a function of the tensor, got 'ones'"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[message[:30] for _, message in FIELDS])
def test_wrong_declaration(fields: dict[str, Any], message: str) -> None:
    cell = type("Wrong", (formula_cells.Rnn,), fields)
    with pytest.raises(FormulaError, match=f"^Wrong.*{message}"):
        cell()


def test_no_step() -> None:
    with pytest.raises(FormulaError, match=r"One: no step; define step\(self, x, r, h\)"):
        One()


def test_a_cell_does_not_change() -> None:
    class Keeps(One):
        def step(self, x: Any, r: Any, h: Any) -> Any:
            self.last = h
            return torch.tanh(x.a + r.a)

    cell = formula_cells.Janet(2.0)
    with pytest.raises(FormulaError, match="Janet.beta: a cell does not change once it is made"):
        cell.beta = 3.0
    with pytest.raises(FormulaError, match="Keeps.last: .* step keeps nothing on self"):
        Keeps()
    assert cell.beta == 2.0 and repr(cell) == "Janet(beta=2.0)"
    for twin in (copy.deepcopy(cell), copy.copy(cell), pickle.loads(pickle.dumps(cell))):
        assert twin.beta == 2.0 and twin.declaration == cell.declaration


def test_a_product_belongs_into_step() -> None:
    with pytest.raises(FormulaError, match="Lstm.product: to be called inside of step only"):
        Lstm().product("u", 1.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_made_under_any_mode(mode: Any) -> None:
    with mode():
        assert formula_cells.Everything().declaration.states == ("h", "c")
    with mode(), pytest.raises(FormulaError, match="in place"):
        InPlaceKeyword()
