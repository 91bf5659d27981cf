"""Cells with norms inside of the step. Each norm is over the H units of one gate or state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fused_rnn.formula.language import Cell


class LayerNormLSTM(Cell):
    """The LSTM with layer norm of both products and of the cell state.

    Ba, Kiros and Hinton 2016, "Layer Normalization", with a norm for each gate where the paper's is over all four::

        i, f, o = sigmoid(LN(W x) + LN(U h))     c = f c + i g
        g = tanh(LN(W x) + LN(U h))              h = o tanh(LN(c))

    LN has a weight and a bias: weight_x_i, bias_x_i and so on of W x, weight_r_i and so on of U h, weight_c of c. The
    paper's equations have a bias after the norm alone: give the layer bias=False.
    """

    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = torch.sigmoid(self.layer_norm(x.i, "x_i") + self.layer_norm(r.i, "r_i"))
        f = torch.sigmoid(self.layer_norm(x.f, "x_f") + self.layer_norm(r.f, "r_f"))
        g = torch.tanh(self.layer_norm(x.g, "x_g") + self.layer_norm(r.g, "r_g"))
        o = torch.sigmoid(self.layer_norm(x.o, "x_o") + self.layer_norm(r.o, "r_o"))
        c = f * c + i * g
        return o * torch.tanh(self.layer_norm(c, "c")), c


class LayerNormGRU(Cell):
    """The GRU with layer norm of both products.

    Ba, Kiros and Hinton 2016, "Layer Normalization", with a norm for each gate where the paper's is over both gates::

        r, z = sigmoid(LN(W x) + LN(U h))     n = tanh(LN(W x) + r LN(U h))     h = (1 - z) n + z h

    LN has a weight and a bias: weight_x_r, bias_x_r and so on of W x, weight_r_r and so on of U h. The paper's z is our
    1 - z. The paper's equations have a bias after the norm alone: give the layer bias=False.
    """

    gates = ("r", "z", "n")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = torch.sigmoid(self.layer_norm(x.r, "x_r") + self.layer_norm(r.r, "r_r"))
        z = torch.sigmoid(self.layer_norm(x.z, "x_z") + self.layer_norm(r.z, "r_z"))
        n = torch.tanh(self.layer_norm(x.n, "x_n") + reset * self.layer_norm(r.n, "r_n"))
        return n + z * (h - n)


class BlockGRU(Cell):
    """Dreamer's GRU with block-diagonal recurrent weights and an RMS norm of each gate, without its hidden layers.

    Hafner, Pasukonis, Ba and Lillicrap 2023, "Mastering Diverse Domains through World Models" (DreamerV3)::

        r = sigmoid(RMS(W x + U h + b))         u = sigmoid(RMS(W x + U h + b) - 1)
        n = tanh(r RMS(W x + U h + b))          h = u n + (1 - u) h

    The paper's norm is over the three gates together. DreamerGRU has the hidden layers of the paper's code.

    Args:
        heads: blocks of units; the paper's code has 8.
    """

    gates = ("r", "n", "u")

    def __init__(self, heads: int = 1) -> None:
        self.heads = heads

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = torch.sigmoid(self.rms_norm(x.r + r.r, "r"))
        n = torch.tanh(reset * self.rms_norm(x.n + r.n, "n"))
        u = torch.sigmoid(self.rms_norm(x.u + r.u, "u") - 1)
        return h + u * (n - h)


class DreamerGRU(Cell):
    """The block GRU of DreamerV3's sequence model with its hidden layers.

    Hafner, Pasukonis, Ba and Lillicrap 2023, "Mastering Diverse Domains through World Models" (DreamerV3)::

        p = silu(RMS(W_p h + b_p))              r = sigmoid(W_r a + b_r)          n = tanh(r (W_n a + b_n))
        a = silu(RMS(W x + U h + W_a p + b))    u = sigmoid(W_u a + b_u - 1)      h = u n + (1 - u) h

    The input is what the paper's code makes of the stochastic state and the action. U is block-diagonal; W_p (weight_p) and
    W_a (weight_a) are [H, H], as are W_r, W_n and W_u (weight_r, weight_n, weight_u), which the paper has block-diagonal.

    Args:
        heads: blocks of units; the paper's code has 8.
    """

    gates = ("a",)
    unit_parameters = {"b_p": 0.0, "b_r": 0.0, "b_n": 0.0, "b_u": 0.0}
    b_p: Any
    b_r: Any
    b_n: Any
    b_u: Any

    def __init__(self, heads: int = 1) -> None:
        self.heads = heads

    def step(self, x: Any, r: Any, h: Any) -> Any:
        p = F.silu(self.rms_norm(self.product("p", h) + self.b_p, "norm_p"))
        a = F.silu(self.rms_norm(x.a + r.a + self.product("a", p), "norm_a"))
        reset = torch.sigmoid(self.product("r", a) + self.b_r)
        n = torch.tanh(reset * (self.product("n", a) + self.b_n))
        u = torch.sigmoid(self.product("u", a) + self.b_u - 1)
        return h + u * (n - h)
