"""Integer input: ids in place of one-hot rows, against the one-hot rows themselves in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, DTYPES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, Data, make_data
from module_pairs import device_of
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import functional, use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn.zoo import MGU, IndRNN

needs_kernels = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LSTM": functional.lstm,
    "GRU": functional.gru,
    "RNN_TANH": lambda *args, **kwargs: functional.rnn(*args, nonlinearity="tanh", **kwargs),
    "RNN_RELU": lambda *args, **kwargs: functional.rnn(*args, nonlinearity="relu", **kwargs),
    "RNN_IDENTITY": lambda *args, **kwargs: functional.rnn(*args, nonlinearity="identity", **kwargs),
}


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def results_and_gradients(case: Case, data: Data, input: Tensor, **more: Any) -> list[Tensor]:
    """All results of a case's call with this input, and the gradients of states, weights and `more`."""
    states = [t.requires_grad_() for t in (data.h0, data.c0) if t is not None]
    hx: Any = None if not states else tuple(states) if case.cell == "LSTM" else states[0]
    weights = [t.requires_grad_() for t in data.weights]
    results = FUNCTIONS[case.cell](
        input,
        weights,
        hx,
        num_layers=case.layers,
        has_biases=case.has_biases,
        bidirectional=case.bidirectional,
        batch_first=case.batch_first,
        batch_sizes=data.batch_sizes,
        lengths=data.lengths,
        resets=data.resets,
        **more,
    )
    outputs = flat(results)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).to(t.device) for t in outputs]
    others = [t for t in flat(more.get("reset_state", ())) if t.requires_grad]
    return outputs + list(torch.autograd.grad(outputs, [*states, *weights, *others], grads))


def random_ids(data: Data, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, data.input.shape[:-1], generator=torch.Generator().manual_seed(seed))


def assert_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype, outputs: int) -> None:
    assert len(got) == len(expected)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        tolerance = (OUTPUT_TOLERANCE if index < outputs else GRADIENT_TOLERANCE)[dtype]
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        assert ours.shape == theirs.shape
        assert (ours.double().cpu() - theirs.cpu()).abs().max().item() <= tolerance * scale if theirs.numel() else True


def cases() -> list[Case]:
    every = [
        Case(cell, ragged=ragged, dtype=dtype)
        for cell in ("LSTM", "GRU", "RNN_TANH")
        for dtype in DTYPES
        for ragged in ("dense", "lengths", "packed")
    ]
    for cell in CELLS:
        every.append(Case(cell, layers=2, bidirectional=True, resets=True, ragged="lengths", hidden=9, batch=5))
        every.append(Case(cell, states=False, has_biases=False, steps=1, batch=1))
        every.append(Case(cell, batch_first=True, bidirectional=True, hidden=33, batch=7, input_size=129))
        every.append(Case(cell, steps=40, batch=3, hidden=130, input_size=1))
    every.append(Case("LSTM", proj=4, layers=2, bidirectional=True, ragged="packed"))
    every.append(Case("LSTM", batch=0))
    every.append(Case("GRU", steps=30, batch=20, hidden=40, input_size=2000))
    return every


@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_one_hot(backend: str, case: Case) -> None:
    data = make_data(case, device_of(backend))
    ids = random_ids(data, case.input_size).to(data.input.device)
    if data.lengths is not None and ids.numel():  # padding may hold anything
        steps = torch.arange(ids.shape[int(case.batch_first)], device=ids.device)
        padding = steps.unsqueeze(1) >= data.lengths
        ids = torch.where(padding.t() if case.batch_first else padding, -7, ids)
    rows = one_hot(ids.clamp(min=0).cpu(), case.input_size).double()
    with use_backend("reference"):
        expected = results_and_gradients(case, make_data(case).to(torch.float64), rows)
    with use_backend(backend):
        got = results_and_gradients(case, data, ids)
    assert_close(got, expected, case.dtype, 3 if case.cell == "LSTM" else 2)


def test_with_reset_state_and_all_states() -> None:
    case = Case("LSTM", layers=2, bidirectional=True, resets=True, ragged="lengths", dtype=torch.float64)
    data = make_data(case)
    ids = random_ids(data, case.input_size)

    def run(input: Tensor) -> list[Tensor]:
        put = tuple(torch.linspace(-1, 1, 4 * 6, dtype=torch.float64).view(4, 1, 6).requires_grad_() for _ in range(2))
        return results_and_gradients(case, make_data(case), input, reset_state=put, return_all_states=True)

    assert_close(run(ids), run(one_hot(ids, case.input_size).double()), torch.float64, 5)


@needs_kernels
def test_gradcheck() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 3], [3, 3], [1, 0]])
    layer = fused_rnn.GRU(4, 3, num_layers=2, bidirectional=True).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(*weights: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (ids,))

    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_modules(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (5, 3))
    rows = one_hot(ids, 11).float()
    layer = getattr(fused_rnn, kind)(11, 8, batch_first=True)
    time_first = getattr(fused_rnn, kind)(11, 8)
    time_first.load_state_dict(layer.state_dict())
    lengths = torch.tensor([2, 5, 1])
    packed, packed_rows = (pack_padded_sequence(x, lengths, enforce_sorted=False) for x in (ids.to(dtype), rows))
    for module, ours, theirs in (
        (time_first, ids.to(dtype), rows),
        (layer, ids.t().to(dtype), rows.transpose(0, 1)),
        (layer, ids[:, 0].to(dtype), rows[:, 0]),  # unbatched
        (time_first, ids[:, 0].to(dtype), rows[:, 0]),
        (time_first, packed, packed_rows),
    ):
        for got, expected in zip(_tensors(module(ours)), _tensors(module(theirs)), strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected)


def _tensors(results: Any) -> list[Tensor]:
    """Of a module's results, with packed ones as their data."""
    output, states, *_ = results
    return [output if isinstance(output, Tensor) else output.data, *flat(states)]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(backend: str, kind: str) -> None:
    torch.manual_seed(0)
    with use_backend(backend):
        cell = getattr(fused_rnn, kind)(7, 5).to(device_of(backend))
        ids = torch.tensor([6, 0, 6, 2], device=device_of(backend))
        rows = one_hot(ids, 7).float()
        resets = torch.tensor([True, False, False, True], device=device_of(backend))
        for ours, theirs, more in ((ids, rows, {}), (ids, rows, {"resets": resets}), (ids[3], rows[3], {})):
            grads = []
            for input in (ours, theirs):
                first = cell(input)
                state = flat(cell(input, first, **more))
                grads.append([*state, *torch.autograd.grad(sum(t.sin().sum() for t in state), list(cell.parameters()))])
            for got, expected in zip(*grads, strict=True):
                torch.testing.assert_close(got, expected)
        function = {"LSTMCell": functional.lstm_cell, "GRUCell": functional.gru_cell, "RNNCell": functional.rnn_cell}[kind]
        for got, expected in zip(flat(function(ids.int(), None, *cell.parameters())), flat(cell(rows)), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [MGU, IndRNN])
def test_own_cells(backend: str, kind: Any) -> None:
    torch.manual_seed(0)
    device = device_of(backend)
    with use_backend(backend):
        layer = fused_rnn.Layer(kind(), 9, 6, num_layers=2, bidirectional=True).to(device)
        ids = torch.randint(9, (4, 3), device=device)
        lengths = torch.tensor([4, 1, 0], device=device)
        padded = torch.where(torch.arange(4, device=device).unsqueeze(1) < lengths, ids, 99)
        rows = one_hot(ids, 9).float()
        packs = [pack_padded_sequence(x, torch.tensor([4, 1, 2]), enforce_sorted=False) for x in (ids, rows)]
        for ours, theirs, more in (
            (ids, rows, {}),
            (padded, rows, {"lengths": lengths}),
            (*packs, {}),
            (ids[:, 0], rows[:, 0], {}),
        ):
            both = []
            for input in (ours, theirs):
                outputs = _tensors(layer(input, **more))
                both.append([*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), list(layer.parameters()))])
            for got, expected in zip(*both, strict=True):
                torch.testing.assert_close(got, expected)
        step = fused_rnn.Step(kind(), 9, 6).to(device)
        for got, expected in zip(flat(step(ids[0])), flat(step(rows[0])), strict=True):
            torch.testing.assert_close(got, expected)
        assert flat(step(ids[0, 0]))[0].shape == (6,)
        if backend != "cuda":
            with pytest.raises(IndexError, match="input: expected ids from 0 to 8 .*, got 9 at time step 1 of batch row 0"):
                layer(torch.tensor([[0], [9]]))


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_ids_out_of_range(backend: str, bad: int) -> None:
    """On a GPU they count as the nearest id, so that nothing is read beyond the weights."""
    ids = torch.tensor([[0, 1], [2, 3], [4, 0]], device=device_of(backend))
    ids[1, 0] = bad
    with use_backend(backend):
        layer = fused_rnn.LSTM(5, 4).to(device_of(backend))
        if backend == "cuda":
            torch.testing.assert_close(layer(ids)[0], layer(ids.clamp(0, 4))[0])
            return
        message = rf"input: expected ids from 0 to 4 \(input_size - 1\), got {bad} at time step 1 of batch row 0"
        with pytest.raises(IndexError, match=message):
            layer(ids)
        with pytest.raises(IndexError, match=message), torch.no_grad():
            layer(ids)
        first = fused_rnn.LSTM(5, 4, batch_first=True)
        with pytest.raises(IndexError, match=message):
            first(ids.t())
        with pytest.raises(IndexError, match=f"got {bad} at packed row 2"):
            layer(pack_padded_sequence(ids, torch.tensor([3, 3])))
        with pytest.raises(IndexError, match=f"got {bad} at time step 0 of batch row 1"):
            fused_rnn.GRUCell(5, 4)(torch.tensor([0, bad]))


def test_other_mistakes(backend: str) -> None:
    with use_backend(backend):
        device = device_of(backend)
        layer = fused_rnn.LSTM(5, 4).to(device)
        with pytest.raises(ValueError, match="input: expected torch.int64 to be ids .* in at most 2 dimensions, got 3-D"):
            layer(torch.zeros(2, 3, 5, dtype=torch.int64, device=device))
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            layer(torch.zeros(0, 3, dtype=torch.int64, device=device))
        with pytest.raises(RuntimeError, match="Expected hidden"):
            layer(torch.zeros(2, 3, dtype=torch.int64, device=device), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
        for dtype in (torch.bool, torch.int16, torch.uint8):
            with pytest.raises((RuntimeError, ValueError)):
                layer(torch.zeros(2, 3, dtype=dtype, device=device))
        with pytest.raises(ValueError, match="input: expected dtype .* or int64 or int32 ids, got torch.int16"):
            functional.lstm(torch.zeros(2, 3, dtype=torch.int16, device=device), list(layer.parameters()))
        with pytest.raises(ValueError, match="input: expected torch.int64 to be ids .* in at most 2 dimensions, got 3-D"):
            functional.lstm(torch.zeros(2, 3, 5, dtype=torch.int64, device=device), list(layer.parameters()))


@needs_kernels
def test_gradients_repeat() -> None:
    """Many rows of few ids: the sums have an order, whatever the number of threads."""
    torch.manual_seed(0)
    layer, ids = fused_rnn.LSTM(3, 70), torch.randint(3, (50, 9))
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer.zero_grad()
            layer(ids)[0].sin().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@needs_kernels
def test_autocast() -> None:
    layer, ids = fused_rnn.GRU(6, 4, 2), torch.randint(6, (3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(ids)
        expected = layer(one_hot(ids, 6).float())
    assert y.dtype == h.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected[0])
    y.float().sum().backward()
    assert layer.weight_ih_l0.grad is not None and layer.weight_ih_l0.grad.dtype == torch.float32


@needs_kernels
def test_compile_and_export() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fused_rnn.LSTM(6, 4, 2)
            self.own = fused_rnn.GRUCell(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.rnn(ids)[0] + self.own(ids[0])

    torch.manual_seed(0)
    model, ids = Model(), torch.randint(6, (3, 2))
    expected = model(ids)
    expected.sin().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        got = compiled(ids)
    got.sin().sum().backward()
    assert torch.equal(got, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)
    steps = torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: steps}})
    longer = torch.randint(6, (7, 2))
    torch.testing.assert_close(program.module()(longer), model(longer))


@needs_kernels
def test_transforms_run_on_the_reference() -> None:
    layer, ids = fused_rnn.LSTM(6, 4), torch.randint(6, (5, 3, 2))
    with pytest.warns(RuntimeWarning) if False else torch.no_grad():
        many = torch.func.vmap(lambda one: layer(one)[0])(ids)
    torch.testing.assert_close(many, torch.stack([layer(one)[0] for one in ids]))


@needs_kernels
def test_no_one_hot_tensor_is_made() -> None:
    """A layer of 10000 classes: one-hot rows would take 160 MB."""
    layer, ids = fused_rnn.RNN(10_000, 4), torch.randint(10_000, (400, 10))
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(ids)[0].sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 2_000_000
