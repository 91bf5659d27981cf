"""Second derivatives of a layer of a formula by the kernels alone, where nothing differentiates them again.

As second_order.second_derivative, with less work: what the layer's forward kept is not made again, and the gradients of the
products that the tangents' cell is given come to the layer's own backward (kFormulaAddsProducts), which multiplies the sum
of both. On a CPU, for cells whose tangents are given all products of the step, none of them inside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn._backend import extension
from fused_rnn._ids import input_product
from fused_rnn._recipe import rows_of
from fused_rnn.formula import ops
from fused_rnn.formula.parameters import recurrent_product
from fused_rnn.formula.second_order import Given, Maybe, TangentsCall, parts_by


def serves(given: Given) -> bool:
    """Whether second_derivative serves such a call."""
    cell = ops.cell_of(given.formula)
    if torch._C._functorch.peek_interpreter_stack() is not None or given.at.params[0].device.type != "cpu":
        return False
    return not cell.phases and not cell.declaration.given_gates and _moved(given).layout.has_all_products


def _moved(given: Given) -> Any:
    from fused_rnn.formula.tangents import tangent_of

    return tangent_of(ops.cell_of(given.formula), False)


def _leaf(t: Tensor, wanted: bool = True) -> Tensor:
    return t.detach().requires_grad_(wanted and t.is_floating_point())


def second_derivative(given: Given, asked: Sequence[bool]) -> tuple[list[Tensor], list[Maybe]]:
    """As second_order.second_derivative."""
    at = given.at
    counts = len(at.states), len(at.params), len(at.resets)
    flat = [at.x, *at.states, *at.params, *at.resets]
    own = parts_by([_leaf(t, wanted) for t, wanted in zip(flat, asked, strict=True)], counts)
    leaves = [own.x, *own.states, *own.params, *own.resets]
    kept, series = _kept(given)
    with torch.enable_grad():
        series = [_leaf(t) for t in series]
        output = ops.cell_of(given.formula).declaration.output
        rows = rows_of([*given.masks, *own.resets], given.flags)
        call = TangentsCall(given.formula, given.flags, own, given.by, rows, _output_first(series, output))
        values, pieces = _values(call)
        y, last, _ = torch.ops.fused_rnn.formula.default(*call.arguments(values))
    results = [y, *last]
    cotangents = [given.dy, *given.dlast]
    used = [i for i, grad in enumerate(cotangents) if grad is not None and grad.shape != (0,)]
    of_products, *found = _gradients([results[i] for i in used], [values, *leaves], [cotangents[i] for i in used])
    d_values = torch.zeros_like(values) if of_products is None else of_products
    moving = [(piece, d_values[place]) for place, piece in pieces if piece.requires_grad]
    if moving:  # through the states before each step
        through = _gradients([piece for piece, _ in moving], [*series, *leaves], [d for _, d in moving])
        of_series, found = through[: len(series)], _sums(found, through[len(series) :])
    else:
        of_series = [None] * len(series)
    again = _backward(given, kept, _output_first(of_series, output), d_values, asked)
    found = _sums(found, again)
    return [t.detach() for t in results], [t if wanted else None for t, wanted in zip(found, asked, strict=True)]


def _values(call: TangentsCall) -> tuple[Tensor, list[tuple[tuple[Any, ...], Tensor]]]:
    """What the tangents' cell is given [D, N, K, H], a leaf, and its parts that depend on the states before each step: the
    place of each, and the part [N, H]."""
    count = len(call.cell.declaration.given_gates)
    values = call.like.new_empty(call.D, call.N, count, call.H)
    pieces: list[tuple[tuple[Any, ...], Tensor]] = []
    for d in range(call.D):
        with torch.no_grad():
            _products_into(call, d, values[d])
        of_steps = call.of_steps(d)
        for k, piece in enumerate(of_steps, count - len(of_steps)):
            pieces.append(((d, slice(None), k), piece))
            values[d, :, k].copy_(piece.detach())
    return values.requires_grad_(), pieces


def _products_into(call: TangentsCall, d: int, out: Tensor) -> None:
    """The products of the step, at all steps, to the first blocks of out [N, K, H]."""
    says, params = call.base.declaration, call.params[d]
    products = [value for value in call.cell.layout.values if value[0] in ("x", "sum", "r")]
    given: dict[str, tuple[Any, ...]] = {"x": (call.input, "weight_ih", "bias_ih", says.weighted_gates)}
    if says.recurrent_gates:
        given["r"] = call.before[d][says.recurrent].detach(), "weight_hh", "bias_hh", says.recurrent_gates
    for kind, (at, weight, bias, gates) in given.items():
        wanted = [(k, gates.index(name)) for k, (of, name) in enumerate(products) if of in (kind, "sum")]
        adds = [of == "sum" and kind == "r" for of, name in products]
        if kind == "x" and call.of_ids or kind == "r" and says.heads > 1:  # products of their own, then moved
            product = input_product if kind == "x" else recurrent_product
            made = product(at, params[weight], params.get(bias)).reshape(call.N, len(gates), call.H)
            for k, gate in wanted:
                (out[:, k].add_ if adds[k] else out[:, k].copy_)(made[:, gate])
            continue
        at = at.flatten(0, -2)
        for k, gate, count in _runs(wanted, adds):
            rows = slice(gate * call.H, (gate + count) * call.H)
            to = out[:, k : k + count].flatten(1)  # a view: blocks are neighbours
            matrix = params[weight][rows].t()
            if adds[k]:
                to.addmm_(at, matrix)
                if bias in params:
                    to.add_(params[bias][rows])
            elif bias in params:
                torch.addmm(params[bias][rows], at, matrix, out=to)
            else:
                torch.mm(at, matrix, out=to)


def _runs(wanted: Sequence[tuple[int, int]], adds: Sequence[bool]) -> list[tuple[int, int, int]]:
    """(block, gate, count) of neighbours in both, that are all added or none."""
    runs: list[tuple[int, int, int]] = []
    for k, gate in wanted:
        if runs and (k, gate) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) and adds[k] == adds[runs[-1][0]]:
            runs[-1] = *runs[-1][:2], runs[-1][2] + 1
        else:
            runs.append((k, gate, 1))
    return runs


def _output_first(series: Sequence[Any], output: int) -> tuple[Any, list[Any]]:
    return series[output], [*series[:output], *series[output + 1 :]]


def _gradients(results: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Any]) -> list[Maybe]:
    """Gradients of the inputs that have one; None where they do not depend on them."""
    places = [place for place, t in enumerate(inputs) if t.requires_grad]
    found: list[Maybe] = [None] * len(inputs)
    own = [inputs[place] for place in places]
    for place, gradient in zip(places, torch.autograd.grad(results, own, grads, allow_unused=True), strict=True):
        found[place] = gradient
    return found


def _sums(some: Sequence[Maybe], more: Sequence[Maybe]) -> list[Maybe]:
    return [b if a is None else a if b is None else a + b for a, b in zip(some, more, strict=True)]


def _kept(given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """What backward with all states takes as ``saved``, and the states after every step in the cell's order, [N, D*H].

    Of what forward kept where that is enough, else of another run of it.
    """
    assert extension is not None
    cell, flags, like = ops.cell_of(given.formula), given.flags, given.at.params[0]
    says = cell.declaration
    saved, _, reads = extension.formula_facts(given.formula, ops.dtype_number(like.dtype))
    others = [index for index in range(len(says.states)) if index != says.output]
    kept = list(given.kept)
    if kept and not flags & ops.ALL_STATES:
        own = [index for index in others if reads[index] or (says.recurrent_gates and index == says.recurrent)]
        needed = {says.states.index(name) for kind, name in _moved(given).layout.values if kind == "state"}
        if needed <= {*own, says.output}:
            y = kept[-1].reshape(-1, kept[-1].shape[-1])
            there = dict(zip(own, kept[int(saved > 0) : -1], strict=True))
            every = [there.get(index, y) for index in others]  # of the rest nothing is read
            kept = [*kept[: int(saved > 0)], *every, kept[-1]]
        else:
            kept = []
    if not kept:
        y, last, made = torch.ops.fused_rnn.formula.default(
            given.at.x, given.at.states, given.at.params, [*given.masks, *given.at.resets], given.formula,
            flags | ops.SAVE | ops.ALL_STATES,
        )  # fmt: skip
        kept = [*made, *last[len(says.states) :], y]
    y = kept[-1].reshape(-1, kept[-1].shape[-1])
    every = kept[int(saved > 0) : -1]
    return kept, [*every[: says.output], y, *every[says.output :]]


def _backward(
    given: Given, kept: Sequence[Tensor], series: tuple[Maybe, Sequence[Maybe]], products: Tensor, asked: Sequence[bool]
) -> list[Maybe]:
    """The layer's own backward, from gradients of the states after every step and of the products: those of x, states,
    params and reset states."""
    at = given.at
    none = at.params[0].new_empty(0)
    dy, others = series
    dlast = [none] * (1 + len(others)) + [none if t is None else t for t in others]
    if dy is not None:
        dy = dy.view(kept[-1].shape)
    states, resets = len(at.states), len(at.resets)
    wants_states = any(asked[1 : 1 + states]) or any(asked[len(asked) - resets :] if resets else [])
    wants_params = any(asked[1 + states : 1 + states + len(at.params)])
    flags = given.flags | ops.ALL_STATES | ops.ADDS_PRODUCTS
    flags |= ops.GRAD_X * asked[0] | ops.GRAD_STATES * wants_states | ops.GRAD_PARAMS * wants_params
    dx, dstates, dparams = torch.ops.fused_rnn.formula_backward.default(
        dy, [*dlast, products], at.x, at.states, at.params, [*given.masks, *at.resets], kept, given.formula, flags
    )
    found = [dx, *dstates[:states], *dparams, *dstates[states:]]
    return [None if t.shape == (0,) else t for t in found]
