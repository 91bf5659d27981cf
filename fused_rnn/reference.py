"""The recurrent layers in plain PyTorch: the definition the kernels are tested against, and the fallback without them.

Every function has the signature of the op of the same name in ``csrc/torch/ops.cpp`` (less what only backward needs).
Written to be read; never tuned. Differentiable any number of times, and by ``torch.func``, because every operation is torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn._kinds import GRU, KINDS, LSTM, RNN_RELU, RNN_TANH


def step(
    x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor], has_biases: bool, cell: int
) -> tuple[Tensor, Tensor | None]:
    """One step of one direction: x [B, I], h [B, P], c [B, H] -> h' [B, P], c' [B, H] (c only for an LSTM).

    Formulas: the documentation of torch.nn.RNNCell, LSTMCell (with W_hr of torch.nn.LSTM) and GRUCell.
    """
    w_ih, w_hh = params[:2]
    b_ih, b_hh = params[2:4] if has_biases else (None, None)
    gi = torch.nn.functional.linear(x, w_ih, b_ih)
    gh = torch.nn.functional.linear(h, w_hh, b_hh)
    if cell == LSTM:
        assert c is not None
        i, f, g, o = (gi + gh).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()  # of c's dtype, which may be wider than the others'
        h = (o.sigmoid() * c.tanh()).to(x.dtype)
        if len(params) == 2 * (1 + has_biases) + 1:
            h = torch.nn.functional.linear(h, params[-1])
        return h, c
    if cell == GRU:
        x_r, x_z, x_n = gi.chunk(3, dim=-1)
        h_r, h_z, h_n = gh.chunk(3, dim=-1)
        r = (x_r + h_r).sigmoid()
        z = (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return n + z * (h - n), None
    a = gi + gh
    return (a.tanh() if cell == RNN_TANH else a.relu() if cell == RNN_RELU else a), None


def _scan(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    cell: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction over time; see csrc/core/params.h (Sequence) for lengths, offsets and resets."""
    sizes = None if offsets is None else offsets.diff().tolist()
    xs = x.unbind() if sizes is None else x.split(sizes)
    masks = None if resets is None else resets.unbind() if sizes is None else resets.split(sizes)
    outputs: list[Tensor] = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        n = None if sizes is None else sizes[t]  # the rows of a packed step are the first n of the batch
        h_t, c_t = h[:n], None if c is None else c[:n]
        if masks is not None:
            keep = ~masks[t].unsqueeze(-1)
            h_t = torch.where(keep, h_t, 0)
            c_t = None if c_t is None else torch.where(keep, c_t, 0)
        if lengths is not None:  # the state of a row without a step here may hold anything, as its padding may
            active = (t < lengths).unsqueeze(-1)
            h_t = torch.where(active, h_t, 0)
            c_t = None if c_t is None else torch.where(active, c_t, 0)
        new_h, new_c = step(xs[t], h_t, c_t, params, has_biases, cell)
        if lengths is None:
            outputs.append(new_h)
        else:
            outputs.append(torch.where(active, new_h, 0))
            new_h = torch.where(active, new_h, h[:n])
            new_c = None if new_c is None or c is None else torch.where(active, new_c, c[:n])
        ended = n is not None and n < h.shape[0]  # rows that took no part in this step keep their state
        h = torch.cat([new_h, h[n:]]) if ended else new_h
        if c is not None and new_c is not None:
            c = torch.cat([new_c, c[n:]]) if ended else new_c
    if reverse:
        outputs.reverse()
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), h, c


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    cell: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, both directions: x [T, B, I] or packed [N, I] -> y [T, B, D*P] or [N, D*P], h_n [D, B, P], c_n [D, B, H].

    c_n is empty for cells without c. With ``offsets``, h0 gives the batch size and must be there.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(params) // directions
    if lengths is not None:  # padding may hold anything, and NaN would come through the gradients of the masks below
        x = torch.where((torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(-1), x, 0)
    scans = []
    for d in range(directions):
        p = params[d * per_direction : (d + 1) * per_direction]
        hidden = p[1].shape[0] // KINDS[cell].gates
        batch = x.shape[1] if h0 is None else h0.shape[1]
        h = x.new_zeros(batch, p[1].shape[1]) if h0 is None else h0[d]
        c = None if cell != LSTM else x.new_zeros(batch, hidden) if c0 is None else c0[d]
        scans.append(_scan(x, h, c, p, has_biases, lengths, offsets, resets, cell, reverse=d == 1))
    y = torch.cat([s[0] for s in scans], dim=-1)
    h_n = torch.stack([s[1] for s in scans])
    c_n = torch.stack([s[2] for s in scans if s[2] is not None]) if cell == LSTM else x.new_empty(0)
    return y, h_n, c_n


def rnn(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    cell: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers with dropout between them; shapes as torch.nn.LSTM's, states [L*D, B, .]."""
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    y = input.transpose(0, 1) if batch_first else input
    if batch_first and resets is not None:
        resets = resets.transpose(0, 1)
    h_n, c_n = [], []
    for index in range(num_layers):
        states = slice(index * directions, (index + 1) * directions)
        y, h, c = layer(
            y,
            None if h0 is None else h0[states],
            None if c0 is None else c0[states],
            weights[index * per_layer : (index + 1) * per_layer],
            has_biases,
            lengths,
            offsets,
            resets,
            cell,
            bidirectional,
        )
        h_n.append(h)
        c_n.append(c)
        if dropout and training and index + 1 < num_layers:
            y = torch.nn.functional.dropout(y, dropout)
    return y.transpose(0, 1) if batch_first else y, torch.cat(h_n), torch.cat(c_n)


def cell(
    input: Tensor, h: Tensor | None, c: Tensor | None, params: Sequence[Tensor], has_biases: bool, cell: int
) -> tuple[Tensor, Tensor]:
    """One step of one cell: input [B, I] -> h' [B, H], c' [B, H] (empty for cells without c)."""
    hidden = params[1].shape[1]
    h = input.new_zeros(input.shape[0], hidden) if h is None else h
    if cell == LSTM and c is None:
        c = input.new_zeros(input.shape[0], hidden)
    new_h, new_c = step(input, h, c, params, has_biases, cell)
    return new_h, input.new_empty(0) if new_c is None else new_c
