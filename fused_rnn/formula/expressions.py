"""Values as C++: expressions with the fewest parentheses that keep the order of operations, and named variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fused_rnn.formula.graph import COMPARISONS, Value

_WIDTH = 90  # an expression longer than this gets variables for its parts
_SUM, _PRODUCT, _UNARY, _ATOM = 1, 2, 3, 4  # how tightly the parts of an expression hold together
_SIGNS = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT)}
_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_JOINED = {"and": "&", "or": "|"}  # of masks, whose SIMD form has no && and ||
_TAKEN = frozenset(
    "sigmoid tanh relu relu_mask exp expm1 log log1p sqrt abs erf sin cos minimum maximum select math "
    "alignas alignof asm auto bool break case catch char class const constexpr continue default delete do double else enum "
    "explicit export extern false float for friend goto if inline int long mutable namespace new noexcept nullptr operator "
    "private protected public register return short signed sizeof static struct switch template this throw true try typedef "
    "typename union unsigned using virtual void volatile while xor and or not".split()
)


class Names:
    """Variables of one function, each name once. arguments: of the function, whose names are taken."""

    def __init__(self, arguments: Iterable[str]) -> None:
        self._taken = _TAKEN | {"V", *arguments}
        self._used: set[str] = set()
        self._unnamed = 0

    def of(self, wanted: str | None) -> str:
        """A new name: the wanted one, or one like it if that is taken."""
        wanted = None if wanted is None or not wanted.isascii() else wanted.strip("_").replace("__", "_")
        if not wanted:
            self._unnamed += 1
            wanted = f"t{self._unnamed}"
        wanted = f"new_{wanted}" if wanted in self._taken else wanted
        name, number = wanted, 2
        while name in self._used:
            name, number = f"{wanted}_{number}", number + 1
        self._used.add(name)
        return name


class Block:
    """The statements of a function's body.

    Args:
        atoms: C++ of the values that are there as the function begins.
        wanted: the user's names of values.
        names: of the function.
    """

    def __init__(self, atoms: Mapping[Value, str], wanted: Mapping[Value, str], names: Names) -> None:
        self.lines: list[str] = []
        self._text = dict(atoms)
        self._wanted = wanted
        self._names = names

    def load(self, values: Sequence[tuple[Value, str, str]]) -> None:
        """Variables for values that lie somewhere: (value, name, where)."""
        if not values:
            return
        parts = []
        for value, wanted, where in values:
            self._text[value] = self._names.of(wanted)
            parts.append(f"{self._text[value]} = {where}")
        line = "const V "
        for index, part in enumerate(parts):
            comma = "" if index + 1 == len(parts) else ", "
            if len(line) + len(part) > _WIDTH:
                self.lines.append(line.rstrip())
                line = "    "
            line += part + comma
        self.lines.append(line + ";")

    def compute(self, roots: Sequence[Value]) -> None:
        """Variables for all that the roots need which is used twice, has a name of the user's, or is long."""
        needed = self._needed(roots)
        uses: dict[Value, int] = {}
        for value in needed:
            for arg in value.args:
                uses[arg] = uses.get(arg, 0) + 1
        for root in roots:
            uses[root] = uses.get(root, 0) + 1
        for value in needed:
            for arg in sorted(value.args, key=lambda arg: -len(self.text(arg))):
                if len(self.text(value)) > _WIDTH and arg.args and arg not in self._text:
                    self.name(arg)
            if value.args and (uses[value] > 1 or value in self._wanted):
                self.name(value)

    def make_safe(self, values: Sequence[Value], array: str) -> None:
        """Variables for those of the values that read the array, which is about to be written."""
        for value in values:
            if f"{array}[" in self.text(value):
                self.name(value, anew=True)

    def name(self, value: Value, anew: bool = False) -> str:
        """The variable of a value, which is made if there is none; anew: if it is no variable yet."""
        if value not in self._text or anew:
            text, _ = self._expression(value)
            name = self._names.of(self._wanted.get(value))
            self.lines.append(f"const {'auto' if value.is_mask else 'V'} {name} = {text};")
            self._text[value] = name
        return self._text[value]

    def text(self, value: Value) -> str:
        """The value as an expression."""
        return self._expression(value)[0]

    def _needed(self, roots: Sequence[Value]) -> list[Value]:
        """The values to be made for the roots, each after its arguments."""
        found: dict[Value, None] = {}

        def visit(value: Value) -> None:
            if value not in found and value not in self._text:
                for arg in value.args:
                    visit(arg)
                found[value] = None

        for root in roots:
            visit(root)
        return list(found)

    def _expression(self, value: Value) -> tuple[str, int]:
        if value in self._text:
            return self._text[value], _ATOM
        op, args = value.op, value.args
        if op == "const":
            return _number(value.number), _ATOM
        if op == "input":
            raise AssertionError(f"{value.name} is not there in this function")
        if op in _SIGNS:
            sign, strength = _SIGNS[op]
            return f"{self._part(args[0], strength)} {sign} {self._part(args[1], strength + 1)}", strength
        if op == "neg":
            return f"-{self._part(args[0], _UNARY)}", _UNARY
        if op in COMPARISONS:
            return f"{self._part(args[0], _SUM)} {_COMPARED[op]} {self._part(args[1], _SUM)}", 0
        if op in _JOINED:
            return f"({self.text(args[0])}) {_JOINED[op]} ({self.text(args[1])})", 0
        if op == "not":
            return f"!({self.text(args[0])})", 0
        if op == "where":
            condition, a, b = args
            zero = b.op == "const" and b.number == 0
            if zero and condition.op == "gt" and condition.args[1].op == "const" and condition.args[1].number == 0:
                return f"relu_mask({self.text(condition.args[0])}, {self.text(a)})", _ATOM
            return f"select({self.text(condition)}, {self.text(a)}, {self.text(b)})", _ATOM
        return f"{op}({', '.join(self.text(arg) for arg in args)})", _ATOM

    def _part(self, value: Value, strength: int) -> str:
        text, own = self._expression(value)
        return text if own >= strength else f"({text})"


def _number(number: float) -> str:
    if math.isinf(number):
        return "V(INFINITY)" if number > 0 else "V(-INFINITY)"
    if math.isnan(number):
        return "V(NAN)"
    if number == 0 and math.copysign(1.0, number) < 0:
        return "V(-0.0)"
    return f"V({int(number)})" if number == int(number) and abs(number) < 1e6 else f"V({number!r})"
