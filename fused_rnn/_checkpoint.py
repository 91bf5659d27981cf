"""Layers that keep their states every k steps alone and run the steps between them again in backward: ``checkpoint=k``.

What a layer keeps for backward beside its arguments is O(T/k) instead of O(T), and outputs and gradients are those of
``checkpoint=0`` bit for bit. Backward has room for the gates of k steps; of all T steps it makes y and the gradients of the
gates while it runs, one layer at a time, so that products over all rows give the gradients of the weights. An LSTM with a
projection, and layers on a GPU, make all gates of a layer again, also one layer at a time. The Python reference keeps all,
and so do calls under forward-mode AD.

The ops are in csrc/torch/checkpoint.cpp; here are their fake kernels, autograd, and a stack of layers on them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _derivatives, _ops, reference
from fused_rnn._backend import extension, forward_mode
from fused_rnn._recipe import Recipe, Rows, rows_of, unpacked


class Checkpointed:
    """Gives a layer the keyword ``checkpoint`` of its constructor, an attribute of the same name."""

    checkpoint: int = 0

    def __init__(self, *args: Any, checkpoint: int = 0, **kwargs: Any) -> None:
        """checkpoint: k, an int of at least 0: backward makes what lies between the states of every k-th step again; 0 keeps
        everything.

        Raises:
            TypeError, ValueError: it is none; and torch.nn's errors.
        """
        check(checkpoint)
        super().__init__(*args, **kwargs)
        if checkpoint:  # the quick call asks for the field
            self.checkpoint = checkpoint

    def extra_repr(self) -> str:
        """As torch.nn's, with checkpoint where it is not 0."""
        of_torch: str = super().extra_repr()  # type: ignore[misc]
        return f"{of_torch}, checkpoint={self.checkpoint}" if self.checkpoint else of_torch


def check(every: Any) -> None:
    if type(every) is not int:
        raise TypeError(f"checkpoint: expected an int, got {type(every).__name__}")
    if every < 0:
        raise ValueError(f"checkpoint: expected a number of steps, or 0 for none, got {every}")


def applies(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], rows: Rows) -> bool:
    """Whether a call keeps states alone: where there will be a backward, and no forward-mode AD, whose tangents the ops of
    this file lack."""
    kept = (input, *states, *weights, *rows.reset_states)
    return torch.is_grad_enabled() and any(t.requires_grad for t in kept) and not forward_mode()


def rnn(
    every: int, recipe: Recipe, input: Tensor, states: Sequence[Tensor], weights: list[Tensor], rows: Rows
) -> tuple[Tensor, list[Tensor]]:
    """reference.rnn on the ops of this file, with states kept every so many steps."""
    return reference.rnn(input, states, weights, rows.on(input.device), recipe, functools.partial(_layer, every))


def _layer(
    every: int, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Rows, recipe: Recipe
) -> tuple[Tensor, list[Tensor]]:
    """reference.layer on the ops."""
    op = torch.ops.fused_rnn.layer_checkpointed
    y, last, _ = op(x, list(states), list(params), rows.given(), [recipe.packed | rows.bits, every])
    return y, last


def keeps_states(device_type: str) -> bool:
    """Whether forward keeps states every k steps; a GPU keeps none, and makes all again of the layer's arguments."""
    return device_type != "cuda"


def fake_layer(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], call: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer_checkpointed's results. call: the recipe, and k."""
    recipe, every = call
    y, last, _ = _ops.fake_layer(x, states, params, rows, recipe, save=False)
    if not keeps_states(x.device.type):
        return y, last, []
    offsets, kind = rows_of(rows, recipe).offsets, unpacked(recipe).kind
    steps = x.shape[0] if offsets is None else offsets.shape[0] - 1
    shapes = [(h.shape[0], (steps - 1) // every, *h.shape[1:]) for h in last[: kind.states]]
    wide = torch.promote_types(y.dtype, torch.float32)  # what a CPU computes in
    kept = [y.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, (y.dtype, wide), strict=False)]
    return y, last, kept


def _fake_layer_backward(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    kept: Sequence[Tensor],
    call: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer_checkpointed_backward's results."""
    return _ops.fake_layer_backward(dy, dlast, x, states, params, rows, [], call[0], mask)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, states, params, rows, call = inputs
    ctx.save_for_backward(x, *states, *params, *rows, *output[2])
    ctx.counts = (len(states), len(params), len(rows))
    ctx.call = call
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dlast: Sequence[Tensor | None], dkept: Any) -> tuple[Any, ...]:
    x, *kept = ctx.saved_tensors
    groups = []
    for count in ctx.counts:
        groups.append(kept[:count])
        kept = kept[count:]
    states, params, rows = groups
    recipe: int = ctx.call[0]
    none = (params[0] if x.dtype is torch.int64 else x).new_empty(0)
    given = [none if grad is None else grad for grad in dlast or []]
    needs_x, needs_states, needs_params, needs_rows = ctx.needs_input_grad[:4]
    asked = (bool(needs_x), _any(needs_states) or _any(needs_rows), _any(needs_params))
    if torch.is_grad_enabled():
        made = _derivatives.layer_backward_differentiable(dy, given, x, states, params, rows, [], recipe, asked)
    else:
        op = torch.ops.fused_rnn.layer_checkpointed_backward
        made = op(dy, given, x, states, params, rows, kept, ctx.call, asked)
    dx, dstates, dparams = made
    masks = len(rows) - len(rows_of(rows, recipe).reset_states)
    return (
        dx if asked[0] else None,
        dstates[: len(states)] if asked[1] else [None] * len(states),
        dparams if asked[2] else [None] * len(params),
        [*[None] * masks, *dstates[len(states) :]] if asked[1] else [None] * len(rows),
        None,
    )


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _layer_on_gpu(
    x: Tensor, states: list[Tensor], params: list[Tensor], rows: list[Tensor], call: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    y, last, _ = torch.ops.fused_rnn.layer(x, states, params, rows, call[0], False)
    return y, last, []


def _layer_backward_on_gpu(
    dy: Tensor | None,
    dlast: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    rows: list[Tensor],
    kept: list[Tensor],
    call: Sequence[int],
    mask: list[bool],
) -> Any:
    """Makes again what forward would have saved, of all steps."""
    y, last, saved = torch.ops.fused_rnn.layer(x, states, params, rows, call[0], True)
    every_c = last[unpacked(call[0]).kind.states :]  # a result, where it is asked for
    return torch.ops.fused_rnn.layer_backward(dy, dlast, x, states, params, rows, [*saved, *every_c, y], call[0], mask)


if extension is not None:
    torch.library.register_fake("fused_rnn::layer_checkpointed", fake_layer)
    torch.library.register_fake("fused_rnn::layer_checkpointed_backward", _fake_layer_backward)
    torch.library.register_autograd("fused_rnn::layer_checkpointed", _backward, setup_context=_set_up)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("layer_checkpointed", _layer_on_gpu, "CUDA")
    _library.impl("layer_checkpointed_backward", _layer_backward_on_gpu, "CUDA")
