"""Cells that discretise differential equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_rnn.formula.language import Cell, Gate
from fused_rnn.zoo.activations import Activation, apply, checked


class AntisymmetricRNN(Cell):
    """The RNN with antisymmetric recurrent weights: a step of Euler's method for a stable system.

    Chang, Chen, Haber and Chi 2019, "AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks"::

        h = h + epsilon f(W x + (M - gamma I) h + b)     M = U - U^T

    M is weight_hh; ``antisymmetric(layer)`` makes it U - U^T and keeps it so in training. Without that, it is any matrix.

    Args:
        epsilon: size of the step.
        gamma: damping.
        f: the activation.
    """

    gates = ("a",)

    def __init__(self, epsilon: float = 0.01, gamma: float = 0.01, f: Activation = "tanh") -> None:
        self.epsilon, self.gamma = epsilon, gamma
        self.f = checked("f", f)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return h + self.epsilon * apply(self.f, x.a + r.a - self.gamma * h)


class GatedAntisymmetricRNN(Cell):
    """The antisymmetric RNN with a gate that has the same recurrent product.

    Chang, Chen, Haber and Chi 2019, "AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks"::

        q = (M - gamma I) h + b'     h = h + epsilon sigmoid(W x + q + b) tanh(W x + q + b)     M = U - U^T

    M is weight_hh; ``antisymmetric(layer)`` makes it U - U^T and keeps it so in training. Without that, it is any matrix.

    Args:
        epsilon: size of the step.
        gamma: damping.
    """

    gates = (Gate("z", recurrent=False), "a")

    def __init__(self, epsilon: float = 0.01, gamma: float = 0.01) -> None:
        self.epsilon, self.gamma = epsilon, gamma

    def step(self, x: Any, r: Any, h: Any) -> Any:
        q = r.a - self.gamma * h
        return h + self.epsilon * torch.sigmoid(x.z + q) * torch.tanh(x.a + q)


class Antisymmetric(nn.Module):
    """A parametrization: the matrix U - U^T of a matrix U [H, H]."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A U whose matrix is the antisymmetric part of the weight."""
        return weight / 2


def antisymmetric(module: nn.Module) -> nn.Module:
    """Makes the recurrent weights of a Layer or Step of AntisymmetricRNN or of its gated form U - U^T, in place.

    Uses torch.nn.utils.parametrize: the parameters are U, parametrizations.weight_hh_l0.original and so on, and start with
    the antisymmetric part of the weights. Such a module is saved by its state_dict; torch does not pickle it.

    Returns:
        The same module.

    Raises:
        TypeError: not a Layer or Step of such a cell.
    """
    cell = getattr(module, "cell", None)
    if not isinstance(cell, (AntisymmetricRNN, GatedAntisymmetricRNN)):
        raise TypeError(
            "module: expected a Layer or Step of AntisymmetricRNN or GatedAntisymmetricRNN, got "
            f"{type(module).__name__}{'' if cell is None else f' of {type(cell).__name__}'}"
        )
    for name in [name for name, _ in module.named_parameters() if name.startswith("weight_hh")]:
        parametrize.register_parametrization(module, name, Antisymmetric())
    return module


class CoRNN(Cell):
    """The coupled oscillatory RNN.

    Rusch and Mishra 2021, "Coupled Oscillatory Recurrent Neural Network (coRNN): An Accurate and (Gradient) Stable
    Architecture for Learning Long Time Dependencies", equation 3::

        z = z + dt (tanh(W x + U h + V z + b) - gamma h - epsilon z)     h = h + dt z

    h is the paper's y. V is weight_z.

    Args:
        dt: size of the step.
        gamma: stiffness.
        epsilon: damping.
    """

    gates = ("a",)
    states = ("h", "z")

    def __init__(self, dt: float = 0.1, gamma: float = 1.0, epsilon: float = 1.0) -> None:
        self.dt, self.gamma, self.epsilon = dt, gamma, epsilon

    def step(self, x: Any, r: Any, h: Any, z: Any) -> Any:
        force = torch.tanh(x.a + r.a + self.product("z", z))
        z = z + self.dt * (force - self.gamma * h - self.epsilon * z)
        return h + self.dt * z, z


class UnICORNN(Cell):
    """The undamped independent controlled oscillatory RNN: every unit sees only itself.

    Rusch and Mishra 2021, "UnICORNN: A Recurrent Model for Learning Very Long Time Dependencies"::

        z = z - dt sigmoid(c) (tanh(W x + w h + b) + alpha h)     h = h + dt sigmoid(c) z

    h is the paper's y.

    Args:
        dt: size of the step.
        alpha: stiffness.
    """

    gates = (Gate("a", recurrent=False),)
    states = ("h", "z")
    unit_parameters = ("w", "c")
    w: Any
    c: Any

    def __init__(self, dt: float = 0.1, alpha: float = 0.0) -> None:
        self.dt, self.alpha = dt, alpha

    def step(self, x: Any, r: Any, h: Any, z: Any) -> Any:
        scale = self.dt * torch.sigmoid(self.c)
        z = z - scale * (torch.tanh(x.a + self.w * h) + self.alpha * h)
        return h + scale * z, z


class LEM(Cell):
    """The long expressive memory: two coupled states with step sizes of their own.

    Rusch, Mishra, Erichson and Mahoney 2022, "Long Expressive Memory for Sequence Modeling", equation 3::

        d_z, d_h = dt sigmoid(W x + U h + b)     z = (1 - d_z) z + d_z tanh(W x + U h + b)
                                                 h = (1 - d_h) h + d_h tanh(W x + V z + b)

    h is the paper's y. The z of V z is the new one. V is weight_h.

    Args:
        dt: the largest step.
        old_z: whether the z of V z is the one before the step, as in torchrecurrent.
    """

    gates = ("d_h", "d_z", "z", Gate("h", recurrent=False))
    states = ("h", "z")

    def __init__(self, dt: float = 1.0, old_z: bool = False) -> None:
        self.dt, self.old_z = dt, old_z

    def step(self, x: Any, r: Any, h: Any, z: Any) -> Any:
        d_h = self.dt * torch.sigmoid(x.d_h + r.d_h)
        d_z = self.dt * torch.sigmoid(x.d_z + r.d_z)
        new_z = z + d_z * (torch.tanh(x.z + r.z) - z)
        seen = z if self.old_z else new_z
        return h + d_h * (torch.tanh(x.h + self.product("h", seen)) - h), new_z
