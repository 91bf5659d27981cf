"""Cells that add gated inputs to a gated state, without a product of the state in what is added."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate


class RAN(Cell):
    """The recurrent additive network: the state is a weighted sum of inputs.

    Lee, Levy and Zettlemoyer 2017, "Recurrent Additive Networks", section 2::

        i, f = sigmoid(W x + U h + b)     c = i (W_c x) + f c     h = tanh(c)

    The content W_c x has the layer's bias_ih, which the paper lacks.
    """

    gates = (Gate("c", recurrent=False), "i", "f")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        c = torch.sigmoid(x.i + r.i) * x.c + torch.sigmoid(x.f + r.f) * c
        return torch.tanh(c), c


class ATR(Cell):
    """The addition-subtraction twin-gated recurrent unit.

    Zhang, Xiong, Su, Lin and Zhang 2018, "Simplifying Neural Machine Translation with Addition-Subtraction Twin-Gated
    Recurrent Networks"::

        p = W x + b     q = U h + b'     h = sigmoid(p + q) p + sigmoid(p - q) h
    """

    gates = ("p",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.sigmoid(x.p + r.p) * x.p + torch.sigmoid(x.p - r.p) * h


class CFN(Cell):
    """The chaos-free network.

    Laurent and von Brecht 2017, "A Recurrent Neural Network without Chaos"::

        theta, eta = sigmoid(W x + U h + b)     h = theta tanh(h) + eta tanh(W x + b)

    The paper's tanh(W x) has no bias.
    """

    gates = ("theta", "eta", Gate("g", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        theta = torch.sigmoid(x.theta + r.theta)
        return theta * torch.tanh(h) + torch.sigmoid(x.eta + r.eta) * torch.tanh(x.g)


class STAR(Cell):
    """The stackable recurrent unit.

    Turkoglu, D'Aronco, Wegner and Schindler 2021, "Gating Revisited: Deep Multi-layer RNNs That Can Be Trained"::

        z = tanh(W x + b)     k = sigmoid(W x + U h + b)     h = tanh((1 - k) h + k z)
    """

    gates = (Gate("z", recurrent=False), "k")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(h + torch.sigmoid(x.k + r.k) * (torch.tanh(x.z) - h))


class SGRN(Cell):
    """The simple gated recurrent network.

    Zu and Wei 2021, "A Simple Gated Recurrent Network for Detection of Power Quality Disturbances"::

        p = W x + b     f = sigmoid(p + U h + b')     h = tanh((1 - f) p + f h)
    """

    gates = ("p",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.p + torch.sigmoid(x.p + r.p) * (h - x.p))
