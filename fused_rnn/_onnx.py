"""What the layers and cells are in a graph that ``torch.onnx.export(model, args, dynamo=True)`` captures.

Layers become ONNX's own LSTM, GRU and RNN, one node a layer with both directions, of any T and B. Cells become the products
and element-wise operations of their definition (fused_rnn/reference.py). A projection and resets, which ONNX's operators
lack, become ONNX's Scan over the definition of a step.

ONNX: X [T, B, I], W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H] (those of W, then those of R), sequence_lens [B], initial_h and
initial_c [D, B, H] -> Y [T, D, B, H], Y_h, Y_c [D, B, H]. Order of gates: LSTM i o f g, GRU z r n; torch's: i f g o, r z n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn._kinds import GRU, KINDS, LSTM, RNN_IDENTITY, RNN_RELU, RNN_TANH

_OPERATOR = {LSTM: "LSTM", GRU: "GRU", RNN_TANH: "RNN", RNN_RELU: "RNN", RNN_IDENTITY: "RNN"}
_GATES = {LSTM: (0, 3, 1, 2), GRU: (1, 0, 2)}  # ONNX's order, by the index in torch's
_ACTIVATION = {RNN_TANH: "Tanh", RNN_RELU: "Relu", RNN_IDENTITY: "Affine"}


def exporting() -> bool:
    """Whether torch.onnx is capturing a model. To be asked where ``torch.compiler.is_exporting()``.

    Reads what torch.onnx.is_in_onnx_export() returns, which imports parts of torch.onnx that need onnxscript, and which
    Dynamo takes for False.
    """
    flags = getattr(getattr(getattr(torch.onnx, "_internal", None), "exporter", None), "_flags", None)
    return flags is not None and flags._is_onnx_exporting


def refuse_packed() -> None:
    raise NotImplementedError("torch.onnx.export: a PackedSequence has no counterpart in ONNX; export with padded input")


def rnn(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
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
    """Arguments and results of the op fused_rnn::rnn.

    Raises:
        NotImplementedError: a packed sequence.
    """
    if offsets is not None:
        refuse_packed()
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * directions)
    in_one_node = per_direction % 2 == 0 and resets is None
    y = input.transpose(0, 1) if batch_first else input
    if resets is not None and batch_first:
        resets = resets.transpose(0, 1)
    h_n, c_n = [], []
    for layer in range(num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        first = rows.start * per_direction
        params = weights[first : first + directions * per_direction]
        groups = [params[i : i + per_direction] for i in range(0, len(params), per_direction)]
        h, c = None if h0 is None else h0[rows], None if c0 is None else c0[rows]
        if in_one_node:
            y, h, c = _node(y, h, c, groups, lengths, cell)
        else:
            y, h, c = _loops(y, h, c, groups, has_biases, lengths, resets, cell)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and training and layer + 1 < num_layers:
            y = torch.dropout(y, dropout, True)
    return y.transpose(0, 1) if batch_first else y, torch.cat(h_n), torch.cat(c_n) if cell == LSTM else input.new_empty(0)


def _node(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, groups: list[list[Tensor]], lengths: Tensor | None, cell: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer as one node: x [T, B, I] -> y [T, B, D*H], h_n, c_n [D, B, H] (c_n: h_n where there is no c)."""
    (steps, batch), directions, hidden = x.shape[:2], len(groups), groups[0][1].shape[1]

    def in_order(weight: Tensor) -> Tensor:
        order = _GATES.get(cell)
        return weight if order is None else torch.cat([weight[g * hidden : (g + 1) * hidden] for g in order])

    w, r = (torch.stack([in_order(group[i]) for group in groups]) for i in range(2))
    biases = None
    if len(groups[0]) == 4:
        biases = torch.stack([torch.cat([in_order(group[2]), in_order(group[3])]) for group in groups])
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"}
    if cell == GRU:
        attributes["linear_before_reset"] = 1
    elif cell != LSTM:
        attributes["activations"] = [_ACTIVATION[cell]] * directions
    if cell == RNN_IDENTITY:  # Affine: alpha * x + beta
        attributes |= {"activation_alpha": [1.0] * directions, "activation_beta": [0.0] * directions}
    state = [directions, batch, hidden]
    outputs = torch.onnx.ops.symbolic_multi_out(
        _OPERATOR[cell],
        [x, w, r, biases, None if lengths is None else lengths.to(torch.int32), h0, *([c0] if cell == LSTM else [])],
        attributes,
        dtypes=[x.dtype] * (3 if cell == LSTM else 2),
        shapes=[[steps, directions, batch, hidden], state, state][: 3 if cell == LSTM else 2],
    )
    y = outputs[0].transpose(1, 2).flatten(2) if directions == 2 else outputs[0].squeeze(1)
    h_n, c_n = outputs[1], outputs[-1]
    if lengths is not None and h0 is not None:  # rows of no steps keep their state; runtimes give zeros
        started = (lengths > 0).unsqueeze(-1)
        h_n, c_n = torch.where(started, h_n, h0), torch.where(started, c_n, h0 if c0 is None else c0)
    return y, h_n, c_n


def _loops(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    groups: list[list[Tensor]],
    has_biases: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer as a loop for each direction: x [T, B, I] -> y [T, B, D*P], h_n [D, B, P], c_n [D, B, H] (h_n without c)."""
    y, h_n, c_n = [], [], []
    for direction, params in enumerate(groups):
        hidden = params[0].shape[0] // KINDS[cell].gates
        # Copies of given states: of views, torch.export took the batch size for a constant (torch 2.13).
        state = [x.new_zeros(x.shape[1], params[1].shape[1]) if h0 is None else h0[direction].clone()]
        if cell == LSTM:
            state.append(x.new_zeros(x.shape[1], hidden) if c0 is None else c0[direction].clone())
        outputs, state = _loop(x, state, params, has_biases, lengths, resets, cell, reverse=direction == 1)
        y.append(outputs)
        h_n.append(state[0])
        c_n.append(state[-1])
    return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n)


def _loop(
    x: Tensor,
    state: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: int,
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    """reference._scan as torch's scan operator: (y [T, B, P], [h] or [h, c])."""
    from torch._higher_order_ops.scan import scan

    masks = []
    if lengths is not None:
        masks.append((torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(-1))
        x = torch.where(masks[0], x, 0)
    if resets is not None:
        masks.append(resets.unsqueeze(-1))

    def step(old: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        x_t, *masks_t = inputs
        given = [torch.where(masks_t[-1], 0, t) for t in old] if resets is not None else old
        h, c = reference.step(x_t, given[0], given[1] if cell == LSTM else None, params, has_biases, cell)
        new = [h] if c is None else [h, c]
        if lengths is None:
            return new, h.clone()
        return [torch.where(masks_t[0], a, b) for a, b in zip(new, old, strict=True)], torch.where(masks_t[0], h, 0)

    last, y = scan(step, state, [x, *masks], reverse=reverse)
    return y, last
