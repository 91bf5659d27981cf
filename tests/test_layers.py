"""Every case on every backend: outputs, last states and all gradients against the fp64 reference and against torch.nn."""

from __future__ import annotations

import math

import pytest
import torch
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, Data, layer_cases, make_data
from torch import Tensor

from fused_rnn import functional, use_backend

CASES = list(layer_cases())


def call(case: Case, data: Data) -> list[Tensor]:
    """(output, h_n[, c_n]) of fused_rnn.functional."""
    options = {
        "num_layers": case.layers,
        "has_biases": case.has_biases,
        "bidirectional": case.bidirectional,
        "batch_first": case.batch_first,
        "batch_sizes": data.batch_sizes,
        "lengths": data.lengths,
        "resets": data.resets,
    }
    if case.cell == "LSTM":
        hx = (data.h0, data.c0) if data.h0 is not None else None
        y, (h_n, c_n) = functional.lstm(data.input, data.weights, hx, **options)
        return [y, h_n, c_n]
    if case.cell == "GRU":
        return list(functional.gru(data.input, data.weights, data.h0, **options))
    kind = case.cell.removeprefix("RNN_").lower()
    return list(functional.rnn(data.input, data.weights, data.h0, nonlinearity=kind, **options))


def results_and_gradients(case: Case, data: Data) -> tuple[list[Tensor], list[Tensor]]:
    inputs = data.differentiable()
    for t in inputs:
        t.requires_grad_()
    results = call(case, data)
    grads = [data.dy, data.dh_n, data.dc_n][: len(results)]
    return results, list(torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True))


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float, norm: float = math.inf) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(actual).all(), f"{name}: not finite"

    def size(t: Tensor) -> float:
        return torch.linalg.vector_norm(t, norm).item()

    error = size(actual - expected) / max(1.0, size(expected))
    assert error <= tolerance, f"{name}: error {error:.3g}, tolerance {tolerance:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, backend: str) -> None:
    data = make_data(case, "cuda" if backend == "cuda" else "cpu")
    exact = data.to(torch.float64)
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, exact)
    with use_backend(backend):
        results, grads = results_and_gradients(case, data)
        with torch.no_grad():
            inference = call(case, data)
    # The relative error of a sum of k roundings grows with sqrt(k).
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    names = ["output", "h_n", "c_n"]
    for name, actual, want, again in zip(names, results, expected, inference, strict=False):
        assert_near(name, actual, want, OUTPUT_TOLERANCE[case.dtype] * growth)
        assert_near(f"{name} without grad", again, want, OUTPUT_TOLERANCE[case.dtype] * growth)
    # relu's derivative jumps at 0: rounding a pre-activation to 16 bits may switch single elements on or off, so that only
    # the gradient as a whole can be compared.
    norm = 2 if case.cell == "RNN_RELU" and case.dtype.itemsize == 2 else math.inf
    for index, (actual, want) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_near(f"gradient {index}", actual, want, GRADIENT_TOLERANCE[case.dtype] * growth, norm)


def _torch_nn_has(case: Case) -> bool:
    return case.cell != "RNN_IDENTITY" and case.ragged != "lengths" and not case.resets


@pytest.mark.parametrize(
    "case", [c for c in CASES if _torch_nn_has(c) and c.dtype in (torch.float64, torch.float32)], ids=str
)
def test_against_torch_nn(case: Case, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    data = make_data(case, device)
    module = case.module(torch.Generator().manual_seed(1), device)
    with torch.no_grad():
        for parameter, weight in zip(module._flat_weights, data.weights, strict=True):
            parameter.copy_(weight)
    with use_backend(backend):
        results, grads = results_and_gradients(case, data)
    states = None if data.h0 is None else (data.h0, data.c0) if case.cell == "LSTM" else data.h0
    given: object = data.input
    if data.batch_sizes is not None:
        given = torch.nn.utils.rnn.PackedSequence(data.input, data.batch_sizes)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y, hx = module(given, states)
    expected = [y.data if data.batch_sizes is not None else y, *(hx if case.cell == "LSTM" else [hx])]
    inputs = [t for t in (data.input, data.h0, data.c0, *module._flat_weights) if t is not None]
    expected_grads = torch.autograd.grad(expected, inputs, [data.dy, data.dh_n, data.dc_n][: len(expected)])
    growth = max(1.0, math.sqrt(case.hidden / 32))
    for name, actual, want in zip(["output", "h_n", "c_n"], results, expected, strict=False):
        assert_near(name, actual, want, OUTPUT_TOLERANCE[case.dtype] * growth)
    for index, (actual, want) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_near(f"gradient {index}", actual, want, GRADIENT_TOLERANCE[case.dtype] * growth)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(cell: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(cell, steps=20, batch=17, input_size=33, hidden=65, bidirectional=True, ragged="lengths", dtype=dtype)
    device = "cuda" if backend == "cuda" else "cpu"
    with use_backend(backend):
        first = results_and_gradients(case, make_data(case, device))
        for _ in range(3):
            again = results_and_gradients(case, make_data(case, device))
            for one, other in zip([*first[0], *first[1]], [*again[0], *again[1]], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_padding_may_hold_anything(cell: str, backend: str) -> None:
    case = Case(cell, steps=6, batch=5, bidirectional=True, ragged="lengths", layers=2)
    device = "cuda" if backend == "cuda" else "cpu"
    clean, dirty = make_data(case, device), make_data(case, device)
    padding = torch.arange(case.steps, device=device)[:, None] >= dirty.lengths[None]
    clean.input[padding] = 0
    dirty.input[padding] = float("nan")
    dirty.dy[padding] = float("inf")
    with use_backend(backend):
        expected, expected_grads = results_and_gradients(case, clean)
        results, grads = results_and_gradients(case, dirty)
    for one, other in zip([*results, *grads[1:]], [*expected, *expected_grads[1:]], strict=True):
        assert torch.equal(one, other)
