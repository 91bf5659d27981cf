"""Python names of the C++ ops, and the parts of their registration that are Python: fake kernels, double backward, flops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _flops, reference
from fused_rnn._backend import extension
from fused_rnn._recipe import rows_of, unpacked


def check_places(x: Tensor, **others: Sequence[Tensor | None]) -> None:
    """Raises unless all tensors of a call are on one device, and floating-point ones have one dtype.

    One tensor on the meta device is enough for torch to call a fake kernel, whose results are uninitialised memory.
    """
    for name, tensors in others.items():
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if tensor.device != x.device:
                raise RuntimeError(f"{name}[{index}]: expected device {x.device} (input's), got {tensor.device}")
            wide = name in ("states", "dlast") and index == 1 and tensor.dtype == torch.float32 and x.dtype.itemsize == 2
            number = name == "rows" and tensor.dim() == 0  # of StepOptions
            if tensor.dtype.is_floating_point and tensor.dtype != x.dtype and not wide and not number:
                raise RuntimeError(f"{name}[{index}]: expected dtype {x.dtype} (input's), got {tensor.dtype}")


def fake_gradients(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], mask: Sequence[bool | int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of a layer's gradients, of x, states and params: [0] where the mask says that nobody asked."""
    return (
        x.new_empty(x.shape) if mask[0] else x.new_empty(0),
        [s.new_empty(s.shape) if mask[1] else x.new_empty(0) for s in states],
        [p.new_empty(p.shape) if mask[2] else p.new_empty(0) for p in params],
    )


def _fake_layer(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], recipe: int, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::layer's results."""
    check_places(x, states=states, params=params, rows=rows)
    layer = unpacked(recipe)
    of_call = rows_of(rows, recipe)
    kind, w_hh, packed = layer.kind, params[1], of_call.offsets is not None
    hidden, out = w_hh.shape[0] // kind.gates, w_hh.shape[1]
    count = x.shape[0] if packed else x.shape[0] * x.shape[1]
    batch = states[0].shape[1] if packed and states else x.shape[1]
    last = [x.new_empty(layer.directions, batch, out)]
    if kind.has_c:
        last.append((states[1] if states else x).new_empty(layer.directions, batch, hidden))
    if kind.has_c and layer.all_states:
        last.append(x.new_empty(layer.directions, count, hidden))
    saved = []
    if save and (kind.saved or of_call.options.any()):
        saved.append(x.new_empty(layer.directions, count, kind.slots, hidden))
    if save and kind.has_c and not layer.all_states:
        saved.append(x.new_empty(layer.directions, count, hidden))
    return x.new_empty(*x.shape[:-1], layer.directions * out), last, saved


def _fake_layer_backward(
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
    check_places(x, dy=[dy], dlast=dlast, states=states, params=params, rows=rows, saved=saved)
    unpacked(recipe)  # raises for a number that is no recipe
    return fake_gradients(x, [*states, *rows_of(rows, recipe).reset_states], params, mask)


def _layer_backward_differentiable(
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
    """The same gradients as fused_rnn::layer_backward, as a differentiable function of everything they depend on.

    Runs the reference again and differentiates it. What forward saved is not read: it follows from the other arguments.
    """
    of_call = rows_of(rows, recipe)
    given = [*states, *of_call.reset_states]
    own, first = 1 + len(states), 1 + len(given)

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        given_rows = of_call._replace(reset_states=tuple(args[own:first]))
        y, last = reference.layer(args[0], args[1:own], args[first:], given_rows, unpacked(recipe))
        return [y, *last]

    asked = [mask[0], *[mask[1]] * len(given), *[mask[2]] * len(params)]
    grads = differentiated(run, [x, *given, *params], asked, [dy, *dlast])
    return grads[0], grads[1:first], grads[first:]


def differentiated(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    given: Sequence[Tensor],
    asked: Sequence[bool],
    result_grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of ``run(given)`` as differentiable functions of everything they depend on; [0] where not asked for.

    result_grads: of run's results; None or a tensor of shape [0] for none, and there may be fewer.
    """
    with torch.enable_grad():
        # An alias for every use, so that a tensor that comes in twice gets two gradients, not twice their sum.
        def alias(t: Tensor) -> Tensor:
            return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

        args = [alias(t) if wanted else t for t, wanted in zip(given, asked, strict=True)]
        pairs = [
            (out, grad)
            for out, grad in zip(run(args), result_grads, strict=False)
            if grad is not None and grad.shape != (0,)
        ]
        inputs = [t for t, wanted in zip(args, asked, strict=True) if wanted]
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
    return [next(found) if wanted else given[0].new_empty(0) for wanted in asked]


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
    dx = torch.stack([result[0] for result in results])
    dstates, dparams = ([torch.stack(parts) for parts in zip(*(r[i] for r in results), strict=True)] for i in (1, 2))
    return (dx, dstates, dparams), (0, [0] * len(dstates), [0] * len(dparams))


if extension is not None:
    rnn = torch.ops.fused_rnn.rnn.default
    cell = torch.ops.fused_rnn.cell.default
    # The same ops with less conversion of arguments: a torch.ops call takes longer than a small step. Not for tensor
    # subclasses, whose __torch_function__ they pass by, nor for Dynamo, which cannot trace them.
    eager_rnn = extension.rnn
    eager_cell = extension.cell
    torch.library.register_fake("fused_rnn::layer", _fake_layer)
    torch.library.register_fake("fused_rnn::layer_backward", _fake_layer_backward)
    torch.library.register_vmap("fused_rnn::layer_backward", _layer_backward_batched)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("layer_backward_differentiable", _layer_backward_differentiable, "CompositeImplicitAutograd")
    _flops.register()
