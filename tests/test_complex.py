"""Complex numbers: no kernels, so the reference serves them, with its warning; values and gradients are torch.nn's."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, flatten, make_pair, raised
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from fused_rnn import _backend, functional, use_backend

DTYPES = (torch.complex64, torch.complex128)
TOLERANCE = {torch.complex64: 2e-5, torch.complex128: 1e-12}


@pytest.fixture(autouse=True)
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_backend, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Small numbers: sigmoid and tanh have poles, near which the least rounding grows beyond any tolerance."""
    return (0.2 * torch.randn(shape, dtype=dtype)).to(device).requires_grad_()


def small_pair(name: str, device: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours on the device; torch.nn's on the CPU, since not all of its CUDA kernels take complex numbers."""
    pair = make_pair(name, 4, 6, **kwargs)
    for parameter in itertools.chain(*(module.parameters() for module in pair)):
        parameter.data.mul_(0.5)
    return pair[0].to(device), pair[1]


def results_of(module: nn.Module, input: Any, hx: Any) -> list[Tensor]:
    """Outputs, last states, and the gradients of every input and parameter."""
    device = next(module.parameters()).device
    input, hx = (
        input.to(device),
        tuple(h.to(device) for h in hx) if isinstance(hx, tuple) else None if hx is None else hx.to(device),
    )
    outputs = flatten(module(input, hx))
    if not torch.is_grad_enabled():
        return [t.cpu() for t in outputs]
    leaves = [*flatten(input), *flatten(hx), *module.parameters()]
    total = sum((t * t.detach().conj()).real.sum() + t.imag.sum() for t in outputs)
    return [t.cpu() for t in (*outputs, *torch.autograd.grad(total, leaves))]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, index
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() <= TOLERANCE[a.dtype] * scale, index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    options: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
    options += [{"proj_size": 3}] if name == "LSTM" else []
    for kwargs, with_state in itertools.product(options, (False, True)):
        ours, theirs = small_pair(name, dtype=dtype, device=device, **kwargs)
        rows = 4 if "num_layers" in kwargs else 1
        h = randn(rows, 3, kwargs.get("proj_size", 6), dtype=dtype, device=device)
        hx = None if not with_state else (h, randn(rows, 3, 6, dtype=dtype, device=device)) if name == "LSTM" else h
        x = randn(*((3, 5) if "batch_first" in kwargs else (5, 3)), 4, dtype=dtype, device=device)
        assert_equal(results_of(ours, x, hx), results_of(theirs, x, hx))
        with torch.no_grad():
            assert_equal(results_of(ours, x, hx), results_of(theirs, x, hx))
            if not with_state:
                assert_equal(results_of(ours, x[0], None), results_of(theirs, x[0], None))
        packed = pack_sequence([randn(n, 4, dtype=dtype, device=device).detach() for n in (2, 5, 3)], enforce_sorted=False)
        packed = PackedSequence(packed.data.requires_grad_(), *packed[1:])
        assert_equal(results_of(ours, packed, hx), results_of(theirs, packed, hx))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    for bias, with_state in itertools.product((True, False), (True, False)):
        ours, theirs = small_pair(name, bias=bias, dtype=dtype, device=device)
        x, h, c = (randn(3, size, dtype=dtype, device=device) for size in (4, 6, 6))
        hx = None if not with_state else (h, c) if name == "LSTMCell" else h
        assert_equal(results_of(ours, x, hx), results_of(theirs, x, hx))
        with torch.no_grad():
            assert_equal(results_of(ours, x, hx), results_of(theirs, x, hx))
            assert_equal(results_of(ours, x[0], None), results_of(theirs, x[0], None))


@pytest.mark.parametrize("name", CLASSES)
def test_the_warning_comes_once(name: str, warnings_seen: list[warnings.WarningMessage]) -> None:
    module = getattr(fused_rnn, name)(4, 6, dtype=torch.complex64)
    x = torch.zeros(*((3, 4) if name in CELLS else (5, 3, 4)), dtype=torch.complex64)
    for _ in range(2):
        module(x)
    assert [str(w.message) for w in warnings_seen] == [
        "fused_rnn runs on its slow Python reference: there are no kernels for torch.complex64"
    ]
    assert warnings_seen[0].filename == __file__
    with use_backend("reference"):
        module(x)
    assert len(warnings_seen) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_forced_backend_is_an_error(name: str, device: str) -> None:
    module = getattr(fused_rnn, name)(4, 6, dtype=torch.complex64, device=device)
    x = torch.zeros(*((3, 4) if name in CELLS else (5, 3, 4)), dtype=torch.complex64, device=device)
    with use_backend(device):
        assert raised(lambda: module(x)) == (
            RuntimeError,
            f"backend {device!r} is forced but there are no kernels for torch.complex64",
        )


@pytest.mark.parametrize("name", ("RNN", "RNNCell"))
def test_relu(name: str) -> None:
    """relu of a complex number is not defined: torch.nn raises."""
    ours, theirs = make_pair(name, 4, 6, nonlinearity="relu", dtype=torch.complex64)
    x = torch.zeros(*((3, 4) if name in CELLS else (5, 3, 4)), dtype=torch.complex64)
    assert raised(lambda: theirs(x))[0] is not None
    for backend in (None, "reference"):
        with use_backend(backend):
            kind, text = raised(lambda: ours(x))
            assert kind is RuntimeError and text.startswith("input: expected a real dtype with nonlinearity 'relu'")


@pytest.mark.parametrize("name", CLASSES)
def test_functional(name: str) -> None:
    function = getattr(functional, name.lower().replace("cell", "_cell"))
    ours, theirs = make_pair(name, 4, 6, dtype=torch.complex128)
    weights = list(ours.parameters())
    x = torch.randn(*((3, 4) if name in CELLS else (5, 3, 4)), dtype=torch.complex128)
    result = function(x, None, *weights) if name in CELLS else function(x, weights)
    assert_equal(flatten(result), flatten(theirs(x)))
    if name not in CELLS:
        lengths, resets = torch.tensor([5, 2, 3]), torch.zeros(5, 3, dtype=torch.bool)
        y = flatten(function(x, weights, lengths=lengths, resets=resets))[0]
        assert_equal([y[:2, 1]], [theirs(x[:2, 1])[0]])
        assert not y[2:, 1].any()


def test_mixed_with_real_numbers() -> None:
    ours, theirs = make_pair("GRU", 4, 6, dtype=torch.complex64)
    for module in (ours, theirs):
        assert raised(lambda m=module: m(torch.zeros(5, 3, 4)))[0] is ValueError
    real = fused_rnn.GRU(4, 6)
    assert raised(lambda: real(torch.zeros(5, 3, 4, dtype=torch.complex64)))[0] is ValueError


def test_explain() -> None:
    plan = fused_rnn.explain(fused_rnn.GRU(4, 6, dtype=torch.complex64), torch.zeros(5, 3, 4, dtype=torch.complex64))
    assert plan.backend == "reference" and "there are no kernels for torch.complex64" in str(plan)
