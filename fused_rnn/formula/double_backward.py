"""Derivatives of fused_rnn::formula's backward, and its forward mode: by the kernels (second_order.py), else by ``step``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _backend, reference
from fused_rnn._derivatives import differentiated
from fused_rnn._recipe import Recipe, Rows, StepOptions, rows_of
from fused_rnn.formula import build, direct, ops, second_order, serve
from fused_rnn.formula.alone import in_first_vmap
from fused_rnn.formula.options import rows_with_values
from fused_rnn.formula.parameters import OWN_KIND, as_declared, outputs_first, step_function
from fused_rnn.formula.second_order import Arguments, Given, parts_by
from fused_rnn.formula.tangents import pushed, tangent_of


def without_tangents(t: Tensor) -> Tensor:
    """The same numbers, for ops whose own forward mode is to do nothing: a function's jvp has saved dual numbers."""
    if not t.is_floating_point():
        return t
    if torch._C._functorch.is_batchedtensor(t):  # torch has no rule of _fw_primal under vmap
        level = torch._C._functorch.maybe_get_level(t)
        unwrapped: Any = torch._C._functorch._unwrap_batched(t, level)
        value, dim = unwrapped
        made: Tensor = torch._C._functorch._add_batch_dim(without_tangents(value), dim, level)
        return made
    primal: Tensor = torch.ops.aten._fw_primal.default(t, 0)
    return primal


class _Split:
    """The tensors of a call of fused_rnn::formula_backward, (dy?, dlast, x, states, params, rows, saved), by what they are.

    Rows that have gradients are the reset states and, of a tangents' cell, the values before them.
    """

    def __init__(self, call: ops.BackwardCall, tensors: Sequence[Any]) -> None:
        dy, self.dlast, (self.x,), self.states, self.params, rows, self.kept = ops.parts_of(
            tensors, *call[3:5], 1, *call[5:]
        )
        self.dy = dy[0] if dy else None
        flags = call.flags
        if call.every and isinstance(self.params[0], Tensor):
            rows, flags = ops.full_rows(self.x, self.params, rows, flags)
        self.flags = flags & ~(ops.SAVE | ops.GRAD_X | ops.GRAD_STATES | ops.GRAD_PARAMS | ops.GRAD_VALUES)
        resets = len(rows_of(rows, flags).reset_states)
        self.masks, self.resets = rows[: len(rows) - resets], rows[len(rows) - resets :]

    @property
    def arguments(self) -> Arguments:
        return Arguments(self.x, self.states, self.params, self.resets)


def _by_kernels(formula: str, like: Tensor, weights: bool) -> bool:
    """Whether the kernels of the cell's tangents serve. They are made if need be; where that fails, a warning says so."""
    cell = ops.cell_of(formula)
    why = second_order.why_not(cell, like.device.type, like.dtype)
    if why is None:
        try:
            serve.prepare(ops.remember(tangent_of(cell, weights)), like.device.type, like.dtype)
        except (build.BuildError, RuntimeError) as error:  # they cannot be compiled, or differ from ``step``
            why = f"its tangents cannot be used: {error}"
            _backend.warn_once(f"formula:{formula}:second", f"second derivatives of {type(cell).__name__}: {why}")
    return why is None


def _by(made: Sequence[Any], call: ops.BackwardCall) -> tuple[Arguments, Any]:
    """Gradients of the results (dx, dstates, dresets, dvalues?, dparams) as tangents of the arguments; that of dvalues."""
    none = [None if t is None or t.shape == (0,) else t for t in made]
    params = none[len(none) - call.params :]
    of_rows = none[1 : len(none) - call.params]
    values = of_rows.pop() if call.flags & ops.GRAD_VALUES else None
    return Arguments(none[0], of_rows[: call.states], params, of_rows[call.states :]), values


def gradients(
    call: ops.BackwardCall, tensors: Sequence[Tensor], grads: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``tensors`` (dy?, dlast, x, states, params, rows, saved) but the last, from those of the results of
    fused_rnn::formula_backward."""
    by, of_values = _by(grads, call)
    split = _Split(call, tensors)
    kept, tensors = split.kept, tensors[: len(tensors) - len(split.kept)]
    weights = any(t is not None for t in by.params)
    # The gradients of tangents are made by autograd.grad, which torch's first vmap does not take.
    if of_values is not None or in_first_vmap() or not _by_kernels(call.cell, split.params[0], weights):
        return _by_reference(call, tensors, grads, needs)
    first = int(call.has_dy) + call.lasts  # of what was given for gradients
    before = first + 1 + call.states + call.params
    resets = len(split.resets)
    asked = [*needs[first:before], *needs[before + call.rows - resets : before + call.rows]]
    asked[0] = asked[0] and split.x.is_floating_point()
    kept = [] if call.every else kept
    given = Given(call.cell, split.flags, split.dy, split.dlast, split.arguments, by, split.masks, kept)
    if not torch.is_grad_enabled() and direct.serves(given):
        results, found = direct.second_derivative(given, asked)
    else:
        results, found = second_order.second_derivative(given, asked, again=torch.is_grad_enabled())
    if not call.has_dy:
        results = results[1:]
    results = results[:first]
    of_results = [t if wanted and g.shape != (0,) else None for t, wanted, g in zip(results, needs, tensors, strict=False)]
    return [*of_results, *found[: len(found) - resets], *[None] * (call.rows - resets), *found[len(found) - resets :]]


def tangents(call: ops.BackwardCall, tensors: Sequence[Tensor], by: Sequence[Any]) -> tuple[Any, ...]:
    """Tangents of fused_rnn::formula_backward's results, from those of its arguments (dy?, dlast, x, ..., saved).

    The results are linear in dy and dlast, and gradients of one function of the rest: its second derivative is symmetric.
    """
    tensors = [without_tangents(t) for t in tensors]
    split = _Split(call, tensors)
    first = int(call.has_dy) + call.lasts
    before = first + 1 + call.states + call.params
    of_args = [*by[first:before], *by[before + call.rows - len(split.resets) : before + call.rows]]
    asked = [
        bool(call.flags & ops.GRAD_X),
        *[bool(call.flags & ops.GRAD_STATES)] * call.states,
        *[bool(call.flags & ops.GRAD_PARAMS)] * call.params,
        *[bool(call.flags & ops.GRAD_STATES)] * len(split.resets),
    ]
    found: list[Any] = [None] * len(asked)
    if any(t is not None for t in of_args):
        counts = call.states, call.params, len(split.resets)
        moved = parts_by(of_args, counts)
        given = Given(call.cell, split.flags, split.dy, split.dlast, split.arguments, moved, split.masks)
        found = second_order.second_derivative(given, asked, True)[1]
    found = [found[0], *found[1 : 1 + call.states], *found[1 + call.states + call.params :], *_params(found, call)]
    if any(t is not None for t in by[:first]):
        none = split.params[0].new_empty(0)
        dy = [by[0]] if call.has_dy and by[0] is not None else []
        own = call._replace(has_dy=bool(dy))
        dlast = [none if t is None else t for t in by[int(call.has_dy) : first]]
        linear = ops.Backward.apply(ops.Facts(own), *dy, *dlast, *tensors[first:])
        found = [
            more if one is None else one if more.shape == (0,) else one + more
            for one, more in zip(found, linear, strict=True)
        ]
    return tuple(found)


def _params(found: Sequence[Any], call: ops.BackwardCall) -> Sequence[Any]:
    return found[1 + call.states : 1 + call.states + call.params]


def tangents_of_results(
    formula: str, flags: int, counts: Sequence[int], saved: Sequence[Tensor], by: Sequence[Any]
) -> list[Tensor]:
    """Tangents of fused_rnn::formula's y and last. saved: x, states, params, rows, y and, with all states, these; by: the
    tangents of x, states, params and rows.

    Raises:
        NotImplementedError: the kernels have none; modules take the reference for it.
    """
    x, *others = [without_tangents(t) for t in saved]
    states, params, rows, result = ops.parts_of(others, *counts)
    cell = ops.cell_of(formula)
    why = second_order.why_not(cell, params[0].device.type, params[0].dtype)
    if why is not None:
        raise NotImplementedError(f"fused_rnn::formula has no jvp of {type(cell).__name__}: {why}")
    resets = len(rows_of(rows, flags).reset_states)
    masks = rows[: len(rows) - resets]
    own = (counts[0], counts[1], resets)
    of_args = [*by[: 1 + counts[0] + counts[1]], *by[len(by) - resets :]]
    at = Arguments(x, states, params, rows[len(rows) - resets :])
    known = result if flags & ops.ALL_STATES or len(cell.declaration.states) == 1 else []
    flags &= ~ops.SAVE
    try:
        return second_order.tangents_of_call(formula, flags, at, parts_by(of_args, own), masks, known)
    except second_order.NotCompiled as error:
        _backend.warn_once(f"formula:{formula}:second", f"forward-mode AD of {type(cell).__name__} runs in a loop: {error}")
    run, first = _loop(formula, flags, (x, states, params, rows))
    moved = [*of_args[: 1 + counts[0]], *by[len(by) - resets :], *of_args[1 + counts[0] : 1 + counts[0] + counts[1]]]
    return _tangents_of(run, [*first, *params], [*moved[: len(first)], *moved[len(moved) - counts[1] :]])


# --- by the reference ---


def _by_reference(
    call: ops.BackwardCall, tensors: Sequence[Tensor], grads: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """``gradients`` by differentiating the loop over ``step`` twice."""
    # Reset states are the last of rows, and values come before them; what comes before these has no gradient.
    own = len(rows_of(tensors[len(tensors) - call.rows :], call.flags).reset_states) + bool(call.flags & ops.GRAD_VALUES)
    first = len(tensors) - call.rows
    masks = tensors[first : len(tensors) - own]
    given = [*tensors[:first], *tensors[len(tensors) - own :]]

    def results(given: Sequence[Tensor]) -> list[Tensor]:
        dy, dlast, x, states, params, rows = ops.parts_of(given, *call[3:5], 1, *call[5:7])
        return _differentiable(call, dy[0] if dy else None, dlast, (x[0], states, params, [*masks, *rows]))

    asked = [*needs[:first], *needs[len(tensors) - own : len(tensors)]]
    asked = [wanted and t.is_floating_point() and t.shape != (0,) for wanted, t in zip(asked, given, strict=True)]
    found = differentiated(results, given, asked, grads)
    flat = [t if wanted else None for t, wanted in zip(found, asked, strict=True)]
    return [*flat[:first], *[None] * len(masks), *flat[first:]]


def _differentiable(
    call: ops.BackwardCall, dy: Tensor | None, dlast: Sequence[Tensor], arguments: tuple[Any, ...]
) -> list[Tensor]:
    """The gradients as a differentiable function of everything they depend on: ``step`` in a loop, differentiated."""
    x, _, params, _ = arguments
    asked = [bool(call.flags & bit) for bit in (ops.GRAD_X, ops.GRAD_STATES, ops.GRAD_PARAMS)]
    run, given = _loop(call.cell, call.flags, arguments)
    values = bool(call.flags & ops.GRAD_VALUES)
    wanted = [asked[0], *[asked[1]] * (len(given) - 1 - values), *[True] * values, *[asked[2]] * len(params)]
    grads = differentiated(run, [*given, *params], wanted, [dy, *dlast])
    return [grads[0], *grads[1:]]


def _loop(
    formula: str, flags: int, arguments: tuple[Any, ...]
) -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    """``step`` in a loop as a function of (x, *states, *reset states, values if flags say so, *params), and these but
    params. It gives what the op gives."""
    x, states, params, rows = arguments
    cell = ops.cell_of(formula)
    of_call: Rows = rows_with_values(rows_of(rows, flags), x, params[0].dtype)
    values = [of_call.options.values] if flags & ops.GRAD_VALUES else []
    own, first = 1 + len(states), 1 + len(states) + len(of_call.reset_states)
    given = [x, *states, *of_call.reset_states, *values]
    recipe = Recipe(OWN_KIND, has_biases=bool(flags & ops.BIASES), bidirectional=bool(flags & ops.BIDIRECTIONAL))
    recipe = recipe._replace(all_states=bool(flags & ops.ALL_STATES))
    says = cell.declaration
    hidden = params[0].shape[0] // len(says.weighted_gates)

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        begin = list(args[1:own]) or [params[0].new_zeros(recipe.directions, x.shape[1], hidden)] * len(says.states)
        put = list(args[own:first])
        given_rows = of_call._replace(reset_states=tuple(outputs_first(cell, put) if put else ()))
        if values:
            given_rows = given_rows._replace(options=StepOptions(values=args[first]))
        y, last = reference.layer(
            args[0], outputs_first(cell, begin), args[len(given) :], given_rows, recipe, step_function(cell)
        )
        every = [state.transpose(0, 1).flatten(1) for state in last[len(begin) :]]  # [N, D*H], as the op gives them
        return [y, *as_declared(cell, last[: len(begin)]), *every]

    return run, given


def _tangents_of(run: Callable[[Sequence[Tensor]], list[Tensor]], args: Sequence[Tensor], by: Sequence[Any]) -> list[Tensor]:
    """Tangents of run(args), from those of args (None: it has none)."""
    places = [place for place, tangent in enumerate(by) if tangent is not None]

    def of_moving(*moving: Tensor) -> list[Tensor]:
        every = list(args)
        for place, tensor in zip(places, moving, strict=True):
            every[place] = tensor
        return run(every)

    at, tangents = [args[place] for place in places], [by[place] for place in places]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return list(torch.func.jvp(of_moving, tuple(at), tuple(tangents))[1])
    with torch.enable_grad():
        at = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in at]
        return pushed(of_moving(*at), at, tangents)
