"""The scalar LSTM of xLSTM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fused_rnn.formula.language import Cell


class SLSTM(Cell):
    """The scalar LSTM of xLSTM: exponential input gate, normaliser n, stabiliser m, block-diagonal recurrent weights.

    Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter and Hochreiter 2024, "xLSTM: Extended Long
    Short-Term Memory", section 2.2, its stabilised form::

        log_i = W_i x + R_i h + b_i                m' = max(log_f + m, log_i)
        log_f = logsigmoid(W_f x + R_f h + b_f)    i = exp(log_i - m')      f = exp(log_f + m - m')
        z = tanh(W_z x + R_z h + b_z)              c' = f c + i z           n' = f n + i
        o = sigmoid(W_o x + R_o h + b_o)           h' = o c' / n'

    Where n is 0, at the start and after a reset, m' = log_i and n' = 1: there is nothing yet that f could keep.

    Args:
        heads: blocks of units that see no other block's state.
    """

    gates = ("i", "f", "z", "o")
    states = ("h", "c", "n", "m")

    def __init__(self, heads: int = 1) -> None:
        self.heads = heads

    def step(self, x: Any, r: Any, h: Any, c: Any, n: Any, m: Any) -> Any:
        log_i = x.i + r.i
        log_f = F.logsigmoid(x.f + r.f) + m
        m = torch.where(n == 0, log_i, torch.maximum(log_f, log_i))
        i = torch.exp(log_i - m)
        f = torch.exp(torch.clamp(log_f - m, max=0.0))  # above 0 only where n is 0
        c = f * c + i * torch.tanh(x.z + r.z)
        n = f * n + i
        return torch.sigmoid(x.o + r.o) * c / n, c, n, m
