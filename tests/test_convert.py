"""convert and revert: what is swapped, what is kept, what is left alone and said."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from module_pairs import CLASSES, LAYERS, assert_close, device_of, raised, warned
from torch import nn
from torch.nn.utils import prune

import fused_rnn
from fused_rnn import use_backend

FUSED = {getattr(nn, name): getattr(fused_rnn, name) for name in CLASSES}


class Model(nn.Module):
    """Every class, some shared, in containers, deep down."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 6, 2, dropout=0.5, bidirectional=True, proj_size=2))
        self.blocks = nn.ModuleDict({"gru": nn.GRU(4, 6, batch_first=True), "rnn": nn.RNN(6, 6, nonlinearity="relu")})
        self.cells = nn.ModuleList([nn.LSTMCell(6, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 6, nonlinearity="relu")])
        self.again = self.cells[1]
        self.hidden = [self.cells[0]]  # a plain list: the same object, reached through self.cells

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder(self.embed(tokens))
        x, _ = self.blocks["gru"](x)
        x, _ = self.blocks["rnn"](x)
        h, c = self.hidden[0](x[-1])
        return self.cells[2](self.again(h, c))


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


def test_everything_is_swapped_and_nothing_else_changes(backend: str) -> None:
    device = device_of(backend)
    torch.manual_seed(0)
    model = Model().double().to(device).eval()
    tokens = torch.randint(11, (5, 3), device=device)
    expected = model(tokens)
    before = {
        "modules": [id(m) for m in model.modules()],
        "parameters": {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()},
        "state": list(model.state_dict()),
        "repr": repr(model),
        "training": [m.training for m in model.modules()],
    }
    types = [type(m) for m in recurrent(model)]
    with use_backend(backend):
        assert warned(lambda: fused_rnn.convert(model)) == []
        assert fused_rnn.convert(model) is model
        assert [type(m) for m in recurrent(model)] == [FUSED[t] for t in types] and len(types) == 6
        assert model.again is model.cells[1] and model.hidden[0] is model.cells[0]
        assert type(model.hidden[0]) is fused_rnn.LSTMCell
        after = {
            "modules": [id(m) for m in model.modules()],
            "parameters": {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()},
            "state": list(model.state_dict()),
            "repr": repr(model),
            "training": [m.training for m in model.modules()],
        }
        assert after == before
        assert_close(model(tokens), expected)
        clone = pickle.loads(pickle.dumps(model))
        assert_close(clone(tokens), expected)
        assert fused_rnn.revert(model) is model
        assert [type(m) for m in recurrent(model)] == types and repr(model) == before["repr"]
        assert_close(model(tokens), expected)
        assert [type(m) for m in recurrent(clone)] == [FUSED[t] for t in types]
        model.float().double()
        assert model.blocks["gru"]._flat_weights[0] is model.blocks["gru"].weight_ih_l0
        assert_close(pickle.loads(pickle.dumps(model))(tokens), model(tokens))


@pytest.mark.parametrize("name", CLASSES)
def test_root_and_holders(name: str) -> None:
    """The root itself; every other holder of the object sees the change, weak references live on."""
    module = getattr(nn, name)(4, 6)
    holder, reference = {"kept": module}, weakref.ref(module)
    fused_rnn.convert(module)
    assert type(module) is getattr(fused_rnn, name) and holder["kept"] is module and reference() is module
    assert "_flat_weights" not in module.__dict__ and "_flat_weight_refs" not in module.__dict__
    fused_rnn.revert(module)
    assert type(module) is getattr(nn, name)
    assert repr(copy.deepcopy(module)) == repr(module)


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_kept(backend: str, name: str) -> None:
    device, events = device_of(backend), []
    module = getattr(nn, name)(4, 6, device=device)
    layer = name in LAYERS
    handle = module.register_forward_hook(lambda m, args, out: events.append("forward"))
    module.register_forward_pre_hook(lambda m, args, kw: events.append("pre"), with_kwargs=True)
    module.register_full_backward_hook(lambda m, gi, go: events.append("backward"))
    module.register_state_dict_post_hook(lambda m, state, prefix, meta: events.append("state_dict"))
    module.register_load_state_dict_pre_hook(lambda *args: events.append("load"))
    module.extra = "an attribute of mine"
    module.train(False)
    fused_rnn.convert(module)
    assert module.extra == "an attribute of mine" and module.training is False
    x = torch.randn(*((5, 2, 4) if layer else (2, 4)), device=device, requires_grad=True)
    with use_backend(backend):
        out = module(x)
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
        module.load_state_dict(module.state_dict())
        assert sorted(events) == ["backward", "forward", "load", "pre", "state_dict"]
        handle.remove()
        module(x)
        assert events.count("forward") == 1


def test_optimizer_built_before_keeps_working(backend: str) -> None:
    device = device_of(backend)
    losses = []
    for change in (lambda m: m, fused_rnn.convert):
        torch.manual_seed(0)
        model = nn.Sequential(nn.GRU(4, 6, batch_first=True)).double().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        x = torch.randn(3, 5, 4, dtype=torch.float64, device=device)
        history = []
        with use_backend(backend):
            for step in range(6):
                if step == 2:
                    change(model)
                loss = (model(x)[0] - 0.5).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert_close(torch.tensor(losses[1], dtype=torch.float64), torch.tensor(losses[0], dtype=torch.float64))


class Sub(nn.LSTM):
    pass


class OurSub(fused_rnn.LSTM):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_exact_types_only() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.GRU(4, 6), "weight_hh_l0")
    replaced = nn.LSTM(4, 6)
    replaced.forward = lambda x: x
    scripted = torch.jit.script(nn.LSTMCell(4, 6))
    model = nn.ModuleDict(
        {
            "a": Sub(4, 6),
            "b": parametrized,
            "c": replaced,
            "d": scripted,
            "e": nn.RNN(4, 6, dtype=torch.complex64),
            "f": nn.LSTM(4, 6),
        }
    )
    types = [type(m) for m in model.values()]
    found = warned(lambda: fused_rnn.convert(model))
    assert [type(m) for m in model.values()] == [*types[:5], fused_rnn.LSTM]
    assert len(found) == 1 and found[0][0] is UserWarning
    text = found[0][1]
    assert text.startswith("fused_rnn.convert left unchanged: ")
    for part in (
        "a (Sub: a subclass; see subclasses=True)",
        "b (ParametrizedGRU: parametrized; convert first, then parametrize)",
        "c (LSTM: its forward was replaced on the instance)",
        "d (RecursiveScriptModule: a TorchScript module cannot be changed)",
        "e (RNN: no kernels for torch.complex64)",
    ):
        assert part in text, text
    ours = nn.ModuleDict(
        {
            "sub": OurSub(4, 6),
            "linear": fused_rnn.RNN(4, 6, nonlinearity="identity"),
            "cell": fused_rnn.RNNCell(4, 6, nonlinearity="identity"),
            "lstm": fused_rnn.LSTM(4, 6),
        }
    )
    assert warned(lambda: fused_rnn.convert(ours)) == []
    text = warned(lambda: fused_rnn.revert(ours))[0][1]
    assert "sub (OurSub: a subclass)" in text and "linear (RNN: torch.nn has no nonlinearity 'identity')" in text
    assert "cell (RNNCell: torch.nn has" in text and type(ours["lstm"]) is nn.LSTM and type(ours["sub"]) is OurSub


def test_parametrize_after_convert(backend: str) -> None:
    device = device_of(backend)
    module = fused_rnn.convert(nn.LSTM(4, 6, dtype=torch.float64, device=device))
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 2, 4, dtype=torch.float64, device=device)
    with use_backend(backend):
        y = module(x)
    assert isinstance(module, fused_rnn.LSTM)
    nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert_close(y, fused_rnn.revert(module)(x))


def test_old_style_reparametrizations_are_converted(backend: str) -> None:
    """weight_norm and prune of torch.nn.utils work by hooks and plain attributes: the type is exact, they come along."""
    device = device_of(backend)
    layers = [nn.GRU(4, 6, dtype=torch.float64, device=device), nn.LSTMCell(4, 6, dtype=torch.float64, device=device)]
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layers[0], "weight_hh_l0")
    prune.random_unstructured(layers[1], "weight_ih", amount=0.5)
    for module, x in zip(layers, (torch.randn(5, 2, 4), torch.randn(2, 4)), strict=True):
        x = x.double().to(device)
        expected = module(x)
        fused_rnn.convert(module)
        with use_backend(backend):
            assert_close(module(x), expected)
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.5)
            assert_close(module(x), fused_rnn.revert(module)(x))


def test_not_a_module() -> None:
    expected = (TypeError, "convert: expected a torch.nn.Module, got type")
    assert raised(lambda: fused_rnn.convert(nn.LSTM)) == expected
    assert raised(lambda: fused_rnn.revert("x")) == (TypeError, "revert: expected a torch.nn.Module, got str")


def test_meta_half_and_frozen() -> None:
    model = nn.Sequential(nn.LSTM(4, 6, device="meta"), nn.GRU(4, 6, dtype=torch.bfloat16)).requires_grad_(False)
    fused_rnn.convert(model)
    assert model[0].weight_ih_l0.is_meta and model[1].weight_ih_l0.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
