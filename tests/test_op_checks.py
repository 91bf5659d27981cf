"""Values and tensors that a call must refuse before it makes addresses of them, and rows that are not numbers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, GATES, Case, make_data
from module_pairs import CLASSES, assert_close, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import _kinds, functional, use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._recipe import Recipe, Rows

if not has_cpu_kernels():
    pytest.skip("needs the compiled extension", allow_module_level=True)

KINDS = _kinds.NUMBER_OF_MODE
ops = torch.ops.fused_rnn

# Offsets of 5 rows in steps of 3 and 2, and what is wrong with others.
GOOD = [0, 3, 5]
BAD = {
    "beyond the rows": [0, 3, 100_000],
    "not to the last row": [0, 2, 4],
    "not from the first row": [1, 3, 5],
    "negative": [0, -3, 5],
    "growing": [0, 2, 5],
    "more than the batch": [0, 5, 5],
    "decreasing": [0, 7, 5],
    "overflow": [0, 2**63 - 1, 5],
}


def packed_args(kind: str, offsets: list[int], device: str) -> list[Any]:
    """Positional arguments of fused_rnn::layer for 5 packed rows of a batch of 3."""
    gates = GATES[kind]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    weights = [randn(gates * 4, 2), randn(gates * 4, 4), randn(gates * 4), randn(gates * 4)]
    states = [randn(1, 3, 4) for _ in range(2 if kind == "LSTM" else 1)]
    rows = Rows(offsets=torch.tensor(offsets, device=device))
    return [randn(5, 2), states, weights, rows.given(), Recipe(KINDS[kind]).packed | rows.bits]


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", CELLS)
def test_values_of_offsets(kind: str, what: str, device: str) -> None:
    """Forward, backward and the stack refuse them. On CUDA the layer op does not read them, but stays inside its memory."""
    args, bad = packed_args(kind, GOOD, device), torch.tensor(BAD[what], device=device)
    y, _, saved = ops.layer(*args, True)
    x, states, weights, _, recipe = args
    bad_rows = [bad]
    backward = [torch.ones_like(y), [], x, states, weights, bad_rows, [*saved, y], recipe, [True, True, True]]
    layer = [x, states, weights, bad_rows, recipe, False]
    for call in (lambda: ops.layer(*layer), lambda: ops.layer_backward(*backward)):
        if device == "cuda":
            call()
        else:
            with pytest.raises(ValueError, match="offsets: expected"):
                call()
    with pytest.raises(ValueError, match="offsets: expected"):
        ops.rnn(x, states, weights, [bad.cpu()], recipe, 0.0)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
@pytest.mark.parametrize("sizes", ([2, 2, 2], [100_000, 100_000], [-2, 6], [1, 3]), ids=str)
def test_traced_module_with_other_batch_sizes(kind: str, sizes: list[int]) -> None:
    """A graph carries the checks that its Python source made no longer."""
    module = getattr(fused_rnn, kind)(5, 8)

    def forward(data: Tensor, batch_sizes: Tensor) -> Tensor:
        return module(PackedSequence(data, batch_sizes))[0].data

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, batch_sizes))[0].data

    data = torch.randn(4, 5)
    traced = torch.jit.trace(Packed(), (data, torch.tensor([2, 2])), check_trace=False)
    torch.testing.assert_close(traced(data, torch.tensor([2, 2])), forward(data, torch.tensor([2, 2])))
    with pytest.raises(RuntimeError):
        traced(data, torch.tensor(sizes))


@pytest.mark.parametrize("cell", (len(KINDS), 7, 255))
def test_number_of_a_cell(cell: int, device: str) -> None:
    x, states, weights, rows, recipe = packed_args("RNN_TANH", GOOD, device)
    y, _, saved = ops.layer(x, states, weights, rows, recipe, True)
    bad = recipe + cell  # the cell of a good one is 0
    for call in (
        lambda: ops.layer(x, states, weights, rows, bad, False),
        lambda: ops.layer_backward(y, [], x, states, weights, rows, [*saved, y], bad, [True, True, True]),
        lambda: ops.rnn(x, states, weights, rows, bad, 0.0),
        lambda: ops.cell(x[:3], [states[0][0]], weights, bad),
    ):
        with pytest.raises(ValueError, match="recipe: expected"):
            call()


@pytest.mark.parametrize("kind", ("RNN_RELU", "GRU"))
def test_c0_of_a_cell_without_c(kind: str, device: str) -> None:
    x, states, *others = packed_args(kind, GOOD, device)
    with pytest.raises(ValueError, match=r"states: expected 1 \(h0\) or none, got 2"):
        ops.layer(x, states * 2, *others, False)


def called(kind: str, module: nn.Module, device: str) -> Callable[[], Any]:
    cell = kind.endswith("Cell")
    x = torch.randn(*((3, 4) if cell else (5, 3, 4)), device=device)
    h = torch.randn(*((3, 6) if cell else (1, 3, 6)), device=device)
    state = (h, h.clone()) if kind.startswith("LSTM") else h
    return lambda: module(x, state)


def parameters_of(kind: str) -> list[str]:
    return [f"{name}{'' if kind.endswith('Cell') else '_l0'}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("kind", CLASSES)
def test_one_weight_on_meta(kind: str, place: int, training: bool, device: str) -> None:
    """An incomplete checkpoint loaded with strict=False, assign=True leaves weights without memory."""
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    name = parameters_of(kind)[place]
    state = {key: value for key, value in module.state_dict().items() if key != name}
    with torch.device("meta"):
        module = getattr(fused_rnn, kind)(4, 6)
    module.load_state_dict(state, strict=False, assign=True)
    assert getattr(module, name).is_meta
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="device"):
        called(kind, module, device)()


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("kind", CLASSES)
def test_one_weight_of_another_dtype(kind: str, place: int, device: str) -> None:
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    name = parameters_of(kind)[place]
    setattr(module, name, nn.Parameter(getattr(module, name).double()))
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="dtype"):
        called(kind, module, device)()


def test_fake_kernels_check_devices_and_dtypes() -> None:
    x, states, weights, *others = packed_args("GRU", GOOD, "meta")
    for wrong in (weights[1].new_empty(weights[1].shape, device="cpu"), weights[1].float()):
        with pytest.raises(RuntimeError, match=r"params\[1\]: expected (device|dtype)"):
            ops.layer(x, states, [weights[0], wrong, *weights[2:]], *others, False)


# ---- memory ----


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kind", CLASSES)
def test_freed_before_forward(kind: str, training: bool, device: str) -> None:
    """FSDP frees weights so between their uses."""
    for name in parameters_of(kind):
        module = getattr(fused_rnn, kind)(4, 6, device=device)
        free(getattr(module, name).data)
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="expected memory"):
            called(kind, module, device)()


@pytest.mark.parametrize("kind", CLASSES)
def test_freed_input_or_state(kind: str, device: str) -> None:
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    cell = kind.endswith("Cell")
    for which in range(2):
        x = torch.randn(*((3, 4) if cell else (5, 3, 4)), device=device)
        h = torch.randn(*((3, 6) if cell else (1, 3, 6)), device=device)
        state = (h.clone(), h) if kind.startswith("LSTM") else h
        free((x, h)[which])
        with torch.no_grad(), pytest.raises(RuntimeError, match="expected memory"):
            module(x, state)


@pytest.mark.parametrize("kind", CLASSES)
def test_freed_before_backward(kind: str, device: str) -> None:
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    y = flatten(called(kind, module, device)())[0]
    free(getattr(module, parameters_of(kind)[0]).data)
    free(getattr(module, parameters_of(kind)[1]).data)
    with pytest.raises(RuntimeError, match="expected memory"):
        y.sum().backward()


@pytest.mark.parametrize("kind", CLASSES)
def test_output_freed_before_backward(kind: str, device: str) -> None:
    """What backward reads of it, if anything, is gone: an error or the right gradients."""
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    call = called(kind, module, device)
    expected = torch.autograd.grad(flatten(call())[0].sum(), list(module.parameters()))
    y = flatten(call())[0]
    total = y.sum()
    free(y.detach())
    try:
        found = torch.autograd.grad(total, list(module.parameters()))
    except RuntimeError as error:
        assert "expected memory" in str(error)
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_zero_tensors(kind: str, device: str) -> None:
    """torch's symbolic zeros have no memory at all."""
    module = getattr(fused_rnn, kind)(4, 6, device=device)
    cell = kind.endswith("Cell")
    shape, state_shape = ((3, 4), (3, 6)) if cell else ((5, 3, 4), (1, 3, 6))

    def state(make: Callable[..., Tensor]) -> Any:
        states = [make(state_shape, device=device) for _ in range(2)]
        return tuple(states) if "LSTM" in kind else states[0]

    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected = module(torch.zeros(shape, device=device), state(torch.zeros))
            assert_close(module(torch._efficientzerotensor(shape, device=device), state(torch.zeros)), expected)
            assert_close(module(torch.zeros(shape, device=device), state(torch._efficientzerotensor)), expected)


# ---- rows that are not numbers ----

NAN_CASES = [
    Case(cell, steps=4, batch=batch, input_size=input_size, hidden=hidden, ragged=ragged, bidirectional=True, dtype=dtype)
    for cell, (batch, input_size, hidden), ragged, dtype in itertools.product(
        CELLS,
        ((5, 3, 7), (19, 63, 80), (33, 80, 63)),
        ("dense", "lengths", "packed"),
        (torch.float64, torch.float32, torch.bfloat16),
    )
]


@functools.cache
def torch_mixes_rows() -> bool:
    """Whether torch's own product lets NaN of one row into another: bfloat16, odd depth, AMX (2.13.0, oneDNN)."""
    rows = torch.zeros(19, 63, dtype=torch.bfloat16)
    rows[2] = float("nan")
    return bool((rows @ torch.ones(63, 80, dtype=torch.bfloat16)).isnan().any(1).sum() > 1)


@pytest.mark.parametrize("case", NAN_CASES, ids=str)
def test_rows_that_are_not_numbers_reach_no_other_row(case: Case, backend: str) -> None:
    """NaN in one row's input, states and gradients changes no output, final state, dx or state gradient of the others."""
    if backend == "reference" and case.dtype is torch.bfloat16 and torch_mixes_rows():
        pytest.skip("torch's own product, which the reference uses, lets NaN of one row into another here")
    data = make_data(case, "cuda" if backend == "cuda" else "cpu")
    row = 2  # has a step in every ragged batch
    kwargs = {"lengths": data.lengths, "batch_sizes": data.batch_sizes, "bidirectional": True}
    function = getattr(functional, "rnn" if case.cell.startswith("RNN") else case.cell.lower())
    if case.cell.startswith("RNN"):
        kwargs["nonlinearity"] = case.cell[4:].lower()
    if data.batch_sizes is not None:
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), data.batch_sizes.cumsum(0)])
        mine = [int(starts[t]) + row for t in range(len(data.batch_sizes)) if data.batch_sizes[t] > row]

    def at_row(t: Tensor, rows_of_input: bool) -> Tensor:
        if rows_of_input and data.batch_sizes is not None:
            return t[mine]
        return t[:, row]

    def others(t: Tensor, rows_of_input: bool) -> Tensor:
        t = t.detach().clone()
        if rows_of_input and data.batch_sizes is not None:
            t[mine] = 0
        else:
            t[:, row] = 0
        return t

    def run(bad: bool) -> list[Tensor]:
        x, h0 = data.input.clone(), data.h0.clone()
        c0 = None if data.c0 is None else data.c0.clone()
        dy, dh_n = data.dy.clone(), data.dh_n.clone()
        if bad:
            for t, of_input in ((x, True), (h0, False), (c0, False), (dy, True), (dh_n, False)):
                if t is None:
                    continue
                if of_input and data.batch_sizes is not None:
                    t[mine] = float("nan")
                else:
                    t[:, row] = float("nan")
        leaves = [t.requires_grad_() for t in (x, h0, c0) if t is not None]
        hx = (h0, c0) if case.cell == "LSTM" else h0
        y, hidden = function(x, data.weights, hx, **kwargs)
        h_n = hidden[0] if isinstance(hidden, tuple) else hidden
        grads = torch.autograd.grad([y, h_n], leaves, [dy, dh_n])
        return [others(y, True), others(h_n, False), others(grads[0], True), *(others(g, False) for g in grads[1:])]

    with use_backend(backend):
        assert_close(run(True), run(False))


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_state_of_a_row_without_steps(cell: str, bidirectional: bool, backend: str) -> None:
    """NaN in the initial state of a row of length 0, and in the padding, reach no gradient but that state's own."""
    case = Case(cell, steps=4, batch=3, ragged="lengths", dtype=torch.float64, bidirectional=bidirectional)
    data = make_data(case, "cuda" if backend == "cuda" else "cpu")
    lengths = torch.tensor([4, 0, 2], device=data.input.device)

    def gradients(bad: bool) -> tuple[Tensor, ...]:
        x, h0 = data.input.clone(), data.h0.clone()
        c0 = None if data.c0 is None else data.c0.clone()
        x[:, 1] = x[2:, 2] = float("nan") if bad else 0
        for t in (h0, c0):
            if t is not None:
                t[:, 1] = float("nan") if bad else 0
        weights = [w.clone().requires_grad_() for w in data.weights]
        x.requires_grad_()
        kwargs = {"nonlinearity": case.cell[4:].lower()} if cell.startswith("RNN") else {}
        function = getattr(functional, "rnn" if kwargs else cell.lower())
        hx = (h0, c0) if cell == "LSTM" else h0
        y = function(x, weights, hx, lengths=lengths, bidirectional=bidirectional, **kwargs)[0]
        return torch.autograd.grad(y.square().sum(), [x, *weights])

    with use_backend(backend):
        assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_infinite_weights_do_not_mix_rows(kind: str, device: str) -> None:
    """Products of bfloat16 parts give up where a value is infinite; what takes their place keeps rows apart too."""
    module = getattr(fused_rnn, kind)(63, 80, device=device, dtype=torch.bfloat16)
    x = torch.randn(6, 19, 63, device=device, dtype=torch.bfloat16)
    x[:, 3] = float("inf")
    clean = x.clone()
    clean[:, 3] = 0
    found, expected = [], []
    for values, into in ((x, found), (clean, expected)):
        values = values.requires_grad_()
        y = module(values)[0]
        dx = torch.autograd.grad(y.square().sum(), values)[0]
        into += [t[:, torch.arange(19, device=device) != 3] for t in (y.detach(), dx)]
    assert_close(found, expected)


def test_packed_module_in_a_loop_is_checked_once(device: str) -> None:
    """The checks leave right calls alone: packed input of every shape that torch can pack."""
    module = fused_rnn.GRU(3, 5, device=device)
    for lengths in ([1], [4, 4, 4], [5, 3, 1, 1]):
        x = torch.randn(max(lengths), len(lengths), 3, device=device)
        packed = pack_padded_sequence(x, torch.tensor(lengths))
        y, h_n = module(packed)
        assert y.data.shape == (sum(lengths), 5) and h_n.shape == (1, len(lengths), 5)
