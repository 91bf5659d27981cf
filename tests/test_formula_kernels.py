"""Compiled kernels of formulas on a CPU against ``step`` in float64."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import formula_cells as cells
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import _backend, _settings
from fused_rnn.formula import Cell, Gate, Layer, ops

pytestmark = pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")

# Products of a state as it came and as it goes: backward has it of what the product took, without a series of its own.
EVERY = (*cells.CELLS, cells.Mgu(), cells.NormLstm(), fused_rnn.zoo.WMCLSTM())
NARROW = (cells.Lstm(), cells.HeadedSLstm(), cells.PeepholeLstm(), cells.Mgu(), cells.NormLstm())
T, B, I = 5, 4, 3  # noqa: E741


def id_of(cell: Any) -> str:
    return type(cell).__name__


def zoo_cells() -> dict[str, Cell]:
    classes = {name: value for name in fused_rnn.zoo.__all__ if isinstance(value := getattr(fused_rnn.zoo, name), type)}
    return {name: value() for name, value in classes.items() if issubclass(value, Cell)}


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [tensor for part in value for tensor in flat(part)]


@dataclasses.dataclass(frozen=True)
class Form:
    """What a call is like beside the cell."""

    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    states: bool = True
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    resets: bool = False
    steps: int = T

    def __str__(self) -> str:
        usual = Form()
        differs = [f for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in differs) or "plain"


FORMS = (
    Form(),
    Form(layers=2, bidirectional=True, lengths=(5, 0, 3, 1), resets=True),
    Form(bias=False, batch_first=True, states=False, bidirectional=True),
    Form(packed=True, bidirectional=True, resets=True),
    Form(steps=1),
    Form(steps=11, states=False),  # more rows than weights are read for as they lie
)


def results(layer: Layer, form: Form, hidden: int) -> list[Tensor]:
    """Output, last states and all gradients of a call whose numbers depend on the form alone."""
    dtype = next(layer.parameters()).dtype
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype).requires_grad_()

    x = made(*((B, form.steps, I) if form.batch_first else (form.steps, B, I)))
    count = len(layer.cell.declaration.states)
    states = [made(form.layers * (1 + form.bidirectional), B, hidden) for _ in range(count)] if form.states else []
    hx = None if not states else states[0] if count == 1 else tuple(states)
    options: dict[str, Any] = {}
    given: Any = x
    if form.packed:
        given = pack_padded_sequence(x, [5, 3, 1, 4], enforce_sorted=False)
    if form.lengths is not None:
        options["lengths"] = torch.tensor(form.lengths)
    if form.resets:
        shape = (len(given.data),) if form.packed else (form.steps, B)
        options["resets"] = torch.rand(shape, generator=generator) < 0.3
    outputs = flat(layer(given, hx, **options))
    weights = [made(*out.shape).detach() for out in outputs]
    leaves = [x, *states, *layer.parameters()]
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def compare(cell: Cell, form: Form, dtype: torch.dtype, hidden: int, limit: float) -> None:
    torch.manual_seed(0)
    options = {"bias": form.bias, "batch_first": form.batch_first, "bidirectional": form.bidirectional}
    ours = Layer(cell, I, hidden, form.layers, dtype=dtype, **options)
    theirs = Layer(cell, I, hidden, form.layers, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    with fused_rnn.use_backend("cpu"):
        got = results(ours, form, hidden)
    with fused_rnn.use_backend("reference"):
        expected = results(theirs, form, hidden)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=limit * max(1 / 16, wanted.abs().max().item()), rtol=0)


def size_of(cell: Cell) -> int:
    return 9 if cell.declaration.heads == 1 else 5 * cell.declaration.heads


@pytest.mark.parametrize("cell", EVERY, ids=id_of)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equal_to_step(cell: Cell, form: Form) -> None:
    compare(cell, form, torch.float64, size_of(cell), 1e-11)


LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("cell", NARROW, ids=id_of)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_equal_to_step_in_narrow_dtypes(cell: Cell, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and isinstance(cell, (cells.PeepholeLstm, cells.Mgu)):
        pytest.skip("three cells cover what depends on the storage")
    for form in (FORMS[1], FORMS[5]):
        compare(cell, form, dtype, 4 * size_of(cell), LIMITS[dtype])


@pytest.mark.parametrize("cell", [cells.HeadedSLstm(), cells.NormLstm()], ids=id_of)
def test_every_instruction_set(cell: Cell) -> None:
    assert _backend.extension is not None
    for name in _backend.extension.build_info()["cpu_instruction_sets"]:
        with _settings.use("FUSED_RNN_CPU", name):
            compare(cell, FORMS[1], torch.float32, 2 * size_of(cell), 1e-5)


@pytest.mark.parametrize("cell", NARROW, ids=id_of)
def test_threads_change_nothing(cell: Cell) -> None:
    layer = Layer(cell, I, 16 * size_of(cell), dtype=torch.float64)
    form = Form(steps=3, lengths=(3, 1, 2, 3))
    alone = results(layer, form, 16 * size_of(cell))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = results(layer, form, 16 * size_of(cell))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_padding_is_never_read() -> None:
    """NaN behind the lengths, in the input and before a reset in the states, reaches nothing."""
    for cell in NARROW:
        hidden = size_of(cell)
        layer = Layer(cell, I, hidden, dtype=torch.float64)
        lengths = torch.tensor([2, 5, 0, 3])
        x = torch.rand(T, B, I, dtype=torch.float64)
        x[torch.arange(T)[:, None] >= lengths] = torch.nan
        x.requires_grad_()
        resets = torch.zeros(T, B, dtype=torch.bool)
        resets[0] = True
        count = len(cell.declaration.states)
        states = [torch.full((1, B, hidden), torch.nan, dtype=torch.float64) for _ in range(count)]
        y, _ = layer(x, states[0] if count == 1 else tuple(states), lengths=lengths, resets=resets)
        y.sum().backward()
        assert y.isfinite().all() and (y[torch.arange(T)[:, None] >= lengths] == 0).all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert x.grad is not None and (x.grad[torch.arange(T)[:, None] >= lengths] == 0).all()


@pytest.mark.parametrize("cell", [cells.SLstm(), cells.Mgu()], ids=id_of)
def test_second_derivatives(cell: Cell) -> None:
    layer = Layer(cell, 2, 3, dtype=torch.float64)
    x = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


def test_compile_and_export() -> None:
    layer = Layer(cells.SLstm(), I, 8, num_layers=2)
    x = torch.rand(T, B, I, requires_grad=True)
    y, _ = layer(x)
    (wanted,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, _ = compiled(x)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], wanted)
    program = torch.export.export(layer, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach())[0], y)
    assert any("fused_rnn.formula" in str(node.target) for node in program.graph.nodes)


def test_opcheck() -> None:
    layer = Layer(cells.SLstm(), I, 8)
    layer(torch.rand(T, B, I))
    x = torch.rand(T, B, I, requires_grad=True)
    params = list(layer.parameters())
    flags = ops.BIASES | ops.SAVE
    torch.library.opcheck(torch.ops.fused_rnn.formula.default, (x, [], params, [], ops.remember(layer.cell), flags))


# --- functions of a vector ---


@dataclasses.dataclass
class Function:
    """A function of one number and where it is tried."""

    name: str
    low: float
    high: float
    units: float  # in the last place, allowed in float32 and float64
    extra: tuple[float, ...] = ()
    least: float = 0.0  # a difference that does not count: sigmoid of less than -87 is not 0 but 1e-38, in float64 too


SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan)
FUNCTIONS = (
    Function("exp", -80, 80, 3, (88.7, 89.5, -95.0, -103.0, -110.0, 1e-30)),
    Function("expm1", -20, 80, 3, (1e-30, -1e-30, 1e-6, 89.5, -200.0)),
    Function("log", 0.01, 50, 2, (1e-42, 1e-38, 1e38, 1.0, 1.0000001, 0.9999999, -1.0)),
    Function("log1p", -0.99, 50, 3, (1e-30, -1e-30, 1e-6, -1e-6, 1e38, -1.0, -2.0)),
    Function("sqrt", 0.0, 50, 1, (1e-42, 1e38, -1.0)),
    Function("erf", -4, 4, 2),
    Function("sin", -10, 10, 2),
    Function("cos", -10, 10, 2),
    Function("abs", -10, 10, 0),
    Function("sigmoid", -90, 90, 4, least=2e-38),
    Function("tanh", -20, 20, 4, (1e-30, -1e-6)),
)


class Chosen(Cell):
    """Every function at once: a unit's ``which`` says whose result it has."""

    gates = (Gate("a", recurrent=False),)
    unit_parameters = ("which",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        result = x.a
        for index, function in enumerate(FUNCTIONS):
            result = torch.where(self.which == index, getattr(torch, function.name)(x.a), result)
        return result


def points_of(function: Function, dtype: torch.dtype) -> Tensor:
    even = torch.linspace(function.low, function.high, 997, dtype=torch.float64)
    return torch.cat([even, torch.tensor([*function.extra, *SPECIAL], dtype=torch.float64)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_of_vectors(dtype: torch.dtype) -> None:
    points = [points_of(function, dtype) for function in FUNCTIONS]
    layer = Layer(Chosen(), 1, sum(map(len, points)), bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat(points)[:, None])
        layer.which_l0.copy_(torch.cat([torch.full_like(p, index) for index, p in enumerate(points)]))
        with fused_rnn.use_backend("cpu"):
            results = layer(torch.ones(1, 1, 1, dtype=dtype))[0].flatten().split([len(p) for p in points])
    for function, at, got in zip(FUNCTIONS, points, results, strict=True):
        exact = getattr(torch, function.name)(at.double())
        expected = exact.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan()), function
        finite = expected.isfinite()
        infinite = expected.isinf()
        assert torch.equal(got[infinite], expected[infinite]) and got[finite].isfinite().all(), function
        unit = torch.finfo(dtype).eps * exact[finite].abs().clamp_min(torch.finfo(dtype).tiny)
        error = ((got[finite].double() - exact[finite]).abs() - function.least).clamp_min(0) / unit
        # float64 is compared with torch's own float64, which has an error too.
        allowed = function.units + (1 if dtype == torch.float64 else 0)
        assert error.max() <= allowed, (function, error.max().item(), at[finite][error.argmax()].item())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(zoo_cells()))
def test_the_zoo_in_random_forms(name: str) -> None:
    """Every cell of the zoo in forms drawn at random, in float64."""
    cell = zoo_cells()[name]
    random = Random(name)
    for _ in range(8):
        packed, ragged = random.choice([(False, False), (True, False), (False, True)])
        form = Form(
            layers=random.choice([1, 1, 2]),
            bidirectional=random.random() < 0.5,
            bias=random.random() < 0.8,
            batch_first=not packed and random.random() < 0.3,
            states=random.random() < 0.6,
            lengths=tuple(random.randint(0, T) for _ in range(B)) if ragged else None,
            packed=packed,
            resets=random.random() < 0.4,
            steps=T if packed or ragged else random.choice([1, 2, T, 13]),
        )
        if form.batch_first and form.resets:
            form = dataclasses.replace(form, resets=False)  # `results` makes them [T, B]
        heads = cell.declaration.heads
        compare(cell, form, torch.float64, heads * random.choice([1, 3, 4, 5, 8, 17]), 1e-9)
