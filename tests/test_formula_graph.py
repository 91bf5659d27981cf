"""The graph of values: what it merges, and that its simplifications change no result."""

from __future__ import annotations

import math
import random

import pytest

from fused_rnn.formula.graph import Graph, Value, leaves_of, ordered

NUMBERS = {"a": 0.37, "b": -1.25, "c": 2.5}
BINARY = {"add": float.__add__, "sub": float.__sub__, "mul": float.__mul__, "div": float.__truediv__}


def evaluated(value: Value) -> float:
    if value.op in ("input", "const"):
        return NUMBERS[value.name] if value.op == "input" else value.number
    args = [evaluated(arg) for arg in value.args]
    return -args[0] if value.op == "neg" else BINARY[value.op](*args)


@pytest.mark.parametrize("seed", range(20))
def test_simplifications_change_no_result(seed: int) -> None:
    """Random sums, products and negations with the numbers that have rules of their own."""
    rng, graph = random.Random(seed), Graph()
    made = [(graph.input(name), number) for name, number in NUMBERS.items()]
    made += [(graph.const(number), number) for number in (0.0, 1.0, -1.0, 2.0)]
    for _ in range(200):
        (left, x), (right, y) = rng.choice(made), rng.choice(made[-40:])
        op = rng.choice([*BINARY, "neg", "neg"])
        if op == "neg":
            value, number = graph.make("neg", left), -x
        elif op == "div" and y == 0:
            continue
        else:
            value, number = graph.make(op, left, right), BINARY[op](x, y)
        if math.isfinite(number) and 1e-6 < abs(number) < 1e6 or number == 0:
            assert evaluated(value) == number
            made.append((value, number))


def test_equal_expressions_are_one_value() -> None:
    graph = Graph()
    a, b = graph.input("a"), graph.input("b")
    assert graph.make("add", a, b) is graph.make("add", b, a)
    assert graph.make("mul", graph.make("exp", a), b) is graph.make("mul", b, graph.make("exp", a))
    assert graph.make("sub", a, b) is not graph.make("sub", b, a)
    assert graph.const(0.0) is not graph.const(-0.0)
    assert graph.make("where", graph.make("lt", a, b), b, b) is b


@pytest.mark.parametrize(
    ("expression", "simpler"),
    [
        (lambda g, a, b: g.make("neg", g.make("sub", a, b)), lambda g, a, b: g.make("sub", b, a)),
        (lambda g, a, b: g.make("add", a, g.make("neg", b)), lambda g, a, b: g.make("sub", a, b)),
        (lambda g, a, b: g.make("add", g.make("neg", a), b), lambda g, a, b: g.make("sub", b, a)),
        (lambda g, a, b: g.make("sub", a, g.make("neg", b)), lambda g, a, b: g.make("add", a, b)),
        (lambda g, a, b: g.make("mul", g.const(-1), b), lambda g, a, b: g.make("neg", b)),
        (lambda g, a, b: g.make("sub", g.const(0), b), lambda g, a, b: g.make("neg", b)),
        (lambda g, a, b: g.make("neg", g.make("neg", b)), lambda g, a, b: b),
        (lambda g, a, b: g.make("div", a, g.const(1)), lambda g, a, b: a),
        (lambda g, a, b: g.make("add", g.const(2), g.const(3)), lambda g, a, b: g.const(5)),
    ],
)
def test_rules(expression, simpler) -> None:  # type: ignore[no-untyped-def]
    graph = Graph()
    a, b = graph.input("a"), graph.input("b")
    assert expression(graph, a, b) is simpler(graph, a, b)


def test_orders() -> None:
    graph = Graph()
    a, b = graph.input("a"), graph.input("b")
    total = graph.make("add", a, b)
    root = graph.make("mul", total, graph.make("exp", total))
    values = ordered([root])
    assert values[-1] is root and all(values.index(arg) < values.index(value) for value in values for arg in value.args)
    assert leaves_of([root], {total, a}) == {total}
    assert leaves_of([root], {a, b}) == {a, b}
