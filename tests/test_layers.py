"""Every case on every backend: outputs, last states and all gradients against the fp64 reference and against torch.nn."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, TORCH_NN, Case, Data, layer_cases, make_data
from settings import Setting
from torch import Tensor

from fused_rnn import functional, use_backend
from fused_rnn._backend import has_cpu_kernels

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
    if case.cell.startswith("RNN_"):
        kind = case.cell.removeprefix("RNN_").lower()
        return list(functional.rnn(data.input, data.weights, data.h0, nonlinearity=kind, **options))
    return list(getattr(functional, case.cell.lower())(data.input, data.weights, data.h0, **options))


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
    return case.cell in TORCH_NN and case.ragged != "lengths" and not case.resets


@pytest.mark.parametrize(
    "case", [c for c in CASES if _torch_nn_has(c) and c.dtype in (torch.float64, torch.float32)], ids=str
)
def test_against_torch_nn(case: Case, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    data = make_data(case, device)
    module = case.module(device)
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


def check_not_a_number_ends_with_a_reset(case: Case, backend: str) -> None:
    """A row of the batch that is not a number is one again from its next reset on, backward before it; no other notices."""
    device = "cuda" if backend == "cuda" else "cpu"
    clean, bad = make_data(case, device), make_data(case, device)
    for data in (clean, bad):
        data.resets[:] = False
        data.resets[2, 0] = True
    bad.input[0, 0] = math.nan
    with use_backend(backend):
        expected, _ = results_and_gradients(case, clean)
        results, _ = results_and_gradients(case, bad)
    assert results[0][:2, 0].isnan().all()
    results[0][:2, 0] = expected[0][:2, 0] = 0
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)
    bad = make_data(case, device)
    bad.resets, bad.dy[-1, 0] = clean.resets, math.nan
    with use_backend(backend):
        _, (expected_dx, *_) = results_and_gradients(case, clean)
        _, (dx, *_) = results_and_gradients(case, bad)
    assert dx[2:, 0].isnan().any()
    dx[2:, 0] = expected_dx[2:, 0] = 0
    assert torch.equal(dx, expected_dx)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # torch.mm leaks NaN into other rows in bfloat16
def test_not_a_number_ends_with_a_reset(cell: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(cell, steps=5, batch=5, hidden=21, resets=True, dtype=dtype)
    check_not_a_number_ends_with_a_reset(case, backend)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_gradients_of_some_inputs_only(cell: str, backend: str) -> None:
    """Frozen weights, input gradients alone, one state alone: the same values as when everything is differentiated."""
    case = Case(cell, dtype=torch.float64, bidirectional=True)
    device = "cuda" if backend == "cuda" else "cpu"
    with use_backend(backend):
        _, everything = results_and_gradients(case, make_data(case, device))
        count = len(everything)
        for index in range(count):
            data = make_data(case, device)
            data.differentiable()[index].requires_grad_()
            results = call(case, data)
            grads = [data.dy, data.dh_n, data.dc_n][: len(results)]
            (grad,) = torch.autograd.grad(results, [data.differentiable()[index]], grads)
            torch.testing.assert_close(grad, everything[index])


@pytest.mark.parametrize(
    ("cell", "used"),
    [(c, u) for c in ("RNN_TANH", "GRU", "LSTM") for u in ("output", "h_n", "c_n") if u != "c_n" or c == "LSTM"],
)
def test_gradients_from_some_outputs_only(cell: str, used: str, backend: str) -> None:
    case = Case(cell, dtype=torch.float64, bidirectional=True, ragged="lengths")
    index = ["output", "h_n", "c_n"].index(used)
    grads = []
    for name in (backend, "reference"):
        data = make_data(case, "cuda" if backend == "cuda" else "cpu")
        for t in data.differentiable():
            t.requires_grad_()
        with use_backend(name):
            result = call(case, data)[index]
            grads.append(torch.autograd.grad(result, data.differentiable(), [data.dy, data.dh_n, data.dc_n][index]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_strides_do_not_matter(cell: str, backend: str) -> None:
    case = Case(cell, layers=2, bidirectional=True, resets=True, dtype=torch.float64)
    device = "cuda" if backend == "cuda" else "cpu"

    def strided(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        wide[..., 1::2] = t
        return wide[..., 1::2]

    with use_backend(backend):
        data = make_data(case, device)
        expected, expected_grads = results_and_gradients(case, data)
        spread = make_data(case, device)
        for name in ("input", "h0", "c0", "resets", "dy", "dh_n", "dc_n"):
            setattr(spread, name, strided(getattr(spread, name)))
        spread.weights = [strided(w) for w in spread.weights]
        results, grads = results_and_gradients(case, spread)
    for one, other in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_more_steps_than_65535(backend: str) -> None:
    """More than cuDNN takes. The reference needs a minute for so many steps and defines nothing new here."""
    if backend == "reference":
        pytest.skip("a Python loop over 70000 steps shows nothing")
    case = Case("RNN_TANH", steps=70_000, batch=1, input_size=1, hidden=2, dtype=torch.float64)
    data = make_data(case, "cuda" if backend == "cuda" else "cpu")
    with use_backend(backend):
        results, grads = results_and_gradients(case, data)
    module = case.module()
    with torch.no_grad():
        for parameter, weight in zip(module._flat_weights, data.weights, strict=True):
            parameter.copy_(weight)
    y, h_n = module(data.input.cpu(), data.h0.cpu())
    weights = torch.autograd.grad([y, h_n], module._flat_weights, [data.dy.cpu(), data.dh_n.cpu()])
    assert_near("output", results[0], y, 1e-12)
    for actual, want in zip(grads[2:], weights, strict=True):
        assert_near("gradient", actual, want, 1e-10)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_inference_mode_and_threads(cell: str, backend: str) -> None:
    """Calls from several Python threads at once, in inference mode, give what one call gives.

    The kernels' results are the same bit for bit. The reference calls torch's products, which differ on some processors.
    """
    case = Case(cell, steps=30, batch=9, hidden=40, bidirectional=True)
    data = make_data(case, "cuda" if backend == "cuda" else "cpu")
    with use_backend(backend):
        with torch.no_grad():
            expected = call(case, data)

        def work(_: int) -> list[Tensor]:
            with torch.inference_mode():
                return call(case, data)

        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(work, range(16)):
                for found, wanted in zip(results, expected, strict=True):
                    tolerance = OUTPUT_TOLERANCE[case.dtype] if backend == "reference" else 0
                    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("lengths", [(9, 4, 0, 2), (0, 0, 0, 0), (9, 9, 8, 9)], ids=str)
def test_gradients_leave_out_much_padding(cell: str, lengths: tuple[int, ...], setting: Setting) -> None:
    """Where a quarter of the rows or more is padding, the products outside the recurrence have only the other rows."""
    setting("FUSED_RNN_CPU", "portable")  # its larger products are torch's, whose shapes the profiler sees
    case = Case(cell, 9, 4, 48, 64, bidirectional=True, proj=32 if cell == "LSTM" else 0, ragged="lengths")
    data = make_data(case)
    data = dataclasses.replace(data, lengths=torch.tensor(lengths))
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    padding = torch.arange(9).unsqueeze(1) >= torch.tensor(lengths)
    data.input[padding] = math.nan
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        results, grads = results_and_gradients(case, data)
    for actual, want in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(actual, want.float(), rtol=1e-4, atol=1e-4)
    # dW_ih [gates, 48] = d_gates^T x: the rows of x, [rows, 48]; those of the weights, as in dx, are others.
    weights = {64 * gates for gates in range(1, 5)}
    shapes = [event.input_shapes[1] for event in profile.events() if event.name == "aten::mm"]
    rows = {shape[0] for shape in shapes if shape[1] == 48} - weights
    assert rows == ({36} if sum(lengths) > 27 else {sum(lengths)} - {0})
