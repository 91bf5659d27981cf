"""Minion recurrent units."""

from __future__ import annotations

from typing import Any

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class MiRU1(Cell):
    """The minion recurrent unit with a reset gate and a fixed update.

    "Minion gated unit", Neurocomputing 2026, doi.org/10.1016/j.neucom.2026.132847::

        r = f(W x + U h + b)     g = g(W x + U_g (r h) + b)     h = update h + (1 - update) g

    U_g is weight_g.

    Args:
        update: share of the state that stays.
        f: activation of the gate.
        g: activation of the candidate.
    """

    gates = ("r", Gate("g", recurrent=False))

    def __init__(self, update: float = 0.5, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.update = update
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        g = apply(self.g, x.g + self.product("g", apply(self.f, x.r + r.r) * h))
        return self.update * h + (1 - self.update) * g


class MiRU2(Cell):
    """The minion recurrent unit with a fixed reset and a fixed update.

    "Minion gated unit", Neurocomputing 2026, doi.org/10.1016/j.neucom.2026.132847::

        g = g(W x + b + reset (U h + b'))     h = update h + (1 - update) g

    Args:
        update: share of the state that stays.
        reset: factor of the recurrent product.
        g: activation of the candidate.
    """

    gates = ("g",)

    def __init__(self, update: float = 0.5, reset: float = 0.5, g: Activation = "tanh") -> None:
        self.update = update
        self.reset = reset
        self.g = checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return self.update * h + (1 - self.update) * apply(self.g, x.g + self.reset * r.g)
