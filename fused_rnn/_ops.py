"""Python names of the C++ ops, and what of their registration is Python: fake kernels, vmap, derivatives, flops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import _derivatives, _flops, _transforms
from fused_rnn._backend import extension
from fused_rnn._recipe import ROWS, rows_of, unpacked


def check_places(x: Tensor, **others: Sequence[Tensor | None]) -> None:
    """Raises unless all tensors of a call are on one device, and floating-point ones have one dtype.

    One tensor on the meta device is enough for torch to call a fake kernel, whose results are uninitialised memory.
    """
    for name, tensors in others.items():
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            number = name == "rows" and tensor.dim() == 0  # of StepOptions, and the host's
            if tensor.device != x.device and not number:
                raise RuntimeError(f"{name}[{index}]: expected device {x.device} (input's), got {tensor.device}")
            wide = name in ("states", "dlast") and index == 1 and tensor.dtype == torch.float32 and x.dtype.itemsize == 2
            if tensor.dtype.is_floating_point and tensor.dtype != x.dtype and not wide and not number:
                raise RuntimeError(f"{name}[{index}]: expected dtype {x.dtype} (input's), got {tensor.dtype}")


def fake_gradients(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mask: Sequence[bool | int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of a layer's gradients, of x, states and params: [0] where the mask says that nobody asked."""
    none = params[0] if x.dtype is torch.int64 else x
    return (
        x.new_empty(x.shape) if mask[0] else none.new_empty(0),
        [s.new_empty(s.shape) if mask[1] else none.new_empty(0) for s in states],
        [p.new_empty(p.shape) if mask[2] else p.new_empty(0) for p in params],
    )


def fake_layer(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], recipe: int, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer's results."""
    ids = x.dtype is torch.int64
    like = params[0] if ids else x  # of the layer's dtype
    check_places(like, input=[x], states=states, params=params, rows=rows)
    layer = unpacked(recipe)
    of_call = rows_of(rows, recipe)
    kind, w_hh, packed = layer.kind, params[1], of_call.offsets is not None
    hidden, out = w_hh.shape[0] // kind.gates, w_hh.shape[1]
    count = x.shape[0] if packed else x.shape[0] * x.shape[1]
    batch = states[0].shape[1] if packed and states else x.shape[1]
    last = [like.new_empty(layer.directions, batch, out)]
    if kind.has_c:
        last.append((states[1] if states else like).new_empty(layer.directions, batch, hidden))
    if kind.has_c and layer.all_states:
        last.append(like.new_empty(layer.directions, count, hidden))
    saved = []
    if save and (kind.saved or of_call.options.any()):
        saved.append(like.new_empty(layer.directions, count, kind.slots, hidden))
    if save and kind.has_c and not layer.all_states:
        saved.append(like.new_empty(layer.directions, count, hidden))
    of_rows = x.shape if ids else x.shape[:-1]
    return like.new_empty(*of_rows, layer.directions * out), last, saved


def fake_layer_backward(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    recipe: int,
    mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer_backward's results."""
    like = params[0] if x.dtype is torch.int64 else x
    check_places(like, input=[x], dy=[dy], dlast=dlast, states=states, params=params, rows=rows, saved=saved)
    unpacked(recipe)  # raises for a number that is no recipe
    return fake_gradients(x, [*states, *rows_of(rows, recipe).reset_states], params, mask)


def _fake_stack(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], recipe: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::stack's results; what it saves is memory alone, in tensors of no elements."""
    check_places(x, input=[x], states=states, params=params)
    stack = unpacked(recipe)
    kind, w_hh, packed = stack.kind, params[1], bool(recipe & ROWS)
    groups, hidden, out = stack.num_layers * stack.directions, w_hh.shape[0] // kind.gates, w_hh.shape[1]
    batch = states[0].shape[1] if packed else x.shape[1]
    last = [x.new_empty(groups, batch, out)]
    if kind.has_c:
        last.append((states[1] if states else x).new_empty(groups, batch, hidden))
    of_layer = bool(kind.saved) + kind.has_c
    saved = [x.new_empty(0, dtype=torch.uint8) for _ in range(stack.num_layers * (of_layer + 1))]
    return x.new_empty(*x.shape[:-1], stack.directions * out), last, saved


def _fake_stack_backward(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    recipe: int,
    mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::stack_backward's results."""
    check_places(x, input=[x], dy=[dy], dlast=dlast, states=states, params=params)
    return fake_gradients(x, states, params, mask)


def _fake_layer_backward_samples(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    call: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer_backward_samples's results."""
    recipe, *mask, samples = call
    wanted = [bool(one) for one in mask]
    dx, dstates, dparams = fake_layer_backward(dy, dlast, x, states, params, rows, saved, recipe, wanted)
    return dx, dstates, [p.new_empty(samples, *p.shape) for p in params] if mask[2] and samples else dparams


def _fake_layer_backward_gates(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    recipe: int,
) -> tuple[Tensor, list[Tensor]]:
    """Shapes of fused_rnn::layer_backward_gates's results."""
    _, dstates, _ = fake_layer_backward(dy, dlast, x, states, params, rows, saved, recipe, [False, True, False])
    layer = unpacked(recipe)
    ids = x.dtype is torch.int64
    of_rows = x.shape if ids else x.shape[:-1]
    rows_of_layer = of_rows[0] if len(of_rows) == 1 else of_rows[0] * of_rows[1]
    hidden = params[1].shape[0] // layer.kind.gates
    return params[0].new_empty(layer.directions, rows_of_layer, layer.kind.slots, hidden), dstates


def _fake_layer_second_order(
    grads: Sequence[Tensor],
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    wanted: Sequence[int],
) -> list[Tensor]:
    """Shapes of fused_rnn::layer_second_order's results."""
    recipe, *mask = wanted
    y, last, _ = fake_layer(x, states, params, rows, recipe, False)
    dx, dstates, dparams = fake_layer_backward(
        dy, dlast, x, states, params, rows, saved, recipe, [bool(one) for one in mask]
    )
    return [y, *last, dx, *dstates, *dparams]


def _fake_layer_jvp(
    tangents: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    call: Sequence[int],
) -> list[Tensor]:
    """Shapes of fused_rnn::layer_jvp's results."""
    check_places(x, tangents=tangents, saved=saved)
    y, last, _ = fake_layer(x, states, params, rows, call[0], False)
    return [y, *last]


def _fake_flags(seed: Tensor, like: Tensor, probability: float) -> Tensor:
    """Shape of fused_rnn::flags's result."""
    return like.new_empty(like.shape, dtype=torch.bool)


if extension is not None:
    rnn = torch.ops.fused_rnn.rnn.default
    cell = torch.ops.fused_rnn.cell.default
    # The same ops with less conversion of arguments: a torch.ops call takes longer than a small step. Not for tensor
    # subclasses, whose __torch_function__ they pass by, nor for Dynamo, which cannot trace them.
    eager_rnn = extension.rnn
    eager_cell = extension.cell
    torch.library.register_fake("fused_rnn::layer", fake_layer)
    torch.library.register_fake("fused_rnn::layer_backward", fake_layer_backward)
    torch.library.register_fake("fused_rnn::layer_backward_samples", _fake_layer_backward_samples)
    torch.library.register_fake("fused_rnn::layer_backward_gates", _fake_layer_backward_gates)
    torch.library.register_fake("fused_rnn::layer_second_order", _fake_layer_second_order)
    torch.library.register_fake("fused_rnn::layer_jvp", _fake_layer_jvp)
    torch.library.register_fake("fused_rnn::stack", _fake_stack)
    torch.library.register_fake("fused_rnn::stack_backward", _fake_stack_backward)
    torch.library.register_fake("fused_rnn::flags", _fake_flags)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _derivatives.register(_library)
    _transforms.register(_library)
    _flops.register()
