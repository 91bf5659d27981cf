"""The cells of torchrecurrent (0.2.5) as cells of the zoo: constants, parameters made of theirs, states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.formula.language import Cell
from fused_rnn.zoo import additive, deep, forget, gru, lstm, memory_lstm, miru, mut, oscillators, sgu, ugrnn, units
from fused_rnn.zoo.activations import Activation


class Theirs:
    """The tensors of one of their cells, whole or in blocks of H rows. Absent biases are zeros, as they are there."""

    def __init__(self, cell: Any, outer: Any) -> None:
        self.cell = cell
        self.outer = outer  # the layer that the cell is in, or the cell itself
        self.tensors = {**dict(cell.named_parameters(recurse=False)), **dict(cell.named_buffers(recurse=False))}
        self.hidden: int = self.cell.hidden_size

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to(self.tensors["weight_ih"].dtype)  # numbers are of the default dtype there

    def blocks(self, name: str) -> tuple[Tensor, ...]:
        """One tensor a gate."""
        return self[name].split(self.hidden)

    def number(self, name: str) -> Tensor:
        return self[name].reshape(())

    def zeros(self, gates: int = 1) -> Tensor:
        return self["weight_ih"].new_zeros(gates * self.hidden)

    def activation(self, name: str) -> Activation:
        """The activation of this attribute, by the zoo's name.

        Raises:
            ValueError: the zoo has no such activation.
        """
        module = getattr(self.cell, name)
        match module:
            case nn.Softplus() if (module.beta, module.threshold) != (1.0, 20.0):
                return ("softplus", module.beta, module.threshold)
            case nn.ELU() if module.alpha != 1.0:
                return ("elu", module.alpha)
            case nn.LeakyReLU() if module.negative_slope != 0.01:
                return ("leaky_relu", module.negative_slope)
            case nn.GELU() if module.approximate == "tanh":
                return "gelu_tanh"
        if type(module) not in _ACTIVATIONS:
            raise ValueError(f"its {name} is {module!r}, which the zoo does not have")
        return _ACTIVATIONS[type(module)]


_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.Softsign: "softsign",
    nn.Hardsigmoid: "hardsigmoid",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
}

Weights = dict[str, Tensor]


# --- our parameters by name, made of theirs. What depends on none of theirs requires no gradients. ---


def _plain(t: Theirs) -> Weights:
    return {name: t[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}


def _products(**indices: int) -> Callable[[Theirs], Weights]:
    """Of cells whose recurrent blocks with these indices are products inside of our step; their biases join bias_ih."""

    def weights(t: Theirs) -> Weights:
        recurrent, bias, input_bias = t.blocks("weight_hh"), t.blocks("bias_hh"), list(t.blocks("bias_ih"))
        rest = [index for index in range(len(recurrent)) if index not in indices.values()]
        for index in indices.values():
            input_bias[index] = input_bias[index] + bias[index]
        return {
            "weight_ih": t["weight_ih"],
            "weight_hh": torch.cat([recurrent[index] for index in rest]),
            "bias_ih": torch.cat(input_bias),
            "bias_hh": torch.cat([bias[index] for index in rest]),
            **{f"weight_{name}": recurrent[index] for name, index in indices.items()},
        }

    return weights


def _peepholes(t: Theirs) -> Weights:
    return _plain(t) | dict(zip(("p_i", "p_f", "p_o"), t.blocks("weight_ph"), strict=True))


def _residual(t: Theirs) -> Weights:
    return _peepholes(t) | {
        "weight_ih": torch.cat([t["weight_ih"], t["weight_res"]]),
        "bias_ih": torch.cat([t["bias_ih"], t.zeros()]),
        "weight_p": t["weight_proj"],
    }


def _gated_antisymmetric(t: Theirs) -> Weights:
    z, a = t.blocks("bias_ih")
    return _plain(t) | {"bias_ih": torch.cat([z, a + t["bias_hh"]]), "bias_hh": t.zeros()}


def _bistable(t: Theirs) -> Weights:
    w_a, w_c = t.blocks("weight_hh")
    bias = t["bias_ih"] + torch.cat([t["bias_hh"], t.zeros()])
    return {"weight_ih": t["weight_ih"], "bias_ih": bias, "w_a": w_a, "w_c": w_c}


def _oscillator(t: Theirs) -> Weights:
    return _plain(t) | {"bias_ih": t["bias_ih"] + t["bias_ch"], "weight_z": t["weight_ch"]}


def _independent_oscillator(t: Theirs) -> Weights:
    bias = t["bias_ih"] + t["bias_hh"]
    return {"weight_ih": t["weight_ih"], "bias_ih": bias, "w": t["weight_hh"], "c": t["weight_ch"]}


def _fast(t: Theirs) -> Weights:
    return _plain(t) | {"alpha": t.number("alpha"), "beta": t.number("beta")}


def _fast_gated(t: Theirs) -> Weights:
    b_z, b_g = (t["bias_ih"] + t["bias_hh"]).split(t.hidden)
    weights = {"weight_ih": t["weight_ih"], "weight_hh": t["weight_hh"], "b_z": b_z, "b_g": b_g}
    return weights | {"zeta": t.number("zeta"), "nu": t.number("nu")}


def _independent(t: Theirs) -> Weights:
    return {"weight_ih": t["weight_ih"], "bias_ih": t["bias_ih"] + t["bias_hh"], "u": t["vector_u"]}


def _intersection(t: Theirs) -> Weights:
    weight = t["weight_ih"]
    identity = torch.eye(t.hidden, dtype=weight.dtype, device=weight.device)
    return _plain(t) | {
        "weight_ih": torch.cat([weight, identity]),
        "bias_ih": torch.cat([t["bias_ih"], t.zeros()]),
    }


def _janet(t: Theirs) -> Weights:
    return _plain(t) | {"beta": t.number("beta")}


def _lem(t: Theirs) -> Weights:
    bias = t["bias_ih"] + torch.cat([t.zeros(3), t["bias_ch"]])
    return _plain(t) | {"bias_ih": bias, "weight_h": t["weight_ch"]}


def _minimal(t: Theirs) -> Weights:
    return _plain(t) | {"weight_z": t["weight_mm"]}


def _scaled_product(t: Theirs) -> Weights:
    return _plain(t) | {"bias_ih": t["bias_ih"] + t["bias_hh"], "bias_hh": t.zeros()}


def _multiplicative(t: Theirs) -> Weights:
    products = dict(zip(("weight_i", "weight_f", "weight_g", "weight_o"), t.blocks("weight_mh"), strict=True))
    return _plain(t) | products | {"bias_ih": t["bias_ih"] + torch.cat([t.zeros(), t["bias_mh"]])}


def _memory(t: Theirs) -> Weights:
    products = dict(zip(("weight_i", "weight_f", "weight_o"), t.blocks("weight_mh"), strict=True))
    return _plain(t) | products | dict(zip(("m_i", "m_f", "m_o"), t.blocks("bias_mh"), strict=True))


def _mut1(t: Theirs) -> Weights:
    (weight_r, weight_g), (bias_r, b_g) = t.blocks("weight_hh"), t.blocks("bias_hh")
    return _plain(t) | {"weight_hh": weight_r, "bias_hh": bias_r, "weight_g": weight_g, "b_g": b_g}


def _additive(t: Theirs) -> Weights:
    return _plain(t) | {"bias_ih": torch.cat([t.zeros(), t["bias_ih"]])}


def _context(t: Theirs) -> Weights:
    (weight_h, weight_y_h), (bias_h, b_y) = t.blocks("weight_hh"), t.blocks("bias_hh")
    (weight_s, weight_y_s), (bias_s, b_y_s) = t.blocks("weight_ch"), t.blocks("bias_ch")
    return {
        "weight_ih": t["weight_ih"],
        "weight_hh": weight_h,
        "bias_ih": t["bias_ih"] + torch.cat([t.zeros(), bias_s]),
        "bias_hh": bias_h,
        "weight_s": weight_s,
        "weight_y_h": weight_y_h,
        "weight_y_s": weight_y_s,
        "b_y": b_y + b_y_s,
        "alpha": t.number("alpha"),
    }


def _simple_gated(t: Theirs) -> Weights:
    (weight_g, weight_z), (b_g, bias_z) = t.blocks("weight_hh"), t.blocks("bias_hh")
    return _plain(t) | {"weight_hh": weight_z, "bias_hh": bias_z, "weight_g": weight_g, "b_g": b_g}


def _deep_simple_gated(t: Theirs) -> Weights:
    return _simple_gated(t) | {"weight_y": t["weight_ho"]}


def _no_recurrent(t: Theirs) -> Weights:
    return {"weight_ih": t["weight_ih"], "bias_ih": t["bias_ih"]}


def _typed(t: Theirs) -> Weights:
    bias = torch.cat([t["bias_ih"] + t["bias_hh"], t.zeros(3)])
    return {"weight_ih": torch.cat([t["weight_ih"], t["weight_hh"]]), "bias_ih": bias}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their cells as ours.

    Attributes:
        cell: ours, with the constants and activations of theirs.
        weights: our parameters by name.
        states: of each of their states in order the index of ours; None where the two are not of one kind.
    """

    cell: Callable[[Theirs], Cell]
    weights: Callable[[Theirs], Weights]
    states: tuple[int | None, ...] = (0,)

    def same_states(self, t: Theirs) -> bool:
        """Whether hx and the last states are the same tensors in the same order there and here."""
        return self.states == tuple(range(len(self.cell(t).declaration.states)))


def _gate_and_act(cell: Callable[..., Cell]) -> Callable[[Theirs], Cell]:
    return lambda t: cell(t.activation("gate_act"), t.activation("act"))


def _gate_and_out(cell: Callable[..., Cell]) -> Callable[[Theirs], Cell]:
    return lambda t: cell(t.activation("gate_act"), t.activation("out_act"))


def _sgu(cell: Callable[..., Cell]) -> Callable[[Theirs], Cell]:
    return lambda t: cell(t.activation("act"), t.activation("output_act"), t.activation("gate_act"))


_TWO = (0, 1)

CELLS: dict[str, Entry] = {
    "ATRCell": Entry(lambda t: additive.ATR(), _plain),
    "AntisymmetricRNNCell": Entry(
        lambda t: oscillators.AntisymmetricRNN(t.cell.epsilon, t.cell.gamma, t.activation("act")), _plain
    ),
    "BRCell": Entry(lambda t: units.BRC(), _bistable),
    "CFNCell": Entry(lambda t: additive.CFN(), _plain),
    "DSGUCell": Entry(_sgu(sgu.DSGU), _deep_simple_gated),
    "FastGRNNCell": Entry(lambda t: units.FastGRNN(t.activation("act")), _fast_gated),
    "FastRNNCell": Entry(lambda t: units.FastRNN(t.activation("act")), _fast),
    "GatedAntisymmetricRNNCell": Entry(
        lambda t: oscillators.GatedAntisymmetricRNN(t.cell.epsilon, t.cell.gamma), _gated_antisymmetric
    ),
    "IndRNNCell": Entry(lambda t: units.IndRNN(t.activation("act")), _independent),
    "IntersectionRNNCell": Entry(
        lambda t: ugrnn.IntersectionRNN(t.activation("depth_act"), t.activation("recurrent_act"), t.activation("gate_act")),
        _intersection,
        (1,),
    ),
    "JANETCell": Entry(lambda t: forget.JANET(t.cell.beta.item(), learnable=True), _janet, (0, 0)),
    "LEMCell": Entry(lambda t: oscillators.LEM(t.cell.dt, old_z=True), _lem, _TWO),
    "LiGRUCell": Entry(_gate_and_act(gru.LiGRU), _plain),
    "LightRUCell": Entry(lambda t: forget.LightRU(), _plain),
    "MCLSTMCell": Entry(lambda t: memory_lstm.MCLSTM(t.activation("gate_act"), t.activation("cell_act")), _plain, (1, 2)),
    "MGUCell": Entry(_gate_and_act(forget.MGU), _products(g=1)),
    "MUT1Cell": Entry(lambda t: mut.MUT1(), _mut1),
    "MUT2Cell": Entry(lambda t: mut.MUT2(), _products(g=2)),
    "MUT3Cell": Entry(lambda t: mut.MUT3(), _products(z=0, g=2)),
    "MiRU1Cell": Entry(
        lambda t: miru.MiRU1(t.cell.update_coefficient, t.activation("gate_act"), t.activation("act")), _products(g=1)
    ),
    "MiRU2Cell": Entry(
        lambda t: miru.MiRU2(t.cell.update_coefficient, t.cell.reset_coefficient, t.activation("act")), _scaled_product
    ),
    "MinimalRNNCell": Entry(_gate_and_act(forget.MinimalRNN), _minimal),
    "MultiplicativeLSTMCell": Entry(lambda t: memory_lstm.MultiplicativeLSTM(), _multiplicative, _TWO),
    "NASCell": Entry(lambda t: deep.NAS(), _plain, _TWO),
    "NBRCell": Entry(lambda t: units.NBRC(), _plain),
    "OriginalLSTMCell": Entry(lambda t: lstm.OriginalLSTM(), _plain, _TWO),
    "PeepholeLSTMCell": Entry(_gate_and_act(lstm.PeepholeLSTM), _peepholes, _TWO),
    "RANCell": Entry(lambda t: additive.RAN(), _additive, _TWO),
    "ResLSTMCell": Entry(_gate_and_act(lstm.ResidualLSTM), _residual, _TWO),
    "SCRNCell": Entry(lambda t: deep.FeedbackSCRN(t.cell.alpha.item()), _context, _TWO),
    "SGRNCell": Entry(lambda t: additive.SGRN(), _plain),
    "SGUCell": Entry(_sgu(sgu.SGU), _simple_gated),
    "STARCell": Entry(lambda t: additive.STAR(), _plain),
    "TGRUCell": Entry(_gate_and_out(units.TGRU), _typed, (0, None)),
    "TLSTMCell": Entry(_gate_and_out(units.TLSTM), _typed, (1, None)),
    "TRNNCell": Entry(lambda t: units.TRNN(t.activation("gate_act")), _no_recurrent),
    "UGRNNCell": Entry(lambda t: ugrnn.UGRNN(), _plain),
    "UnICORNNCell": Entry(lambda t: oscillators.UnICORNN(t.cell.dt, t.cell.alpha), _independent_oscillator, _TWO),
    "WMCLSTMCell": Entry(lambda t: memory_lstm.WMCLSTM(), _memory, _TWO),
    "coRNNCell": Entry(lambda t: oscillators.CoRNN(t.cell.dt, t.cell.gamma, t.cell.epsilon), _oscillator, _TWO),
    "tauGRUCell": Entry(
        lambda t: gru.TauGRU(getattr(t.outer, "delay", 1), t.activation("gate_act"), t.activation("act")), _products(z=1)
    ),
}
