"""``checkpoint=k`` of cells of one's own: states are kept every k steps, and backward makes what lies between them again.

The ops are in csrc/torch/formula_checkpoint.cpp; here are their fake kernels, autograd, and the ops for a GPU, which keeps
no states and makes all steps of a layer again. What is kept and what backward has room for is told in _checkpoint.py. Masks
of options are saved as they are drawn, a byte each, and become values of gates in both passes. The Python reference, calls
under torch.func and those under forward-mode AD keep everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _checkpoint
from fused_rnn._backend import extension, is_transformed
from fused_rnn._recipe import Rows, rows_of
from fused_rnn.formula import ops


def applies(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], rows: Rows) -> bool:
    """Whether a call that compiled kernels serve keeps states alone: where there will be a backward, and no transform."""
    return _checkpoint.applies(input, states, weights, rows) and not is_transformed()


def _fake(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], cell: str, call: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::formula_checkpointed's results. call: flags, and k."""
    flags, every = call
    y, last, _ = ops.fake_formula(x, states, params, rows, cell, flags & ~ops.SAVE)
    if not _checkpoint.keeps_states(x.device.type):
        return y, last, []
    offsets = rows_of(rows, flags).offsets
    steps = x.shape[0] if offsets is None else offsets.shape[0] - 1
    directions, batch, hidden = last[0].shape
    wide = torch.promote_types(y.dtype, torch.float32)  # what a CPU computes in
    count = len(ops.cell_of(cell).declaration.states)
    return y, last, [y.new_empty(directions, (steps - 1) // every, count, batch, hidden, dtype=wide)]


def _fake_backward(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    kept: Sequence[Tensor],
    cell: str,
    call: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::formula_checkpointed_backward's results."""
    return ops.fake_formula_backward(dy, dlast, x, states, params, rows, kept, cell, call[0])


class _Checkpointed(torch.autograd.Function):
    """fused_rnn::formula_checkpointed for autograd, on one flat list of tensors (ops._Differentiable)."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """call: dispatch keys, cell, flags and k, numbers of states, params and rows; tensors: x and these."""
        keys, cell, (flags, every), *counts = call
        states, params, rows, _ = ops.parts_of(tensors[1:], *counts)
        y, last, kept = _below_autograd(keys, tensors[0], states, params, rows, cell, (flags, every))
        ctx.save_for_backward(*tensors, *kept)
        ctx.counts, ctx.lasts = counts, len(last)
        ctx.cell, ctx.flags, ctx.every = cell, flags, every
        ctx.set_materialize_grads(False)
        return (y, *last, *kept)

    backward = staticmethod(ops.flat_backward)


def _below_autograd(
    keys: Any, x: Tensor, states: list[Tensor], params: list[Tensor], rows: list[Tensor], cell: str, call: Sequence[int]
) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        rows, flags = ops.full_rows(x, params, rows, call[0])
        op = torch.ops.fused_rnn.formula_checkpointed.default
        return op.redispatch(keys & torch._C._after_autograd_keyset, x, states, params, rows, cell, [flags, call[1]])


def _autograd(
    keys: Any, x: Tensor, states: list[Tensor], params: list[Tensor], rows: list[Tensor], cell: str, call: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """fused_rnn::formula_checkpointed where torch's dispatcher comes to autograd. keys: of the call."""
    tensors = (x, *states, *params, *rows)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        result: tuple[Tensor, list[Tensor], list[Tensor]] = _below_autograd(keys, x, states, params, rows, cell, call)
        return result
    y, *others = _Checkpointed.apply((keys, cell, tuple(call), len(states), len(params), len(rows)), *tensors)
    count = ops.last_count(cell, call[0])
    return y, others[:count], others[count:]


def _on_gpu(
    x: Tensor, states: list[Tensor], params: list[Tensor], rows: list[Tensor], cell: str, call: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    y, last, _ = torch.ops.fused_rnn.formula(x, states, params, rows, cell, call[0] & ~ops.SAVE)
    return y, last, []


def _backward_on_gpu(
    dy: Tensor | None,
    dlast: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    rows: list[Tensor],
    kept: list[Tensor],
    cell: str,
    call: Sequence[int],
) -> Any:
    """Makes again what forward would have saved, of all steps."""
    flags = call[0]
    y, last, saved = torch.ops.fused_rnn.formula(x, states, params, rows, cell, flags | ops.SAVE)
    series = last[(len(last) + 1) // 2 :] if flags & ops.ALL_STATES else []
    return torch.ops.fused_rnn.formula_backward(dy, dlast, x, states, params, rows, [*saved, *series, y], cell, flags)


if extension is not None:
    torch.library.register_fake("fused_rnn::formula_checkpointed", _fake)
    torch.library.register_fake("fused_rnn::formula_checkpointed_backward", _fake_backward)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("formula_checkpointed", _autograd, "Autograd", with_keyset=True)
    _library.impl("formula_checkpointed", _on_gpu, "CUDA")
    _library.impl("formula_checkpointed_backward", _backward_on_gpu, "CUDA")
