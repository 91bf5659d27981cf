"""Tangents of a layer of a formula, and second derivatives: a scan of the cell's tangents (tangents.py) on the kernels.

The states after every step are known once the layer has run, so all that the tangents' cell is given is made at once, by
products over all steps. Everything here is differentiable: the gradients of what is given are those of the kernels, and
those of the states go on through the layer's own backward. So a second derivative is a gradient of tangents: the gradient of
<dy, tangents(args; u)> with regard to args is the second derivative of <dy, layer(args)> times u.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _settings
from fused_rnn._ids import input_product
from fused_rnn._recipe import Rows, StepOptions, rows_of
from fused_rnn.formula import ops
from fused_rnn.formula.language import Cell
from fused_rnn.formula.parameters import recurrent_product, run_phase, specs_of
from fused_rnn.formula.tangents import NoTangents, Tangent, run_base, tangent_of

Maybe = Tensor | None
DTYPES = (torch.float32, torch.float64)


class NotCompiled(RuntimeError):
    """The kernels of a cell's tangents cannot be made, or differ from ``step``."""


class Arguments(NamedTuple):
    """What a layer's results depend on, or the tangents of it (None where there is none)."""

    x: Any
    states: list[Any]  # none for zeros
    params: list[Any]
    resets: list[Any]  # reset states


def why_not(cell: Cell, device_type: str, dtype: torch.dtype) -> str | None:
    """None if the kernels of the cell's tangents could serve a layer, else why not, as a clause; compiles nothing."""
    # They would be compiled and compared inside of a node of autograd. On a GPU such a node runs in a thread of its own, for
    # which the comparison's own backward would wait.
    if device_type != "cpu":
        return "tangents have no CUDA kernels"
    if dtype not in DTYPES:
        return f"there are no tangents in {str(dtype).removeprefix('torch.')}"
    if _settings.extension is None:
        return "there are no kernels"
    return _why_not(cell)


@functools.cache
def _why_not_of(name: str) -> str | None:
    try:
        tangent_of(ops.cell_of(name), weights=True)
    except NoTangents as error:
        return str(error)
    return None


def _why_not(cell: Cell) -> str | None:
    if isinstance(cell, Tangent):
        return "third derivatives are not compiled"
    return _why_not_of(ops.remember(cell))


def tangents(
    formula: str, flags: int, at: Arguments, by: Arguments, rows: Rows, series: tuple[Tensor, Sequence[Tensor]]
) -> list[Tensor]:
    """Tangents of y, of the last states and, if ``flags`` say so, of all states after every step, as the op gives them.

    at: the arguments; by: their tangents. series: y and all other states after every step [N, D*H], at ``at``.
    """
    call = TangentsCall(formula, flags, at, by, rows, series)
    y, last, _ = torch.ops.fused_rnn.formula.default(*call.arguments(call.values()))
    return [y, *last]


class TangentsCall:
    """The call of the tangents' layer."""

    def __init__(
        self, formula: str, flags: int, at: Arguments, by: Arguments, rows: Rows, series: tuple[Tensor, Sequence[Tensor]]
    ) -> None:
        self.base, self.flags, self.at, self.by, self.rows = ops.cell_of(formula), flags, at, by, rows
        says = self.base.declaration
        self.D = 2 if flags & ops.BIDIRECTIONAL else 1
        self.like = at.params[0]
        self.H = self.like.shape[0] // len(says.weighted_gates)
        self.biases = bool(flags & ops.BIASES)
        self.names = [spec.name for spec in specs_of(self.base, 1, says.heads, self.biases)]
        self.of_ids = at.x.dtype is torch.int64
        self.packed = rows.offsets is not None
        self.N = at.x.shape[0] if self.packed else at.x.shape[0] * at.x.shape[1]
        self.B = at.states[0].shape[1] if at.states else at.x.shape[1]
        count = len(self.names)
        self.params = [dict(zip(self.names, at.params[d * count :], strict=False)) for d in range(self.D)]
        self.moves = [dict(zip(self.names, by.params[d * count :], strict=False)) for d in range(self.D)]
        self.weights = any(
            move is not None
            for moves in self.moves
            for name, move in moves.items()
            if name not in ("weight_ih", "bias_ih", "bias_hh")
        )
        self.cell = tangent_of(self.base, self.weights)
        self.before = self._before(series)

    # --- the states before each step ---

    def _before(self, series: tuple[Tensor, Sequence[Tensor]]) -> list[list[Tensor]]:
        """Of each direction the states before every step, [N, H] each in the cell's order."""
        y, every = series
        output = self.base.declaration.output
        after = [*every[:output], y, *every[output:]]
        after = [s.reshape(self.N, self.D, self.H) for s in after]
        return [[self._shifted(s[:, d], i, d) for i, s in enumerate(after)] for d in range(self.D)]

    def _shifted(self, after: Tensor, state: int, d: int) -> Tensor:
        first = self.at.states[state][d] if self.at.states else after.new_zeros(self.B, self.H)
        if self.packed or (d and self.rows.lengths is not None):
            before = torch.cat([first, after]).index_select(0, self._places[d])
        elif d:
            before = torch.cat([after[self.B :], first])
        else:
            before = torch.cat([first, after[: self.N - self.B]])
        resets = self.rows.resets
        if resets is None:
            return before
        return torch.where(resets.reshape(self.N, 1), self._put(state, d), before)

    def _put(self, state: int, d: int) -> Any:
        """What resets put into a state at every row: [N, H], or zero."""
        if not self.rows.reset_states:
            return 0
        put = self.at.resets[state].select(-3, d)
        if put.dim() == 3:  # of every step
            put = put.expand(-1, self.B, -1).flatten(0, 1)
            return put.index_select(0, self._steps * self.B + self._batch) if self.packed else put
        put = put.expand(self.B, -1)
        return put.index_select(0, self._batch) if self.packed else put.repeat(self.N // self.B, 1)

    @functools.cached_property
    def _steps(self) -> Tensor:
        """Of each packed row its step."""
        sizes = self.rows.offsets.diff()  # type: ignore[union-attr]
        return torch.repeat_interleave(sizes, output_size=self.N)

    @functools.cached_property
    def _batch(self) -> Tensor:
        """Of each packed row its place in the batch."""
        return torch.arange(self.N, device=self.like.device) - self.rows.offsets[self._steps]  # type: ignore[index]

    @functools.cached_property
    def _places(self) -> list[Tensor]:
        """Of each direction and row the place of the row before it among B initial states and N rows."""
        if self.packed:
            offsets: Any = self.rows.offsets
            t, b = self._steps, self._batch
            sizes = torch.cat([offsets.diff(), offsets.new_zeros(1)])
            forward = torch.where(t == 0, b, self.B + offsets[(t - 1).clamp(min=0)] + b)
            backward = torch.where(b >= sizes[t + 1], b, self.B + offsets[t + 1] + b)
            return [forward, backward]
        lengths: Any = self.rows.lengths
        n = torch.arange(self.N, device=self.like.device)
        t, b = n // self.B, n % self.B
        return [torch.where(t == 0, b, n), torch.where(t + 1 >= lengths[b], b, n + 2 * self.B)]

    # --- what the cell is given ---

    def values(self) -> Tensor | None:
        """[D, N, K, H]; None where the cell is given nothing."""
        if not self.cell.declaration.given_gates:
            return None
        return torch.stack([torch.stack(self._values(d), 1) for d in range(self.D)])

    def _values(self, d: int) -> list[Tensor]:
        """[N, H] each, in the order of the cell's gates."""
        says, params, moves = self.base.declaration, self.params[d], self.moves[d]
        x: dict[str, Tensor] = {}
        r: dict[str, Tensor] = {}
        wanted = [*self.cell.layout.values, *self.cell.layout.given]
        phases = bool(self.base.phases)
        kinds = {kind for kind, _ in wanted}
        h = self.before[d][says.recurrent] if says.recurrent_gates else None
        if kinds & {"sum", "x"} or phases:
            products = input_product(self.input, params["weight_ih"], params.get("bias_ih")).flatten(0, -2)
            x = dict(zip(says.weighted_gates, products.chunk(len(says.weighted_gates), -1), strict=True))
        if h is not None and (kinds & {"sum", "r"} or phases):
            products = recurrent_product(h, params["weight_hh"], params.get("bias_hh"))
            r = dict(zip(says.recurrent_gates, products.chunk(len(says.recurrent_gates), -1), strict=True))
        if says.given_gates:
            given: Any = self.rows.options.values
            x |= dict(zip(says.given_gates, given[d].unbind(1), strict=True))
        taken, results = self._phases(d, x, r) if phases else ({}, {})
        of_steps = dict(zip(self.cell.layout.of_steps, self.of_steps(d), strict=True))

        def value(kind: str, name: str) -> Tensor:
            match kind:
                case "sum":
                    return x[name] + r[name]
                case "x" | "given":
                    return x[name]
                case "r":
                    return r[name]
                case "phase":
                    return results[name]
                case "source_of_phase":
                    move = moves[f"weight_{name}"]
                    return self._zero if move is None else torch.nn.functional.linear(taken[name], move)
            return of_steps[kind, name]

        return [value(*one) for one in wanted]

    def of_steps(self, d: int) -> list[Tensor]:
        """[N, H] each of Layout.of_steps."""
        says, move = self.base.declaration, self.moves[d].get("weight_hh")
        sources: dict[str, Tensor] = {}
        if move is not None and self.weights:
            products = recurrent_product(self.before[d][says.recurrent], move, None)
            sources = dict(zip(says.recurrent_gates, products.chunk(len(says.recurrent_gates), -1), strict=True))
        return [
            self.before[d][says.states.index(name)] if kind == "state" else sources.get(name, self._zero)
            for kind, name in self.cell.layout.of_steps
        ]

    @functools.cached_property
    def _zero(self) -> Tensor:
        return self.like.new_zeros(1, 1).expand(self.N, self.H)

    @functools.cached_property
    def input(self) -> Tensor:
        """x, 0 in padding, which may hold anything."""
        x: Tensor = self.at.x
        if self.rows.lengths is None:
            return x
        active = torch.arange(x.shape[0], device=x.device).unsqueeze(1) < self.rows.lengths
        return torch.where(active if x.dim() == 2 else active.unsqueeze(-1), x, 0)

    def _phases(self, d: int, x: dict[str, Tensor], r: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the products inside of the step take and give, of all steps at once."""
        says, params = self.base.declaration, self.params[d]
        results: dict[str, Tensor] = {}

        def run(phase: Any, value: Tensor) -> Tensor:
            results[phase.name] = run_phase(phase, value, params)
            return results[phase.name]

        inputs = {f"x.{gate}": value for gate, value in x.items()} | {f"r.{gate}": value for gate, value in r.items()}
        inputs |= dict(zip(says.states, self.before[d], strict=True))
        inputs |= {f"self.{name}": params[name] for name in (*says.units, *says.scalars)}
        _, taken = run_base(self.base, inputs, run)
        return {phase.name: value for phase, value in zip(self.base.phases, taken, strict=True)}, results

    # --- the call ---

    def arguments(self, values: Maybe) -> tuple[Any, ...]:
        """Of fused_rnn::formula. values: what the cell is given."""
        moved_biases = self.biases and any(
            moves.get(name) is not None for moves in self.moves for name in ("bias_ih", "bias_hh")
        )
        x, matrices = self._inputs()
        params = [p for d in range(self.D) for p in self._params(d, matrices[d], moved_biases)]
        flags = self.flags & (ops.BIDIRECTIONAL | ops.ALL_STATES) | ops.BIASES * moved_biases
        resets = tuple(
            torch.zeros_like(at) if by is None else by for at, by in zip(self.at.resets, self.by.resets, strict=True)
        )
        rows = Rows(*self.rows[:3], resets, StepOptions(values=values))
        states: list[Tensor] = []
        if self.packed or any(state is not None for state in self.by.states):
            shape = (self.D, self.B, self.H)
            states = [self.like.new_zeros(shape) if state is None else state for state in self.by.states]
        return x, states, params, rows.given(), _prepared(self.cell, self.like), flags | rows.bits

    def _inputs(self) -> tuple[Tensor, list[Tensor]]:
        """The input of the tangents' layer and, of each direction, its weight_ih: W x' + W' x as one product."""
        moved = [moves["weight_ih"] for moves in self.moves]
        of_weights = any(move is not None for move in moved)
        own = [params["weight_ih"] for params in self.params]
        moved = [torch.zeros_like(w) if move is None else move for w, move in zip(own, moved, strict=True)]
        x, of_x = self.at.x, self.by.x
        if of_x is not None and of_weights:
            return torch.cat([of_x, x], -1), [torch.cat(pair, 1) for pair in zip(own, moved, strict=True)]
        if of_x is not None:
            return of_x, own
        if of_weights:
            return x, moved
        shape = x.shape if self.of_ids else x.shape[:-1]
        return self.like.new_zeros(*shape, 1), [self.like.new_zeros(w.shape[0], 1) for w in own]

    def _params(self, d: int, w_ih: Tensor, biases: bool) -> list[Tensor]:
        says, params, moves = self.base.declaration, self.params[d], self.moves[d]

        def moved(name: str) -> Tensor:
            move: Maybe = moves[name]
            return torch.zeros_like(params[name]) if move is None else move

        made = [w_ih]
        if says.recurrent_gates:
            made.append(params["weight_hh"])
        if biases:
            made += [moved(name) for name in ("bias_ih", "bias_hh") if name in params]
        for own in (says.units, says.scalars):
            made += [params[name] for name in own]
            made += [moved(name) for name in own if self.weights]
        return made + [params[name] for phase in self.base.phases for name in phase.parameters]


def _prepared(cell: Tangent, like: Tensor) -> str:
    """The name of the cell, whose kernels are there.

    Raises:
        NotCompiled: they cannot be made, or differ from ``step``.
    """
    from fused_rnn.formula import build, serve

    formula = ops.remember(cell)
    try:
        serve.prepare(formula, like.device.type, like.dtype)
    except (build.BuildError, RuntimeError) as error:  # they cannot be compiled, or differ from ``step``
        raise NotCompiled(f"{cell!r} cannot be used: {error}") from error
    return formula


def parts_by(tensors: Sequence[Any], counts: tuple[int, int, int]) -> Arguments:
    """x, states, params and reset states of (x, *states, *params, *reset states). counts: of the lists."""
    states, params, resets, _ = ops.parts_of(tensors[1:], *counts)
    return Arguments(tensors[0], states, params, resets)


def tangents_of_call(
    formula: str, flags: int, at: Arguments, by: Arguments, masks: Sequence[Tensor], result: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The same of a call of fused_rnn::formula. masks: of its ``rows``, what is before the reset states.

    result: y and the states after every step where the call had them; else the layer runs again.
    """
    rows = rows_of([*masks, *at.resets], flags)
    if not result:
        y, last, _ = torch.ops.fused_rnn.formula.default(
            at.x, at.states, at.params, [*masks, *at.resets], formula, flags & ~ops.SAVE | ops.ALL_STATES
        )
        result = [y, *last[(len(last) + 1) // 2 :]]
    return tangents(formula, flags, at, by, rows, (result[0], result[1:]))


class Given(NamedTuple):
    """What a call's second derivative is made of."""

    formula: str
    flags: int
    dy: Maybe
    dlast: list[Tensor]  # [0] for none, or fewer
    at: Arguments
    by: Arguments
    masks: list[Tensor]
    kept: Sequence[Tensor] = ()  # what the layer's forward kept for backward, with y as the last, where it is there


def second_derivative(given: Given, asked: Sequence[bool], again: bool) -> tuple[list[Tensor], list[Maybe]]:
    """Tangents of y and the last states, and the gradients of <dy, tangents> by x, states, params and reset states.

    asked: of each of these whether its gradient is; else it is None. again: whether the results may be differentiated.
    """
    counts = len(given.at.states), len(given.at.params), len(given.at.resets)
    flat = [given.at.x, *given.at.states, *given.at.params, *given.at.resets]
    places = [place for place, wanted in enumerate(asked) if wanted]
    cotangents = [given.dy, *given.dlast]
    used = [place for place, grad in enumerate(cotangents) if grad is not None and grad.shape != (0,)]

    def run(*own: Tensor) -> tuple[Tensor, ...]:
        args = list(flat)
        for place, tensor in zip(places, own, strict=True):
            args[place] = tensor
        return tuple(tangents_of_call(given.formula, given.flags, parts_by(args, counts), given.by, given.masks))

    gradients: list[Maybe] = [None] * len(flat)
    own = [flat[place] for place in places]
    if not places or not used:
        return list(run(*own)), gradients
    of_used = [cotangents[place] for place in used]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        pulled: Any = torch.func.vjp(run, *own)
        results, pull = pulled
        found = pull(tuple(cotangents[i] if i in used else torch.zeros_like(one) for i, one in enumerate(results)))
    else:
        with torch.enable_grad():
            # An alias for every use, so that a tensor that comes in twice gets two gradients, not twice their sum.
            own = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in own]
            results = run(*own)
            found = torch.autograd.grad(
                [results[place] for place in used], own, of_used, create_graph=again, allow_unused=True
            )
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return list(results), gradients
