"""LSTMs with other paths between memory, gates and output."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class MultiplicativeLSTM(Cell):
    """The LSTM whose gates see a product of input and state.

    Krause, Lu, Murray and Renals 2016, "Multiplicative LSTM for Sequence Modelling"::

        m = (W_m x) (U_m h)               c = f c + i g
        i, f, o = sigmoid(W x + V m)      h = o tanh(c)
        g = tanh(W x + V m)

    V is weight_i, weight_f, weight_g and weight_o.
    """

    gates = ("m", *(Gate(name, recurrent=False) for name in "ifgo"))
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        m = x.m * r.m
        i = torch.sigmoid(x.i + self.product("i", m))
        f = torch.sigmoid(x.f + self.product("f", m))
        g = torch.tanh(x.g + self.product("g", m))
        o = torch.sigmoid(x.o + self.product("o", m))
        c = f * c + i * g
        return o * torch.tanh(c), c


class MCLSTM(Cell):
    """The memory-controller LSTM: what recurs is not what the layer returns.

    Ben-Ari and Shwartz-Ziv 2017, "Sequence Modeling Using a Memory Controller Extension for LSTM"::

        f, i, o, m = f(W x + U v + b)     c = f c + i g(W x + U v + b)
        h = o tanh(c)                     v = m tanh(c)

    Args:
        f: activation of the gates.
        g: activation of the candidate.
    """

    gates = ("f", "i", "o", "m", "g")
    states = ("h", "v", "c")
    recurrent = "v"

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any, v: Any, c: Any) -> Any:
        c = apply(self.f, x.f + r.f) * c + apply(self.f, x.i + r.i) * apply(self.g, x.g + r.g)
        squashed = torch.tanh(c)
        return apply(self.f, x.o + r.o) * squashed, apply(self.f, x.m + r.m) * squashed, c


class WMCLSTM(Cell):
    """The LSTM with working memory connections: its gates see a squashed product of the whole cell state.

    Landi, Baraldi, Cornia and Cucchiara 2021, "Working Memory Connections for LSTM"::

        i, f = sigmoid(W x + U h + b + tanh(V c + b_m))     c' = f c + i tanh(W x + U h + b)
        o = sigmoid(W x + U h + b + tanh(V c' + b_m))       h' = o tanh(c')

    V is weight_i, weight_f and weight_o, b_m is m_i, m_f and m_o.
    """

    gates = ("i", "f", "g", "o")
    states = ("h", "c")
    unit_parameters = {"m_i": 0.0, "m_f": 0.0, "m_o": 0.0}
    m_i: Any
    m_f: Any
    m_o: Any

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = torch.sigmoid(x.i + r.i + torch.tanh(self.product("i", c) + self.m_i))
        f = torch.sigmoid(x.f + r.f + torch.tanh(self.product("f", c) + self.m_f))
        c = f * c + i * torch.tanh(x.g + r.g)
        o = torch.sigmoid(x.o + r.o + torch.tanh(self.product("o", c) + self.m_o))
        return o * torch.tanh(c), c
