"""The update gate RNN and the intersection RNN."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class UGRNN(Cell):
    """The update gate RNN.

    Collins, Sohl-Dickstein and Sussillo 2017, "Capacity and Trainability in Recurrent Neural Networks"::

        g = tanh(W x + U h + b)     u = sigmoid(W x + U h + b)     h = u h + (1 - u) g
    """

    gates = ("g", "u")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        g = torch.tanh(x.g + r.g)
        return g + torch.sigmoid(x.u + r.u) * (h - g)


class IntersectionRNN(Cell):
    """The intersection RNN (+RNN): one gate to the next step, one to the next layer.

    Collins, Sohl-Dickstein and Sussillo 2017, "Capacity and Trainability in Recurrent Neural Networks"::

        y_in = y(W x + U h + b)          y = g_y x + (1 - g_y) y_in
        h_in = g(W x + U h + b)          h = g_h h + (1 - g_h) h_in
        g_y, g_h = f(W x + U h + b)

    The x of g_y x is a gate of its own, "x", with weights: the identity gives the paper's cell.

    Args:
        y: activation of the output's candidate.
        g: activation of the state's candidate.
        f: activation of the gates.
    """

    gates = ("y", "h", "g_y", "g_h", Gate("x", recurrent=False))
    states = ("y", "h")
    recurrent = "h"

    def __init__(self, y: Activation = "relu", g: Activation = "tanh", f: Activation = "sigmoid") -> None:
        self.y, self.g, self.f = checked("y", y), checked("g", g), checked("f", f)

    def step(self, x: Any, r: Any, y: Any, h: Any) -> Any:
        y_in = apply(self.y, x.y + r.y)
        h_in = apply(self.g, x.h + r.h)
        g_y = apply(self.f, x.g_y + r.g_y)
        g_h = apply(self.f, x.g_h + r.g_h)
        return y_in + g_y * (x.x - y_in), h_in + g_h * (h - h_in)
