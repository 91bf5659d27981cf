"""Cells as formulas, for the tests of fused_rnn.formula; each with the paper's equations in `step`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fused_rnn.formula import Cell, Gate, operations


class Rnn(Cell):
    gates = ("a",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a)


class ReluRnn(Cell):
    gates = ("a",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return F.relu(x.a + r.a)


class Lstm(Cell):
    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = torch.sigmoid(x.i + r.i)
        f = torch.sigmoid(x.f + r.f)
        g = torch.tanh(x.g + r.g)
        o = torch.sigmoid(x.o + r.o)
        c = f * c + i * g
        return o * torch.tanh(c), c


class Gru(Cell):
    gates = ("r", "z", "n")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = torch.sigmoid(x.r + r.r)
        z = torch.sigmoid(x.z + r.z)
        n = torch.tanh(x.n + reset * r.n)
        return n + z * (h - n)


class LiGru(Cell):
    """Ravanelli et al. 2018, without the batch norm."""

    gates = ("z", "g")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        z = torch.sigmoid(x.z + r.z)
        return z * h + (1 - z) * torch.relu(x.g + r.g)


class Janet(Cell):
    """Van der Westhuizen and Lasenby 2018: only the forget gate; beta is a constant of the instance."""

    gates = ("f", "g")

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def step(self, x: Any, r: Any, h: Any) -> Any:
        s = x.f + r.f
        f = torch.sigmoid(s)
        return f * h + (1 - torch.sigmoid(s - self.beta)) * torch.tanh(x.g + r.g)


class PeepholeLstm(Cell):
    """Gers and Schmidhuber 2000."""

    gates = ("i", "f", "g", "o")
    states = ("h", "c")
    unit_parameters = ("p_i", "p_f", "p_o")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        i = torch.sigmoid(x.i + r.i + self.p_i * c)
        f = torch.sigmoid(x.f + r.f + self.p_f * c)
        new_c = f * c + i * torch.tanh(x.g + r.g)
        o = torch.sigmoid(x.o + r.o + self.p_o * new_c)
        return o * torch.tanh(new_c), new_c


class SLstm(Cell):
    """Beck et al. 2024 (xLSTM): exponential gates, normaliser n, stabiliser m."""

    gates = ("i", "f", "z", "o")
    states = ("h", "c", "n", "m")

    def step(self, x: Any, r: Any, h: Any, c: Any, n: Any, m: Any) -> Any:
        log_f = F.logsigmoid(x.f + r.f) + m
        log_i = x.i + r.i
        new_m = torch.maximum(log_f, log_i)
        i = torch.exp(log_i - new_m)
        f = torch.exp(log_f - new_m)
        c = f * c + i * torch.tanh(x.z + r.z)
        n = f * n + i
        return torch.sigmoid(x.o + r.o) * c / n, c, n, new_m


class MinimalRnn(Cell):
    """Chen 2017: z has no recurrent product; u reads the input's embedding by the gate's own block of weights."""

    gates = (Gate("z", recurrent=False), "u")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        u = torch.sigmoid(x.u + r.u)
        return u * h + (1 - u) * torch.tanh(x.z)


class IndRnn(Cell):
    """Li et al. 2018: every unit sees only itself."""

    gates = (Gate("a", recurrent=False),)
    unit_parameters = {"u": 0.5}

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.relu(x.a + self.u * h)


class FastRnn(Cell):
    """Kusupati et al. 2018: learnable numbers."""

    gates = ("a",)
    scalar_parameters = {"alpha": -3.0, "beta": 3.0}

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.sigmoid(self.alpha) * torch.tanh(x.a + r.a) + torch.sigmoid(self.beta) * h


class RecurrentOnly(Cell):
    """A gate without input, an output that is not the state that recurs."""

    gates = ("a", Gate("k", input=False))
    states = ("s", "y")
    output = "y"
    recurrent = "s"

    def step(self, x: Any, r: Any, s: Any, y: Any) -> Any:
        s = torch.tanh(x.a + r.a) + 0.5 * s
        return s, s * torch.sigmoid(r.k)


class Mgu(Cell):
    """Zhou et al. 2016: the second product, of f h, is inside of the step."""

    gates = ("f", Gate("g", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        f = torch.sigmoid(x.f + r.f)
        return (1 - f) * h + f * torch.tanh(x.g + self.product("u", f * h))


class NormLstm(Cell):
    """Layer norm of the cell state before the output (after Ba et al. 2016), RMS norm of the candidate."""

    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        g = torch.tanh(self.rms_norm(x.g + r.g, "g"))
        c = torch.sigmoid(x.f + r.f) * c + torch.sigmoid(x.i + r.i) * g
        return torch.sigmoid(x.o + r.o) * torch.tanh(self.layer_norm(c, "c")), c


class Everything(Cell):
    """Every operation of the language that the other cells lack; one gate of its own each, so that nothing cancels."""

    gates = ("a", "b", Gate("e", recurrent=False))
    states = ("h", "c")
    unit_parameters = ("w",)
    scalar_parameters = ("k",)

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        a, b = x.a + r.a, x.b - r.b
        u = F.softplus(a) + F.silu(b) + F.gelu(x.e) + F.gelu(a, approximate="tanh") + F.hardtanh(b, -0.7, 0.9)
        u = u + F.softsign(b) + F.elu(a, 1.3) + F.leaky_relu(b, 0.1) + F.relu6(4 * a)
        v = torch.erf(a) + torch.sin(b) + torch.cos(x.e) + torch.expm1(a) + torch.log1p(torch.abs(b)) + torch.square(h)
        v = v + torch.log(torch.exp(a) + 1.5) + torch.sqrt(1 + b * b) + F.softplus(b, 2.0, 0.5)
        v = v + (2 - a) / (2 + torch.cos(b)) + torch.add(a, b, alpha=0.3)
        w = torch.minimum(a, c) + torch.clamp(b, -0.5, 0.5) + torch.clamp(a, min=x.e * 0.1) + torch.clamp(h, max=0.3)
        w = w + torch.where(a > b, a * self.w, self.k) + torch.where(h <= 0.1, 0.2, b) + torch.where(a == b, 1.0, h)
        w = w + torch.where(a >= 0, -a, torch.where(b != c, b, 0.0)) + torch.where(c < 0.2, a, b)
        return torch.tanh(0.1 * u + 0.1 * w) * torch.reciprocal(1 + torch.exp(v)), 0.5 * c + torch.sigmoid(v) * torch.tanh(w)


class OddNames(Cell):
    """Variables with names that C++ or the struct has for something else."""

    gates = ("double",)
    states = ("int", "a")
    unit_parameters = ("V",)

    def step(self, x: Any, r: Any, int: Any, a: Any) -> Any:
        double, tanh, d, after, p = x.double + r.double, int * 2, x.double * r.double, int + 1, self.V * a
        t1, h_prev, int_prev = double * tanh, d * after, p + tanh
        return torch.tanh(double + p * t1 + h_prev * int_prev), torch.tanh(a + tanh)


class HeadedSLstm(SLstm):
    heads = 3


class Delay(Cell):
    """The state before the last one, handed on as it is."""

    gates = ("a",)
    states = ("h", "last")

    def step(self, x: Any, r: Any, h: Any, last: Any) -> Any:
        return torch.tanh(x.a + r.a + 0.5 * last) * h, h


class SameTwice(Cell):
    """Two states with one value."""

    gates = ("f", "g")
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        f = torch.sigmoid(x.f + r.f)
        c = torch.sigmoid(f * c + (1 - f) * (x.g + r.g))
        return c, c


class OutputLast(Cell):
    """Three states, of which the output is the last and the one that recurs the second."""

    gates = ("f", "g")
    states = ("c", "s", "y")
    output = "y"
    recurrent = "s"

    def step(self, x: Any, r: Any, c: Any, s: Any, y: Any) -> Any:
        f = torch.sigmoid(x.f + r.f)
        c = f * c + (1 - f) * torch.tanh(x.g + r.g)
        return c, torch.tanh(c - 0.3 * y), f * s + 0.2 * c


class ResetFirst(Cell):
    """A GRU whose candidate is the first gate."""

    gates = ("n", "z", "r")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
        return n + torch.sigmoid(x.z + r.z) * (h - n)


class EveryFunction(Cell):
    """Every function of the table, by each of its names that takes one or two tensors."""

    gates = ("a", "b")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        a, b = 0.5 + torch.sigmoid(x.a + r.a), 0.5 + torch.sigmoid(x.b + r.b)
        total = h * 0.1
        for function, takes in FUNCTIONS:
            if takes == "comparison":
                total = total + torch.where(function(a, b), a, b)
            else:
                total = total + (function(a) if takes == 1 else function(a, b))
        return torch.tanh(0.01 * total)


def _name_of(function: Any) -> str:
    name: str = torch.overrides.resolve_name(function)
    return name


def _functions() -> list[tuple[Any, Any]]:
    """(function, how many tensors it takes)."""
    found = []
    for function in sorted(operations.ALLOWED, key=_name_of):
        name = _name_of(function).rsplit(".", 1)[-1]
        if name == "where":
            continue
        a = torch.full((2,), 0.7)
        for count in (1, 2):
            try:
                result = function(*[a] * count)
            except (TypeError, ValueError, RuntimeError):
                continue
            if result is NotImplemented:
                continue
            found.append((function, "comparison" if result.dtype == torch.bool else count))
            break
    return found


FUNCTIONS = _functions()

CELLS = (
    Rnn(),
    ReluRnn(),
    Lstm(),
    Gru(),
    LiGru(),
    Janet(1.5),
    PeepholeLstm(),
    SLstm(),
    MinimalRnn(),
    IndRnn(),
    FastRnn(),
    RecurrentOnly(),
    Everything(),
    OddNames(),
    HeadedSLstm(),
    Delay(),
    SameTwice(),
    OutputLast(),
    ResetFirst(),
    EveryFunction(),
)
