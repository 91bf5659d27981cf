"""convert(model, subclasses=True): users' subclasses of torch.nn's layers and cells run on ours, and stay what they are."""

from __future__ import annotations

import abc
import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, device_of, gradients, random_state, warned
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import use_backend

# --- classes like those of packages ---


class WithLengths(abc.ABC, nn.RNNBase):
    """A mixin as pytorch-forecasting's: rows of different lengths, some of them 0."""

    @abc.abstractmethod
    def empty(self, hidden: Any, rows: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Tensor | None = None, enforce_sorted: bool = True) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=enforce_sorted, batch_first=self.batch_first)
        out, hidden = super().forward(packed, hx=hx)
        out, _ = pad_packed_sequence(out, batch_first=self.batch_first)
        return out, self.empty(hidden, lengths == 0)


def blank(state: Tensor, rows: Tensor) -> Tensor:
    return state.masked_fill(rows[None, :, None], 0)


class LengthsLSTM(WithLengths, nn.LSTM):
    def empty(self, hidden: Any, rows: Tensor) -> Any:
        return tuple(blank(h, rows) for h in hidden)


class LengthsGRU(WithLengths, nn.GRU):
    def empty(self, hidden: Any, rows: Tensor) -> Any:
        return blank(hidden, rows)


class LengthsRNN(WithLengths, nn.RNN):
    def empty(self, hidden: Any, rows: Tensor) -> Any:
        return blank(hidden, rows)


class Dropped(nn.LSTM):
    """Drops recurrent weights, by the list that torch.nn's forward reads."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        kept, names = self._flat_weights, self._flat_weights_names
        self._flat_weights = [w * 0.5 if n.startswith("weight_hh") else w for n, w in zip(names, kept, strict=True)]
        result = nn.LSTM.__mro__ and super().forward(input, hx)  # reads other things of nn.LSTM
        self._flat_weights = kept
        return result


WRAPPERS: dict[str, type] = {}
PLAIN: dict[str, type] = {}
for _name in CLASSES:

    def _make(base: type, name: str) -> None:
        class Wrapper(base):
            """Adds to what it takes and to what it gives; keeps something of its own."""

            def __init__(self, *args: Any, note: str = "kept", **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.note = note
                self.gain = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

            def forward(self, input: Any, hx: Any = None) -> Any:
                out = super().forward(input * self.gain, hx)
                return (out[0] + 1, out[1]) if isinstance(out, tuple) else out + 1

        class Plain(base):
            extra = 5

        for cls, table in ((Wrapper, WRAPPERS), (Plain, PLAIN)):
            cls.__name__ = cls.__qualname__ = f"{cls.__name__}{name}"
            globals()[cls.__name__] = table[name] = cls

    _make(getattr(nn, _name), _name)


def example(module: nn.Module, device: str = "cpu") -> tuple[Tensor, Any]:
    g = torch.Generator().manual_seed(0)
    size = (2, 4) if isinstance(module, nn.RNNCellBase) else (5, 2, 4)
    x = torch.randn(size, generator=g, dtype=torch.float64).to(device)
    return x, random_state(module, 2, g, dtype=torch.float64, device=device)


@pytest.fixture
def ours_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused classes whose forward has run."""
    called: list[str] = []
    for name in CLASSES:
        cls = getattr(fused_rnn, name)

        def forward(self: Any, *args: Any, _run: Any = cls.forward, _name: str = name, **kwargs: Any) -> Any:
            called.append(_name)
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return called


@pytest.mark.parametrize("name", CLASSES)
def test_forward_runs_on_ours(backend: str, name: str, ours_called: list[str]) -> None:
    device = device_of(backend)
    for table in (WRAPPERS, PLAIN):
        theirs = table[name](4, 6).double().to(device)
        x, hx = example(theirs, device)
        expected = theirs(x, hx)
        grads = gradients(theirs, expected, [])
        model = nn.ModuleList([copy.deepcopy(theirs)])
        module, state, text = model[0], list(theirs.state_dict()), repr(theirs)
        assert warned(lambda model=model: fused_rnn.convert(model, subclasses=True)) == []
        assert model[0] is module and isinstance(module, (table[name], getattr(fused_rnn, name)))
        assert list(module.state_dict()) == state and repr(module) == text and type(module).__module__ == __name__
        with use_backend(backend):
            out = module(x, hx)
            assert ours_called == [name]
            assert_close(out, expected)
            assert_close(gradients(module, out, []), grads)
        fused_rnn.convert(model)  # nothing more to do, nothing to say
        fused_rnn.revert(model)
        assert type(module) is table[name] and model[0] is module
        assert_close(module(x, hx), expected)
        assert ours_called == [name]
        ours_called.clear()


@pytest.mark.parametrize("name", LAYERS)
def test_a_mixin_between(backend: str, name: str, ours_called: list[str]) -> None:
    device = device_of(backend)
    cls = globals()[f"Lengths{name}"]
    theirs = cls(4, 6, num_layers=2, bidirectional=True, batch_first=True).double().to(device)
    ours = fused_rnn.convert(copy.deepcopy(theirs), subclasses=True)
    x, lengths = torch.randn(3, 5, 4, dtype=torch.float64, device=device), torch.tensor([2, 5, 0])
    with use_backend(backend):
        assert_close(ours(x), theirs(x))
        assert_close(ours(x, lengths=lengths, enforce_sorted=False), theirs(x, lengths=lengths, enforce_sorted=False))
    assert ours_called == [name, name] and isinstance(ours, WithLengths)


def test_a_list_of_weights_set_for_a_call(ours_called: list[str]) -> None:
    theirs = Dropped(4, 6).double()
    ours = fused_rnn.convert(copy.deepcopy(theirs), subclasses=True)
    x, hx = example(theirs)
    with use_backend("reference"):
        assert_close(ours(x, hx), theirs(x, hx))
    assert ours_called == ["LSTM"] and not torch.equal(ours(x)[0], nn.LSTM.forward(theirs, x)[0])


@pytest.mark.parametrize("name", CLASSES)
def test_pickle_and_copies(name: str) -> None:
    module = WRAPPERS[name](4, 6, note="mine").double().eval()
    x, hx = example(module)
    expected = module(x, hx)
    fused_rnn.convert(module, subclasses=True)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        blob = pickle.dumps(module, protocol)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for clone in (pickle.loads(blob), torch.load(buffer, weights_only=False), copy.deepcopy(module), copy.copy(module)):
        assert type(clone) is type(module) and clone.note == "mine" and not clone.training
        assert_close(clone(x, hx), expected)
        fused_rnn.revert(clone)
        assert type(clone) is WRAPPERS[name]
        assert_close(clone(x, hx), expected)
    with pytest.raises(TypeError, match="use 2 or higher"):
        pickle.dumps(module, 0)
    twin = type(module)(4, 6)  # as code does that builds another of the same class
    assert isinstance(twin, WRAPPERS[name]) and isinstance(twin, getattr(fused_rnn, name)) and twin.note == "kept"


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_optimizers_and_parametrizations(backend: str, name: str) -> None:
    device, events = device_of(backend), []
    module = WRAPPERS[name](4, 6).double().to(device)
    parameters = {n: id(p) for n, p in module.named_parameters()}
    module.register_forward_hook(lambda m, args, out: events.append("forward"))
    fused_rnn.convert(module, subclasses=True)
    assert {n: id(p) for n, p in module.named_parameters()} == parameters
    x, hx = example(module, device)
    with use_backend(backend):
        expected = module(x, hx)
        assert events == ["forward"]
        weight = "weight_hh" if name in CELLS else "weight_hh_l0"
        nn.utils.parametrizations.weight_norm(module, weight)
        assert_close(module(x, hx), expected)
        assert_close(copy.deepcopy(module)(x, hx), expected)
        nn.utils.parametrize.remove_parametrizations(module, weight)
        assert_close(module(x, hx), expected)
    fused_rnn.revert(module)
    assert type(module) is WRAPPERS[name]


def test_one_class_for_each_and_none_kept_alive() -> None:
    class Local(nn.GRU):
        pass

    first, second = (fused_rnn.convert(Local(4, 6), subclasses=True) for _ in range(2))
    assert type(first) is type(second) and type(first).__mro__[:3] == (type(first), Local, fused_rnn.GRU)
    gone = weakref.ref(Local)
    del first, second, Local
    gc.collect()
    assert gone() is None


def test_default_names_the_argument() -> None:
    model = nn.ModuleDict({"a": WRAPPERS["GRU"](4, 6), "b": nn.GRU(4, 6)})
    text = warned(lambda: fused_rnn.convert(model))[0][1]
    assert "a (WrapperGRU: a subclass; see subclasses=True)" in text
    assert type(model["a"]) is WRAPPERS["GRU"] and type(model["b"]) is fused_rnn.GRU
    with pytest.raises(TypeError, match="subclasses: expected a bool, got int"):
        fused_rnn.convert(model, subclasses=1)


# --- what cannot work stays as it is and is said ---


class ByName(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, input, hx)


class ByBoundName(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        if input is None:
            return super().forward(input, hx)
        return (lambda: torch.nn.modules.rnn.LSTM.forward(self, input, hx))()


class ByAttribute(nn.GRU):
    _forward = nn.GRU.forward

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self._forward(input, hx)


class Own(nn.GRUCell):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return torch.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class Checks(nn.RNN):
    def check_forward_args(self, input: Any, hidden: Any, batch_sizes: Any) -> None:
        raise ZeroDivisionError


class Permutes(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


class Clashing(nn.GRU):
    def _run(self) -> None: ...


class Pickled(nn.GRU):
    def __reduce__(self) -> Any:
        return (Pickled, (4, 6))


class Meta(type):
    def __init__(cls, name: str, bases: Any, fields: Any) -> None:
        if bases[0] is not nn.LSTM:
            raise RuntimeError("final")
        super().__init__(name, bases, fields)


class Final(nn.LSTM, metaclass=Meta):
    pass


class Registered(nn.LSTM):
    def __init_subclass__(cls, *, key: str) -> None: ...


class FromBase(nn.RNNBase):
    def __init__(self, *args: Any) -> None:
        super().__init__("GRU", *args)


REFUSED = {
    ByName: "ByName.forward calls torch.nn.LSTM.forward by name instead of super().forward",
    ByBoundName: "ByBoundName.forward calls torch.nn.LSTM.forward by name",
    ByAttribute: "ByAttribute.forward calls torch.nn.GRU.forward by name",
    Own: "its forward does not call super().forward",
    Checks: "Checks defines check_forward_args, which fused layers do not use as torch.nn's do",
    Permutes: "Permutes defines permute_hidden",
    Clashing: "Clashing defines _run",
    Pickled: "Pickled defines __reduce__",
    Final: "no class can be derived from it (RuntimeError: final)",
    Registered: "no class can be derived from it (TypeError: ",
    FromBase: "a subclass of RNNBase or RNNCellBase, not of a layer or cell",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_refused(cls: type) -> None:
    model = nn.Sequential(cls(4, 6))
    text = warned(lambda: fused_rnn.convert(model, subclasses=True))[0][1]
    assert text.startswith(f"fused_rnn.convert left unchanged: 0 ({cls.__name__}: {REFUSED[cls]}"), text
    assert type(model[0]) is cls and not any(name.startswith("_fused") for name in vars(cls))


def test_instances_that_cannot_be_changed() -> None:
    named, replaced, odd = PLAIN["LSTM"](4, 6), PLAIN["GRU"](4, 6), PLAIN["RNN"](4, 6, dtype=torch.complex64)
    named._weights = "mine"
    replaced.forward = lambda x: x
    parametrized = nn.utils.parametrizations.weight_norm(PLAIN["GRU"](4, 6), "weight_hh_l0")
    model = nn.ModuleList([named, replaced, odd, parametrized])
    text = warned(lambda: fused_rnn.convert(model, subclasses=True))[0][1]
    for part in (
        "0 (PlainLSTM: its attribute _weights has the name of one of the fused class's)",
        "1 (PlainGRU: its forward was replaced on the instance)",
        "2 (PlainRNN: no kernels for torch.complex64)",
        "3 (ParametrizedPlainGRU: parametrized; convert first, then parametrize)",
    ):
        assert part in text, text


class Slots(nn.LSTM):
    __slots__ = ("slot",)


class Further(WRAPPERS["GRU"]):
    """Calls a class between by name, which is no way past ours."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return WRAPPERS["GRU"].forward(self, input, hx)


def test_what_looks_hard_and_works(ours_called: list[str]) -> None:
    slots = Slots(4, 6).double()
    slots.slot = 5
    for module in (slots, Further(4, 6).double()):
        x, hx = example(module)
        expected = module(x, hx)
        assert warned(lambda module=module: fused_rnn.convert(module, subclasses=True)) == []
        with use_backend("reference"):
            assert_close(module(x, hx), expected)
    assert ours_called == ["LSTM", "GRU"] and slots.slot == 5
