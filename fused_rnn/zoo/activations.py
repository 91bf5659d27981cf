"""Activations by name, for the cells of the zoo that let the user choose.

An activation is a name, or a tuple of a name and its numbers: "tanh", ("elu", 0.5), ("HardSigmoid", 0.2, 0.5). Lower-case
names are those of torch.nn.functional, names in CamelCase those of ONNX's RNN, LSTM and GRU, with ONNX's defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Activation = str | tuple[Any, ...]


def _identity(value: Any) -> Any:
    return value


def _affine(value: Any, alpha: float, beta: float) -> Any:
    return alpha * value + beta


def _scaled_tanh(value: Any, alpha: float, beta: float) -> Any:
    return alpha * torch.tanh(beta * value)


def _hard_sigmoid(value: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return torch.clamp(alpha * value + beta, 0.0, 1.0)


def _thresholded_relu(value: Any, alpha: float = 1.0) -> Any:
    return torch.where(value > alpha, value, 0.0)


def _softplus(value: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return F.softplus(value, beta, threshold)


def _elu(value: Any, alpha: float = 1.0) -> Any:
    return F.elu(value, alpha)


def _leaky_relu(value: Any, slope: float = 0.01) -> Any:
    return F.leaky_relu(value, slope)


def _relu(value: Any) -> Any:
    return torch.relu(value)


def _sigmoid(value: Any) -> Any:
    return torch.sigmoid(value)


def _tanh(value: Any) -> Any:
    return torch.tanh(value)


def _softsign(value: Any) -> Any:
    return F.softsign(value)


def _hardsigmoid(value: Any) -> Any:
    return F.hardsigmoid(value)


def _silu(value: Any) -> Any:
    return F.silu(value)


def _gelu(value: Any) -> Any:
    return F.gelu(value)


def _gelu_tanh(value: Any) -> Any:
    return F.gelu(value, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "identity": _identity,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "relu": _relu,
    "softplus": _softplus,
    "softsign": _softsign,
    "hardsigmoid": _hardsigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "Affine": _affine,
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky_relu,
    "Relu": _relu,
    "ScaledTanh": _scaled_tanh,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Tanh": _tanh,
    "ThresholdedRelu": _thresholded_relu,
}


def checked(argument: str, activation: Any) -> Activation:
    """The activation, if there is such a one; ``argument`` is its name in errors.

    Raises:
        ValueError: no such name, or another count of numbers than the activation takes.
        TypeError: neither a name nor a tuple of a name and numbers.
    """
    name, numbers = (activation, ()) if isinstance(activation, str) else _parts(argument, activation)
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    takes = list(inspect.signature(ACTIVATIONS[name]).parameters.values())[1:]
    needed = [parameter for parameter in takes if parameter.default is inspect.Parameter.empty]
    if not len(needed) <= len(numbers) <= len(takes):
        names = ", ".join(parameter.name for parameter in takes) or "no number"
        raise ValueError(f"{argument}: expected {name} with {names}, got {len(numbers)} number(s)")
    return name if not numbers else (name, *numbers)


def _parts(argument: str, activation: Any) -> tuple[str, tuple[float, ...]]:
    good = isinstance(activation, tuple) and len(activation) > 0 and isinstance(activation[0], str)
    if not good or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in activation[1:]):
        raise TypeError(f"{argument}: expected a name, or a tuple of a name and numbers, got {activation!r}")
    return activation[0], activation[1:]


def apply(activation: Activation, value: Any) -> Any:
    """The activation of a value of a step; one that ``checked`` has returned."""
    name, numbers = (activation, ()) if isinstance(activation, str) else (activation[0], activation[1:])
    return ACTIVATIONS[name](value, *numbers)
