"""The recurrent layers in plain PyTorch: the definition the kernels are tested against, and the fallback without them.

``layer``, ``rnn`` and ``cell`` are the ops of the same name (csrc/torch/ops.cpp). Written to be read; never tuned.
Differentiable any number of times, and by ``torch.func``, because every operation is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn._ids import input_product
from fused_rnn._kinds import GRU, LSTM
from fused_rnn._recipe import Recipe, Rows, StepOptions

_NO_OPTIONS = StepOptions()
_NONLINEARITIES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda a: a,
}


def step(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    recipe: Recipe,
    options: StepOptions = _NO_OPTIONS,
) -> list[Tensor]:
    """One step of one direction: x [B, I], states h [B, P] and, of an LSTM, c [B, H] -> the states after it.

    x may be ids [B] that are in range, in place of one-hot rows, as everywhere here.
    Formulas: the documentation of torch.nn.RNNCell, LSTMCell (with W_hr of torch.nn.LSTM) and GRUCell.
    options: of this step and direction; zoneout is zoneout's.
    """
    cell, h = recipe.cell, states[0]
    w_ih, w_hh = params[:2]
    b_ih, b_hh = params[2:4] if recipe.has_biases else (None, None)
    gi = input_product(x, w_ih, b_ih)
    gh = torch.nn.functional.linear(h if options.product is None else h * options.product, w_hh, b_hh)

    def masked(candidate: Tensor) -> Tensor:
        return candidate if options.candidate is None else candidate * options.candidate

    def clipped(state: Tensor) -> Tensor:
        clip: Any = options.clip
        return state if clip is None else state.clamp(-clip, clip)

    if cell == LSTM:
        i, f, g, o = (gi + gh).chunk(4, dim=-1)
        # Of c's dtype, which may be wider than the others'.
        c = clipped(f.sigmoid() * states[1] + i.sigmoid() * masked(g.tanh()))
        h = (o.sigmoid() * c.tanh()).to(gi.dtype)
        if len(params) == 2 * (1 + recipe.has_biases) + 1:
            h = torch.nn.functional.linear(h, params[-1])
        return [h, c]
    if cell == GRU:
        x_r, x_z, x_n = gi.chunk(3, dim=-1)
        h_r, h_z, h_n = gh.chunk(3, dim=-1)
        r = (x_r + h_r).sigmoid()
        z = (x_z + h_z).sigmoid()
        n = masked((x_n + r * h_n).tanh())
        return [clipped(n + z * (h - n))]
    nonlinearity = _NONLINEARITIES.get(recipe.kind.nonlinearity)
    if nonlinearity is None:
        raise NotImplementedError(f"the reference has no step of the cell {recipe.kind.name}")
    return [clipped(nonlinearity(gi + gh))]


def zoneout(before: Tensor, after: Tensor, kept: Tensor | float | None) -> Tensor:
    """A state after a step whose units keep their value where `kept` is true, or by the share that it is."""
    if kept is None:
        return after
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        return torch.where(kept, before, after)
    return kept * before + (1 - kept) * after


StepFunction = Callable[..., list[Tensor]]  # as ``step``; of a cell of one's own the only options are ``values``


def _scan(
    x: Tensor, states: list[Tensor], params: Sequence[Tensor], rows: Rows, recipe: Recipe, reverse: bool, step: StepFunction
) -> tuple[list[Tensor], list[Tensor]]:
    """One direction over time: (each state after every step, the last states).

    See csrc/core/active.h for lengths and offsets, modifier.h for resets.
    """
    sizes = None if rows.offsets is None else rows.offsets.diff().tolist()
    xs = x.unbind() if sizes is None else x.split(sizes)
    resets = None if rows.resets is None else rows.resets.unbind() if sizes is None else rows.resets.split(sizes)
    starts = [] if sizes is None else rows.offsets.tolist()  # type: ignore[union-attr]
    options = rows.options.of_direction(int(reverse)) if rows.options.any() else None
    put = [state.select(-3, int(reverse)) for state in rows.reset_states]
    every: list[list[Tensor]] = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        n = None if sizes is None else sizes[t]  # the rows of a packed step are the first n of the batch
        before = [state[:n] for state in states]
        if resets is not None:
            keep = ~resets[t].unsqueeze(-1)
            given: list[Any] = [(state[t] if state.dim() == 3 else state)[:n] for state in put] or [0] * len(before)
            before = [torch.where(keep, state, new) for state, new in zip(before, given, strict=True)]
        if rows.lengths is not None:  # the state of a row without a step here may hold anything, as its padding may
            active = (t < rows.lengths).unsqueeze(-1)
            before = [torch.where(active, state, 0) for state in before]
        if options is None:
            after = step(xs[t], before, params, recipe)
        else:
            batch = xs[t].shape[0]
            first = starts[t] if starts else t * batch
            of_step = options.of_step(slice(first, first + batch), batch)
            after = step(xs[t], before, params, recipe, of_step)
            kept = (of_step.zoneout_h, of_step.zoneout_c, *[None] * len(after))  # of a formula there is none
            after = [zoneout(*state) for state in zip(before, after, kept, strict=False)]
        if rows.lengths is None:
            every.append(after)
        else:
            every.append([torch.where(active, new, 0) for new in after])
            after = [torch.where(active, new, old) for new, old in zip(after, states, strict=True)]
        ended = n is not None and n < states[0].shape[0]  # rows that took no part in this step keep their state
        states = [torch.cat([new, old[n:]]) if ended else new for new, old in zip(after, states, strict=True)]
    if reverse:
        every.reverse()
    join = torch.stack if sizes is None else torch.cat
    return [join(of_steps) for of_steps in zip(*every, strict=True)], states


def layer(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Rows,
    recipe: Recipe,
    step: StepFunction = step,
) -> tuple[Tensor, list[Tensor]]:
    """One layer, both directions: x [T, B, I] or packed [N, I] -> y [T, B, D*P] or [N, D*P], last states [D, B, .].

    With ``recipe.all_states`` the last states are followed by all states but the output after every step, [D, N, .] each.
    states: of each [D, B, .], or none for zeros. With ``offsets`` they give the batch size and must be there.
    """
    directions = recipe.directions
    per_direction = len(params) // directions
    if rows.lengths is not None:  # padding may hold anything, and NaN would come through the gradients of the masks below
        active = torch.arange(x.shape[0], device=x.device).unsqueeze(1) < rows.lengths
        x = torch.where(active if x.dim() == 2 else active.unsqueeze(-1), x, 0)
    scans = []
    for d in range(directions):
        p = params[d * per_direction : (d + 1) * per_direction]
        first = [s[d] for s in states] if states else zero_states(x, x.shape[1], p, recipe)
        scans.append(_scan(x, first, p, rows, recipe, d == 1, step))
    y = torch.cat([every[0] for every, _ in scans], dim=-1)
    last = [torch.stack(of_directions) for of_directions in zip(*(last for _, last in scans), strict=True)]
    if recipe.all_states:
        for of_directions in zip(*(every[1:] for every, _ in scans), strict=True):
            series = torch.stack(of_directions).to(y.dtype)  # a wide c comes as the others
            last.append(series if rows.offsets is not None else series.flatten(1, 2))
    return y, last


# As ``layer``, without its step.
LayerFunction = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Rows, Recipe], tuple[Tensor, list[Tensor]]]


def zero_states(x: Tensor, batch: int, params: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    """The initial states [B, .] of one direction where none are given."""
    w_hh = params[1]
    sizes = [w_hh.shape[1], w_hh.shape[0] // recipe.kind.gates]
    like = w_hh if x.dtype is torch.int64 else x
    return [like.new_zeros(batch, size) for size in sizes[: recipe.kind.states]]


def rnn(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Rows,
    recipe: Recipe,
    layer: LayerFunction = layer,
) -> tuple[Tensor, list[Tensor]]:
    """A stack of layers with dropout between them; shapes as torch.nn.LSTM's, states [L*D, B, .]. layer: of a cell that is
    no kind of ours.

    With ``recipe.all_states`` the last states are followed by each state after every step [T, L*D, B, .], packed
    [N, L*D, .], the output first.
    """
    num_layers, directions = recipe.num_layers, recipe.directions
    per_layer = len(weights) // num_layers
    y = input.transpose(0, 1) if recipe.batch_first else input
    if recipe.batch_first and rows.resets is not None:
        rows = rows._replace(resets=rows.resets.transpose(0, 1))
    last, every = [], []
    for index in range(num_layers):
        of_layer = [state[index * directions : (index + 1) * directions] for state in states]
        params = weights[index * per_layer : (index + 1) * per_layer]
        y, states_after = layer(y, of_layer, params, rows.of_layer(index, directions), recipe.of_layer())
        if recipe.all_states:
            count = (len(states_after) + 1) // 2
            every.append([_of_directions(y, directions), *(_of_steps(s, y) for s in states_after[count:])])
            states_after = states_after[:count]
        last.append(states_after)
        if recipe.dropout and recipe.training and index + 1 < num_layers:
            y = torch.nn.functional.dropout(y, recipe.dropout)
    y = y.transpose(0, 1) if recipe.batch_first else y
    joined = last[0] if num_layers == 1 else [torch.cat(of_layers) for of_layers in zip(*last, strict=True)]
    return y, [*joined, *(torch.cat(of_layers, 1) for of_layers in zip(*every, strict=True))]


def _of_directions(y: Tensor, directions: int) -> Tensor:
    """Outputs [T, B, D*P] or [N, D*P] as [T, D, B, P] or [N, D, P]."""
    by_direction = y.unflatten(-1, (directions, -1))
    return by_direction.transpose(1, 2) if y.dim() == 3 else by_direction


def _of_steps(state: Tensor, y: Tensor) -> Tensor:
    """A state after every step [D, N, H] as [T, D, B, H], or packed as [N, D, H]."""
    return state.transpose(0, 1) if y.dim() == 2 else state.unflatten(1, y.shape[:2]).transpose(0, 1)


def cell(input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    """One step of one cell: input [B, I], states [B, H] or none for zeros -> the states after it."""
    return step(input, states or zero_states(input, input.shape[0], params, recipe), params, recipe)
