"""Checks of the modules, in torch.nn's words; _checks.py has those of the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _checks
from fused_rnn._kinds import number_of_nonlinearity


def check_nonlinearity(value: Any) -> None:
    """Raises ValueError, in torch.nn.RNN's words, for a nonlinearity that RNN lacks."""
    try:
        number_of_nonlinearity(value)
    except LookupError as names:
        raise ValueError(f"Unknown nonlinearity '{value}'. Select from {names}.") from None


def type_name(tensor: Tensor) -> str:
    """The dtype as torch's error messages spell it: Float, Double, BFloat16."""
    return tensor.type().rsplit(".", 1)[-1].removesuffix("Tensor")


def check_like(input: Tensor, tensor: Tensor, name: str, wide: bool = False) -> None:
    """Raises RuntimeError, in torch's words, unless the tensor is on input's device and, outside autocast, of its dtype.

    wide: the tensor is an LSTM's c, which may be float32 where the input has 16 bits.
    """
    if tensor.device != input.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, found input tensor at {input.device} "
            f"and {name} tensor at {tensor.device}"
        )
    if wide and _checks.is_wide_c(tensor, input):
        return
    if tensor.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(
            f"Input and {name} tensors are not the same dtype, found input tensor with {type_name(input)} "
            f"and {name} tensor with {type_name(tensor)}"
        )


def check_parameters(input: Tensor, names: Sequence[str], weights: Sequence[Any]) -> None:
    """Raises, by its name, for the first weight that is no dense tensor of input's device and, outside autocast, dtype.

    In torch's words, which name no weight, where all weights are alike: then the input does not fit the module.
    """
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, Tensor):
            raise TypeError(f"expected Tensor as parameter {name}, but got {type(weight).__name__}")
        problem = _checks.layout_problem(weight)
        if problem is not None:
            raise RuntimeError(f"parameter {name}: {problem}")
    alike = len({(weight.dtype, weight.device) for weight in weights}) == 1
    for name, weight in zip(names, weights, strict=True):
        check_like(input, weight, "parameter" if alike else f"parameter {name}")


def check_layout(tensor: Tensor, name: str) -> None:
    """Raises RuntimeError unless the tensor is dense. Before sizes are read, which some nested tensors do not have."""
    problem = _checks.layout_problem(tensor)
    if problem is not None:
        raise RuntimeError(f"{name}: {problem}")
