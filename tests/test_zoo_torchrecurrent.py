"""Every cell and layer of torchrecurrent 0.2.5 equals ours with its weights: outputs, last states and all gradients."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_zoo import B, H, T, assert_same, hx_of, rand, with_gradients
from torch import Tensor, nn

import fused_rnn
from fused_rnn import zoo
from fused_rnn.formula import Layer, Step
from fused_rnn.zoo import _torchrecurrent as mapping

theirs = pytest.importorskip("torchrecurrent", reason="needs torchrecurrent (pip install torchrecurrent==0.2.5)")

CELLS = sorted(name for name in theirs.__all__ if name.endswith("Cell"))
IN = H  # one of the cells needs it
ON_KERNELS = ("JANETCell", "TLSTMCell")  # a learnable number; no recurrent product and five states


@pytest.fixture
def reference() -> Iterator[None]:
    with fused_rnn.use_backend("reference"):
        yield


def randomized(module: nn.Module) -> nn.Module:
    """All parameters random, also biases and numbers that start at constants."""
    module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def their_states(module: nn.Module, layers: int) -> list[Tensor]:
    """Initial states [L, B, H] in their form. JANET's h and c are one tensor after a step, and here before the first too."""
    entry = mapping.entry_of(mapping.cells_of(module)[0])
    states = [(0.5 * rand(layers, B, H, seed=index + 1)).requires_grad_() for index in range(len(entry.states))]
    return [states[0]] * 2 if entry.states == (0, 0) else states


def our_states(module: nn.Module, states: list[Tensor]) -> list[Tensor]:
    """Theirs as ours: zeros where there is none of theirs, for the typed cells products of the input before."""
    cells = mapping.cells_of(module)
    entry = mapping.entry_of(cells[0])
    found = dict(zip(entry.states, states, strict=True))
    ours = [found.get(index, torch.zeros_like(states[0])) for index in range(len(entry.cell(cells[0]).declaration.states))]
    if None in found:
        products = [before @ t["weight_hh"].T for before, t in zip(found[None], cells, strict=True)]
        ours[-3:] = torch.stack(products).chunk(3, dim=-1)
    return ours


def as_list(states: Any) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def their_results(module: nn.Module, result: Any) -> list[Tensor]:
    """Output and states after it, without the input before, which ours keeps as products."""
    entry = mapping.entry_of(mapping.cells_of(module)[0])
    output_is_no_state = entry.states[0] != 0
    if not hasattr(module, "cells") and not output_is_no_state:
        result = (as_list(result)[0], result)
    kept = [state for index, state in zip(entry.states, as_list(result[1]), strict=True) if index is not None]
    return [result[0], *kept]


def our_results(module: nn.Module, cell: Any, result: Any) -> list[Tensor]:
    """The same of ours."""
    entry = mapping.entry_of(mapping.cells_of(module)[0])
    if not hasattr(module, "cells"):
        result = (as_list(result)[cell.declaration.output], result)
    return [result[0], *(as_list(result[1])[index] for index in entry.states if index is not None)]


def compare(module: nn.Module, *shape: int) -> None:
    """One of their layers or cells, and ours with parameters that are functions of theirs; from given states and zeros."""
    ours, values, whole = zoo.from_torchrecurrent(module), mapping.parameters_of(module), hasattr(module, "cells")
    assert isinstance(ours, Layer if whole else Step)
    assert {name for name, _ in ours.named_parameters()} == set(values)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, values[name]) and parameter.requires_grad == values[name].requires_grad
    x, states = rand(*shape, IN).requires_grad_(), their_states(module, ours.num_layers if whole else 1)
    mine = our_states(module, states)
    if not whole:
        mine, given = [state[0] for state in mine], [state[0] for state in states]
    leaves = [x, *module.parameters()]
    for hx, their_hx, more in (
        (hx_of(mine), hx_of(states if whole else given), list({id(state): state for state in states}.values())),
        (None, None, []),
    ):
        got = our_results(module, ours.cell, torch.func.functional_call(ours, values, (x, hx)))
        expected = their_results(module, module(x, their_hx))
        assert_same(with_gradients(got, [*leaves, *more]), with_gradients(expected, [*leaves, *more]))


def layer_of(name: str, **options: Any) -> nn.Module:
    return randomized(getattr(theirs, name.removesuffix("Cell"))(IN, H, **options))


def test_every_cell_has_an_entry() -> None:
    assert set(CELLS) == set(mapping.CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_layers(name: str, reference: None) -> None:
    compare(layer_of(name, num_layers=2), T, B)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, reference: None) -> None:
    compare(randomized(getattr(theirs, name)(IN, H)), B)


@pytest.mark.parametrize("name", ON_KERNELS)
def test_layers_on_kernels(name: str) -> None:
    with fused_rnn.use_backend("cpu"):
        compare(layer_of(name, num_layers=2), T, B)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", ["input", "recurrent", "none"])
def test_biases(name: str, bias: str, reference: None) -> None:
    """Biases that they lack are zeros here that are not trained, or none at all."""
    options: dict[str, Any] = {"bias": bias == "input"}
    if name != "TRNNCell":
        options["recurrent_bias"] = bias == "recurrent"
    more = {"SCRNCell": "context_bias", "LEMCell": "cell_bias", "coRNNCell": "cell_bias", "WMCLSTMCell": "memory_bias"}
    more["MultiplicativeLSTMCell"] = "multiplicative_bias"
    if name in more:
        options[more[name]] = False
    compare(layer_of(name, **options), T, B)


@pytest.mark.parametrize(
    "name, options",
    [
        ("PeepholeLSTM", {"nonlinearity": nn.ELU(0.7), "gate_nonlinearity": "hard_sigmoid"}),
        ("LiGRU", {"nonlinearity": nn.LeakyReLU(0.3), "gate_nonlinearity": nn.Softsign()}),
        ("MGU", {"nonlinearity": "gelu"}),
        ("SGU", {"nonlinearity": "silu", "output_nonlinearity": nn.Softplus(2.0, 1.0)}),
        ("IntersectionRNN", {"depth_nonlinearity": "identity", "recurrent_nonlinearity": nn.GELU("tanh")}),
        ("AntisymmetricRNN", {"nonlinearity": "sigmoid", "epsilon": 0.3, "gamma": 0.2}),
        ("GatedAntisymmetricRNN", {"epsilon": 0.3, "gamma": 0.2}),
        ("coRNN", {"dt": 0.2, "gamma": 0.7, "epsilon": 0.4}),
        ("UnICORNN", {"dt": 0.2, "alpha": 0.5}),
        ("LEM", {"dt": 0.3}),
        ("JANET", {"beta": 0.5}),
        ("MiRU1", {"update_coefficient": 0.3}),
        ("MiRU2", {"update_coefficient": 0.3, "reset_coefficient": 0.8}),
        ("tauGRU", {"delay": 3, "nonlinearity": "softplus"}),
    ],
)
def test_constants_and_activations(name: str, options: dict[str, Any], reference: None) -> None:
    compare(layer_of(name, **options), T, B)


@pytest.mark.parametrize("name", ["AntisymmetricRNN", "FastRNN", "NAS", "MCLSTM", "CFN", "LightRU", "TRNN"])
def test_trains_alike(name: str, reference: None) -> None:
    """After a step of SGD the parameters are still theirs; these are cells whose parameters are one to one."""
    before = layer_of(name, num_layers=2)
    ours = zoo.from_torchrecurrent(before)
    x = rand(T, B, IN)
    for layer in (before, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x)[0].square().sum().backward()
        optimizer.step()
    for parameter, value in mapping.parameters_of(before).items():
        torch.testing.assert_close(ours.get_parameter(parameter), value, atol=1e-10, rtol=0)


# --- fused_rnn.convert ---


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = theirs.LiGRU(IN, H, num_layers=2, dropout=0.5, batch_first=True)
        self.lstm = nn.LSTM(H, H, batch_first=True)
        self.cell = theirs.PeepholeLSTMCell(H, H, dtype=torch.float32)
        self.antisymmetric = theirs.AntisymmetricRNN(H, H, gamma=0.1, bias=False)
        self.again = self.rnn

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.again(x)[0])
        h, c = self.cell(y[:, -1])
        return self.cell(self.antisymmetric(y)[0][:, 0], (h, c))[0]


def test_convert(reference: None) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    model.rnn.tag = "theirs"
    calls: list[str] = []
    handle = model.rnn.register_forward_hook(lambda *args: calls.append("hook"))
    x = torch.randn(B, T, IN)
    expected, objects = model(x), [model.rnn, model.cell, model.antisymmetric]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_rnn.convert(model) is model
    assert [model.rnn, model.cell, model.antisymmetric] == objects and model.again is model.rnn
    assert [type(model.rnn), type(model.cell)] == [Layer, Step] and isinstance(model.antisymmetric, Layer)
    assert isinstance(model.lstm, fused_rnn.LSTM)
    assert not model.rnn.training and model.rnn.dropout == 0.5 and model.rnn.batch_first and model.rnn.tag == "theirs"
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)
    assert calls == ["hook"] * 2
    handle.remove()
    assert not [name for name, _ in model.named_modules() if "cells" in name]
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model.rnn))(x), model.rnn(x))
    fused_rnn.convert(model)  # once more: nothing left to do
    fused_rnn.revert(model)
    assert type(model.rnn) is Layer and type(model.lstm) is nn.LSTM
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Subclass(theirs.ATR):  # type: ignore[name-defined,misc]
    pass


@pytest.mark.parametrize(
    "module, reason",
    [
        (lambda: theirs.JANET(IN, H), "its states are others than the zoo's; see fused_rnn.zoo.from_torchrecurrent"),
        (lambda: theirs.MCLSTM(IN, H), "its states are others"),
        (lambda: theirs.tauGRU(IN, H), "its states are others"),
        (lambda: theirs.TLSTMCell(IN, H), "its states are others"),
        (lambda: theirs.LiGRU(IN, H, nonlinearity=OwnActivation()), r"its act is OwnActivation\(\), which the zoo does not"),
        (lambda: Subclass(IN, H), "expected a layer or cell of torchrecurrent, got test_zoo_torchrecurrent.Subclass"),
    ],
)
def test_convert_says_what_it_leaves(module: Any, reason: str) -> None:
    model = nn.Sequential(module())
    kinds = [type(part) for part in model.modules()]
    with pytest.warns(UserWarning, match=f"left unchanged: 0 \\(.*{reason}") as caught:
        fused_rnn.convert(model)
    assert [type(part) for part in model.modules()] == kinds
    assert len(caught) == 1 and ".cells" not in str(caught[0].message)


def test_convert_leaves_a_replaced_forward() -> None:
    layer = theirs.ATR(IN, H)
    layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="the model itself .ATR: its forward was replaced"):
        fused_rnn.convert(layer)
    assert type(layer) is theirs.ATR


@pytest.mark.parametrize("module", [nn.GRU(2, 2), nn.Linear(2, 2)])
def test_from_torchrecurrent_names_what_it_got(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="module: expected a layer or cell of torchrecurrent, got torch.nn.modules"):
        zoo.from_torchrecurrent(module)


def test_dtype_device_and_frozen_parameters_stay() -> None:
    layer = theirs.ATR(IN, H, num_layers=2, dropout=0.2).to(torch.bfloat16)
    layer.cells[0].weight_ih.requires_grad_(False)
    ours = zoo.from_torchrecurrent(layer)
    assert ours.weight_ih_l0.dtype == torch.bfloat16 and ours.training and ours.dropout == 0.2
    assert [name for name, parameter in ours.named_parameters() if not parameter.requires_grad] == ["weight_ih_l0"]
