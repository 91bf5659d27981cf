"""The simple recurrent network with any activation."""

from __future__ import annotations

from typing import Any

from fused_rnn.formula.language import Cell
from fused_rnn.zoo.activations import Activation, apply, checked


class RNN(Cell):
    """The simple recurrent network; torch.nn.RNN with any activation.

    Elman 1990, "Finding Structure in Time"; ONNX RNN::

        h = f(W x + b + U h + b')

    Args:
        f: the activation, see fused_rnn.zoo.activations.
    """

    gates = ("a",)

    def __init__(self, f: Activation = "tanh") -> None:
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return apply(self.f, x.a + r.a)
