"""The registered ops: opcheck, first and second derivatives, torch.compile, torch.export, meta tensors, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CELLS, Case, Data, make_data

import fused_rnn
from fused_rnn import _kinds, functional, use_backend
from fused_rnn._backend import forced_backend, has_cpu_kernels
from fused_rnn._recipe import Recipe, Rows

KINDS = _kinds.NUMBER_OF_MODE
RAGGED = ("dense", "lengths", "packed")

if not has_cpu_kernels():
    pytest.skip("needs the compiled extension", allow_module_level=True)


def layer_args(case: Case, device: str, requires_grad: bool = True) -> list:
    """Positional arguments of fused_rnn::layer."""
    data = make_data(case, device)
    offsets = None
    if data.batch_sizes is not None:
        offsets = torch.cat([data.batch_sizes.new_zeros(1), data.batch_sizes.cumsum(0)]).to(device)
    if requires_grad:
        for t in data.differentiable():
            t.requires_grad_()
    recipe = Recipe(KINDS[case.cell], 1, case.has_biases, case.bidirectional)
    rows = Rows(data.lengths, offsets, data.resets)
    return [data.input, states_of(data), data.weights, rows.given(), recipe.packed | rows.bits]


def states_of(data: Data) -> list[torch.Tensor]:
    return [state for state in (data.h0, data.c0) if state is not None]


def op_cases() -> list[Case]:
    cases = []
    for cell, ragged in itertools.product(CELLS, RAGGED):
        cases.append(Case(cell, ragged=ragged, bidirectional=ragged == "lengths", dtype=torch.float64, steps=3, resets=True))
    cases.append(Case("LSTM", proj=2, dtype=torch.float64, steps=3, ragged="lengths"))
    cases.append(Case("GRU", states=False, has_biases=False, dtype=torch.float64, steps=3))
    return cases


@pytest.mark.parametrize("case", op_cases(), ids=str)
def test_opcheck_layer(case: Case, device: str) -> None:
    args = layer_args(case, device)
    torch.library.opcheck(torch.ops.fused_rnn.layer.default, (*args, False))
    torch.library.opcheck(torch.ops.fused_rnn.layer.default, (*args, True))


@pytest.mark.parametrize("case", op_cases(), ids=str)
@pytest.mark.parametrize("op", ["layer_backward", "layer_backward_differentiable"])
def test_opcheck_layer_backward(case: Case, op: str, device: str) -> None:
    args = layer_args(case, device, requires_grad=False)
    y, last, saved = torch.ops.fused_rnn.layer(*args, True)
    grads = [torch.randn_like(y), [torch.randn_like(state) for state in last]]
    function = getattr(torch.ops.fused_rnn, op).default
    # Packed rows make the reference, which the differentiable form runs, read the offsets as numbers: no symbolic shapes.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op == "layer_backward_differentiable":
        utils = utils[:2] if case.ragged == "packed" else utils[:3]
    torch.library.opcheck(function, (*grads, *args[:4], [*saved, y], args[4], [True, True, True]), test_utils=utils)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_composites(cell: str, device: str) -> None:
    case = Case(cell, layers=2, bidirectional=True, batch_first=True, dtype=torch.float64, steps=3)
    data = make_data(case, device)
    for t in data.differentiable():
        t.requires_grad_()
    recipe = Recipe(KINDS[cell], 2, bidirectional=True, batch_first=True, training=True)
    torch.library.opcheck(
        torch.ops.fused_rnn.rnn.default, (data.input, states_of(data), data.weights, [], recipe.packed, 0.0)
    )
    data = make_data(Case(cell, dtype=torch.float64), device)
    for t in data.differentiable():
        t.requires_grad_()
    x, *states = (t[0].detach().requires_grad_() for t in (data.input, *states_of(data)))
    torch.library.opcheck(torch.ops.fused_rnn.cell.default, (x, states, data.weights, Recipe(KINDS[cell]).packed))


@pytest.mark.parametrize("case", op_cases(), ids=str)
def test_first_and_second_derivatives(case: Case, device: str) -> None:
    args = layer_args(case, device)
    count = len(args[1])

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, states, params = tensors[0], list(tensors[1 : 1 + count]), list(tensors[1 + count :])
        y, last, _ = torch.ops.fused_rnn.layer(x, states, params, *args[3:], False)
        return y, *last

    inputs = [args[0], *args[1], *args[2]]

    assert torch.autograd.gradcheck(function, inputs, fast_mode=case.cell == "LSTM")
    if case.cell != "RNN_RELU":  # its second derivative is a sum of impulses
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_of_gradient_through_shared_tensors(device: str) -> None:
    """One tensor as h0 and c0, one weight in both directions: every use counts once."""
    case = Case("LSTM", bidirectional=True, dtype=torch.float64)
    data = make_data(case, device)
    weights = data.weights[:4] * 2

    def penalty(backend: str) -> list[torch.Tensor]:
        state = data.h0.detach().clone().requires_grad_()
        shared = [w.detach().clone().requires_grad_() for w in weights[:4]]
        with use_backend(backend):
            y, _ = functional.lstm(data.input, shared * 2, (state, state), bidirectional=True)
            grads = torch.autograd.grad(y.square().sum(), [state, *shared], create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in grads), [state, *shared]))

    for one, other in zip(penalty(device), penalty("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_compile_and_export(cell: str, device: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = make_data(Case(cell, layers=2), device).weights
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(w) for w in weights])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            function = {"LSTM": functional.lstm, "GRU": functional.gru}.get(cell, functional.rnn)
            return function(x * 2, list(self.weights), num_layers=2)[0]

    model = Model()
    x = torch.randn(5, 3, 4, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 3, 4), (7, 2, 4)):
        x = torch.randn(*shape, device=device)
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (expected, actual)]
        torch.testing.assert_close(grads[1], grads[0])
    dim = torch.export.Dim
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: dim("T", min=2), 1: dim("B", min=2)},), strict=False)
    x = torch.randn(9, 4, 4, device=device)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("cell", CELLS)
def test_meta_tensors(cell: str) -> None:
    case = Case(cell, layers=2, bidirectional=True)
    data = make_data(case)
    args = ([], Recipe(KINDS[cell], 2, bidirectional=True).packed, 0.0)
    tensors = (data.input, states_of(data), data.weights)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else [w.to("meta") for w in t] for t in tensors]
    (y, last), (fake_y, fake_last) = (torch.ops.fused_rnn.rnn(*given, *args) for given in (tensors, meta))
    for real, fake in zip([y, *last], [fake_y, *fake_last], strict=True):
        assert fake.device.type == "meta" and fake.shape == real.shape and fake.dtype == real.dtype


@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cell: str, dtype: torch.dtype, device: str) -> None:
    data = make_data(Case(cell), device)
    function = {"LSTM": functional.lstm, "GRU": functional.gru}.get(cell, functional.rnn)
    weights = [w.requires_grad_() for w in data.weights]
    results = []
    for backend in (device, "reference"):
        with use_backend(backend), torch.autocast(device, dtype=dtype):
            y, _ = function(data.input, weights)
            results.append(y)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), weights)
        assert all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(results[0], results[1], rtol=0.05, atol=0.05)
    with torch.autocast(device, dtype=dtype):
        assert function(data.input.double(), [w.detach().double() for w in weights])[0].dtype == torch.float64


def test_op_arguments_are_checked() -> None:
    data = make_data(Case("LSTM"))
    recipe = Recipe(KINDS["LSTM"]).packed
    given = {"x": data.input, "states": [data.h0, data.c0], "params": data.weights, "rows": [], "recipe": recipe}

    def fails(match: str, **changes: object) -> None:
        with pytest.raises((RuntimeError, ValueError), match=match):
            torch.ops.fused_rnn.layer(**{**given, **changes}, save=False)

    fails("input: expected 3-D, got 2-D", x=data.input[0])
    fails("input: expected dtype", x=data.input.int())
    fails("input: expected at least 1 time step", x=data.input[:0])
    fails("h0: expected shape", states=[data.h0[..., :-1], data.c0])
    fails("c0: expected dtype", states=[data.h0, data.c0.double()])
    fails(r"states: expected 2 \(h0 and c0\) or none, got 1", states=[data.h0])
    fails("params: expected 4 tensors, got 3", params=data.weights[:3])
    fails("w_ih: expected shape", params=[data.weights[0][:, :-1], *data.weights[1:]])
    for rows, match in (
        (Rows(lengths=torch.zeros(3, dtype=torch.int32)), "lengths: expected dtype"),
        (Rows(lengths=torch.zeros(4, dtype=torch.int64)), "lengths: expected shape"),
        (Rows(resets=torch.zeros(3, 5, dtype=torch.bool)), "resets: expected shape"),
    ):
        fails(match, rows=rows.given(), recipe=recipe | rows.bits)
    fails("rows: expected 0 of lengths, offsets, resets and options of steps", rows=[torch.zeros(3, dtype=torch.int64)])
    fails(r"recipe: expected .*\(a cell of 0 to 4 ", recipe=Recipe(7).packed)
    fails("recipe: expected that of one layer", recipe=Recipe(KINDS["LSTM"], num_layers=2).packed)


def test_deterministic_dropout_from_torchs_generator(device: str) -> None:
    data = make_data(Case("GRU", layers=2), device)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(functional.gru(data.input, data.weights, num_layers=2, dropout=0.5, training=True)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(Case("GRU"))
    with pytest.raises(ValueError, match="use_backend: expected one of cuda, cpu, reference, got 'tpu'"), use_backend("tpu"):
        pass
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' is forced but the input is on 'cpu'"):
        functional.gru(data.input, data.weights)
    with use_backend("reference"):
        by_reference = functional.gru(data.input, data.weights)[0]
        with use_backend("cpu"):
            by_kernel = functional.gru(data.input, data.weights)[0]
        with use_backend(None):
            torch.testing.assert_close(functional.gru(data.input, data.weights)[0], by_kernel, rtol=0, atol=0)
    torch.testing.assert_close(by_reference, by_kernel)
    assert fused_rnn.build_info()["cpu_instruction_set"]


def test_overlapping_backend_blocks() -> None:
    """Blocks of two threads that end in the order in which they began leave nothing behind."""
    first, second = use_backend("reference"), use_backend("cpu")
    before = forced_backend()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert forced_backend() == "cpu"
    second.__exit__(None, None, None)
    assert forced_backend() == before
