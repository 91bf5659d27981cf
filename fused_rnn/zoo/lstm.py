"""The long short-term memory and its nearest relatives."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class LSTM(Cell):
    """The LSTM of torch.nn with any activations.

    Gers, Schmidhuber and Cummins 2000, "Learning to Forget: Continual Prediction with LSTM"; ONNX LSTM without peepholes::

        i, f, o = f(W x + U h + b)     c = f c + i g
        g = g(W x + U h + b)           h = o h(c)

    Args:
        f: activation of the three gates; f, g and h are in ONNX's order.
        g: activation of the candidate.
        h: activation of the cell state before the output gate.
    """

    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh", h: Activation = "tanh") -> None:
        self.f, self.g, self.h = checked("f", f), checked("g", g), checked("h", h)

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = apply(self.f, x.i + r.i)
        f = apply(self.f, x.f + r.f)
        o = apply(self.f, x.o + r.o)
        c = f * c + i * apply(self.g, x.g + r.g)
        return o * apply(self.h, c), c


class CoupledLSTM(Cell):
    """The LSTM whose input gate is what the forget gate leaves (CIFG); ONNX LSTM with input_forget = 1.

    Greff, Srivastava, Koutnik, Steunebrink and Schmidhuber 2017, "LSTM: A Search Space Odyssey", variant CIFG::

        f, o = sigmoid(W x + U h + b)     c = f c + (1 - f) g
        g = tanh(W x + U h + b)           h = o tanh(c)
    """

    gates = ("f", "g", "o")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        f = torch.sigmoid(x.f + r.f)
        g = torch.tanh(x.g + r.g)
        c = g + f * (c - g)
        return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


class OriginalLSTM(Cell):
    """The LSTM without a forget gate.

    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory"::

        i, o = sigmoid(W x + U h + b)     c = c + i g
        g = tanh(W x + U h + b)           h = o tanh(c)
    """

    gates = ("i", "g", "o")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        c = c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
        return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


class PeepholeLSTM(Cell):
    """The LSTM whose gates see the cell state; ONNX LSTM with P.

    Gers, Schraudolph and Schmidhuber 2002, "Learning Precise Timing with LSTM Recurrent Networks"::

        i, f = f(W x + U h + p c + b)     c' = f c + i g(W x + U h + b)
        o = f(W x + U h + p c' + b)       h' = o g(c')

    Args:
        f: activation of the gates.
        g: activation of the candidate and of the cell state before the output gate.
    """

    gates = ("i", "f", "g", "o")
    states = ("h", "c")
    unit_parameters = ("p_i", "p_f", "p_o")
    p_i: Any
    p_f: Any
    p_o: Any

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = apply(self.f, x.i + r.i + self.p_i * c)
        f = apply(self.f, x.f + r.f + self.p_f * c)
        c = f * c + i * apply(self.g, x.g + r.g)
        return apply(self.f, x.o + r.o + self.p_o * c) * apply(self.g, c), c


class ResidualLSTM(Cell):
    """The peephole LSTM with a projection of the cell state and a shortcut from the input.

    Kim, El-Khamy and Lee 2017, "Residual LSTM: Design of a Deep Recurrent Architecture for Distant Speech Recognition"::

        i, f = f(W x + U h + p c + b)     c' = f c + i g(W x + U h + b)
        o = f(W x + U h + p c' + b)       h' = o (W_p g(c') + W_r x)

    W_p is weight_p. The gate "res", W_r x, has the layer's bias_ih, which the paper lacks.

    Args:
        f: activation of the gates.
        g: activation of the candidate and of the cell state before the projection.
    """

    gates = ("i", "f", "g", "o", Gate("res", recurrent=False))
    states = ("h", "c")
    unit_parameters = ("p_i", "p_f", "p_o")
    p_i: Any
    p_f: Any
    p_o: Any

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = apply(self.f, x.i + r.i + self.p_i * c)
        f = apply(self.f, x.f + r.f + self.p_f * c)
        c = f * c + i * apply(self.g, x.g + r.g)
        o = apply(self.f, x.o + r.o + self.p_o * c)
        return o * (self.product("p", apply(self.g, c)) + x.res), c
