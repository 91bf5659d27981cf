"""RNNCell, LSTMCell and GRUCell as drop-in replacements, against torch.nn."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from module_pairs import CELLS, assert_close, compare, device_of, make_pair, raised, random_state, warned
from torch import nn

import fused_rnn
from fused_rnn import use_backend

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

NAMED = [pytest.param(name, {"bias": bias}, id=f"{name}-{bias=}") for name in CELLS for bias in (True, False)]
NAMED.append(pytest.param("RNNCell", {"nonlinearity": "relu"}, id="RNNCell-relu"))


@pytest.mark.parametrize(("name", "kwargs"), NAMED)
def test_construction(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = make_pair(name, 4, 6, **kwargs, dtype=torch.float64)
    assert isinstance(ours, type(theirs)) and type(ours) is getattr(fused_rnn, name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    for key, value in theirs.__dict__.items():
        if key != "_parameters":
            assert ours.__dict__[key] == value, key
    theirs.load_state_dict(ours.state_dict())
    clone = pickle.loads(pickle.dumps(ours))
    assert type(clone) is type(ours) and repr(clone) == repr(ours)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(clone(x), ours(x))
    assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_positional_arguments() -> None:
    for name, args in (("RNNCell", (4, 6, False, "relu")), ("LSTMCell", (4, 6, False)), ("GRUCell", (4, 6, False))):
        ours, theirs = make_pair(name, *args, None, torch.float64)
        assert repr(ours) == repr(theirs) and ours.weight_ih.dtype == torch.float64
    assert repr(fused_rnn.RNNCell(1, 2, nonlinearity="identity")) == "RNNCell(1, 2, nonlinearity=identity)"


@pytest.mark.parametrize("name", CELLS)
def test_constructor_errors(name: str) -> None:
    for args in ((3, -1), (-1, 3), (3,), (3, "a"), ("3", 3)):
        expected = raised(lambda a=args: getattr(nn, name)(*a))
        assert expected[0] is not None and raised(lambda a=args: getattr(fused_rnn, name)(*a)) == expected, args


def test_unknown_nonlinearity() -> None:
    """torch.nn.RNNCell finds out at the first call; ours at construction, in RNN's words."""
    assert raised(lambda: nn.RNNCell(3, 4, nonlinearity="gelu"))[0] is None
    kind, text = raised(lambda: fused_rnn.RNNCell(3, 4, nonlinearity="gelu"))
    assert kind is ValueError and text == "Unknown nonlinearity 'gelu'. Select from 'tanh', 'relu' or 'identity'."
    ours, theirs = make_pair("RNNCell", 3, 4)
    ours.nonlinearity = theirs.nonlinearity = "gelu"
    assert raised(lambda: ours(torch.zeros(2, 3))) == raised(lambda: theirs(torch.zeros(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kwargs"), NAMED)
def test_forward(backend: str, name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    g, place = torch.Generator().manual_seed(1), {"dtype": dtype, "device": device_of(backend)}
    with use_backend(backend):
        for (inputs, hidden), batch, with_state in itertools.product(((4, 6), (1, 1), (33, 9)), (3, 1, None), (True, False)):
            ours, theirs = make_pair(name, inputs, hidden, **place, **kwargs)
            x = torch.randn([inputs] if batch is None else [batch, inputs], generator=g, dtype=torch.float64).to(**place)
            compare(
                ours, theirs, x, random_state(theirs, batch, g, **place) if with_state else None, f"{batch=} {with_state=}"
            )


@pytest.mark.parametrize("name", CELLS)
def test_noncontiguous_and_empty(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        x = torch.randn(3, 8, dtype=torch.float64, device=device)[:, ::2]
        h = torch.randn(6, 3, dtype=torch.float64, device=device).t()
        compare(ours, theirs, x, (h, h.flip(0)) if name == "LSTMCell" else h)
        compare(ours, theirs, x[:0], (h[:0], h[:0]) if name == "LSTMCell" else h[:0])
        compare(ours, theirs, x[:0])


def test_identity(backend: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        m = fused_rnn.RNNCell(3, 4, nonlinearity="identity", dtype=torch.float64, device=device)
        x, h = (torch.randn(2, n, dtype=torch.float64, device=device) for n in (3, 4))
        assert_close(m(x, h), x @ m.weight_ih.T + m.bias_ih + h @ m.weight_hh.T + m.bias_hh)


@pytest.mark.parametrize("name", CELLS)
def test_sequence_by_cells_equals_layer(backend: str, name: str) -> None:
    g, place = torch.Generator().manual_seed(1), {"dtype": torch.float64, "device": device_of(backend)}
    with use_backend(backend):
        cell = getattr(fused_rnn, name)(4, 6, **place)
        layer = getattr(fused_rnn, name.removesuffix("Cell"))(4, 6, **place)
        layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
        x, state, outputs = torch.randn(5, 3, 4, generator=g, dtype=torch.float64).to(**place), None, []
        for x_t in x:
            state = cell(x_t, state)
            outputs.append(state[0] if name == "LSTMCell" else state)
        assert_close(layer(x)[0], torch.stack(outputs))


def state_of(name: str, *shape: int, **kwargs: Any) -> Any:
    return (
        (torch.zeros(shape, **kwargs), torch.zeros(shape, **kwargs)) if name == "LSTMCell" else torch.zeros(shape, **kwargs)
    )


@pytest.mark.parametrize("name", CELLS)
def test_errors_are_torchs(backend: str, name: str) -> None:
    if backend == "cuda":
        pytest.skip("the checks do not depend on the device; messages name the CPU")
    ours, theirs = make_pair(name, 3, 4)
    x, u = torch.zeros(2, 3), torch.zeros(3)
    # (where ranks disagree, see test_rank_of_state)
    calls: dict[str, tuple[Any, ...]] = {
        "last dimension": (torch.zeros(2, 4),),
        "last dimension unbatched": (torch.zeros(4),),
        "dtype": (x.double(),),
        "integers": (x.short(),),  # of int32 and int64 they are ids
        "rank 0": (torch.tensor(0.0),),
        "rank 3": (torch.zeros(1, 2, 3),),
        "hx rank 3": (x, state_of(name, 1, 2, 4)),
        "hx rank 0": (x, state_of(name)),
        "hx batch": (x, state_of(name, 3, 4)),
        "hx hidden": (x, state_of(name, 2, 5)),
        "hx hidden unbatched": (u, state_of(name, 5)),
        "hx of None": (x, (None, None)),
        "hx of three": (x, (torch.zeros(2, 4),) * 3),
        "hx of one": (x, (torch.zeros(2, 4),)),
        "not a tensor": ([1.0],),
    }
    if name == "LSTMCell":
        h = torch.zeros(2, 4)
        calls |= {"c hidden": (x, (h, torch.zeros(2, 5))), "c batch": (x, (h, torch.zeros(3, 4))), "hx a tensor": (x, h)}
    with use_backend(backend):
        for key, args in calls.items():
            expected = raised(lambda a=args: theirs(*a))
            assert expected[0] is not None, key
            assert raised(lambda a=args: ours(*a)) == expected, key


@pytest.mark.parametrize("name", CELLS)
def test_rank_of_state(name: str) -> None:
    """A batched input with an unbatched state, or the reverse: torch 2.15's words (older ones broadcast)."""
    ours, theirs = make_pair(name, 3, 4)
    x = torch.zeros(2, 3)
    for args, got in (
        ((x, state_of(name, 4)), 1),
        ((x, state_of(name, 2)), 1),
        ((x[0], state_of(name, 1, 4)), 3),
        ((x[0], state_of(name, 4, 4)), 3),
    ):
        found = raised(lambda a=args: ours(*a))
        assert found == (RuntimeError, f"Expected 2D hidden0 (batch x hidden_size), but got {got}D tensor")
        if TORCH >= (2, 15):
            assert raised(lambda a=args: theirs(*a)) == found


@pytest.mark.parametrize("name", CELLS)
def test_errors_where_torchs_are_unclear(name: str) -> None:
    """torch.nn fails inside addmm (hx of another dtype or device)."""
    ours, theirs = make_pair(name, 3, 4)
    x = torch.zeros(2, 3)
    words = {
        "not the same dtype, found input tensor with Float and hidden tensor with Double": (
            x,
            state_of(name, 2, 4, dtype=torch.float64),
        ),
        "not at the same device, found input tensor at cpu and hidden tensor at meta": (
            x,
            state_of(name, 2, 4, device="meta"),
        ),
        "Input and parameter tensors are not at the same device": (x.to("meta"),),
    }
    for text, args in words.items():
        kind, message = raised(lambda a=args: ours(*a))
        assert kind is RuntimeError and text in message, (kind, message)


@pytest.mark.parametrize("name", CELLS)
def test_wrong_weight_shape_is_an_error(backend: str, name: str) -> None:
    x = torch.zeros(2, 3, device=device_of(backend))
    with use_backend(backend):
        for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            m = getattr(fused_rnn, name)(3, 4, device=x.device)
            setattr(m, weight, nn.Parameter(getattr(m, weight)[:-1].detach().clone()))
            assert raised(lambda m=m: m(x))[0] in (RuntimeError, ValueError), weight


@pytest.mark.parametrize("name", CELLS)
def test_no_warning(backend: str, name: str) -> None:
    with use_backend(backend):
        m = getattr(fused_rnn, name)(3, 4, device=device_of(backend))
        assert warned(lambda: m(torch.zeros(2, 3, device=device_of(backend)))) == []
