"""The ops under ``torch.func.vmap``: a vmapped dimension becomes rows of the batch, and one call of the kernels serves it.

V: size of the vmapped dimension; the other letters are those of functional.py. Row b of sample v is row b * V + v of the
folded batch, so that packed rows stay in order, and results of forward that backward reads are unfolded without a copy.
Weights that are vmapped (an ensemble), packed rows, ids, and options of steps (zoneout and its like) make a call of the
kernels for each sample.

The plainest calls of the layer and its backward are served by csrc/torch/ops_vmap.cpp, which does as the rules here say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn._backend import extension
from fused_rnn._recipe import OPTIONS, Rows, rows_of, unpacked

Dim = int | None
# Of tensors that backward makes (the gradients of the gates) up to this many elements at once: jacobians have many samples.
_ELEMENTS = 1 << 24
# The same of tangents on a CPU, whose directions cost nothing to part: jacfwd by the weights of an LSTM 16x1x8x32 takes
# 207 ms, with 1 << 24 elements 380, with 1 << 16 254 (float32, one thread of a Xeon, 2026-11).
_DIRECTIONS = 1 << 19


class _Fold:
    """One call of an op under vmap: tensors with their vmapped dimension, folded into rows, and results unfolded."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, tensor: Tensor, dim: Dim, place: int) -> Tensor:
        """The tensor with its rows, dimension ``place`` of a sample, V times as many. None stands as a tensor [0]."""
        if _is_none(tensor, dim):
            return tensor.new_empty(0)
        if dim is None:
            shape = (*tensor.shape[: place + 1], self.count, *tensor.shape[place + 1 :])
            tensor = tensor.unsqueeze(place + 1).expand(shape)
        else:
            tensor = tensor.movedim(dim, place + 1)
        return tensor.flatten(place, place + 1)

    def each(self, tensors: Sequence[Tensor], dims: Sequence[Dim], place_of: Callable[[int], int]) -> list[Tensor]:
        """place_of: from the number of a sample's dimensions to that of its rows."""
        return [
            self.rows(tensor, dim, place_of(tensor.dim() - (dim is not None)))
            for tensor, dim in zip(tensors, dims, strict=True)
        ]

    def unfolded(self, tensor: Tensor, place: int) -> tuple[Tensor, Dim]:
        """A result by samples, and its vmapped dimension; what nobody asked for [0] is not vmapped."""
        if tensor.dim() == 1:
            return tensor, None
        return tensor.unflatten(place, (tensor.shape[place] // self.count, self.count)), place + 1


def _is_none(tensor: Tensor, dim: Dim) -> bool:
    return tensor.dim() - (dim is not None) == 1 and tensor.numel() == 0 and tensor.is_floating_point()


def _second_last(dims: int) -> int:
    return dims - 2


def _of_saved(dims: int) -> int:
    """gates [D, N, S, H], c after each step [D, N, H], y [T, B, D*P] or [N, D*P]; likewise what a formula saves."""
    return 1 if dims == 4 else dims - 2


def _batch_of(x: Tensor, x_dim: Dim, states: Sequence[Tensor], state_dims: Sequence[Dim]) -> int:
    """B of a sample."""
    t, dim = (states[0], state_dims[0]) if states else (x, x_dim)
    return t.shape[1 if dim is None or dim > 1 else 2]


def _folded_rows(fold: _Fold, given: Sequence[Tensor], dims: Sequence[Dim], recipe: int, batch: int) -> list[Tensor]:
    """The ops' argument ``rows`` of the folded batch."""
    if not given:
        return []
    rows = rows_of(given, recipe)
    of: Any = rows_of(dims, recipe)  # type: ignore[arg-type]  # the same places
    lengths, offsets, resets = rows.lengths, rows.offsets, rows.resets
    if lengths is not None:
        lengths = fold.rows(lengths, of.lengths, 0)
    if offsets is not None:
        offsets = offsets * fold.count
    if resets is not None:
        resets = fold.rows(resets, of.resets, resets.dim() - (of.resets is not None) - 1)
    states = [
        _folded_reset_state(fold, state, dim, batch) for state, dim in zip(rows.reset_states, of.reset_states, strict=True)
    ]
    return Rows(lengths, offsets, resets, tuple(states)).given()


def _folded_reset_state(fold: _Fold, state: Tensor, dim: Dim, batch: int) -> Tensor:
    own = state if dim is None else state.movedim(dim, 0)
    own = own.expand(*own.shape[:-2], batch, own.shape[-1])
    return fold.rows(own, None if dim is None else 0, own.dim() - (dim is not None) - 2)


def _is_looped(x: Tensor, params: Sequence[Dim], rows: Sequence[Dim], recipe: int) -> bool:
    """Whether samples are calls of their own."""
    if x.dtype is torch.int64:  # ids
        return True
    packed = rows_of(rows, recipe).offsets is not None  # type: ignore[arg-type]
    return packed or bool(recipe & OPTIONS) or any(dim is not None for dim in params)


def _looped(op: Any, count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """The op once for each sample."""

    def sample(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [sample(a, d, index) for a, d in zip(arg, dim, strict=True)]
        return arg.select(dim, index) if isinstance(dim, int) else arg

    results = [op(*(sample(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(count)]
    joined = [
        torch.stack(parts) if isinstance(parts[0], Tensor) else [torch.stack(part) for part in zip(*parts, strict=True)]
        for parts in zip(*results, strict=True)
    ]
    return tuple(joined), tuple(0 if isinstance(part, Tensor) else [0] * len(part) for part in joined)


def _pairs(pairs: Sequence[tuple[Tensor, Dim]]) -> tuple[list[Tensor], list[Dim]]:
    return [tensor for tensor, _ in pairs], [dim for _, dim in pairs]


def _forward(op: Any, count: int, in_dims: Sequence[Any], args: Sequence[Any], flags: int) -> tuple[Any, Any]:
    """The rule of an op (x, states, params, rows, two more) -> (y, last, saved). flags: a recipe's bits of the rows."""
    x, states, params, rows = args[:4]
    x_dim, state_dims, param_dims, row_dims = in_dims[:4]
    if _is_looped(x, param_dims, row_dims, flags):
        return _looped(op, count, in_dims, args)
    fold = _Fold(count)
    batch = _batch_of(x, x_dim, states, state_dims)
    y, last, saved = op(
        *fold.each([x], [x_dim], _second_last),
        fold.each(states, state_dims, _second_last),
        params,
        _folded_rows(fold, rows, row_dims, flags, batch),
        *args[4:],
    )
    y, y_dim = fold.unfolded(y, _second_last(y.dim()))
    last, last_dims = _pairs([fold.unfolded(t, _second_last(t.dim())) for t in last])
    saved, saved_dims = _pairs([fold.unfolded(t, _of_saved(t.dim())) for t in saved])
    return (y, last, saved), (y_dim, last_dims, saved_dims)


def layer(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer(x, states, params, rows, recipe, save)."""
    return _forward(torch.ops.fused_rnn.layer.default, info.batch_size, in_dims, args, args[4])


def layer_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer_backward, whose weights' gradients become those of each sample."""
    return _backward(info.batch_size, in_dims, args)


def layer_backward_samples(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer_backward_samples: each of its samples is V samples."""
    return _backward(info.batch_size, in_dims, args)


def layer_backward_gates(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer_backward_gates."""
    if _is_looped(args[2], in_dims[4], in_dims[5], args[7]):
        return _looped(torch.ops.fused_rnn.layer_backward_gates.default, info.batch_size, in_dims, args)
    fold = _Fold(info.batch_size)
    gates, dstates = torch.ops.fused_rnn.layer_backward_gates(*_folded_arguments(fold, in_dims, args), args[7])
    gates, gates_dim = fold.unfolded(gates, 1)
    dstates, dims = _pairs(_unfolded_states(fold, dstates, in_dims, args))
    return (gates, dstates), (gates_dim, dims)


def _numbers(args: Sequence[Any]) -> tuple[int, Sequence[bool], int]:
    """Recipe, mask and samples of the arguments of layer_backward, whose samples are 1, or layer_backward_samples."""
    if len(args) == 9:
        return args[7], args[8], 1
    recipe, *mask, samples = args[7]
    return recipe, [bool(wanted) for wanted in mask], samples


def _backward(count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """layer_backward, or layer_backward_samples."""
    x, recipe = args[2], _numbers(args)[0]
    if _is_looped(x, in_dims[4], in_dims[5], recipe):
        ops = torch.ops.fused_rnn
        op = ops.layer_backward if len(args) == 9 else ops.layer_backward_samples
        return _looped(op.default, count, in_dims, args)
    layer = unpacked(recipe)
    rows = x.numel() // max(x.shape[-1], 1) // (1 if in_dims[2] is None else count)
    most = max(1, _ELEMENTS // max(1, rows * layer.kind.slots * args[4][1].shape[0]))
    if most >= count:
        return _folded_backward(count, in_dims, args)

    results = []
    for first in range(0, count, most):
        size = min(most, count - first)
        given = [_part(arg, dim, first, size) for arg, dim in zip(args, in_dims, strict=True)]
        found, dims = _folded_backward(size, in_dims, given)
        results.append(found)

    def joined(parts: Sequence[Tensor], dim: Dim) -> Tensor:
        return parts[0] if dim is None else torch.cat(tuple(parts), dim)

    dx = joined([result[0] for result in results], dims[0])
    lists = [
        [
            joined(parts, dim)
            for parts, dim in zip(zip(*(result[i] for result in results), strict=True), dims[i], strict=True)
        ]
        for i in (1, 2)
    ]
    return (dx, *lists), dims


def _folded_arguments(fold: _Fold, in_dims: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """dy, dlast, x, states, params, rows and saved of the folded batch."""
    dy, dlast, x, states, params, rows, saved = args[:7]
    recipe = args[7] if isinstance(args[7], int) else args[7][0]
    dy_dim, dlast_dims, x_dim, state_dims, _, row_dims, saved_dims = in_dims[:7]
    batch = _batch_of(x, x_dim, states, state_dims)
    return [
        None if dy is None else fold.rows(dy, dy_dim, dy.dim() - (dy_dim is not None) - 2),
        fold.each(dlast, dlast_dims, _second_last),
        fold.rows(x, x_dim, x.dim() - (x_dim is not None) - 2),
        fold.each(states, state_dims, _second_last),
        params,
        _folded_rows(fold, rows, row_dims, recipe, batch),
        fold.each(saved, saved_dims, _of_saved),
    ]


def _unfolded_states(
    fold: _Fold, dstates: Sequence[Tensor], in_dims: Sequence[Any], args: Sequence[Any]
) -> list[tuple[Tensor, Dim]]:
    """Gradients of states and of reset states."""
    x, states, rows = args[2], args[3], args[5]
    recipe = args[7] if isinstance(args[7], int) else args[7][0]
    batch = _batch_of(x, in_dims[2], states, in_dims[3])
    found = [fold.unfolded(t, t.dim() - 2) for t in dstates]
    reset_dims: Any = rows_of(in_dims[5], recipe).reset_states
    for i, (state, state_dim) in enumerate(zip(rows_of(rows, recipe).reset_states, reset_dims, strict=True), len(states)):
        gradient, dim = found[i]
        if dim is not None and (state if state_dim is None else state.movedim(state_dim, 0)).shape[-2] == 1 < batch:
            found[i] = gradient.sum(dim - 1, keepdim=True), dim  # one state for all rows of a sample
    return found


def _folded_backward(count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    recipe, mask, samples = _numbers(args)
    fold = _Fold(count)
    dx, dstates, dparams = torch.ops.fused_rnn.layer_backward_samples(
        *_folded_arguments(fold, in_dims, args), [recipe, *mask, samples * count]
    )
    dx, dx_dim = fold.unfolded(dx, dx.dim() - 2)
    dstates, dstate_dims = _pairs(_unfolded_states(fold, dstates, in_dims, args))
    if not mask[2]:
        return (dx, dstates, dparams), (dx_dim, dstate_dims, [None] * len(dparams))
    nested = len(args) == 8  # samples of samples
    if nested:
        dparams = [t.unflatten(0, (samples, count)) for t in dparams]
    return (dx, dstates, dparams), (dx_dim, dstate_dims, [int(nested)] * len(dparams))


def layer_second_order(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer_second_order, whose results are one list."""
    op = torch.ops.fused_rnn.layer_second_order.default
    (found,), (dims,) = _looped(lambda *of_sample: (op(*of_sample),), info.batch_size, in_dims, args)
    return found, dims


def layer_jvp(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::layer_jvp, whose tangents of the weights become those of each sample; in parts, as backward."""
    x, params, (recipe, _) = args[1], args[3], args[6]
    count = info.batch_size
    if recipe & OPTIONS or any(dim is not None for dim in in_dims[3]):
        op = torch.ops.fused_rnn.layer_jvp.default
        (found,), (dims,) = _looped(lambda *of_sample: (op(*of_sample),), count, in_dims, args)
        return found, dims
    rows_of_sample = x.numel() // max(x.shape[-1], 1) // (1 if in_dims[1] is None else count)
    layer = unpacked(recipe)
    elements = rows_of_sample * layer.directions * layer.kind.slots * params[1].shape[0] // layer.kind.gates
    most = max(1, (_DIRECTIONS if x.device.type == "cpu" else _ELEMENTS) // max(1, elements))
    if most >= count:
        return _folded_jvp(count, in_dims, args)
    results, dims = [], None
    for first in range(0, count, most):
        size = min(most, count - first)
        given = [_part(arg, dim, first, size) for arg, dim in zip(args, in_dims, strict=True)]
        found, dims = _folded_jvp(size, in_dims, given)
        results.append(found)
    assert dims is not None
    return [torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), dims, strict=True)], dims


def _part(arg: Any, dim: Any, first: int, size: int) -> Any:
    """Of an argument the samples from ``first`` on."""
    if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_part(a, d, first, size) for a, d in zip(arg, dim, strict=True)]
    return arg.narrow(dim, first, size) if isinstance(dim, int) else arg


def _folded_jvp(count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[list[Tensor], list[Dim]]:
    tangents, x, states, params, rows, saved, (recipe, samples) = args
    dims, x_dim, state_dims, _, row_dims, saved_dims, _ = in_dims
    fold = _Fold(count)
    batch = _batch_of(x, x_dim, states, state_dims)
    before = 1 + len(states)  # tangents of reset states follow
    first = len(tangents) - len(params)
    by_rows = [
        tensor if _is_none(tensor, dim) and dim is None else fold.rows(tensor, dim, tensor.dim() - (dim is not None) - 2)
        for tensor, dim in zip(tangents[:before], dims[:before], strict=True)
    ]
    by_rows += [
        tensor if _is_none(tensor, dim) else _folded_reset_state(fold, tensor, dim, batch)
        for tensor, dim in zip(tangents[before:first], dims[before:first], strict=True)
    ]
    of_params, own = tangents[first:], dims[first:]
    if samples or any(dim is not None for dim in own):
        of_params = [_of_samples(t, dim, count, samples) for t, dim in zip(of_params, own, strict=True)]
        samples = max(samples, 1) * count
    found = torch.ops.fused_rnn.layer_jvp(
        [*by_rows, *of_params],
        *fold.each([x], [x_dim], _second_last),
        fold.each(states, state_dims, _second_last),
        params,
        _folded_rows(fold, rows, row_dims, recipe, batch),
        fold.each(saved, saved_dims, _of_saved),
        [recipe, samples],
    )
    return _pairs([fold.unfolded(t, _second_last(t.dim())) for t in found])


def _of_samples(tensor: Tensor, dim: Dim, count: int, samples: int) -> Tensor:
    """Tangents of a parameter for each sample of the folded batch, [samples * V, ...]; samples: that there were, or 0."""
    if _is_none(tensor, dim):
        return tensor
    if not samples:
        tensor, dim = tensor.unsqueeze(0), None if dim is None else dim + 1
    tensor = tensor.unsqueeze(1).expand(-1, count, *tensor.shape[1:]) if dim is None else tensor.movedim(dim, 1)
    return tensor.flatten(0, 1)


def flags(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::flags(seed, like, probability): a seed for each sample, or one for all."""
    op = torch.ops.fused_rnn.flags.default
    seed, like, p = args
    of_sample = like if in_dims[1] is None else like.select(in_dims[1], 0)
    if in_dims[0] is None:
        return op(seed, of_sample, p), None
    return torch.stack([op(one, of_sample, p) for one in seed.movedim(in_dims[0], 0).unbind()]), 0


def formula(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::formula(x, states, params, rows, cell, flags), whose flags have a recipe's bits of the rows."""
    return _forward(torch.ops.fused_rnn.formula.default, info.batch_size, in_dims, args, args[5])


def formula_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """fused_rnn::formula_backward; where the parameters have a gradient, a call for each sample."""
    cell, flags = args[7:]
    op = torch.ops.fused_rnn.formula_backward.default
    assert extension is not None
    if flags & extension.formula_constants()["GRAD_PARAMS"] or _is_looped(args[2], in_dims[4], in_dims[5], flags):
        return _looped(op, info.batch_size, in_dims, args)
    fold = _Fold(info.batch_size)
    given = (*args[:7], flags)
    dx, dstates, dparams = op(*_folded_arguments(fold, in_dims, given), cell, flags)
    dx, dx_dim = fold.unfolded(dx, dx.dim() - 2)
    dstates, dstate_dims = _pairs(_unfolded_states(fold, dstates, in_dims, given))
    return (dx, dstates, dparams), (dx_dim, dstate_dims, [None] * len(dparams))


class _Info(NamedTuple):
    """What a rule is told of the vmap, as by torch.library.register_vmap."""

    batch_size: int


def _unwrapped(arg: Any, level: int) -> tuple[Any, Any]:
    """A call's argument without the level of vmap, and its vmapped dimensions, in the same lists."""
    if isinstance(arg, Tensor):
        return torch._C._functorch._unwrap_batched(arg, level)
    if isinstance(arg, (list, tuple)):
        parts = [_unwrapped(part, level) for part in arg]
        return [part for part, _ in parts], [dim for _, dim in parts]
    return arg, None


def _wrapped(result: Any, dim: Any, level: int) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)(_wrapped(part, own, level) for part, own in zip(result, dim, strict=True))
    return result if dim is None else torch._C._functorch._add_batch_dim(result, dim, level)


def _one_sample(arg: Any, dim: Any) -> Any:
    """An argument of no samples, with one of zeros in their place."""
    if isinstance(dim, list):
        return [_one_sample(part, own) for part, own in zip(arg, dim, strict=True)]
    if dim is None:
        return arg
    shape = list(arg.shape)
    shape[dim] = 1
    return torch.cat((arg, arg.new_zeros(shape)), dim)  # what is made of it depends on the argument


def _no_samples(result: Any, dim: Any) -> Any:
    """A result without its samples."""
    if isinstance(result, (list, tuple)):
        return type(result)(_no_samples(part, own) for part, own in zip(result, dim, strict=True))
    return result if dim is None else result.narrow(dim, 0, 0)


def _size_of(arg: Any, dim: Any) -> int | None:
    """The size of the vmapped dimension, of any of the argument's tensors that has one."""
    if isinstance(dim, list):
        return next((size for part in zip(arg, dim, strict=True) if (size := _size_of(*part)) is not None), None)
    return None if dim is None else int(arg.shape[dim])


def _kernel(op: Any, rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """What torch calls in place of the op under vmap.

    As torch.library.register_vmap would make it of the rule, whose general trees of arguments take as long as two steps of
    per-sample gradients of a small layer.
    """
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

    def batched(*args: Any) -> Any:
        level: Any = torch._C._functorch.maybe_current_level()
        given, dims = _unwrapped(args, level)
        size = _size_of(given, dims)
        with torch._C._ExcludeDispatchKeyGuard(below):
            if size is None:
                return op(*args)
            if size == 0:  # shapes of results follow from a sample
                result, result_dims = rule(_Info(1), tuple(dims), *_one_sample(given, dims))
                result = _no_samples(result, result_dims)
            else:
                result, result_dims = rule(_Info(size), tuple(dims), *given)
        return _wrapped(result, result_dims, level)

    return batched


def register(library: Any) -> None:
    """Makes torch.func.vmap know the ops; once."""
    own = (layer, layer_backward, layer_backward_samples, layer_backward_gates, layer_second_order, layer_jvp)
    for rule in (*own, flags, formula, formula_backward):
        op = getattr(torch.ops.fused_rnn, rule.__name__).default
        # These two begin in csrc/torch/ops_vmap.cpp, which comes here with what it leaves.
        name = f"{rule.__name__}_vmapped" if rule in (layer, layer_backward) else rule.__name__
        library.impl(name, _kernel(op, rule), "FuncTorchBatched")
