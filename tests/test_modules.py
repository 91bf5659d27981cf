"""RNN, LSTM and GRU as drop-in replacements: construction, forward in every form, errors, against torch.nn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from module_pairs import LAYERS, assert_close, compare, device_of, make_pair, raised, random_state, warned
from torch import nn

import fused_rnn
from fused_rnn import use_backend

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nobias": {"bias": False},
    "stack": {"num_layers": 3},
    "bi": {"bidirectional": True},
    "bi-stack-nobias": {"bidirectional": True, "num_layers": 2, "bias": False},
}


def configs(name: str) -> dict[str, dict[str, Any]]:
    extra: dict[str, dict[str, Any]] = {}
    if name == "LSTM":
        extra = {"proj": {"proj_size": 3}, "proj-bi-stack": {"proj_size": 2, "bidirectional": True, "num_layers": 2}}
    if name == "RNN":
        extra = {"relu": {"nonlinearity": "relu"}, "relu-bi": {"nonlinearity": "relu", "bidirectional": True}}
    return {**CONFIGS, **extra}


NAMED = [pytest.param(name, kwargs, id=f"{name}-{key}") for name in LAYERS for key, kwargs in configs(name).items()]


# --- construction ---


@pytest.mark.parametrize(("name", "kwargs"), NAMED)
def test_construction(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = make_pair(name, 4, 6, **kwargs, batch_first=True, dtype=torch.float64)
    assert isinstance(ours, type(theirs)) and type(ours) is getattr(fused_rnn, name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert ours._flat_weights_names == theirs._flat_weights_names and ours._all_weights == theirs._all_weights
    assert all(a is b for a, b in zip(ours._flat_weights, (getattr(ours, n) for n in ours._flat_weights_names), strict=True))
    assert [[tuple(w.shape) for w in group] for group in ours.all_weights] == [
        [tuple(w.shape) for w in group] for group in theirs.all_weights
    ]
    skipped = ("_flat_weights", "_flat_weight_refs", "_parameters")
    for key, value in theirs.__dict__.items():
        if key not in skipped:
            assert ours.__dict__[key] == value, key
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_positional_arguments() -> None:
    for name, args in (
        ("RNN", (4, 6, 2, "relu", False, True, 0.5, True)),
        ("LSTM", (4, 6, 2, False, True, 0.5, True, 3)),
        ("GRU", (4, 6, 2, False, True, 0.5, True)),
    ):
        ours, theirs = make_pair(name, *args)
        assert repr(ours) == repr(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    linear = fused_rnn.RNN(4, 6, 2, "identity", False)
    assert linear.nonlinearity == "identity" and linear.mode == "RNN_IDENTITY" and linear.bias is False


BAD_CONSTRUCTORS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((4, 0), {}),
    ((4, -1), {}),
    ((0, 4), {}),
    ((4.0, 4), {}),
    ((4, 4.0), {}),
    (("4", 4), {}),
    ((4, 4, 0), {}),
    ((4, 4, -1), {}),
    ((4, 4), {"dropout": 1.5}),
    ((4, 4), {"dropout": -0.1}),
    ((4, 4), {"dropout": True}),
    ((4, 4), {"dropout": None}),
    ((4, 4), {"dropout": "a"}),
    ((4, 4), {"bias": 1}),
    ((4, 4), {"bias": "True"}),
    ((4, 4), {"batch_first": 0}),
    ((4, 4), {"proj_size": -1}),
    ((4, 4), {"proj_size": 4}),
    ((4, 4), {"proj_size": 2}),
    ((4, 4), {"proj_size": 0}),
    ((4, 4), {"nonsense": 2}),
    ((4,), {}),
    ((), {}),
]


@pytest.mark.parametrize("name", LAYERS)
def test_constructor_errors(name: str) -> None:
    failures = 0
    for args, kwargs in BAD_CONSTRUCTORS:
        theirs = raised(lambda a=args, k=kwargs: getattr(nn, name)(*a, **k))
        assert raised(lambda a=args, k=kwargs: getattr(fused_rnn, name)(*a, **k)) == theirs, (args, kwargs)
        failures += theirs[0] is not None
    assert failures >= len(BAD_CONSTRUCTORS) - 2  # LSTM takes proj_size 2 and 0


def test_unknown_nonlinearity() -> None:
    theirs = raised(lambda: nn.RNN(4, 4, nonlinearity="gelu"))
    for call in (lambda: fused_rnn.RNN(4, 4, nonlinearity="gelu"), lambda: fused_rnn.RNN(4, 4, 1, "gelu")):
        kind, text = raised(call)
        assert kind is theirs[0] is ValueError
        assert text == theirs[1].replace("'tanh' or 'relu'", "'tanh', 'relu' or 'identity'")


@pytest.mark.parametrize("name", LAYERS)
def test_constructor_warning(name: str) -> None:
    theirs = warned(lambda: getattr(nn, name)(4, 4, dropout=0.5))
    assert warned(lambda: getattr(fused_rnn, name)(4, 4, dropout=0.5)) == theirs and len(theirs) == 1
    assert warned(lambda: getattr(fused_rnn, name)(4, 4, 2, dropout=0.5)) == []


# --- forward ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kwargs"), NAMED)
def test_forward(backend: str, name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    device, g = device_of(backend), torch.Generator().manual_seed(1)
    place = {"dtype": dtype, "device": device}
    with use_backend(backend):
        for batch_first, batch, with_state in itertools.product((False, True), (3, 1, None), (False, True)):
            ours, theirs = make_pair(name, 4, 6, batch_first=batch_first, **place, **kwargs)
            sizes = [5, 4] if batch is None else [batch, 5, 4] if batch_first else [5, batch, 4]
            x = torch.randn(sizes, generator=g, dtype=torch.float64).to(**place)
            hx = random_state(theirs, batch, g, **place) if with_state else None
            compare(ours, theirs, x, hx, f"batch_first={batch_first} batch={batch} hx={with_state}")


@pytest.mark.parametrize("name", LAYERS)
def test_noncontiguous(backend: str, name: str) -> None:
    device, g = device_of(backend), torch.Generator().manual_seed(1)
    place = {"dtype": torch.float64, "device": device}
    with use_backend(backend):
        ours, theirs = make_pair(name, 4, 6, num_layers=2, **place)
        wide = torch.randn(5, 3, 8, generator=g, dtype=torch.float64).to(device)
        state = torch.randn(6, 3, 2, generator=g, dtype=torch.float64).to(device).permute(2, 1, 0)
        hx = (state, state.flip(0)) if name == "LSTM" else state
        for x in (wide[..., ::2], wide[..., :4], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 4:]):
            assert not x.is_contiguous() and not state.is_contiguous()
            expected = theirs(x, hx) if device == "cpu" else theirs(x.contiguous(), _contiguous(hx))
            assert_close(ours(x, hx), expected)
        ours.weight_hh_l0.data = ours.weight_hh_l0.data.t().contiguous().t()
        assert not ours.weight_hh_l0.is_contiguous()
        assert_close(ours(wide[..., :4]), theirs(wide[..., :4]))
        expanded = wide[:1, :1, :4].expand(5, 3, 4)
        assert_close(ours(expanded), theirs(expanded))


def _contiguous(hx: Any) -> Any:
    return tuple(h.contiguous() for h in hx) if isinstance(hx, tuple) else hx.contiguous()


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        for batch_first in (False, True):
            ours, theirs = make_pair(name, 4, 6, 2, bidirectional=True, batch_first=batch_first, device=device)
            x = torch.zeros((0, 5, 4) if batch_first else (5, 0, 4), device=device, requires_grad=True)
            output = ours(x)
            assert_close(output, theirs(x))
            output[0].sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape
            assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_masks_are_torchs(backend: str, name: str) -> None:
    """Between layers, in training only, drawn from torch's generator: on a CPU the very masks of torch.nn."""
    if backend == "cuda":
        pytest.skip("cuDNN draws its masks from a generator of its own")
    with use_backend(backend):
        for p, packed, batch_first in itertools.product((0.3, 1.0), (False, True), (False, True)):
            ours, theirs = make_pair(
                name, 4, 6, 3, dropout=p, bidirectional=True, batch_first=batch_first, dtype=torch.float64
            )
            x = torch.randn(3, 5, 4, dtype=torch.float64)
            if packed:
                x = nn.utils.rnn.pack_padded_sequence(x, [5, 2, 3], batch_first=True, enforce_sorted=False)
            results = []
            for module in (ours, theirs):
                torch.manual_seed(7)
                results.append((module(x), module(x), torch.rand(1)))
            assert_close(*results)  # and the generator stands at the same place afterwards
            if p < 1:
                first, second = (_data(out[0]) for out in results[0][:2])
                assert not torch.equal(first, second)
            assert torch.equal(_data(ours.eval()(x)[0]), _data(ours(x)[0]))
            assert_close(ours(x), theirs.eval()(x))


def _data(output: Any) -> torch.Tensor:
    return output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output


def test_integers_for_booleans(backend: str) -> None:
    """torch.nn's constructor takes any truth value for bidirectional; its forward then fails. Ours means what it says."""
    device = device_of(backend)
    with use_backend(backend):
        ours, theirs = fused_rnn.LSTM(3, 4, bidirectional=1, device=device), nn.LSTM(3, 4, bidirectional=True, device=device)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(5, 2, 3, device=device)
        assert_close(ours(x), theirs(x))
        module = fused_rnn.GRU(3, 4, 2, dropout=1.0, device=device)
        module.training = 1
        dropped = module(x)[0]
        module.eval()
        assert not torch.equal(dropped, module(x)[0])


def test_identity_is_linear(backend: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        m = fused_rnn.RNN(3, 4, 2, "identity", dtype=torch.float64, device=device, bidirectional=True)
        x, y = torch.randn(2, 5, 2, 3, dtype=torch.float64, device=device).unbind()
        zero = m(torch.zeros_like(x))[0]
        assert_close(m(x + 2 * y)[0] - zero, (m(x)[0] - zero) + 2 * (m(y)[0] - zero))
        one = fused_rnn.RNN(3, 4, nonlinearity="identity", dtype=torch.float64, device=device)
        h, rows = torch.zeros(2, 4, dtype=torch.float64, device=device), []
        for x_t in x:
            h = x_t @ one.weight_ih_l0.T + one.bias_ih_l0 + h @ one.weight_hh_l0.T + one.bias_hh_l0
            rows.append(h)
        assert_close(one(x)[0], torch.stack(rows))


# --- errors ---


def state_of(name: str, *shape: int, **kwargs: Any) -> Any:
    return (torch.zeros(shape, **kwargs), torch.zeros(shape, **kwargs)) if name == "LSTM" else torch.zeros(shape, **kwargs)


def error_calls(name: str) -> dict[str, Any]:
    """Bad calls of a layer with input 3, hidden 4, for which torch.nn has a message of its own."""
    x, u = torch.zeros(5, 2, 3), torch.zeros(5, 3)
    calls: dict[str, tuple[Any, ...]] = {
        "T=0": (torch.zeros(0, 2, 3),),
        "T=0 unbatched": (torch.zeros(0, 3),),
        "T=0 B=0": (torch.zeros(0, 0, 3),),
        "last dimension": (torch.zeros(5, 2, 4),),
        "last dimension unbatched": (torch.zeros(5, 4),),
        "dtype": (x.double(),),
        "integers": (x.short(),),  # of int32 and int64 they are ids
        "rank 1": (torch.zeros(3),),
        "rank 4": (torch.zeros(1, 1, 1, 3),),
        "hx batch": (x, state_of(name, 1, 3, 4)),
        "hx layers": (x, state_of(name, 2, 2, 4)),
        "hx hidden": (x, state_of(name, 1, 2, 5)),
        "hx 2-D": (x, state_of(name, 2, 4)),
        "hx 4-D": (x, state_of(name, 1, 1, 2, 4)),
        "hx 3-D unbatched": (u, state_of(name, 1, 1, 4)),
        "hx layers unbatched": (u, state_of(name, 2, 4)),
        "hx and T=0": (torch.zeros(0, 2, 3), state_of(name, 1, 3, 4)),
        "hx device": (x, state_of(name, 1, 2, 4, device="meta")),
        "input device": (x.to("meta"),),
        "hx of None": (x, (None, None)),
        "hx of three": (x, (torch.zeros(1, 2, 4),) * 3),
        "hx of one": (x, (torch.zeros(1, 2, 4),)),
        "hx a list": (x, [1, 2]),
        "not a tensor": ([1.0],),
    }
    if name == "LSTM":
        h, c = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)
        calls |= {"c hidden": (x, (h, c)), "c rank": (x, (h, c[0])), "hx a tensor": (x, h)}
    return calls


@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_torchs(backend: str, name: str) -> None:
    if backend == "cuda":
        pytest.skip("the checks do not depend on the device; messages name the CPU")
    ours, theirs = make_pair(name, 3, 4)
    with use_backend(backend):
        for key, args in error_calls(name).items():
            expected = raised(lambda a=args: theirs(*a))
            assert expected[0] is not None, key
            assert raised(lambda a=args: ours(*a)) == expected, key


def test_projected_state_errors(backend: str) -> None:
    ours, theirs = make_pair("LSTM", 3, 5, 2, proj_size=2)
    x, small, large = torch.zeros(5, 2, 3), torch.zeros(4, 2, 2)[:2], torch.zeros(2, 2, 5)
    with use_backend("reference"):
        for hx in ((large, large), (small, small), (large, small)):
            expected = raised(lambda h=hx: theirs(x, h))
            assert expected[0] is RuntimeError and raised(lambda h=hx: ours(x, h)) == expected
        assert raised(lambda: ours(x, (small, large)))[0] is None


@pytest.mark.parametrize("name", LAYERS)
def test_errors_where_torch_has_none(name: str) -> None:
    """dtype of hx: torch.nn fails inside oneDNN or addmm, with their words."""
    ours, theirs = make_pair(name, 3, 4)
    call = (torch.zeros(5, 2, 3), state_of(name, 1, 2, 4, dtype=torch.float64))
    assert raised(lambda: theirs(*call))[0] is RuntimeError
    kind, text = raised(lambda: ours(*call))
    assert kind is RuntimeError
    assert text == (
        "Input and hidden tensors are not the same dtype, found input tensor with Float and hidden tensor with Double"
    )


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_weight_shape_is_an_error(backend: str, name: str) -> None:
    """The constructor's sizes and the weights' can differ once someone assigns a Parameter: never a read past its end."""
    device = device_of(backend)
    x = torch.zeros(5, 2, 3, device=device)
    with use_backend(backend):
        for weight in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            m = getattr(fused_rnn, name)(3, 4, device=device)
            setattr(m, weight, nn.Parameter(getattr(m, weight)[:-1].detach().clone()))
            assert raised(lambda m=m: m(x))[0] in (RuntimeError, ValueError), weight


# --- calls that must not warn, and the methods torch.nn offers ---


@pytest.mark.parametrize("name", LAYERS)
def test_weights_in_any_storage_without_warning(backend: str, name: str) -> None:
    device = device_of(backend)
    m = getattr(fused_rnn, name)(3, 4, 2, bidirectional=True, device=device, dtype=torch.float64)
    x = torch.randn(5, 2, 3, device=device, dtype=torch.float64)
    with use_backend(backend):
        expected = m(x)
        flat = torch.cat([p.detach().reshape(-1) for p in m.parameters()])
        offset = 0
        for p in m.parameters():
            p.data = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        assert warned(lambda: m(x)) == [] and warned(m.flatten_parameters) == []
        assert_close(m(x), expected)
        pointers = [p.data_ptr() for p in m.parameters()]
        m.flatten_parameters()
        assert pointers == [p.data_ptr() for p in m.parameters()]
        m.weight_hh_l0_reverse = m.weight_hh_l0  # one Parameter under two names
        assert warned(lambda: m(x)[0].sum().backward()) == []


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_check_methods(name: str) -> None:
    ours, theirs = make_pair(name, 3, 4, 2, bidirectional=True, **({"proj_size": 2} if name == "LSTM" else {}))
    x, sizes = torch.zeros(5, 2, 3), torch.tensor([3, 2])
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_hidden_size(x, sizes) == theirs.get_expected_hidden_size(x, sizes)
    if name == "LSTM":
        assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    hx = random_state(ours, 2, torch.Generator().manual_seed(0))
    order = torch.tensor([1, 0])
    assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx
    ours.check_forward_args(x, hx, None)
    for bad in (torch.zeros(5, 2, 4), torch.zeros(5, 3), x.double()):
        assert raised(lambda b=bad: ours.check_input(b, None)) == raised(lambda b=bad: theirs.check_input(b, None))
    wrong = random_state(ours, 3, torch.Generator().manual_seed(0))
    assert raised(lambda: ours.check_forward_args(x, wrong, None)) == raised(
        lambda: theirs.check_forward_args(x, wrong, None)
    )
