"""Family cudnn, beside checks.py: whole stacks by torch's ops for cuDNN; the CPU's layers stand in for it (cudnn.cpp)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

# isort: off
from checks import EXTENSION, calls  # builds the extension, before fused_rnn is imported

# isort: on
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, make_data
from settings import Setting
from settings import setting as setting
from test_layers import assert_near, results_and_gradients

import fused_rnn
from fused_rnn import use_backend

MODULES = (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN)


def cudnn_calls() -> tuple[int, int, int]:
    """So far: forwards, backwards, and how often torch was asked for the layout of weights."""
    counts = (ctypes.c_int * 3)()
    ctypes.CDLL(EXTENSION.__file__).torch_host_cudnn_calls(counts)
    return counts[0], counts[1], counts[2]


def last_buffer() -> int:
    """Where the weights of the latest forward lay."""
    function = ctypes.CDLL(EXTENSION.__file__).torch_host_cudnn_buffer
    function.restype = ctypes.c_void_p
    return function()


@pytest.fixture
def cudnn_enabled() -> Iterator[None]:
    torch.backends.cudnn.enabled = True
    torch._C._set_mkldnn_enabled(False)  # it frees its memory by threads, which the simulator's does not allow
    yield
    torch.backends.cudnn.enabled = False


@pytest.fixture(autouse=True)
def by_cudnn(setting: Setting, cudnn_enabled: None) -> None:
    setting("FUSED_RNN_PLAN", "cudnn")


def cases() -> Iterator[Case]:
    for cell in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU"):
        yield Case(cell, 5, 9, 4, 21, layers=2, bidirectional=True)
        yield Case(cell, 5, 9, 4, 21, layers=3, ragged="packed")
        yield Case(cell, 5, 3, 4, 21, layers=2, states=False, has_biases=False, batch_first=True)
        yield Case(cell, 1, 3, 4, 21, ragged="packed", states=False, bidirectional=True)
    yield Case("LSTM", 5, 3, 4, 21, proj=7, layers=2, bidirectional=True)
    yield Case("LSTM", 5, 3, 4, 21, proj=7, has_biases=False)
    yield Case("GRU", 5, 3, 4, 21, dtype=torch.float64)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_against_fp64(case: Case) -> None:
    data = make_data(case)
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    before, ours = cudnn_calls(), calls()
    with use_backend("cpu"):
        results, grads = results_and_gradients(case, data)
    assert calls() == ours, "no kernel of ours runs"
    assert [after - start for after, start in zip(cudnn_calls(), before, strict=True)][:2] == [1, 1]
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    for index, (actual, want) in enumerate(zip([*results, *grads], [*expected, *expected_grads], strict=True)):
        allowed = (OUTPUT_TOLERANCE if index < len(results) else GRADIENT_TOLERANCE)[case.dtype]
        assert_near(f"tensor {index}", actual, want, allowed * growth)


def gradients(rnn: torch.nn.Module, x: Tensor, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(rnn(x)[0].square().sum(), [x, *rnn.parameters()], **options))


@pytest.mark.parametrize("module", MODULES)
def test_backward_in_evaluation(module: type) -> None:
    rnn = module(4, 20, num_layers=2, dropout=0.5).eval()
    x = torch.randn(7, 3, 4, requires_grad=True)
    found = gradients(rnn, x)
    with use_backend("reference"):
        expected = gradients(rnn, x)
    for actual, want in zip(found, expected, strict=True):
        assert_near("gradient", actual, want, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("module", MODULES)
def test_backward_twice(module: type) -> None:
    """cuDNN's backward writes into what its forward reserved: a graph that is kept gives it a copy."""
    rnn = module(4, 20)
    x = torch.randn(7, 3, 4, requires_grad=True)
    loss = rnn(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *rnn.parameters()], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [x, *rnn.parameters()]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_second_derivatives(module: type, packed: bool) -> None:
    rnn = module(3, 5, num_layers=2)
    data = torch.randn(7, 3, 3, requires_grad=True)

    def run() -> list[Tensor]:
        x = pack_padded_sequence(data, torch.tensor([7, 4, 2])) if packed else data
        y, state = rnn(x)
        y = y.data if isinstance(y, PackedSequence) else y
        h_n = state[0] if isinstance(state, tuple) else state
        inputs = [data, *rnn.parameters()]
        first = torch.autograd.grad(y.square().sum() + h_n.sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    found = run()
    with use_backend("reference"):
        expected = run()
    for actual, want in zip(found, expected, strict=True):
        assert_near("derivative", actual, want, 10 * GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("module", MODULES)
def test_results_written_in_place(module: type) -> None:
    rnn = module(4, 20, num_layers=2)
    x = torch.randn(7, 3, 4, requires_grad=True)

    def run(write: bool) -> tuple[Tensor, ...]:
        y = rnn(x)[0]
        return torch.autograd.grad((y.mul_(3) if write else y * 3).square().sum(), [x, *rnn.parameters()])

    for written, expected in zip(run(True), run(False), strict=True):
        assert_near("gradient", written, expected, GRADIENT_TOLERANCE[torch.float32])


def test_weights_written_in_place() -> None:
    rnn = fused_rnn.GRU(4, 20)
    y = rnn(torch.randn(7, 3, 4))[0]
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_dropout(module: type, bidirectional: bool, packed: bool, setting: Setting) -> None:
    """The masks of the other families, from the same seed."""
    rnn = module(4, 20, num_layers=3, bidirectional=bidirectional, dropout=0.4)
    batch_sizes = torch.tensor([3, 3, 3, 2, 2, 1, 1])
    x = torch.randn((int(batch_sizes.sum()), 4) if packed else (7, 3, 4), requires_grad=True)

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        y = rnn(PackedSequence(x, batch_sizes))[0].data if packed else rnn(x)[0]
        return [y, *torch.autograd.grad(y.square().sum(), [x, *rnn.parameters()])]

    before = cudnn_calls()
    found = run()
    assert [after - start for after, start in zip(cudnn_calls(), before, strict=True)][:2] == [3, 3]
    setting("FUSED_RNN_PLAN", "step")
    for actual, want in zip(found, run(), strict=True):
        assert_near("tensor", actual, want, 4 * GRADIENT_TOLERANCE[torch.float32])


def test_parameters_are_the_user_s() -> None:
    """They are read where they lie: not moved, not written, and a write that leaves no trace is seen."""
    rnn = fused_rnn.LSTM(4, 20, num_layers=2)
    x = torch.randn(7, 3, 4)
    places = [(p.data_ptr(), p._version) for p in rnn.parameters()]
    before = cudnn_calls()
    y = rnn(x)[0]
    rnn(x)
    assert cudnn_calls()[2] - before[2] <= 1, "the layout of the weights is remembered"
    assert places == [(p.data_ptr(), p._version) for p in rnn.parameters()]
    rnn.weight_hh_l0.data.mul_(2)
    assert not torch.allclose(rnn(x)[0], y)


def test_buffers_without_biases_are_copied() -> None:
    """What lies at the place of the biases need not be zeros."""
    rnn = fused_rnn.GRU(4, 20, bias=False)
    x = torch.randn(7, 3, 4)
    expected = rnn(x)[0]
    with torch.no_grad():
        buffer = torch._cudnn_rnn_flatten_weight(list(rnn.parameters()), 2, 4, 3, 20, 0, 1, False, False)
    assert torch.equal(rnn(x)[0], expected) and last_buffer() != buffer.data_ptr()


def test_flat_parameters_are_not_copied() -> None:
    rnn = fused_rnn.GRU(4, 20, num_layers=2)
    x = torch.randn(7, 3, 4)
    expected = rnn(x)[0]
    with torch.no_grad():
        buffer = torch._cudnn_rnn_flatten_weight(list(rnn.parameters()), 4, 4, 3, 20, 0, 2, False, False)
    assert last_buffer() != buffer.data_ptr()
    y = rnn(x)[0]
    assert last_buffer() == buffer.data_ptr() and torch.equal(y, expected)
    rnn.bias_hh_l1 = torch.nn.Parameter(rnn.bias_hh_l1.detach().clone())
    assert torch.equal(rnn(x)[0], expected) and last_buffer() != buffer.data_ptr()


def test_what_it_lacks() -> None:
    x = torch.randn(5, 3, 4)
    lstm, identity = fused_rnn.LSTM(4, 6), fused_rnn.RNN(4, 6, nonlinearity="identity")
    weights = [p.detach() for p in lstm.parameters()]
    states = torch.randn(3, 1, 6).transpose(0, 1)[:, :, ::1], torch.randn(1, 6, 3).transpose(1, 2)
    long = torch.zeros(65536, 1, 4)
    functional = fused_rnn.functional.lstm
    for call, reason in (
        (lambda: functional(x, weights, lengths=torch.tensor([5, 3, 1])), "takes no lengths: ragged input must be packed"),
        (lambda: functional(x, weights, resets=torch.zeros(5, 3, dtype=torch.bool)), "has no resets"),
        (lambda: identity(x), "has no cell rnn_identity"),
        (lambda: lstm(x, states), "needs contiguous states"),
        (lambda: lstm(long), "makes 65535 steps at most"),
        (lambda: lstm(x[:, :0]), "takes no empty input"),
    ):
        with pytest.raises(ValueError, match=f"kernel family cudnn cannot serve this call: cuDNN {reason}"):
            call()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="cuDNN is not bitwise repeatable"):
            lstm(x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.enabled = False
    with pytest.raises(ValueError, match="torch.backends.cudnn.enabled is False"):
        lstm(x)


def test_shapes_that_do_not_fit() -> None:
    weights = [p.detach() for p in fused_rnn.GRU(4, 6).parameters()]
    with pytest.raises((ValueError, RuntimeError), match="w_hh|weight"):
        fused_rnn.functional.gru(torch.randn(5, 3, 4), [weights[0], weights[1][:, :5], *weights[2:]])


@pytest.mark.parametrize("what", ["input", "w_hh", "b_ih"])
def test_memory_that_was_freed(what: str) -> None:
    """As FSDP leaves weights between its calls: an error, where cuDNN would read what is not there."""
    gru, x = fused_rnn.GRU(4, 6, num_layers=2), torch.randn(5, 3, 4)
    freed = {"input": x, "w_hh": gru.weight_hh_l1, "b_ih": gru.bias_ih_l0}[what]
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{what}: expected memory for a tensor"):
        gru(x)


def test_batched_gradients() -> None:
    """Each run of cuDNN's backward writes into what its forward reserved: the layers make gradients of a batch."""
    rnn = fused_rnn.GRU(4, 20, num_layers=2)
    y = rnn(torch.randn(7, 3, 4))[0]
    grads = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, list(rnn.parameters()), grads, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        single = torch.autograd.grad(y, list(rnn.parameters()), grads[index], retain_graph=True)
        for batched, expected in zip(found, single, strict=True):
            torch.testing.assert_close(batched[index], expected, rtol=1e-5, atol=1e-5)


def test_default(setting: Setting) -> None:
    """Where nothing is recorded cuDNN serves what it can, the planner's family the rest."""
    setting("FUSED_RNN_PLAN", "")
    setting("FUSED_RNN_TUNE", "off")
    x, rnn = torch.randn(5, 3, 4), fused_rnn.LSTM(4, 6)
    before, ours = cudnn_calls(), calls()
    rnn(x)[0].sum().backward()
    assert (cudnn_calls()[0] - before[0], cudnn_calls()[1] - before[1], calls()) == (1, 1, ours)
    weights = [p.detach() for p in rnn.parameters()]
    fused_rnn.functional.lstm(x, weights, lengths=torch.tensor([5, 3, 1]))
    assert cudnn_calls()[0] == before[0] + 1 and calls()[0] == ours[0] + 1


def test_cells_are_served_by_ours() -> None:
    before = calls()
    fused_rnn.LSTMCell(4, 6)(torch.randn(3, 4))
    assert calls()[0] == before[0] + 1
