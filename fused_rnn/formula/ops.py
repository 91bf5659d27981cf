"""The ops of compiled formulas: what csrc/torch/formula_ops.cpp leaves to Python (fake kernels, autograd), and a layer on
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _dtensor
from fused_rnn._backend import extension, forward_mode, is_transformed
from fused_rnn._derivatives import above_transforms
from fused_rnn._ops import check_places, fake_gradients
from fused_rnn._recipe import ROWS, Recipe, Rows, rows_of
from fused_rnn.formula.language import Cell
from fused_rnn.formula.options import rows_with_values

# csrc/torch/formula_ops.h's bits of `flags`.
BIASES, BIDIRECTIONAL, SAVE, GRAD_X, GRAD_STATES, GRAD_PARAMS = (1 << bit for bit in range(6))
ALL_STATES, GRAD_VALUES, ADDS_PRODUCTS = _dtensor.FORMULA_ALL_STATES, 1 << 7, 1 << 8

# csrc/core/params.h's DType.
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_cells: dict[str, Cell] = {}  # by name


def dtype_number(dtype: torch.dtype) -> int:
    """csrc/core/params.h's DType."""
    return _DTYPES[dtype]


def cell_of(formula: str) -> Cell:
    """The cell of such a name.

    Raises:
        RuntimeError: no Layer or Step of the cell was made in this process.
    """
    cell = _cells.get(formula)
    if cell is None:
        raise RuntimeError(f"{formula}: no such cell in this process; import its class and make a fused_rnn.Layer of it")
    return cell


def remember(cell: Cell) -> str:
    """Makes a cell known to the ops; returns its name."""
    formula = f"{type(cell).__name__}-{cell.identity}"
    _cells.setdefault(formula, cell)
    return formula


def layer(
    formula: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Rows,
    recipe: Recipe,
    every: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """One layer on the kernels of a formula: x [T, B, I] or packed [N, I] -> y, last states [D, B, H] in the cell's order.

    With ``recipe.all_states`` the last states are followed by all states but the output after every step, [D, N, H] each.
    states: of each [D, B, H], or none for zeros. every: k of ``checkpoint=k`` where it applies (checkpoint.py), and the
    masks in ``rows`` are then options.Masks.compact's; else 0.
    """
    if type(x) is not Tensor or type(params[0]) not in (torch.nn.Parameter, Tensor):
        _dtensor.prepare()
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *params, *rows.reset_states))
    flags = BIASES * recipe.has_biases | BIDIRECTIONAL * recipe.bidirectional | SAVE * differentiates | rows.bits
    flags |= ALL_STATES * recipe.all_states
    given = rows.given()
    if every:
        op = torch.ops.fused_rnn.formula_checkpointed.default
        y, last, _ = op(x, list(states), list(params), given, formula, [flags & ~SAVE, every])
    elif forward_mode() or (differentiates and is_transformed()):
        # Tangents are made of the states after every step; of a tensor of jvp's nothing tells whether there is a backward.
        own = flags | ALL_STATES | SAVE * torch.is_grad_enabled() if forward_mode() else flags
        call = Facts((formula, own, len(states), len(params), len(given)))
        y, *last = _Transformed.apply(call, x, *states, *params, *given)[: 1 + last_count(formula, flags)]
    elif differentiates or torch.compiler.is_compiling() or is_transformed():
        y, last, _ = torch.ops.fused_rnn.formula.default(x, list(states), list(params), given, formula, flags)
    else:  # past the op's autograd, which is Python and would do nothing
        with torch._C._AutoDispatchBelowAutograd():
            y, last, _ = torch.ops.fused_rnn.formula.default(x, list(states), list(params), given, formula, flags)
    if recipe.all_states:
        count = (len(last) + 1) // 2
        last = [*last[:count], *(state.unflatten(-1, (recipe.directions, -1)).transpose(0, 1) for state in last[count:])]
    return y, last


def fake_formula(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Sequence[Tensor], cell: str, flags: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::formula's results."""
    ids = x.dtype is torch.int64
    of_rows = x.shape if ids else x.shape[:-1]
    shape, x = x.shape, params[0] if ids else x  # of the layer's dtype from here on
    check_places(x, states=states, params=params, rows=rows)
    says = cell_of(cell).declaration
    saved, phases, reads_series = extension.formula_facts(cell, dtype_number(x.dtype))  # type: ignore[union-attr]
    directions, hidden = 2 if flags & BIDIRECTIONAL else 1, params[0].shape[0] // len(says.weighted_gates)
    packed = rows_of(rows, flags).offsets is not None
    count = shape[0] if packed else shape[0] * shape[1]
    batch = states[0].shape[1] if packed else shape[1]
    all_states = bool(flags & ALL_STATES)
    kept = [
        x.new_empty(count, directions * hidden)
        for state, reads in enumerate(reads_series)
        if state != says.output and not all_states and (reads or (says.recurrent_gates and state == says.recurrent))
    ]
    kept += [x.new_empty(directions, count, hidden) for _ in range(phases)]
    if saved:
        kept.insert(0, x.new_empty(directions, count, saved, hidden))
    last = [x.new_empty(directions, batch, hidden) for _ in says.states]
    if all_states:
        last += [x.new_empty(count, directions * hidden) for _ in says.states[1:]]
    return x.new_empty(*of_rows, directions * hidden), last, kept if flags & SAVE else []


def fake_formula_backward(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    cell: str,
    flags: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Shapes of fused_rnn::formula_backward's results."""
    like = params[0] if x.dtype is torch.int64 else x
    check_places(like, dy=[dy], dlast=dlast, states=states, params=params, rows=rows, saved=saved)
    of_call = rows_of(rows, flags)
    values = of_call.options.values
    given = [*states, *of_call.reset_states, *([values] if flags & GRAD_VALUES and values is not None else [])]
    return fake_gradients(x, given, params, [flags & GRAD_X, flags & GRAD_STATES, flags & GRAD_PARAMS])


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, states, params, rows, cell, flags = inputs
    y, last, saved = output
    every = last[(len(last) + 1) // 2 :] if flags & ALL_STATES else []  # results that backward reads
    ctx.save_for_backward(x, *states, *params, *rows, *saved, *every, y)
    ctx.counts = (len(states), len(params), len(rows))
    ctx.cell, ctx.flags = cell, flags
    ctx.set_materialize_grads(False)


def _backward(ctx: _Context, dy: Tensor | None, dlast: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of x, states, params and rows."""
    if dy is None and all(grad is None for grad in dlast or []):
        # Backward of a backward comes here for what forward has saved, which has no gradient.
        return None, *([None] * count for count in ctx.counts)
    x, *others = ctx.saved_tensors
    states, params, rows, others = parts_of(others, *ctx.counts)
    resets = len(rows_of(rows, ctx.flags).reset_states)
    masks = len(rows) - resets
    none = (params[0] if x.dtype is torch.int64 else x).new_empty(0)
    given = [none if grad is None else grad for grad in dlast or []]
    needs_x, needs_states, needs_params, needs_rows = ctx.needs_input_grad[:4]
    needs_values = masks > 0 and bool(
        needs_rows[masks - 1]
    )  # values are the last of the masks, and the only ones of numbers
    asked = (bool(needs_x), _any(needs_states) or _any(needs_rows[masks:]), _any(needs_params))
    flags = ctx.flags | GRAD_X * asked[0] | GRAD_STATES * asked[1] | GRAD_PARAMS * asked[2] | GRAD_VALUES * needs_values
    if torch.is_grad_enabled() or is_transformed():  # the gradients may be differentiated
        call = BackwardCall(ctx.cell, flags, ctx.every, dy is not None, len(given), len(states), len(params), len(rows))
        dx, *made = Backward.apply(Facts(call), *([] if dy is None else [dy]), *given, x, *states, *params, *rows, *others)
        dstates, dparams, _ = parts_of(made, len(made) - len(params), len(params))
    else:
        of_call = (ctx.cell, flags, ctx.every)
        dx, dstates, dparams = _run_backward(of_call, dy, given, x, states, params, rows, others)
    of_masks = [*[None] * (masks - 1), dstates[-1]] if needs_values else [None] * masks
    return (
        dx if asked[0] else None,
        dstates[: len(states)] if asked[1] else [None] * len(states),
        dparams if asked[2] else [None] * len(params),
        [*of_masks, *(dstates[len(states) : len(states) + resets] if asked[1] else [None] * resets)],
    )


def _run_backward(
    call: tuple[str, int, int],
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The op of the call: cell, flags and, of a checkpointed layer, k."""
    cell, flags, every = call
    result: tuple[Tensor, list[Tensor], list[Tensor]]
    if every:
        rows, flags = full_rows(x, params, rows, flags)
        op = torch.ops.fused_rnn.formula_checkpointed_backward.default
        result = op(dy, dlast, x, states, params, rows, saved, cell, [flags, every])
    else:
        whole = torch.ops.fused_rnn.formula_backward.default
        result = whole(dy, dlast, x, states, params, rows, saved, cell, flags)
    return result


def full_rows(x: Tensor, params: Sequence[Tensor], rows: Sequence[Tensor], flags: int) -> tuple[list[Tensor], int]:
    """rows and flags as the kernels take them, of those of a checkpointed layer, whose masks are compact."""
    made = rows_with_values(rows_of(rows, flags), x, params[0].dtype)
    return made.given(), flags & ~ROWS | made.bits


def parts_of(tensors: Sequence[Tensor], *counts: int) -> list[list[Tensor]]:
    """The first of so many tensors each, and what remains."""
    parts = []
    for count in counts:
        parts.append(list(tensors[:count]))
        tensors = tensors[count:]
    return [*parts, list(tensors)]


def flat_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Backward of the functions whose arguments are (call, x, *states, *params, *rows) and whose results y, last, saved."""
    needs = ctx.needs_input_grad[1:]
    of_inputs = (needs[0], *parts_of(needs[1:], *ctx.counts)[:3])
    flat = _Context(ctx.saved_tensors, ctx.counts, ctx.cell, ctx.flags, of_inputs, getattr(ctx, "every", 0))
    dx, dstates, dparams, drows = _backward(flat, grads[0], grads[1 : 1 + ctx.lasts])
    return (None, dx, *dstates, *dparams, *drows)


class _Differentiable(torch.autograd.Function):
    """fused_rnn::formula for autograd, on one flat list of tensors.

    What torch.library.register_autograd makes of a function on lists flattens and compares general trees in every call and
    every backward, which takes as long as the kernels of a small layer.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """call: the dispatch keys of the call, cell, flags, numbers of states, params and rows; tensors: x and these."""
        keys, cell, flags, *counts = call
        states, params, rows, _ = parts_of(tensors[1:], *counts)
        y, last, saved = _below_autograd(keys, tensors[0], states, params, rows, cell, flags)
        ctx.lasts = len(last)
        _set_up(ctx, (tensors[0], states, params, rows, cell, flags), (y, last, saved))
        return (y, *last, *saved)

    backward = staticmethod(flat_backward)


def _below_autograd(keys: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fused_rnn.formula.default.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _formula_autograd(
    keys: Any, x: Tensor, states: list[Tensor], params: list[Tensor], rows: list[Tensor], cell: str, flags: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """fused_rnn::formula where torch's dispatcher comes to autograd. keys: of the call."""
    tensors = (x, *states, *params, *rows)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and not _has_tangents(tensors):
        result: tuple[Tensor, list[Tensor], list[Tensor]] = _below_autograd(keys, x, states, params, rows, cell, flags)
        return result
    # The caller may not have known: of a tensor that a transform has wrapped, autograd outside of it tells nothing.
    call = (cell, flags | SAVE, len(states), len(params), len(rows))
    if is_transformed():
        with above_transforms():
            y, *others = _Transformed.apply(Facts(call), *tensors)
    else:
        y, *others = _Differentiable.apply((keys, *call), *tensors)
    count = last_count(cell, flags)
    return y, others[:count], others[count:]


def _has_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a dual number, and forward-mode AD looks at it now."""
    unpack = torch.autograd.forward_ad.unpack_dual
    return forward_mode() and any(t.is_floating_point() and unpack(t).tangent is not None for t in tensors)


class Facts:
    """What a function is called with beside its tensors: one value to torch.func, which would take a tuple apart."""

    def __init__(self, call: Any) -> None:
        self.call = call


class _Transformed(torch.autograd.Function):
    """fused_rnn::formula for torch.func, whose transforms take functions with a context set up apart from forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(facts: Facts, *tensors: Tensor) -> tuple[Tensor, ...]:
        """facts: cell, flags, numbers of states, params and rows; tensors: x and these. Gives y, last, saved."""
        cell, flags, *counts = facts.call
        states, params, rows, _ = parts_of(tensors[1:], *counts)
        y, last, saved = torch.ops.fused_rnn.formula.default(tensors[0], states, params, rows, cell, flags)
        return (y, *last, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        facts, x, *tensors = inputs
        cell, flags, *counts = facts.call
        states, params, rows, _ = parts_of(tensors, *counts)
        ctx.lasts = last_count(cell, flags)
        y, last, saved = output[0], output[1 : 1 + ctx.lasts], output[1 + ctx.lasts :]
        _set_up(ctx, (x, states, params, rows, cell, flags), (y, last, saved))
        ctx.mark_non_differentiable(*saved)
        every = last[(len(last) + 1) // 2 :] if flags & ALL_STATES else ()
        ctx.save_for_forward(x, *states, *params, *rows, y, *every)
        ctx.results = len(output)

    backward = staticmethod(flat_backward)

    @staticmethod
    def jvp(ctx: Any, _: None, *given: Any) -> tuple[Any, ...]:
        from fused_rnn.formula import double_backward  # which needs this module

        found = double_backward.tangents_of_results(ctx.cell, ctx.flags, ctx.counts, ctx.saved_tensors, given)
        return (*found, *[None] * (ctx.results - len(found)))


class _Context(NamedTuple):
    """What _backward reads of autograd's context."""

    saved_tensors: tuple[Tensor, ...]
    counts: tuple[int, int, int]
    cell: str
    flags: int
    needs_input_grad: tuple[Any, ...]
    every: int = 0  # k of a checkpointed layer


def last_count(formula: str, flags: int) -> int:
    """How many tensors `last` has."""
    states = len(cell_of(formula).declaration.states)
    return 2 * states - 1 if flags & ALL_STATES else states


class BackwardCall(NamedTuple):
    """A call of fused_rnn::formula_backward beside its tensors, with their numbers."""

    cell: str
    flags: int
    every: int  # k of a checkpointed layer, or 0
    has_dy: bool
    lasts: int
    states: int
    params: int
    rows: int


class Backward(torch.autograd.Function):
    """fused_rnn::formula_backward as a differentiable function.

    Its own derivatives are those of tangents, by the kernels (double_backward.py); where there are none ``step`` runs in a
    loop.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(facts: Facts, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: dy where it is there, dlast, x, states, params, rows, saved. Gives dx, dstates, dparams."""
        call: BackwardCall = facts.call
        dy, dlast, x, states, params, rows, saved = parts_of(tensors, *call[3:5], 1, *call[5:])
        dx, dstates, dparams = _run_backward(call[:3], dy[0] if dy else None, dlast, x[0], states, params, rows, saved)
        return (dx, *dstates, *dparams)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        facts, *tensors = inputs
        call = facts.call
        ctx.call, ctx.saved = call, len(tensors) - sum(call[3:]) - 1
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        from fused_rnn.formula import double_backward  # which needs this module

        found = double_backward.gradients(ctx.call, ctx.saved_tensors, grads, ctx.needs_input_grad[1:])
        return (None, *found, *[None] * ctx.saved)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
        from fused_rnn.formula import double_backward

        return double_backward.tangents(ctx.call, ctx.saved_tensors, tangents)


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _hidden(cell: Cell, params: Sequence[Tensor]) -> int:
    return params[0].shape[0] // len(cell.declaration.weighted_gates)


if extension is not None:
    torch.library.register_fake("fused_rnn::formula", fake_formula)
    torch.library.register_fake("fused_rnn::formula_backward", fake_formula_backward)
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("formula", _formula_autograd, "Autograd", with_keyset=True)
