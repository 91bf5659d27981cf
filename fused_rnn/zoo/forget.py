"""Cells with one gate, which forgets."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class JANET(Cell):
    """Just another network: the LSTM with the forget gate alone.

    Van der Westhuizen and Lasenby 2018, "The Unreasonable Effectiveness of the Forget Gate"::

        s = W x + U h + b     g = tanh(W x + U h + b)     h = sigmoid(s) h + (1 - sigmoid(s - beta)) g

    Args:
        beta: how much more is let in than is forgotten.
        learnable: whether beta is a parameter of the layer, which starts there.
    """

    gates = ("f", "g")
    beta: Any

    def __init__(self, beta: float = 1.0, learnable: bool = False) -> None:
        self.learnable = learnable
        if learnable:
            self.scalar_parameters = {"beta": beta}
        else:
            self.beta = beta

    def step(self, x: Any, r: Any, h: Any) -> Any:
        s = x.f + r.f
        return torch.sigmoid(s) * h + (1 - torch.sigmoid(s - self.beta)) * torch.tanh(x.g + r.g)


class MGU(Cell):
    """The minimal gated unit.

    Zhou, Wu, Zhang and Zhou 2016, "Minimal Gated Unit for Recurrent Neural Networks"::

        f = f(W x + U h + b)     g = g(W x + U_g (f h) + b)     h = (1 - f) h + f g

    U_g is weight_g.

    Args:
        f: activation of the gate.
        g: activation of the candidate.
    """

    gates = ("f", Gate("g", recurrent=False))

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        f = apply(self.f, x.f + r.f)
        g = apply(self.g, x.g + self.product("g", f * h))
        return h + f * (g - h)


class MinimalRNN(Cell):
    """The minimal RNN: the state mixes with an embedding of the input.

    Chen 2017, "MinimalRNN: Toward More Interpretable and Trainable Recurrent Neural Networks"::

        z = g(W x + b)     u = f(U h + V z + b)     h = u h + (1 - u) z

    V is weight_z.

    Args:
        f: activation of the gate.
        g: activation of the embedding.
    """

    gates = (Gate("z", recurrent=False), Gate("u", input=False))

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        z = apply(self.g, x.z)
        return z + apply(self.f, r.u + self.product("z", z)) * (h - z)


class LightRU(Cell):
    """The light recurrent unit.

    Ye et al. 2024, "Light Recurrent Unit: Towards an Interpretable Recurrent Neural Network for Modeling Long-Range
    Dependency"::

        g = tanh(W x + b)     f = sigmoid(W x + U h + b)     h = (1 - f) h + f g
    """

    gates = (Gate("g", recurrent=False), "f")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return h + torch.sigmoid(x.f + r.f) * (torch.tanh(x.g) - h)
