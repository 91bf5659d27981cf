"""Simple gated units."""

from __future__ import annotations

from typing import Any

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class SGU(Cell):
    """The simple gated unit.

    Gao and Glowacka 2016, "Deep Gate Recurrent Neural Network"::

        g = g(V ((W x + b) h) + b_g)     z = f(W x + U h + b)     h = (1 - z) h + z y(g h)

    V is weight_g.

    Args:
        g: activation of the inner gate.
        y: activation of the candidate.
        f: activation of the outer gate.
    """

    gates = (Gate("g", recurrent=False), "z")
    unit_parameters = {"b_g": 0.0}
    b_g: Any

    def __init__(self, g: Activation = "tanh", y: Activation = "softplus", f: Activation = "hardsigmoid") -> None:
        self.g, self.y, self.f = checked("g", g), checked("y", y), checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        g = apply(self.g, self.product("g", x.g * h) + self.b_g)
        return h + apply(self.f, x.z + r.z) * (apply(self.y, g * h) - h)


class DSGU(Cell):
    """The deep simple gated unit.

    Gao and Glowacka 2016, "Deep Gate Recurrent Neural Network"::

        g = g(V ((W x + b) h) + b_g)     z = f(W x + U h + b)     h = (1 - z) h + z y(V_y (g h))

    V is weight_g, V_y is weight_y.

    Args:
        g: activation of the inner gate.
        y: activation of the candidate.
        f: activation of the outer gate.
    """

    gates = (Gate("g", recurrent=False), "z")
    unit_parameters = {"b_g": 0.0}
    b_g: Any

    def __init__(self, g: Activation = "tanh", y: Activation = "sigmoid", f: Activation = "hardsigmoid") -> None:
        self.g, self.y, self.f = checked("g", g), checked("y", y), checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        g = apply(self.g, self.product("g", x.g * h) + self.b_g)
        candidate = apply(self.y, self.product("y", g * h))
        return h + apply(self.f, x.z + r.z) * (candidate - h)
