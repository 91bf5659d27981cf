"""Cells with several layers of their own inside a step."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate


class NAS(Cell):
    """The cell that a search by reinforcement learning found.

    Zoph and Le 2017, "Neural Architecture Search with Reinforcement Learning", as in TensorFlow's NASCell. With
    a0 to a7 = W x + U h + b::

        c = tanh(tanh(sigmoid(a0) relu(a1)) + c) tanh(sigmoid(a2) + relu(a3))
        h = tanh(c tanh(tanh(tanh(a4) sigmoid(a5)) + sigmoid(tanh(a6) + sigmoid(a7))))
    """

    gates = tuple(f"a{index}" for index in range(8))
    states = ("h", "c")

    def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
        first = torch.tanh(torch.sigmoid(x.a0 + r.a0) * torch.relu(x.a1 + r.a1))
        second = torch.tanh(torch.sigmoid(x.a2 + r.a2) + torch.relu(x.a3 + r.a3))
        third = torch.tanh(torch.tanh(x.a4 + r.a4) * torch.sigmoid(x.a5 + r.a5))
        fourth = torch.sigmoid(torch.tanh(x.a6 + r.a6) + torch.sigmoid(x.a7 + r.a7))
        c = torch.tanh(first + c) * second
        return torch.tanh(c * torch.tanh(third + fourth)), c


class SCRN(Cell):
    """The structurally constrained recurrent network: a slow context beside the state.

    Mikolov, Joulin, Chopra, Mathieu and Ranzato 2015, "Learning Longer Memory in Recurrent Neural Networks",
    without the output layer::

        s = (1 - alpha) (W_s x + b) + alpha s     h = sigmoid(W x + U h + P s + b)

    P is weight_s.

    Args:
        alpha: share of the context that stays.
        learnable: whether alpha is a parameter of the layer, which starts there.
    """

    gates = (Gate("s", recurrent=False), "h")
    states = ("h", "s")
    alpha: Any

    def __init__(self, alpha: float = 0.95, learnable: bool = False) -> None:
        self.learnable = learnable
        if learnable:
            self.scalar_parameters = {"alpha": alpha}
        else:
            self.alpha = alpha

    def step(self, x: Any, r: Any, h: Any, s: Any) -> Any:
        s = (1 - self.alpha) * x.s + self.alpha * s
        return torch.sigmoid(x.h + r.h + self.product("s", s)), s


class FeedbackSCRN(Cell):
    """SCRN with its output layer, whose output recurs in place of the hidden units, as in torchrecurrent.

    After Mikolov, Joulin, Chopra, Mathieu and Ranzato 2015, "Learning Longer Memory in Recurrent Neural Networks"::

        s = (1 - alpha) (W_s x + b) + alpha s     y = tanh(V_h sigmoid(W x + U y + P s + b) + V_s s + b_y)

    P is weight_s, V_h is weight_y_h, V_s is weight_y_s. alpha is a parameter of the layer.

    Args:
        alpha: the start of alpha, the share of the context that stays.
    """

    gates = (Gate("s", recurrent=False), "h")
    states = ("y", "s")
    unit_parameters = {"b_y": 0.0}
    alpha: Any
    b_y: Any

    def __init__(self, alpha: float = 0.5) -> None:
        self.scalar_parameters = {"alpha": alpha}

    def step(self, x: Any, r: Any, y: Any, s: Any) -> Any:
        s = (1 - self.alpha) * x.s + self.alpha * s
        h = torch.sigmoid(x.h + r.h + self.product("s", s))
        return torch.tanh(self.product("y_h", h) + self.product("y_s", s) + self.b_y), s


class RHN(Cell):
    """The recurrent highway network: several highway layers a step, with coupled gates.

    Zilly, Srivastava, Koutnik and Schmidhuber 2017, "Recurrent Highway Networks", equations 6 to 9, c = 1 - t::

        s_0 = h     g_l = tanh(W x [l = 1] + U_l s_{l-1} + b_l)
                    t_l = sigmoid(W x [l = 1] + U_l s_{l-1} + b_l)     s_l = g_l t_l + s_{l-1} (1 - t_l)     h = s_depth

    The first layer's weights are the layer's weight_ih and weight_hh, those of layer l weight_g{l}, weight_t{l}, b_g{l} and
    b_t{l}.

    Args:
        depth: highway layers.
    """

    gates = ("g", "t")

    def __init__(self, depth: int = 3) -> None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth: expected an int of at least 1, got {depth!r}")
        self.depth = depth
        self.unit_parameters = {f"b_{gate}{layer}": 0.0 for layer in range(2, depth + 1) for gate in "gt"}

    def step(self, x: Any, r: Any, h: Any) -> Any:
        h = h + torch.sigmoid(x.t + r.t) * (torch.tanh(x.g + r.g) - h)
        for layer in range(2, self.depth + 1):
            g = torch.tanh(self.product(f"g{layer}", h) + getattr(self, f"b_g{layer}"))
            t = torch.sigmoid(self.product(f"t{layer}", h) + getattr(self, f"b_t{layer}"))
            h = h + t * (g - h)
        return h
