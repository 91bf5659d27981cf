"""Opacus's DPLSTM, DPGRU and DPRNN (differential privacy): a sequence is one call, and its per-sample gradients one product.

    fused_rnn.integrations.opacus.enable()
    model, optimizer, loader = PrivacyEngine().make_private(module=model, ...)  # model has DPLSTM layers

Replaced: ``DPRNNBase.forward_layer``, which runs a cell step by step, with a hook of Opacus at each of its two products.
Here the kernels run the sequence and give the gradients of the gates before they are summed over the batch, [T, B, G*H].
The modules of the two products are called once, on all steps, so that Opacus's own hooks make their per-sample gradients, as
of any linear layer: clipping, noise, accumulation, Poisson sampling and state_dict are Opacus's. The products themselves are
part of the kernels: what the modules give has their shape alone.

Versions: opacus 1.6.

Limits: Opacus's own loop still runs for ``dropout`` while training (Opacus applies it inside of the recurrence), cells
derived from Opacus's, under autocast, torch.compile, tracers and torch.func transforms, and where the kernels are not
compiled. Gradients of gradients raise RuntimeError. Of packed input in both directions the last states are torch.nn's, which
Opacus's are not. A fused_rnn.LSTM has no per-sample gradients by itself: DPLSTM takes its state_dict.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_rnn import _backend, _checks, _kinds, functional
from fused_rnn._recipe import Recipe, Rows
from fused_rnn.integrations._integration import Integration, Replacement, watched

__all__ = ["disable", "enable", "enabled"]


def _replacements() -> Iterator[Replacement]:
    from opacus.layers.dp_rnn import DPRNNBase

    yield Replacement(DPRNNBase, "forward_layer", _forward_layer)


def _forward_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_layer(
        self: Any, x: Any, h_0: Tensor, c_0: Tensor | None, batch_sizes: Tensor | None, cell: Any, **form: Any
    ) -> Any:
        """x [T, B, I], or of each step [b, I]; h_0, c_0 [B, H] -> outputs in the form of x, last h and c [B, H].

        form: max_batch_size, seq_length, is_packed, reverse_layer, as DPRNNBase.forward passes them.
        """
        kind = _kind_of(cell)
        if kind is None or not form["seq_length"] or not _serves(self, h_0):
            return original(self, x, h_0, c_0, batch_sizes, cell, **form)
        max_batch_size, is_packed, reverse_layer = form["max_batch_size"], form["is_packed"], form["reverse_layer"]
        states = [h_0] if c_0 is None else [h_0, c_0]
        lengths, sizes = None, torch.as_tensor([] if batch_sizes is None else batch_sizes)
        if is_packed:
            lengths = (torch.arange(max_batch_size).unsqueeze(1) < sizes).sum(1).to(h_0.device)
            x = torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True)  # steps of [b, I] -> [T, B, I]
        if reverse_layer:
            x = _reversed(x, lengths)
        y, last = _run(kind, cell, x, states, lengths)
        if reverse_layer:
            y = _reversed(y, lengths)
        output = [step[: int(size)] for step, size in zip(y, sizes, strict=True)] if is_packed else y
        return output, last[0], last[1] if len(last) > 1 else None

    return forward_layer


def _kind_of(cell: Any) -> int | None:
    """The number of the kernels' cell; None for a cell that is not exactly one of Opacus's."""
    from opacus.layers import dp_rnn

    if type(cell) is dp_rnn.DPRNNCell:
        return _checks.rnn_kind(cell.nonlinearity)
    return {dp_rnn.DPLSTMCell: _kinds.LSTM, dp_rnn.DPGRUCell: _kinds.GRU}.get(type(cell))


def _serves(layer: Any, h_0: Tensor) -> bool:
    if (layer.dropout and layer.training) or watched() or functional.autocast_on(h_0.device.type):
        return False
    return _backend.uses_ops(h_0.device.type, h_0.dtype, h_0.device)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, B, I] with the first lengths[b] steps of each row in reverse, the others where they are."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _run(
    kind: int, cell: Any, x: Tensor, states: Sequence[Tensor], lengths: Tensor | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """One layer forward in time: x [T, B, I], states [B, H] -> y [T, B, H], last states [B, H]."""
    params = [cell.ih.weight, cell.hh.weight]
    if cell.ih.bias is not None:
        params += [cell.ih.bias, cell.hh.bias]
    recipe = Recipe(kind, 1, len(params) > 2)
    rows = Rows(lengths)
    numbers = recipe.packed | rows.bits
    given = [x.detach(), *(state.detach() for state in states), *(param.detach() for param in params)]
    before, weights = given[1 : 1 + len(states)], given[1 + len(states) :]
    y, last, saved = torch.ops.fused_rnn.layer(
        given[0].contiguous(), [state.unsqueeze(0) for state in before], weights, rows.given(), numbers, True
    )
    if not torch.is_grad_enabled():
        return y, [state.squeeze(0) for state in last]
    previous = torch.cat([before[0].unsqueeze(0), y[:-1]])
    # Opacus hooks both products, [B, T, .]: what backward gives them are the gradients of the gates.
    gx = _called(cell.ih, x.transpose(0, 1))
    gh = _called(cell.hh, previous.transpose(0, 1))
    kept = [y, *(state.squeeze(0) for state in last), *before, *weights, *saved, *rows.given()]
    y, *last = _Scan.apply(gx, gh, *states, (kind, numbers, len(states), len(weights), len(saved)), *kept)
    return y, last


def _called(linear: Any, x: Tensor) -> Tensor:
    """linear(x) with its hooks, without its values."""
    linear.forward = functools.partial(_without_values, linear)
    try:
        found: Tensor = linear(x)
    finally:
        del linear.forward
    return found


def _without_values(linear: Any, x: Tensor) -> Tensor:
    found: Tensor = _Product.apply(x, linear.weight, linear.bias)
    return found


class _Product(torch.autograd.Function):
    """x [B, T, I], weight [G*H, I], bias [G*H] or None: backward of their linear map; forward has its shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(1).expand(*x.shape[:2], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # Rows in the order of time, as the kernels have them.
        rows = gradient.transpose(0, 1).reshape(-1, weight.shape[0])
        return (
            gradient @ weight if of_x else None,
            rows.t() @ x.transpose(0, 1).reshape(-1, weight.shape[1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class _Scan(torch.autograd.Function):
    """The sequence as a function of its products: gx, gh [B, T, G*H] and the states before it; it was computed before."""

    @staticmethod
    def forward(ctx: Any, gx: Tensor, gh: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """args: states, then (kind, recipe, counts of states, weights and saved), then those tensors, after the results."""
        place = next(index for index, arg in enumerate(args) if isinstance(arg, tuple))
        ctx.facts, kept = args[place], args[place + 1 :]
        results = tuple(tensor.detach() for tensor in kept[: 1 + place])
        ctx.save_for_backward(*kept[1 + place :], results[0])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        kind, numbers, states, weights, saved = ctx.facts
        *kept, y = ctx.saved_tensors
        before, kept = [state.unsqueeze(0) for state in kept[:states]], kept[states:]
        params, kept = kept[:weights], kept[weights:]
        of_forward, rows = kept[:saved], kept[saved:]
        steps, batch, hidden = y.shape
        none = y.new_empty(0)
        of_last = [none if grad is None else grad.unsqueeze(0) for grad in gradients[1:]]
        x = y.new_zeros(1).expand(steps, batch, params[0].shape[1])  # the gradients of the gates do not depend on it
        gates, dstates = torch.ops.fused_rnn.layer_backward_gates(
            gradients[0], of_last, x, before, params, rows, [*of_forward, y], numbers
        )
        gates = gates.view(steps, batch, -1)
        dgx = dgh = gates
        if kind == _kinds.GRU:  # the gradients of gx_n, r, z, gh_n
            dgx = torch.cat([gates[..., hidden : 3 * hidden], gates[..., :hidden]], 2)
            dgh = gates[..., hidden:]
        nothing = [None] * (1 + 1 + states + states + weights + saved + len(rows))  # the facts and what was kept
        found = [state.squeeze(0) for state in dstates]
        return dgx.transpose(0, 1), dgh.transpose(0, 1), *found, *nothing


_integration = Integration("opacus", "opacus", ("1.6",), _replacements)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
