"""How many floating point operations the ops take, for torch.utils.flop_counter.FlopCounterMode.

Matrix products count, 2*m*n*k each, as torch counts its own; element-wise operations do not. A dispatch mode sees
``layer`` and ``layer_backward``: ``rnn``, ``cell`` and the differentiable form of backward consist of these or of torch's
ops. The numbers are those of torch.nn's GRU, RNN and cells, and of its LSTM where that is not one op of a library, which
counts 0.

Symbols: N rows of input (T*B, or a packed input's), D directions, G gates, I, H, P sizes of input, hidden state and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_rnn._recipe import rows_of, unpacked


def _forward_flops(call: dict[str, Any]) -> int:
    """For each row and direction: W_ih x, W_hh h, and W_hr h with a projection."""
    return 2 * _rows(call["x"]) * sum(w.numel() for w in call["params"] if w.dim() == 2)


def _backward_flops(call: dict[str, Any]) -> int:
    """The products of forward, for the gradients of weights and again for those of x and h, where these are wanted.

    The first step of a direction takes no product for the gradient of h0 if that is not wanted.
    """
    x, params, offsets = call["x"], call["params"], rows_of(call["rows"]).offsets
    needs_x, needs_states, needs_weights = call["mask"]
    rows, directions = _rows(x), unpacked(call["recipe"]).directions
    per_direction = len(params) // directions
    total = _forward_flops(call) if needs_weights else 0
    for direction in range(directions):
        w_ih, w_hh, *others = params[direction * per_direction : (direction + 1) * per_direction]
        first = 0 if needs_states and call["states"] else _rows_of_first_step(x, offsets, direction)
        total += 2 * rows * w_ih.numel() if needs_x else 0
        total += 2 * (rows - first) * w_hh.numel()
        total += 2 * rows * sum(w.numel() for w in others if w.dim() == 2)
    return total


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _rows_of_first_step(x: Tensor, offsets: Tensor | None, direction: int) -> int:
    """Rows of the step that reads h0: the first one, or for the backward direction the last one, of a packed input."""
    if offsets is None:
        return x.shape[1] if x.shape[0] else 0
    start, end = (offsets[-2:] if direction else offsets[:2]).tolist()
    return end - start


def _register(name: str, formula: Callable[[dict[str, Any]], int]) -> None:
    packet = getattr(torch.ops.fused_rnn, name)
    names = [argument.name for argument in packet.default._schema.arguments]

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    register_flop_formula(packet, get_raw=True)(flops)  # get_raw: tensors as they are, since offsets' values count


def register() -> None:
    """Makes FlopCounterMode know the ops; once."""
    _register("layer", _forward_flops)
    _register("layer_backward", _backward_flops)
