"""Keras's cells as calls of the kernels: their weights in torch.nn's layout, their activations by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import functional
from fused_rnn._kinds import NUMBER_OF_NONLINEARITY
from fused_rnn._recipe import Recipe, Rows
from fused_rnn.zoo.activations import Activation

Run = Callable[[Tensor, Sequence[Tensor], Tensor | None], tuple[Tensor, list[Tensor]]]
"""x [B, T, I], states each [B, H], lengths [B] or None -> output [B, T, H], zero after the lengths, and last states."""


def activation_of(function: Any) -> Activation | None:
    """The name among fused_rnn.zoo.activations of an activation of Keras's; None: it has none there."""
    from keras import activations

    names: dict[Any, Activation] = {
        activations.tanh: "tanh",
        activations.sigmoid: "sigmoid",
        activations.linear: "identity",
        activations.relu: "relu",
        activations.hard_sigmoid: "hardsigmoid",
        activations.softplus: "softplus",
        activations.softsign: "softsign",
        activations.silu: "silu",
        activations.gelu: "gelu",
        activations.elu: "elu",
        activations.leaky_relu: ("leaky_relu", 0.2),
        torch.tanh: "tanh",
        torch.sigmoid: "sigmoid",
        torch.relu: "relu",
    }
    try:
        return names.get(function)
    except TypeError:  # a callable that has no hash
        return None


def lstm(cell: Any, device_type: str) -> Run | None:
    """Of an LSTMCell. Gates i f c o, as in torch.nn."""
    gate, candidate = activation_of(cell.recurrent_activation), activation_of(cell.activation)
    kernel, recurrent, bias = _tensors(cell)
    params = {"weight_ih": kernel.t(), "weight_hh": recurrent.t()}
    if bias is not None:
        params |= {"bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
    if (gate, candidate) == ("sigmoid", "tanh"):
        return functools.partial(_on_torchs_cell, functional.lstm, params)
    return _on_a_formula("LSTM", (gate, candidate, candidate), params, device_type)


def gru(cell: Any, device_type: str) -> Run | None:
    """Of a GRUCell. Gates z r h, of torch.nn's r z n; reset_after=False has the cell ResetFirstGRU."""
    gate, candidate = activation_of(cell.recurrent_activation), activation_of(cell.activation)
    kernel, recurrent, bias = _tensors(cell)
    z, r, n = recurrent.chunk(3, 1)
    reset_first = {"weight_hh": torch.cat([r, z], 1).t(), "weight_n": n.t()}
    params = {"weight_ih": _torchs_order(kernel).t()}
    params |= {"weight_hh": _torchs_order(recurrent).t()} if cell.reset_after else reset_first
    if bias is not None:
        given = bias if cell.reset_after else torch.stack([bias, torch.zeros_like(bias)])
        params |= {"bias_ih": _torchs_order(given[0]), "bias_hh": _torchs_order(given[1])}
        params["bias_hh"] = params["bias_hh"][: params["weight_hh"].shape[0]]
    if cell.reset_after and (gate, candidate) == ("sigmoid", "tanh"):
        return functools.partial(_on_torchs_cell, functional.gru, params)
    name = "GRU" if cell.reset_after else "ResetFirstGRU"
    return _on_a_formula(name, (gate, candidate), params, device_type)


def simple_rnn(cell: Any, device_type: str) -> Run | None:
    """Of a SimpleRNNCell."""
    activation = activation_of(cell.activation)
    kernel, recurrent, bias = _tensors(cell)
    params = {"weight_ih": kernel.t(), "weight_hh": recurrent.t()}
    if bias is not None:
        params |= {"bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
    if activation in NUMBER_OF_NONLINEARITY:
        function = functools.partial(functional.rnn, nonlinearity=activation)
        return functools.partial(_on_torchs_cell, function, params)
    return _on_a_formula("RNN", (activation,), params, device_type)


def _tensors(cell: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    from keras.src.backend import convert_to_tensor

    bias = None if cell.bias is None else convert_to_tensor(cell.bias)
    return convert_to_tensor(cell.kernel), convert_to_tensor(cell.recurrent_kernel), bias


def recurrent_kernel(cell: Any) -> Tensor:
    """[H, G*H]; its dtype is that of the cell's products."""
    return _tensors(cell)[1]


def _torchs_order(weight: Tensor) -> Tensor:
    """Blocks z r n of the last dimension as r z n."""
    z, r, n = weight.chunk(3, -1)
    return torch.cat([r, z, n], -1)


def _on_torchs_cell(
    function: Callable[..., Any], params: dict[str, Tensor], x: Tensor, states: Sequence[Tensor], lengths: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    lifted = [state.unsqueeze(0) for state in states]
    hx = lifted[0] if len(lifted) == 1 else tuple(lifted)
    y, last = function(x, list(params.values()), hx, has_biases=len(params) > 2, batch_first=True, lengths=lengths)
    return y, [state.squeeze(0) for state in (last if isinstance(last, tuple) else (last,))]


@functools.cache
def _formula(name: str, activations: tuple[Activation, ...]) -> tuple[Any, str]:
    """A cell of the zoo and its name among the ops."""
    from fused_rnn import zoo
    from fused_rnn.formula import ops

    cell = getattr(zoo, name)(*activations)
    return cell, ops.remember(cell)


def _on_a_formula(
    name: str, activations: tuple[Activation | None, ...], params: dict[str, Tensor], device_type: str
) -> Run | None:
    """On the zoo's cell; None where an activation has no name there or the cell no kernels here."""
    from fused_rnn.formula import serve

    known = tuple(activation for activation in activations if activation is not None)
    if len(known) < len(activations):
        return None
    cell, formula = _formula(name, known)
    if not serve.has_kernels(formula, device_type, params["weight_ih"].dtype):
        return None
    return functools.partial(_run_formula, cell, formula, params)


def _run_formula(
    cell: Any, formula: str, params: dict[str, Tensor], x: Tensor, states: Sequence[Tensor], lengths: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    from fused_rnn.formula import ops
    from fused_rnn.formula.parameters import OWN_KIND, specs_of

    has_biases = "bias_ih" in params
    specs = specs_of(cell, x.shape[2], states[0].shape[1], has_biases)
    weights = [params[spec.name].contiguous() for spec in specs]
    rows = Rows(None if lengths is None else lengths.to(torch.int64))
    recipe = Recipe(OWN_KIND, 1, has_biases)
    lifted = [state.unsqueeze(0).contiguous() for state in states]
    y, last = ops.layer(formula, x.transpose(0, 1).contiguous(), lifted, weights, rows, recipe)
    return y.transpose(0, 1), [state.squeeze(0) for state in last]
