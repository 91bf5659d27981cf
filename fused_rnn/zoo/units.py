"""Cells whose units see each other little or not at all: vectors and numbers in place of recurrent matrices."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class IndRNN(Cell):
    """The independently recurrent network: every unit sees only itself.

    Li, Li, Cook, Zhu and Gao 2018, "Independently Recurrent Neural Network (IndRNN): Building a Longer and Deeper RNN"::

        h = f(W x + u h + b)

    Args:
        f: the activation.
    """

    gates = (Gate("a", recurrent=False),)
    unit_parameters = ("u",)
    u: Any

    def __init__(self, f: Activation = "relu") -> None:
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return apply(self.f, x.a + self.u * h)


class FastRNN(Cell):
    """The RNN with a weighted residual connection.

    Kusupati, Singh, Bhatia, Kumar, Jain and Varma 2018, "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated
    Recurrent Neural Network", section 3.1::

        g = f(W x + U h + b)     h = sigmoid(alpha) g + sigmoid(beta) h

    alpha and beta are learnable numbers, which start at -3 and 3.

    Args:
        f: activation of the candidate.
    """

    gates = ("g",)
    scalar_parameters = {"alpha": -3.0, "beta": 3.0}
    alpha: Any
    beta: Any

    def __init__(self, f: Activation = "tanh") -> None:
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.sigmoid(self.alpha) * apply(self.f, x.g + r.g) + torch.sigmoid(self.beta) * h


class FastGRNN(Cell):
    """The gated RNN whose gate and candidate share their weights.

    Kusupati, Singh, Bhatia, Kumar, Jain and Varma 2018, "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated
    Recurrent Neural Network", section 3.2::

        a = W x + U h             h = (sigmoid(zeta) (1 - z) + sigmoid(nu)) g + z h
        z = f(a + b_z)
        g = tanh(a + b_g)

    zeta and nu are learnable numbers, which start at 1 and -4. The layer's own biases belong to a: bias=False gives the
    paper's cell.

    Args:
        f: activation of the gate.
    """

    gates = ("a",)
    unit_parameters = {"b_z": 1.0, "b_g": 1.0}
    scalar_parameters = {"zeta": 1.0, "nu": -4.0}
    b_z: Any
    b_g: Any
    zeta: Any
    nu: Any

    def __init__(self, f: Activation = "sigmoid") -> None:
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        a = x.a + r.a
        z = apply(self.f, a + self.b_z)
        return (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * torch.tanh(a + self.b_g) + z * h


class BRC(Cell):
    """The bistable recurrent cell: units that see only themselves.

    Vecoven, Ernst and Drion 2021, "A Bio-inspired Bistable Recurrent Cell Allows for Long-lasting Memory"::

        a = 1 + tanh(W x + w_a h + b)     c = sigmoid(W x + w_c h + b)     h = c h + (1 - c) tanh(W x + a h + b)
    """

    gates = tuple(Gate(name, recurrent=False) for name in "acg")
    unit_parameters = ("w_a", "w_c")
    w_a: Any
    w_c: Any

    def step(self, x: Any, r: Any, h: Any) -> Any:
        a = 1 + torch.tanh(x.a + self.w_a * h)
        g = torch.tanh(x.g + a * h)
        return g + torch.sigmoid(x.c + self.w_c * h) * (h - g)


class NBRC(Cell):
    """The neuromodulated bistable recurrent cell: its gates see the whole state.

    Vecoven, Ernst and Drion 2021, "A Bio-inspired Bistable Recurrent Cell Allows for Long-lasting Memory"::

        a = 1 + tanh(W x + U h + b)     c = sigmoid(W x + U h + b)     h = c h + (1 - c) tanh(W x + a h + b)
    """

    gates = ("a", "c", Gate("g", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        a = 1 + torch.tanh(x.a + r.a)
        g = torch.tanh(x.g + a * h)
        return g + torch.sigmoid(x.c + r.c) * (h - g)


class TRNN(Cell):
    """The strongly typed RNN: no recurrent weights.

    Balduzzi and Ghifary 2016, "Strongly-Typed Recurrent Neural Networks"::

        z = W x + b     f = f(W x + b)     h = f h + (1 - f) z

    Args:
        f: activation of the gate.
    """

    gates = (Gate("z", recurrent=False), Gate("f", recurrent=False))

    def __init__(self, f: Activation = "sigmoid") -> None:
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return x.z + apply(self.f, x.f) * (h - x.z)


class TGRU(Cell):
    """The strongly typed GRU: its gates see the last two inputs and no state.

    Balduzzi and Ghifary 2016, "Strongly-Typed Recurrent Neural Networks"::

        z = W x + V x' + b     f = f(W x + V x' + b)     o = g(W x + V x' + b)     h = f h + z o

    x' is the input before. V x' is kept in states: the gates v_z, v_f and v_o are V x, of the next step's use.

    Args:
        f: activation of the gate.
        g: activation of the output gate.
    """

    gates = tuple(Gate(name, recurrent=False) for name in ("z", "f", "o", "v_z", "v_f", "v_o"))
    states = ("h", "v_z", "v_f", "v_o")

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any, v_z: Any, v_f: Any, v_o: Any) -> Any:
        h = apply(self.f, x.f + v_f) * h + (x.z + v_z) * apply(self.g, x.o + v_o)
        return h, x.v_z, x.v_f, x.v_o


class TLSTM(Cell):
    """The strongly typed LSTM: its gates see the last two inputs and no state.

    Balduzzi and Ghifary 2016, "Strongly-Typed Recurrent Neural Networks"::

        z = W x + V x' + b       o = g(W x + V x' + b)
        f = f(W x + V x' + b)    c = f c + (1 - f) z     h = c o

    x' is the input before. V x' is kept in states: the gates v_z, v_f and v_o are V x, of the next step's use.

    Args:
        f: activation of the gate.
        g: activation of the output gate.
    """

    gates = tuple(Gate(name, recurrent=False) for name in ("z", "f", "o", "v_z", "v_f", "v_o"))
    states = ("h", "c", "v_z", "v_f", "v_o")

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any, c: Any, v_z: Any, v_f: Any, v_o: Any) -> Any:
        z = x.z + v_z
        c = z + apply(self.f, x.f + v_f) * (c - z)
        return c * apply(self.g, x.o + v_o), c, x.v_z, x.v_f, x.v_o
