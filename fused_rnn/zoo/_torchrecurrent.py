"""Layers and cells of torchrecurrent (0.2.5) as ours. Nothing here imports it: its classes are known by their names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_rnn.formula.modules import Layer, Step
from fused_rnn.zoo import oscillators
from fused_rnn.zoo._torchrecurrent_table import CELLS, Entry, Theirs, Weights


def cells_of(module: nn.Module) -> list[Theirs]:
    """The cells of one of their layers, or the cell itself.

    Raises:
        TypeError: no layer or cell of torchrecurrent, or a subclass of one.
    """
    cls = type(module)
    if cls.__module__.partition(".")[0] == "torchrecurrent":
        if cls.__name__ in CELLS:
            return [Theirs(module, module)]
        if f"{cls.__name__}Cell" in CELLS:
            return [Theirs(cell, module) for cell in module.cells]  # type: ignore[union-attr]
    raise TypeError(f"module: expected a layer or cell of torchrecurrent, got {cls.__module__}.{cls.__name__}")


def entry_of(t: Theirs) -> Entry:
    return CELLS[type(t.cell).__name__]


def parameters_of(module: nn.Module) -> Weights:
    """The parameters of our module by their full names, as functions of theirs: gradients flow through."""
    cells, weights = cells_of(module), {}
    biased = _has_bias(cells)
    for index, t in enumerate(cells):
        suffix = "" if t.outer is t.cell else f"_l{index}"
        for name, tensor in entry_of(t).weights(t).items():
            if name not in ("bias_ih", "bias_hh") or biased:
                weights[_full_name(t, name, suffix)] = tensor
    return weights


def _has_bias(cells: list[Theirs]) -> bool:
    own = type(cells[0].cell).__name__ == "FastGRNNCell"  # its biases are the cell's, not the layer's
    return not own and any(name.startswith("bias") for t in cells for name, _ in t.cell.named_parameters())


def _full_name(t: Theirs, name: str, suffix: str) -> str:
    antisymmetric = name == "weight_hh" and type(t.cell).__name__ in ("AntisymmetricRNNCell", "GatedAntisymmetricRNNCell")
    return f"parametrizations.{name}{suffix}.original" if antisymmetric else f"{name}{suffix}"


def from_torchrecurrent(module: nn.Module) -> Layer | Step:
    """A layer or cell of torchrecurrent 0.2.5 as a Layer or Step: the same outputs and gradients.

    The parameters are new ones, of the same dtype and device; where several of theirs stand for one of ours (two biases of
    one sum), ours is what they make together. A parameter of ours that none of theirs stands for, such as the second of two
    biases where they have one, is zero and has requires_grad False. Where that holds for some rows alone, these start as
    zeros and are trained: in the bias of RAN's content, of ResLSTM's shortcut and of the typed cells' kept products; and in
    the weight of IntersectionRNN's shortcut, where they start as the identity. The recurrent weights of antisymmetric cells
    are parametrized.

    hx and the last states are those of the zoo's cell. They differ from theirs for JANET (one state), MCLSTM and
    IntersectionRNN (the output is a state), TGRU and TLSTM (products of the input before in place of that input) and tauGRU
    (delayed states).

    Raises:
        TypeError: not a layer or cell of torchrecurrent.
        ValueError: an activation that the zoo does not have.
    """
    cells = cells_of(module)
    first = cells[0]
    cell, weight, biased = entry_of(first).cell(first), first["weight_ih"], _has_bias(cells)
    theirs: Any = module
    ours: Layer | Step
    if first.outer is first.cell:
        ours = Step(cell, theirs.input_size, theirs.hidden_size, biased, weight.device, weight.dtype)
    else:
        ours = Layer(
            cell,
            theirs.input_size,
            theirs.hidden_size,
            theirs.num_layers,
            bias=biased,
            batch_first=theirs.batch_first,
            dropout=theirs.dropout if theirs.num_layers > 1 else 0.0,
            device=weight.device,
            dtype=weight.dtype,
        )
    if isinstance(cell, (oscillators.AntisymmetricRNN, oscillators.GatedAntisymmetricRNN)):
        oscillators.antisymmetric(ours)
    with torch.enable_grad():
        values = parameters_of(module)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(values[name].requires_grad)
        with torch.no_grad():
            parameter.copy_(values[name])
    return ours.train(module.training)


def why_not(module: nn.Module) -> str | None:
    """Why ``become_ours`` leaves one of their modules as it is; None if it would change it."""
    try:
        cells = cells_of(module)
        if not entry_of(cells[0]).same_states(cells[0]):
            return "its states are others than the zoo's; see fused_rnn.zoo.from_torchrecurrent"
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def become_ours(module: nn.Module) -> None:
    """Makes one of their modules, in place, what ``from_torchrecurrent`` returns; hooks and others' attributes stay."""
    ours, before = from_torchrecurrent(module), dict(module.__dict__)
    kept = {name: value for name, value in before.items() if "_hook" in name or name not in ours.__dict__}
    module.__dict__.clear()
    module.__class__ = type(ours)
    module.__dict__.update(ours.__dict__)
    module.__dict__.update(kept)
