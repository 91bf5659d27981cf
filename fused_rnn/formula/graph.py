"""A small graph of pointwise operations in which equal expressions are one value.

``Graph.make`` is the only way to a value: it folds constants, drops what changes nothing (a + 0, a * 1, --a) and returns
the value that is there already for the same operation of the same arguments. So common subexpressions are merged as they are
made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Sequence

# Operations of two arguments whose order does not matter, not even to the last bit.
_COMMUTATIVE = frozenset({"add", "mul", "eq", "ne", "and", "or"})
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
MASKS = COMPARISONS | {"and", "or", "not"}

# What an operation costs where backward does it again, in units of one value saved: kept in memory and read back.
_DEAR = frozenset({"sigmoid", "tanh", "exp", "expm1", "log", "log1p", "erf", "sin", "cos"})


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What an operation of other values makes; "input" has a name instead, "const" a number."""

    op: str
    args: tuple[Value, ...]
    number: float = 0.0
    name: str = ""
    index: int = 0  # in the order of making

    @property
    def is_mask(self) -> bool:
        return self.op in MASKS

    @property
    def cost(self) -> float:
        """Of making it again, with saving it as the unit: a function of the math library a quarter, others little."""
        if self.op in ("input", "const"):
            return 0.0
        return 0.25 if self.op in _DEAR else 0.05 if self.op in ("div", "sqrt") else 0.01

    def __repr__(self) -> str:
        if self.op == "const":
            return repr(self.number)
        return self.name if self.op == "input" else f"{self.op}({', '.join(map(repr, self.args))})"


class Graph:
    """All values of a cell, forward and backward."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Value] = {}

    def _intern(self, op: str, args: tuple[Value, ...] = (), number: float = 0.0, name: str = "") -> Value:
        order = tuple(sorted(args, key=lambda arg: arg.index)) if op in _COMMUTATIVE else args
        key = (op, tuple(id(arg) for arg in order), repr(number), name)
        if key not in self._known:
            self._known[key] = Value(op, args, number, name, len(self._known))
        return self._known[key]

    def const(self, number: float) -> Value:
        return self._intern("const", number=float(number))

    def input(self, name: str) -> Value:
        return self._intern("input", name=name)

    def make(self, op: str, *args: Value) -> Value:
        """The value of an operation."""
        return self._simpler(op, args) or self._intern(op, args)

    def _simpler(self, op: str, args: Sequence[Value]) -> Value | None:
        """A value that is there already, or of fewer operations; bitwise the same but for the sign of zeros."""
        numbers = [arg.number if arg.op == "const" else None for arg in args]
        if op in _FOLDED and all(number is not None for number in numbers):
            return self.const(_FOLDED[op](*numbers))
        match op, list(args), numbers:
            case "add", [a, _], [_, 0.0]:
                return a
            case "add", [_, b], [0.0, _]:
                return b
            case "sub", [a, _], [_, 0.0]:
                return a
            case "sub", [_, b], [0.0, _]:
                return self.make("neg", b)
            case (("mul" | "div"), [a, _], [_, 1.0]):
                return a
            case "mul", [_, b], [1.0, _]:
                return b
            case (("mul" | "div"), [a, _], [_, -1.0]):
                return self.make("neg", a)
            case "mul", [_, b], [-1.0, _]:
                return self.make("neg", b)
            case "neg", [Value(op="neg") as a], _:
                return a.args[0]
            case "neg", [Value(op="sub") as a], _:
                return self.make("sub", a.args[1], a.args[0])
            case "add", [a, Value(op="neg") as b], _:
                return self.make("sub", a, b.args[0])
            case "add", [Value(op="neg") as a, b], _:
                return self.make("sub", b, a.args[0])
            case "sub", [a, Value(op="neg") as b], _:
                return self.make("add", a, b.args[0])
            case "where", [_, a, b], _ if a is b:
                return a
        return None


def _divided(a: float, b: float) -> float:
    return a / b if b else math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)


_FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _divided,
    "neg": lambda a: -a,
}


def ordered(roots: Iterable[Value]) -> list[Value]:
    """The values that roots are made of, and roots, each after its arguments."""
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value not in found:
            for arg in value.args:
                visit(arg)
            found[value] = None

    for root in roots:
        visit(root)
    return list(found)


def users_of(values: Iterable[Value]) -> dict[Value, list[Value]]:
    """Of each value those, among the given ones, whose arguments it is; twice where it is both."""
    users: dict[Value, list[Value]] = {}
    for value in values:
        users.setdefault(value, [])
        for arg in value.args:
            users.setdefault(arg, []).append(value)
    return users


def leaves_of(roots: Iterable[Value], stops: Container[Value]) -> set[Value]:
    """Those of ``stops`` that the roots are made of, with no other one in between."""
    found: set[Value] = set()
    seen: set[Value] = set()

    def visit(value: Value) -> None:
        if value in seen:
            return
        seen.add(value)
        if value in stops:
            found.add(value)
            return
        for arg in value.args:
            visit(arg)

    for root in roots:
        visit(root)
    return found
