"""RNN, LSTM and GRU as a loop over time in float64, written from the formulas in torch.nn's documentation.

It shares nothing with the library. T steps, B rows, I input size, H hidden size, P output size, L layers, D directions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Outputs:
    """y [T, B, D*P] (zero where a row does not take part), h_n [L*D, B, P], c_n [L*D, B, H] or None."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    nearest: float  # how near to 0 an argument of a ReLU came


class Loop:
    """A stack of layers of one kind: "RNN_TANH", "RNN_RELU", "RNN_IDENTITY", "LSTM" or "GRU"."""

    def __init__(self, kind: str, layers: int, bidirectional: bool, has_biases: bool) -> None:
        self.kind, self.layers, self.directions, self.has_biases = kind, layers, 1 + bidirectional, has_biases
        self.nearest = float("inf")

    def __call__(
        self, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor], lengths: Tensor, resets: Tensor
    ) -> Outputs:
        """x [T, B, I], h0 [L*D, B, P], c0 [L*D, B, H], lengths [B], resets [T, B] bool; weights in torch.nn's order."""
        groups = self.layers * self.directions
        size = len(weights) // groups
        h_n, c_n = [], []
        for layer in range(self.layers):
            outputs = []
            for direction in range(self.directions):
                at = layer * self.directions + direction
                group = weights[at * size : (at + 1) * size]
                c = None if c0 is None else c0[at]
                y, h, c = self._scan(x, h0[at], c, group, lengths, resets, reverse=direction == 1)
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            x = torch.cat(outputs, 2)
        states = None if c_n[0] is None else torch.stack([c for c in c_n if c is not None])
        return Outputs(x, torch.stack(h_n), states, self.nearest)

    def _scan(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        weights: list[Tensor],
        lengths: Tensor,
        resets: Tensor,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        steps = x.shape[0]
        y: list[Tensor] = [torch.empty(0)] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            takes_part, keeps = (t < lengths)[:, None], ~resets[t][:, None]
            old_h = torch.where(keeps, h, torch.zeros_like(h))
            old_c = None if c is None else torch.where(keeps, c, torch.zeros_like(c))
            new_h, new_c = self._step(x[t], old_h, old_c, weights, takes_part)
            h = torch.where(takes_part, new_h, h)
            c = None if c is None or new_c is None else torch.where(takes_part, new_c, c)
            y[t] = torch.where(takes_part, new_h, torch.zeros_like(new_h))
        return torch.stack(y), h, c

    def _step(
        self, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], takes_part: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        w_ih, w_hh, *rest = weights
        from_input, from_hidden = x @ w_ih.t(), h @ w_hh.t()
        if self.has_biases:
            from_input, from_hidden = from_input + rest[0], from_hidden + rest[1]
        if self.kind == "LSTM":
            i, f, g, o = (from_input + from_hidden).chunk(4, dim=1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            has_projection = len(rest) > 2 * self.has_biases
            return (new_h @ rest[-1].t() if has_projection else new_h), new_c
        if self.kind == "GRU":
            (r, z, n), (hr, hz, hn) = from_input.chunk(3, dim=1), from_hidden.chunk(3, dim=1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            n = (n + r * hn).tanh()
            return (1 - z) * n + z * h, None
        total = from_input + from_hidden
        if self.kind == "RNN_TANH":
            return total.tanh(), None
        if self.kind == "RNN_RELU":
            used = total.detach()[takes_part.expand_as(total)]
            if used.numel():
                self.nearest = min(self.nearest, used.abs().min().item())
            return total.relu(), None
        return total, None
