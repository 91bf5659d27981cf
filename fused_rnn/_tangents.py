"""Tangents of a layer's results (forward-mode AD) by torch's ops, which are differentiable themselves.

For tangents of tangents; those of a layer alone are a scan of the kernels (fused_rnn::layer_jvp).

    a'_t = v's share of the products + W_hh h'_{t-1}, then h'_t and c'_t by the cell's derivative

Products of x and of h_{t-1} are batched over T; a step has one product and a few operations on [B, H]. The derivatives of
backward are those of csrc/torch/second_order.cpp. Letters as in functional.py; ' marks a tangent; V_ih, V_hh, v_x: the
tangents of W_ih, W_hh, x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _settings
from fused_rnn._kinds import GRU, LSTM, RNN_IDENTITY, RNN_RELU, RNN_TANH
from fused_rnn._recipe import Recipe, Rows

Maybe = Tensor | None


class Call(NamedTuple):
    """A layer's call, and v, the tangents of its arguments."""

    x: Tensor  # [T, B, I]
    states: list[Tensor]
    params: list[Tensor]
    rows: Rows
    recipe: Recipe
    v_x: Maybe
    v_states: list[Maybe]
    v_params: list[Maybe]


DEVICES = ("cpu", "cuda")  # whose kernels have tangents, and second derivatives
SERVED = (
    "expected an RNN, LSTM or GRU in float32 or float64 without zoneout, recurrent_dropout and state_clip; and for a jvp of "
    "a jvp, without lengths, packed rows, projection, reset states and all states"
)


def serves(x: Tensor, per_direction: int, rows: Rows, recipe: Recipe) -> bool:
    """Whether the ops have the tangents of such a layer. per_direction: number of parameters of one direction."""
    return by_kernels(x, rows, recipe) or by_scan(x, per_direction, rows, recipe)


def by_kernels(x: Tensor, rows: Rows, recipe: Recipe) -> bool:
    """Whether fused_rnn::layer_jvp has them (csrc/torch/second_order.cpp). It has no tangents itself."""
    return x.device.type in DEVICES and _is_known(x, rows, recipe) and not _in_two_levels() and kernels_serve(x)


def kernels_serve(x: Tensor) -> bool:
    """Whether the scans of csrc/torch/second_order.cpp may serve x's device: on a GPU once family step is verified there."""
    extension: Any = _settings.extension
    if extension is None or extension.second_order_serves(x):
        return extension is not None
    if x.device.type != "cuda":
        return False
    from .tuning.serve import prove_second_order  # which needs the ops

    return prove_second_order(x.get_device())


def _in_two_levels() -> bool:
    """Whether a torch.func.jvp runs inside of another: tangents may have tangents."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def by_scan(x: Tensor, per_direction: int, rows: Rows, recipe: Recipe) -> bool:
    """Whether this file has them."""
    projected = per_direction > 2 * (1 + recipe.has_biases)
    plain = rows.lengths is None and rows.offsets is None and not rows.reset_states
    plain = plain and not (projected or recipe.all_states)
    return plain and x.device.type in DEVICES and _is_known(x, rows, recipe)


def _is_known(x: Tensor, rows: Rows, recipe: Recipe) -> bool:
    known = recipe.cell in _TANGENTS and x.dtype in (torch.float32, torch.float64)
    return known and x.numel() > 0 and not rows.options.any()


def tangents(call: Call, y: Tensor) -> list[Tensor]:
    """Tangents of y and of the last states in the direction v; differentiable by torch's ops."""
    per_direction = len(call.params) // call.recipe.directions
    scans = [
        _Direction(call, direction, slice(direction * per_direction, (direction + 1) * per_direction), y)
        for direction in range(call.recipe.directions)
    ]
    last = [torch.stack([scan.last[i] for scan in scans]) for i in range(call.recipe.kind.states)]
    return [torch.cat([scan.y_tangent() for scan in scans], 2), *last]


class _Direction:
    """One direction, its steps in the order of its scan."""

    def __init__(self, call: Call, direction: int, own: slice, y: Tensor) -> None:
        self.cell, self.reverse = call.recipe.cell, direction == 1
        self.w_ih, self.w_hh = call.params[own][:2]
        self.hidden = self.w_hh.shape[1]
        self.biases = call.params[own][2:]
        self.v_ih, self.v_hh = call.v_params[own][:2]
        self.v_biases = call.v_params[own][2:]
        self.x, self.v_x = self._ordered(call.x), None if call.v_x is None else self._ordered(call.v_x)
        states, v_states = ([s[direction] if s is not None else None for s in of] for of in (call.states, call.v_states))
        self.keep = None if call.rows.resets is None else self._ordered(~call.rows.resets).unsqueeze(-1)
        h = self._ordered(y.unflatten(2, (-1, self.hidden))[:, :, direction])
        self.h = h
        self.h_prev = self._before(h, states[0] if states else None)
        self.a: Sequence[Tensor] = ()  # activated gates
        self.c = h
        self._activate(states[1] if len(states) > 1 else None)
        self.c_prev = self._before(self.c, states[1] if len(states) > 1 else None)
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

    def _tangents(self) -> None:
        """The scan of the tangents of h and c after each step."""
        rows = self.w_hh.shape[0]
        zeros = self.x.new_zeros(1).expand(*self.x.shape[:2], rows)
        of_x = zeros if self.v_x is None else self.v_x @ self.w_ih.t()
        if self.v_ih is not None:
            of_x = of_x + self.x @ self.v_ih.t()
        of_h = zeros if self.v_hh is None else self.h_prev @ self.v_hh.t()
        if self.biases:
            v_b_ih, v_b_hh = self.v_biases
            of_x = of_x if v_b_ih is None else of_x + v_b_ih
            of_h = of_h if v_b_hh is None else of_h + v_b_hh
        _TANGENTS[self.cell](self, of_x, of_h)

    def _steps(self, source: Tensor, step: Callable[[int, Tensor, Tensor], Tensor], h: Tensor) -> Tensor:
        """The tangents of h [T, B, H]; step(t, product [B, G*H], h before) -> h after."""
        w, after = self.w_hh.t().contiguous(), []
        for t, given in enumerate(source.unbind()):
            h = self._kept(h, t)
            h = step(t, torch.addmm(given, h, w), h)
            after.append(h)
        return torch.stack(after)

    def lstm_tangents(self, of_x: Tensor, of_h: Tensor) -> None:
        i, f, g, o = self.a
        tanh_c = self.c.tanh()
        # dc / da of i, f, g; dh / da of o
        slopes = [g * i * (1 - i), self.c_prev * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
        factors, forget, of_c = torch.cat(slopes, 2).unbind(), f.unbind(), (o * (1 - tanh_c * tanh_c)).unbind()
        c = self.v_before[1]

        def step(t: int, product: Tensor, h: Tensor) -> Tensor:
            nonlocal c
            p_i, p_f, p_g, p_o = (product * factors[t]).split(self.hidden, 1)
            c = torch.addcmul(p_i + p_f + p_g, forget[t], self._kept(c, t))
            return torch.addcmul(p_o, of_c[t], c)

        self.h_dot = self._steps(of_x + of_h, step, self.v_before[0])
        self.last = [self.h_dot[-1], c]

    def gru_tangents(self, of_x: Tensor, of_h: Tensor) -> None:
        r, z, n, hn = self.a
        x_r, x_z, x_n = of_x.chunk(3, -1)
        source = torch.cat([x_r, x_z, torch.zeros_like(x_r)], -1) + of_h
        of_n = (1 - z) * (1 - n * n)  # dh / d(x_n)
        factors = torch.cat([of_n * hn * r * (1 - r), (self.h_prev - n) * z * (1 - z), of_n * r], -1).unbind()
        given, update = (of_n * x_n).unbind(), z.unbind()

        def step(t: int, product: Tensor, h: Tensor) -> Tensor:
            p_r, p_z, p_n = (product * factors[t]).split(self.hidden, 1)
            return torch.addcmul(given[t] + p_r + p_z + p_n, update[t], h)

        self.h_dot = self._steps(source, step, self.v_before[0])
        self.last = [self.h_dot[-1]]

    def rnn_tangents(self, of_x: Tensor, of_h: Tensor) -> None:
        of_a = _SLOPES[self.cell](self.h)
        factors = None if of_a is None else of_a.unbind()
        self.h_dot = self._steps(
            of_x + of_h, lambda t, product, h: product if factors is None else product * factors[t], self.v_before[0]
        )
        self.last = [self.h_dot[-1]]

    def y_tangent(self) -> Tensor:
        return self._ordered(self.h_dot)


# dh / da of an RNN, by its h; None: 1.
_SLOPES: dict[int, Callable[[Tensor], Maybe]] = {
    RNN_TANH: lambda h: 1 - h * h,
    RNN_RELU: lambda h: (h > 0).to(h.dtype),
    RNN_IDENTITY: lambda h: None,
}
# The cells that have tangents here, and what makes those of their h and c.
_TANGENTS: dict[int, Callable[[_Direction, Tensor, Tensor], None]] = {
    LSTM: _Direction.lstm_tangents,
    GRU: _Direction.gru_tangents,
    **dict.fromkeys(_SLOPES, _Direction.rnn_tangents),
}


def call_of(given: dict[str, Any], tangents: Sequence[Tensor]) -> Call:
    """given: x, states, params, rows and recipe of the op, without reset states; tangents: of x, states and params, [0] for
    none."""
    count = len(given["states"])
    v = [None if t.shape == (0,) else t for t in tangents]
    return Call(**given, v_x=v[0], v_states=v[1 : 1 + count], v_params=v[1 + count :])
