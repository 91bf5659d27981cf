"""Python names of the C++ ops, and the parts of their registration that are Python: fake kernels, double backward, flops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _flops, reference
from fused_rnn._backend import _C
from fused_rnn._kinds import KINDS


def _check_fake(x: Tensor, cell: int, **others: Tensor | Sequence[Tensor] | None) -> None:
    """Raises unless all tensors of a call are on one device, its floating-point tensors have one dtype, and the cell exists.

    One tensor on the meta device is enough for torch to call a fake kernel, whose results are uninitialised memory.
    """
    if not 0 <= cell < len(KINDS):
        raise ValueError(f"cell: expected 0 to {len(KINDS) - 1}, got {cell}")
    for name, value in others.items():
        for tensor in [value] if isinstance(value, Tensor) else value or ():
            if tensor.device != x.device:
                raise RuntimeError(f"{name}: expected device {x.device} (input's), got {tensor.device}")
            wide = name in ("c0", "dc_n") and tensor.dtype == torch.float32 and x.dtype.itemsize == 2
            if tensor.dtype.is_floating_point and tensor.dtype != x.dtype and not wide:
                raise RuntimeError(f"{name}: expected dtype {x.dtype} (input's), got {tensor.dtype}")


def _fake_layer(
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of fused_rnn::layer's results."""
    _check_fake(x, cell, h0=h0, c0=c0, params=params, lengths=lengths, offsets=offsets, resets=resets)
    directions = 2 if bidirectional else 1
    kind, w_hh = KINDS[cell], params[1]
    hidden, out = w_hh.shape[0] // kind.gates, w_hh.shape[1]
    rows = x.shape[0] if offsets is not None else x.shape[0] * x.shape[1]
    batch = h0.shape[1] if offsets is not None and h0 is not None else x.shape[1]
    return (
        x.new_empty(*x.shape[:-1], directions * out),
        x.new_empty(directions, batch, out),
        (x if c0 is None else c0).new_empty(directions, batch, hidden) if kind.has_c else x.new_empty(0),
        x.new_empty(directions, rows, kind.slots, hidden) if save and kind.saved else x.new_empty(0),
        x.new_empty(directions, rows, hidden) if save and kind.has_c else x.new_empty(0),
    )


def _fake_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    y: Tensor | None,
    gates: Tensor,
    cs: Tensor,
    cell: int,
    bidirectional: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Shapes of fused_rnn::layer_backward's results."""
    _check_fake(
        x, cell, dy=dy, dh_n=dh_n, dc_n=dc_n, h0=h0, c0=c0, params=params, lengths=lengths, offsets=offsets, resets=resets,
        y=y, gates=gates, cs=cs,
    )  # fmt: skip
    return (
        x.new_empty(x.shape) if mask[0] else x.new_empty(0),
        h0.new_empty(h0.shape) if mask[1] and h0 is not None else x.new_empty(0),
        c0.new_empty(c0.shape) if mask[1] and c0 is not None else x.new_empty(0),
        [p.new_empty(p.shape) if mask[2] else p.new_empty(0) for p in params],
    )


def _layer_backward_differentiable(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    offsets: Tensor | None,
    resets: Tensor | None,
    y: Tensor | None,
    gates: Tensor,
    cs: Tensor,
    cell: int,
    bidirectional: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The same gradients as fused_rnn::layer_backward, as a differentiable function of everything they depend on.

    Runs the reference again and differentiates it; y, gates and cs are not read, since they follow from the other arguments.
    """
    with torch.enable_grad():
        # An alias for every use, so that a tensor that comes in twice gets two gradients, not twice their sum.
        def alias(t: Tensor) -> Tensor:
            return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

        wanted: list[Tensor | None] = [
            alias(x) if mask[0] else None,
            alias(h0) if mask[1] and h0 is not None else None,
            alias(c0) if mask[1] and c0 is not None else None,
            *(alias(p) if mask[2] else None for p in params),
        ]
        given: list[Any] = [x, h0, c0, *params]
        args = [new if new is not None else old for new, old in zip(wanted, given, strict=True)]
        outputs = reference.layer(
            args[0], args[1], args[2], args[3:], has_biases, lengths, offsets, resets, cell, bidirectional
        )
        pairs = [(out, grad) for out, grad in zip(outputs, (dy, dh_n, dc_n), strict=True) if grad is not None]
        inputs = [t for t in wanted if t is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                inputs,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if inputs and pairs
            else [torch.zeros_like(t) for t in inputs]
        )
    grads = [x.new_empty(0) if t is None else next(found) for t in wanted]
    return grads[0], grads[1], grads[2], grads[3:]


def _layer_backward_batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[Any, ...]]:
    """fused_rnn::layer_backward under vmap, as of ``torch.autograd.grad(is_grads_batched=True)``: once for each sample.

    Gradients of weights are sums over a sample's own rows, so the samples do not fold into one batch.
    """

    def sample(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [sample(a, d, index) for a, d in zip(arg, dim, strict=True)]
        return arg.select(dim, index) if isinstance(dim, int) else arg

    op = torch.ops.fused_rnn.layer_backward.default
    results = [op(*(sample(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*(r[:3] for r in results), strict=True))
    dparams = [torch.stack(parts) for parts in zip(*(r[3] for r in results), strict=True)]
    return (*stacked, dparams), (0, 0, 0, [0] * len(dparams))


if _C is not None:
    rnn = torch.ops.fused_rnn.rnn.default
    cell = torch.ops.fused_rnn.cell.default
    # The same ops with less conversion of arguments: a torch.ops call takes longer than a small step. Not for tensor
    # subclasses, whose __torch_function__ they pass by, nor for Dynamo, which cannot trace them.
    eager_rnn = _C.rnn
    eager_cell = _C.cell
    torch.library.register_fake("fused_rnn::layer", _fake_layer)
    torch.library.register_fake("fused_rnn::layer_backward", _fake_layer_backward)
    torch.library.register_vmap("fused_rnn::layer_backward", _layer_backward_batched)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("layer_backward_differentiable", _layer_backward_differentiable, "CompositeImplicitAutograd")
    _flops.register()
