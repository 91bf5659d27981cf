"""The gated recurrent unit and its nearest relatives."""

from __future__ import annotations

from typing import Any

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class GRU(Cell):
    """The GRU of torch.nn, with the reset gate after the product, and any activations.

    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder"; ONNX GRU with linear_before_reset = 1::

        r, z = f(W x + U h + b)     n = g(W x + b + r (U h + b'))     h = (1 - z) n + z h

    Args:
        f: activation of the gates; f and g are in ONNX's order.
        g: activation of the candidate.
    """

    gates = ("r", "z", "n")

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = apply(self.f, x.r + r.r)
        z = apply(self.f, x.z + r.z)
        n = apply(self.g, x.n + reset * r.n)
        return n + z * (h - n)


class ResetFirstGRU(Cell):
    """The GRU with the reset gate before the product; Keras's reset_after=False, ONNX's linear_before_reset = 0.

    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", equations 5 to 8::

        r, z = f(W x + U h + b)     n = g(W x + U_n (r h) + b)     h = (1 - z) n + z h

    U_n is weight_n.

    Args:
        f: activation of the gates; f and g are in ONNX's order.
        g: activation of the candidate.
    """

    gates = ("r", "z", Gate("n", recurrent=False))

    def __init__(self, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = apply(self.f, x.r + r.r)
        z = apply(self.f, x.z + r.z)
        n = apply(self.g, x.n + self.product("n", reset * h))
        return n + z * (h - n)


class LiGRU(Cell):
    """The light GRU: no reset gate, relu. Its batch norm of W x belongs in front of the layer.

    Ravanelli, Brakel, Omologo and Bengio 2018, "Light Gated Recurrent Units for Speech Recognition"::

        z = f(W x + U h + b)     g = g(W x + U h + b)     h = z h + (1 - z) g

    Args:
        f: activation of the gate.
        g: activation of the candidate.
    """

    gates = ("z", "g")

    def __init__(self, f: Activation = "sigmoid", g: Activation = "relu") -> None:
        self.f, self.g = checked("f", f), checked("g", g)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        g = apply(self.g, x.g + r.g)
        return g + apply(self.f, x.z + r.z) * (h - g)


class TauGRU(Cell):
    """The GRU with a weighted feedback of a state of some steps before; zeros before the sequence.

    Erichson, Lim and Mahoney 2023, "Gated Recurrent Neural Networks with Weighted Time-Delay Feedback"::

        u = g(W x + U h + b)     z = g(W x + U h[-delay] + b)     g, a = f(W x + U h + b)
        h = (1 - g) h + g (u + a z)

    h is h_{t-1} and h[-delay] is h_{t-1-delay}. The U of z is weight_z. The states are h and the delayed ones, the latest
    first; more than 7 delayed ones have no kernels.

    Args:
        delay: in steps, at least 1.
        f: activation of the gates.
        g: activation of u and z.
    """

    gates = ("u", Gate("z", recurrent=False), "g", "a")

    def __init__(self, delay: int = 1, f: Activation = "sigmoid", g: Activation = "tanh") -> None:
        if not isinstance(delay, int) or isinstance(delay, bool) or delay < 1:
            raise ValueError(f"delay: expected an int of at least 1, got {delay!r}")
        self.delay = delay
        self.f, self.g = checked("f", f), checked("g", g)
        self.states = ("h", *(f"h_{steps}" for steps in range(1, delay + 1)))

    def step(self, x: Any, r: Any, h: Any, *delayed: Any) -> Any:
        u = apply(self.g, x.u + r.u)
        z = apply(self.g, x.z + self.product("z", delayed[-1]))
        a = apply(self.f, x.a + r.a)
        new_h = h + apply(self.f, x.g + r.g) * (u + a * z - h)
        return (new_h, h, *delayed[:-1])
