"""The derivative of a layer's backward, by the kernels: what gradient penalties and Hessian-vector products need.

The gradients (dx, dh0, dc0, dW) of a layer are linear in (dy, dh_n, dc_n). So <v, gradients> = <(dy, ..), tangent of (y, ..)
in the direction v>, and its derivatives are a scan forward and one backward:

    tangents   a'_t = v's share of the products + W_hh h'_{t-1}, then h'_t and c'_t by the cell's derivative; products of x
               and of h_{t-1} are batched over T, a step has one product and a few operations on [B, H]
    q_t        the cell's second derivative: how d_gates_t changes with the tangents, the gradients of h_t and c_t held fixed
    adjoints   D_t = M_t(s_t) + q_t with s_{t-1} = W_hh^T D_t + V_hh^T d_gates_t: the recurrence of backward itself, so its
               kernel runs it, with dy_{t-1} = W_hh^T q_t + V_hh^T d_gates_t in place of dy

Letters as in functional.py; V_ih, V_hh, v_x: the part of v for W_ih, W_hh, x; d: d_gates in the order of csrc/core/params.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn._kinds import GRU, LSTM, RNN_IDENTITY, RNN_RELU, RNN_TANH
from fused_rnn._recipe import ALL_STATES, Recipe, Rows

Maybe = Tensor | None


class Call(NamedTuple):
    """A layer's call, its backward, and v, the gradients of that backward's results."""

    dy: Maybe
    dlast: list[Maybe]  # of each state
    x: Tensor  # [T, B, I]
    states: list[Tensor]
    params: list[Tensor]
    rows: Rows
    saved: list[Tensor]
    recipe: Recipe
    v_x: Maybe
    v_states: list[Maybe]
    v_params: list[Maybe]


DEVICE = "cpu"  # whose kernels take and give c after every step
CELLS = (RNN_TANH, RNN_RELU, RNN_IDENTITY, LSTM, GRU)  # those whose derivatives are below; others take the reference's
SERVED = (
    "expected an RNN, LSTM or GRU in float32 or float64 on a CPU, no lengths, packed rows, projection, reset states, all "
    "states, nor zoneout, recurrent_dropout or state_clip"
)


def serves(x: Tensor, per_direction: int, rows: Rows, recipe: Recipe) -> bool:
    """Whether this file has the derivatives of such a layer. per_direction: number of parameters of one direction."""
    projected = per_direction > 2 * (1 + recipe.has_biases)
    plain = rows.lengths is None and rows.offsets is None and not rows.reset_states and not rows.options.any()
    plain = plain and not (projected or recipe.all_states) and recipe.cell in CELLS
    return plain and x.device.type == DEVICE and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


class Derivatives(NamedTuple):
    """Of every argument: the gradients of <v, gradients>."""

    dy: Tensor
    dlast: list[Tensor]
    x: Tensor
    states: list[Tensor]
    params: list[Tensor]


def derivatives(call: Call) -> Derivatives:
    recipe, x = call.recipe, call.x
    steps, batch, _ = x.shape
    per_direction = len(call.params) // recipe.directions
    y, cs = _outputs(call)
    d = _gates(call, call.dy, call.dlast, [y])[0].unflatten(1, (steps, batch))  # [D, T, B, S, H]
    scans = []
    for direction in range(recipe.directions):
        own = slice(direction * per_direction, (direction + 1) * per_direction)
        scans.append(_Direction(call, direction, own, y, cs, d[direction]))
    # The second run of backward's kernel: all directions at once.
    sources = [scan.sources() for scan in scans]
    dy = torch.cat([h for h, _, _, _ in sources], 2)
    dlast: list[Maybe] = [None] * recipe.kind.states
    if recipe.kind.has_c:
        dlast.append(torch.stack([c.flatten(0, 1) for _, c, _, _ in sources]))  # type: ignore[union-attr]
    made, dstates = _gates(call, dy, dlast, [y], ALL_STATES if recipe.kind.has_c else 0)
    made = made.unflatten(1, (steps, batch))
    parts = [scan.gradients(made[index], q) for index, (scan, (_, _, q, _)) in enumerate(zip(scans, sources, strict=True))]
    first = [torch.stack([before[i] for _, _, _, before in sources]) for i in range(len(dstates))]
    return Derivatives(
        torch.cat([scan.y_tangent() for scan in scans], 2),
        [torch.stack([scan.last[i] for scan in scans]) for i in range(recipe.kind.states)],
        sum(dx for dx, _ in parts),  # type: ignore[arg-type]
        [state + more for state, more in zip(dstates, first, strict=True)],
        [gradient for _, gradients in parts for gradient in gradients],
    )


def tangents(call: Call, y: Tensor) -> list[Tensor]:
    """Tangents of y and of the last states in the direction v; differentiable by torch's ops."""
    per_direction = len(call.params) // call.recipe.directions
    scans = [
        _Direction(call, direction, slice(direction * per_direction, (direction + 1) * per_direction), y, None, None)
        for direction in range(call.recipe.directions)
    ]
    last = [torch.stack([scan.last[i] for scan in scans]) for i in range(call.recipe.kind.states)]
    return [torch.cat([scan.y_tangent() for scan in scans], 2), *last]


def _outputs(call: Call) -> tuple[Tensor, Maybe]:
    """y [T, B, D*H] and c after each step [D, T, B, H]. Not the y that was saved: its owner may have written there since."""
    steps, batch, _ = call.x.shape
    if call.recipe.cell == LSTM:
        gates, cs = call.saved[:2]
        h = gates[:, :, 3] * cs.tanh()  # [D, N, H]
        return h.transpose(0, 1).flatten(1).unflatten(0, (steps, batch)), cs.unflatten(1, (steps, batch))
    recipe = call.recipe.packed | call.rows.bits
    return torch.ops.fused_rnn.layer(call.x, call.states, call.params, call.rows.given(), recipe, False)[0], None


def _gates(call: Call, dy: Maybe, dlast: Sequence[Maybe], y: list[Tensor], bits: int = 0) -> tuple[Tensor, list[Tensor]]:
    none = call.x.new_empty(0)
    saved = [*call.saved[: bool(call.recipe.kind.saved) + call.recipe.kind.has_c], *y]
    made: tuple[Tensor, list[Tensor]] = torch.ops.fused_rnn.layer_backward_gates(
        dy,
        [none if t is None else t for t in dlast],
        call.x,
        call.states,
        call.params,
        call.rows.given(),
        saved,
        call.recipe.packed | call.rows.bits | bits,
    )
    return made


class _Direction:
    """One direction, its steps in the order of its scan."""

    def __init__(self, call: Call, direction: int, own: slice, y: Tensor, cs: Maybe, d: Maybe) -> None:
        """cs and d: c after each step and the gradients of the gates; None where tangents alone are wanted."""
        self.cell, self.reverse = call.recipe.cell, direction == 1
        self.w_ih, self.w_hh = call.params[own][:2]
        self.hidden = self.w_hh.shape[1]
        self.biases = call.params[own][2:]
        self.v_ih, self.v_hh = call.v_params[own][:2]
        self.has_v_biases = call.v_params[own][2:]
        self.x, self.v_x = self._ordered(call.x), None if call.v_x is None else self._ordered(call.v_x)
        self.batch = self.x.shape[1]
        states, v_states = ([s[direction] if s is not None else None for s in of] for of in (call.states, call.v_states))
        self.keep = None if call.rows.resets is None else self._ordered(~call.rows.resets).unsqueeze(-1)
        h = self._ordered(y.unflatten(2, (-1, self.hidden))[:, :, direction])
        self.h = h
        self.h_prev = self._before(h, states[0] if states else None)
        self.a: Sequence[Tensor] = ()  # activated gates
        self.c = h
        if d is None:
            self._activate(states[1] if len(states) > 1 else None)
        elif call.recipe.kind.saved:
            self.a = self._ordered(call.saved[0][direction].unflatten(0, y.shape[:2])).unbind(2)
            self.c = h if cs is None else self._ordered(cs[direction])
        self.c_prev = self._before(self.c, states[1] if len(states) > 1 else None)
        self.d = h.unsqueeze(2) if d is None else self._ordered(d)
        dy = None if call.dy is None else self._ordered(call.dy.unflatten(2, (-1, self.hidden))[:, :, direction])
        self.dy = torch.zeros_like(h) if dy is None else dy
        self.dlast = [None if t is None else t[direction] for t in call.dlast] or [None] * call.recipe.kind.states
        self.v_before = [torch.zeros_like(h[0]) if s is None else s for s in v_states or [None] * call.recipe.kind.states]
        self.last: list[Tensor] = []
        self._tangents()

    def _ordered(self, t: Tensor) -> Tensor:
        return t.flip(0) if self.reverse else t

    def _kept(self, of_states: Tensor, steps: int | slice = slice(None)) -> Tensor:
        """What belongs to the states before these steps, 0 where a reset puts others: 0 * NaN would be NaN."""
        return of_states if self.keep is None else torch.where(self.keep[steps], of_states, 0)

    def _before(self, states: Tensor, first: Maybe) -> Tensor:
        """The state before each step, from that after each."""
        start = torch.zeros_like(states[0]) if first is None else first
        return self._kept(torch.cat([start.unsqueeze(0), states[:-1]]))

    def _activate(self, c: Maybe) -> None:
        """The gates, and c after each step, of what forward was given and has made."""
        of_x, of_h = self.x @ self.w_ih.t(), self.h_prev @ self.w_hh.t()
        if self.biases:
            of_x, of_h = of_x + self.biases[0], of_h + self.biases[1]
        if self.cell == LSTM:
            i, f, g, o = (of_x + of_h).chunk(4, -1)
            self.a = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            given, forget = (self.a[0] * self.a[2]).unbind(), self.a[1].unbind()
            state, every = torch.zeros_like(given[0]) if c is None else c, []
            for t, more in enumerate(given):
                state = torch.addcmul(more, forget[t], self._kept(state, t))
                every.append(state)
            self.c = torch.stack(every)
        elif self.cell == GRU:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            r = (x_r + h_r).sigmoid()
            self.a = r, (x_z + h_z).sigmoid(), (x_n + r * h_n).tanh(), h_n

    def _rg(self, d: Tensor) -> Tensor:
        """The gradients of the recurrent product [T, B, G*H]."""
        return d[:, :, 1:].flatten(2) if self.cell == GRU else d.flatten(2)

    def _ig(self, d: Tensor) -> Tensor:
        """The gradients of the input product [T, B, G*H]."""
        return torch.cat([d[:, :, 1:3], d[:, :, :1]], 2).flatten(2) if self.cell == GRU else d.flatten(2)

    def _tangents(self) -> None:
        """The scan of the tangents: of h and c after each step, and of the pre-activations."""
        rows = self.w_hh.shape[0]
        zeros = self.x.new_zeros(1).expand(*self.x.shape[:2], rows)
        of_x = zeros if self.v_x is None else self.v_x @ self.w_ih.t()
        if self.v_ih is not None:
            of_x = of_x + self.x @ self.v_ih.t()
        of_h = zeros if self.v_hh is None else self.h_prev @ self.v_hh.t()
        if self.biases:
            v_b_ih, v_b_hh = self.has_v_biases
            of_x = of_x if v_b_ih is None else of_x + v_b_ih
            of_h = of_h if v_b_hh is None else of_h + v_b_hh
        if self.cell == LSTM:
            self._lstm_tangents(of_x + of_h)
        elif self.cell == GRU:
            self._gru_tangents(of_x, of_h)
        else:
            self._rnn_tangents(of_x + of_h)

    def _steps(self, source: Tensor, step: Callable[[int, Tensor, Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        """The products of all steps [T, B, G*H] and tangents of h [T, B, H]; step(t, product, h before) -> h after."""
        w, products, after = self.w_hh.t().contiguous(), [], []
        for t, given in enumerate(source.unbind()):
            h = self._kept(h, t)
            product = torch.addmm(given, h, w)
            h = step(t, product, h)
            products.append(product)
            after.append(h)
        return torch.stack(products), torch.stack(after)

    def _lstm_tangents(self, source: Tensor) -> None:
        i, f, g, o = self.a
        self.tanh_c = tanh_c = self.c.tanh()
        self.of_c = o * (1 - tanh_c * tanh_c)  # dh / dc
        self.factors = torch.stack(
            [g * i * (1 - i), self.c_prev * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], 2
        )  # dc / da of i, f, g; dh / da of o
        factors, forget, of_c = self.factors.flatten(2).unbind(), f.unbind(), self.of_c.unbind()
        c, every = self.v_before[1], []
        size = self.hidden

        def step(t: int, product: Tensor, h: Tensor) -> Tensor:
            nonlocal c
            p_i, p_f, p_g, p_o = (product * factors[t]).split(size, 1)
            c = torch.addcmul(p_i + p_f + p_g, forget[t], self._kept(c, t))
            every.append(c)
            return torch.addcmul(p_o, of_c[t], c)

        self.products, self.h_dot = self._steps(source, step, self.v_before[0])
        self.c_dot = torch.stack(every)
        self.last = [self.h_dot[-1], c]

    def _gru_tangents(self, of_x: Tensor, of_h: Tensor) -> None:
        r, z, n, hn = self.a
        x_r, x_z, self.x_n = of_x.chunk(3, -1)
        source = torch.cat([x_r, x_z, torch.zeros_like(x_r)], -1) + of_h
        self.of_n = (1 - z) * (1 - n * n)  # dh / d(x_n)
        factors = torch.cat([self.of_n * hn * r * (1 - r), (self.h_prev - n) * z * (1 - z), self.of_n * r], -1).unbind()
        given, update, size = (self.of_n * self.x_n).unbind(), z.unbind(), self.hidden

        def step(t: int, product: Tensor, h: Tensor) -> Tensor:
            p_r, p_z, p_n = (product * factors[t]).split(size, 1)
            return torch.addcmul(given[t] + p_r + p_z + p_n, update[t], h)

        self.products, self.h_dot = self._steps(source, step, self.v_before[0])
        self.last = [self.h_dot[-1]]

    def _rnn_tangents(self, source: Tensor) -> None:
        if self.cell == RNN_TANH:
            of_a: Maybe = 1 - self.h * self.h
        else:
            of_a = (self.h > 0).to(self.h.dtype) if self.cell == RNN_RELU else None
        factors = None if of_a is None else of_a.unbind()
        self.products, self.h_dot = self._steps(
            source, lambda t, product, h: product if factors is None else product * factors[t], self.v_before[0]
        )
        self.last = [self.h_dot[-1]]

    def _h_gradients(self) -> Tensor:
        """The total gradient of h after each step [T, B, H], of the first backward."""
        through = self._kept(self._rg(self.d) @ self.w_hh)
        last = torch.zeros_like(self.h[0]) if self.dlast[0] is None else self.dlast[0]
        total = self.dy + torch.cat([through[1:], last.unsqueeze(0)])
        if self.cell != GRU:
            return total
        return self._carried(total, self.a[1])

    def _carried(self, given: Tensor, factors: Tensor) -> Tensor:
        """g_t = given_t + factors_{t+1} g_{t+1}, without the second part where step t + 1 begins from a reset."""
        parts, by = given.unbind(), factors.unbind()
        every = [parts[-1]]
        for t in reversed(range(len(parts) - 1)):
            every.append(torch.addcmul(parts[t], self._kept(by[t + 1], t + 1), self._kept(every[-1], t + 1)))
        return torch.stack(every[::-1])

    def sources(self) -> tuple[Tensor, Maybe, Tensor, list[Tensor]]:
        """What the adjoints' scan is given: of h and of c after each step, in the order of time; q; and what reaches the
        states before the first step past that scan."""
        dh = self._h_gradients()
        h_dot_prev = self._before(self.h_dot, self.v_before[0])
        of_h = self.d.new_zeros(1).expand_as(dh)
        of_c: Maybe = None
        if self.cell == LSTM:
            q, of_c = self._lstm_second(dh)
        elif self.cell == GRU:
            q, of_h = self._gru_second(dh, h_dot_prev)
        elif self.cell == RNN_TANH:
            q = (-2 * dh * self.h * self.h_dot).unsqueeze(2)
        else:
            q = torch.zeros_like(self.d)
        before = of_h + self._rg(q) @ self.w_hh
        if self.v_hh is not None:
            before = before + self._rg(self.d) @ self.v_hh
        firsts, given = [], []
        for source in [before] if of_c is None else [before, of_c]:
            kept = self._kept(source)
            firsts.append(kept[0])
            given.append(self._ordered(torch.cat([kept[1:], torch.zeros_like(kept[:1])])))
        self.h_dot_prev = h_dot_prev
        return given[0], given[1] if len(given) > 1 else None, q, firsts

    def _lstm_second(self, dh: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, B, 4, H] and the change of the gradient of c before each step."""
        i, f, g, o = self.a
        tanh_c = self.tanh_c
        last = torch.zeros_like(dh[:1]) if self.dlast[1] is None else self.dlast[1].unsqueeze(0)
        own = dh * self.of_c
        dc = self._carried(torch.cat([own[:-1], own[-1:] + last]), f)  # of c after each step, in total
        i_dot, f_dot, g_dot, o_dot = (self.products.unflatten(2, (4, -1)) * self._slopes(i, f, g, o)).unbind(2)
        c_dot_prev = self._before(self.c_dot, self.v_before[1])
        square = 1 - tanh_c * tanh_c
        dc_dot = dh * square * (o_dot - 2 * o * tanh_c * self.c_dot)
        f_i, f_f, f_g, _ = self.factors.unbind(2)
        q = torch.stack(
            [
                dc_dot * f_i + dc * (g_dot * i * (1 - i) + g * (1 - 2 * i) * i_dot),
                dc_dot * f_f + dc * (c_dot_prev * f * (1 - f) + self.c_prev * (1 - 2 * f) * f_dot),
                dc_dot * f_g + dc * (i_dot * (1 - g * g) - 2 * i * g * g_dot),
                dh * (square * self.c_dot * o * (1 - o) + tanh_c * (1 - 2 * o) * o_dot),
            ],
            2,
        )
        return q, dc_dot * f + dc * f_dot

    @staticmethod
    def _slopes(i: Tensor, f: Tensor, g: Tensor, o: Tensor) -> Tensor:
        return torch.stack([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], 2)

    def _gru_second(self, dh: Tensor, h_dot_prev: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, B, 4, H] in the order of d_gates, and the change of the gradient of h before each step past W_hh."""
        r, z, n, hn = self.a
        p_r, p_z, hn_dot = self.products.chunk(3, -1)
        r_dot, z_dot = r * (1 - r) * p_r, z * (1 - z) * p_z
        n_dot = (1 - n * n) * (self.x_n + r_dot * hn + r * hn_dot)
        dn = dh * self.of_n
        dn_dot = -dh * (z_dot * (1 - n * n) + 2 * (1 - z) * n * n_dot)
        q = torch.stack(
            [
                dn_dot,
                dn_dot * hn * r * (1 - r) + dn * (hn_dot * r * (1 - r) + hn * (1 - 2 * r) * r_dot),
                dh * ((h_dot_prev - n_dot) * z * (1 - z) + (self.h_prev - n) * (1 - 2 * z) * z_dot),
                dn_dot * r + dn * r_dot,
            ],
            2,
        )
        return q, dh * z_dot

    def y_tangent(self) -> Tensor:
        return self._ordered(self.h_dot)

    def gradients(self, made: Tensor, q: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dx [T, B, I], and those of the parameters; made: what the adjoints' scan gave [T, B, S, H]."""
        d = self._ordered(made) + q
        of_input, first_input = self._ig(d), self._ig(self.d)
        of_recurrent = self._rg(d)
        dx = of_input @ self.w_ih
        if self.v_ih is not None:
            dx = dx + first_input @ self.v_ih

        def product(a: Tensor, b: Tensor) -> Tensor:
            return a.flatten(0, 1).t() @ b.flatten(0, 1)

        dw_ih = product(of_input, self.x)
        if self.v_x is not None:
            dw_ih = dw_ih + product(first_input, self.v_x)
        dw_hh = product(of_recurrent, self.h_prev) + product(self._rg(self.d), self.h_dot_prev)
        gradients = [dw_ih, dw_hh]
        if self.biases:
            gradients += [of_input.sum((0, 1)), of_recurrent.sum((0, 1))]
        return self._ordered(dx), gradients


def call_of(given: dict[str, Any], grads: Sequence[Tensor]) -> Call:
    """given: x, states, params, rows, saved, recipe, dy and dlast of the backward op; grads: of its results."""

    def or_none(t: Maybe) -> Maybe:
        return None if t is None or t.shape == (0,) else t

    count = len(given["states"])
    v = [or_none(t) for t in grads]
    dlast = [or_none(t) for t in given.pop("dlast")] or [None] * given["recipe"].kind.states
    return Call(**given, dlast=dlast, v_x=v[0], v_states=v[1 : 1 + count], v_params=v[1 + count :])
