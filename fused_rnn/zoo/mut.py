"""Three cells that an evolutionary search found."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.formula.language import Cell, Gate


class MUT1(Cell):
    """The first of the cells that an evolutionary search found.

    Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", MUT1::

        z = sigmoid(W x + b)            g = tanh(U_g (r h) + tanh(W x + b) + b_g)
        r = sigmoid(W x + U h + b)      h = g z + h (1 - z)

    The paper's tanh(x) has no W. U_g is weight_g.
    """

    gates = (Gate("z", recurrent=False), "r", Gate("g", recurrent=False))
    unit_parameters = {"b_g": 0.0}
    b_g: Any

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = torch.sigmoid(x.r + r.r)
        g = torch.tanh(self.product("g", reset * h) + torch.tanh(x.g) + self.b_g)
        return h + torch.sigmoid(x.z) * (g - h)


class MUT2(Cell):
    """The second of the cells that an evolutionary search found.

    Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", MUT2::

        z, r = sigmoid(W x + U h + b)     g = tanh(U_g (r h) + W x + b)     h = g z + h (1 - z)

    In the paper r has x in place of W x. U_g is weight_g.
    """

    gates = ("z", "r", Gate("g", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        reset = torch.sigmoid(x.r + r.r)
        g = torch.tanh(x.g + self.product("g", reset * h))
        return h + torch.sigmoid(x.z + r.z) * (g - h)


class MUT3(Cell):
    """The third of the cells that an evolutionary search found.

    Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", MUT3::

        z = sigmoid(W x + U_z tanh(h) + b)     g = tanh(U_g (r h) + W x + b)
        r = sigmoid(W x + U h + b)             h = g z + h (1 - z)

    U_z is weight_z, U_g is weight_g.
    """

    gates = (Gate("z", recurrent=False), "r", Gate("g", recurrent=False))

    def step(self, x: Any, r: Any, h: Any) -> Any:
        z = torch.sigmoid(x.z + self.product("z", torch.tanh(h)))
        reset = torch.sigmoid(x.r + r.r)
        g = torch.tanh(x.g + self.product("g", reset * h))
        return h + z * (g - h)
