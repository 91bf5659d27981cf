"""How many floating point operations the ops take, for torch.utils.flop_counter.FlopCounterMode.

As in torch, matrix products count 2*m*n*k each and element-wise operations nothing. A dispatch mode sees ``layer``,
``layer_backward`` and its forms, ``layer_second_order`` and ``layer_jvp`` alone, and ``stack`` and ``stack_backward`` of a
graph: ``rnn``, ``cell`` and other tangents consist of these or of torch's ops. The numbers equal those that torch counts for
torch.nn's GRU, RNN and cells, and for torch.nn.LSTM where it runs as separate ops; an LSTM that is one op of a library
counts 0 in torch.

Symbols: N rows of input (T*B, or a packed input's), D directions, G gates, I, H, P sizes of input, hidden state and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_rnn._recipe import ROWS, rows_of, unpacked


def _forward_flops(call: dict[str, Any]) -> int:
    """For each row and direction: W_ih x, of ids nothing, W_hh h, and W_hr h with a projection."""
    x, params = call["x"], call["params"]
    per_direction = len(params) // unpacked(call["recipe"]).directions
    products = [w for i, w in enumerate(params) if w.dim() == 2 and not (_has_ids(x) and i % per_direction == 0)]
    return 2 * _rows(x) * sum(w.numel() for w in products)


def _stack_backward_flops(call: dict[str, Any]) -> int:
    """Those of its layers: all but the first make the gradient of their input in any case."""
    params, recipe, mask = call["params"], unpacked(call["recipe"]), call["mask"]
    layer, count = recipe.of_layer().packed | call["recipe"] & ROWS, len(params) // recipe.num_layers
    layers = [params[place : place + count] for place in range(0, len(params), count)]
    own = {**call, "rows": call["rows"][:1], "recipe": layer}  # not the host's offsets
    of_mask = [[mask[0] or number > 0, *mask[1:]] for number in range(len(layers))]
    return sum(
        _backward_flops({**own, "params": of_layer, "mask": wanted})
        for of_layer, wanted in zip(layers, of_mask, strict=True)
    )


def _sample_backward_flops(call: dict[str, Any]) -> int:
    recipe, *mask, _ = call["call"]
    return _backward_flops({**call, "recipe": recipe, "mask": mask})


def _backward_flops(call: dict[str, Any]) -> int:
    """Forward's products once for the gradients of the weights, and once for those of x and h, each where it is wanted.

    Where the gradient of h0 is not wanted, the first step of a direction takes no product with W_hh.
    """
    x, params, offsets = call["x"], call["params"], rows_of(call["rows"], call["recipe"]).offsets
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


def _second_order_flops(call: dict[str, Any]) -> int:
    """Of csrc/torch/second_order.cpp: tangents, backward of them and of values, products with v's part of x and weights."""
    x, params, v, (packed, *wanted) = call["x"], call["params"], call["grads"], call["wanted"]
    offsets, directions = rows_of(call["rows"], packed).offsets, unpacked(packed).directions
    rows, has_x, of_params = _rows(x), v[0].shape != (0,), v[len(v) - len(params) :]
    per_direction, total = len(params) // directions, 0
    for direction in range(directions):
        own = slice(direction * per_direction, (direction + 1) * per_direction)
        matrices = [
            (w, tangent.shape != (0,)) for w, tangent in zip(params[own], of_params[own], strict=True) if w.dim() == 2
        ]
        (w_ih, of_ih), (w_hh, of_hh), *projection = matrices
        first = 0 if call["states"] else _rows_of_first_step(x, offsets, direction)
        total += 2 * rows * w_ih.numel() * (has_x + of_ih + wanted[0] * (1 + of_ih) + wanted[2] * (1 + has_x))
        total += 2 * w_hh.numel() * (rows * (1 + of_hh + 2 * wanted[2]) + (rows - first) * (2 + of_hh))
        total += sum(2 * rows * w.numel() * (3 + 2 * of_w + 2 * wanted[2]) for w, of_w in projection)
    return total


def _jvp_flops(call: dict[str, Any]) -> int:
    """The scan of tangents: forward's products, of x' where it is given, and those of v's part of the weights."""
    x, params, v, (packed, _) = call["x"], call["params"], call["tangents"], call["call"]
    per_direction, of_params = len(params) // unpacked(packed).directions, v[len(v) - len(params) :]
    total = 0
    for i, (w, tangent) in enumerate(zip(params, of_params, strict=True)):
        own = v[0].shape != (0,) if i % per_direction == 0 else True
        total += 2 * _rows(x) * w.numel() * (own + (tangent.shape != (0,))) if w.dim() == 2 else 0
    return total


def _has_ids(x: Tensor) -> bool:
    return not x.is_floating_point()


def _rows(x: Tensor) -> int:
    return x.numel() if _has_ids(x) else x.shape[:-1].numel()


def _rows_of_first_step(x: Tensor, offsets: Tensor | None, direction: int) -> int:
    """Rows of the step that reads h0: the first step, or the last one for the direction that scans backwards."""
    if offsets is None:
        return x.shape[1] if x.shape[0] else 0
    start, end = (offsets[-2:] if direction else offsets[:2]).tolist()
    return end - start


def _register(name: str, formula: Callable[[dict[str, Any]], int]) -> None:
    packet = getattr(torch.ops.fused_rnn, name)
    names = [argument.name for argument in packet.default._schema.arguments]

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    register_flop_formula(packet, get_raw=True)(flops)  # get_raw: tensors, not shapes, since the values of offsets count


def register() -> None:
    """Makes FlopCounterMode know the ops; once."""
    _register("layer", _forward_flops)
    _register("layer_backward", _backward_flops)
    _register("stack", _forward_flops)
    _register("stack_backward", _stack_backward_flops)
    _register("layer_backward_samples", _sample_backward_flops)
    _register("layer_second_order", _second_order_flops)
    _register("layer_jvp", _jvp_flops)
    _register("layer_backward_gates", lambda call: _backward_flops({**call, "mask": (False, True, False)}))
