"""Compiled kernels of formulas on a CPU against ``step`` in float64; what a user sees where they cannot be made."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import formula_cells as cells
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import _backend, _settings
from fused_rnn.formula import Cell, Gate, Layer, Step, build, ops, serve, store, verify

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


# --- where nothing can be compiled, and what is kept ---


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing known of any cell."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_RNN_CACHE", str(folder))
    monkeypatch.setattr(serve, "_ready", set())
    monkeypatch.setattr(serve, "_reasons", {})
    monkeypatch.setattr(_backend, "_warned", set())
    yield folder


class Odd(Cell):
    """A cell of its own for each number, so that nothing of it is loaded yet."""

    gates = ("a",)

    def __init__(self, number: float) -> None:
        self.number = number

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a + self.number)


NUMBERS = itertools.count(1)


def new_layer() -> Layer:
    return Layer(Odd(next(NUMBERS) / 1024), 2, 3)


def test_without_a_compiler_step_serves(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = new_layer(), torch.rand(2, 2, 2)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found .CXX=no-such-compiler"):
        y, _ = layer(x)
    with fused_rnn.use_backend("reference"):
        assert torch.equal(y, layer(x)[0])
    layer(x)  # the warning comes once
    with fused_rnn.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced but Odd could not be compiled"):
        layer(x)


def test_a_broken_compiler_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match="the C.. compiler failed with status 1"):
        new_layer()(torch.rand(2, 2, 2))
    assert list(fresh.iterdir()) == []


def test_a_killed_compiler_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "slow-compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\nprintf half > "$last"\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "SECONDS", 1)
    with pytest.warns(RuntimeWarning, match="took more than 1 s"):
        new_layer()(torch.rand(2, 2, 2))
    assert list(fresh.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs a user who may not write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("FUSED_RNN_CACHE", str(blocked / "cache"))
    layer = new_layer()
    with fused_rnn.use_backend("cpu"):
        layer(torch.rand(2, 2, 2))  # compiled all the same, for this process
    assert store.entries() == []


def test_a_damaged_library_is_made_again(fresh: Path) -> None:
    number = next(NUMBERS) / 1024
    Layer(Odd(number), 2, 3)(torch.rand(2, 2, 2))
    (library,) = fresh.glob("*.so")
    library.unlink()  # this process has mapped the file
    library.write_bytes(b"no library")
    script = f"import torch, test_formula_kernels as t\nt.Layer(t.Odd({number}), 2, 3)(torch.rand(2, 2, 2))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert library.stat().st_size > 1000


def test_libraries_of_other_users_are_not_loaded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_layer()(torch.rand(2, 2, 2))
    (library,) = fresh.glob("*.so")
    assert store.find(library.stem) == library
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0o100644, 0, 0, 1, 4242, 0, 1, 0, 0, 0)))
    assert store.find(library.stem) is None


def test_a_forced_backend_that_has_no_kernels() -> None:
    layer = Layer(cells.Rnn(), 2, 3)
    with fused_rnn.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced but the input is on 'cpu'"):
        layer(torch.rand(2, 2, 2))


def test_what_makes_the_code_is_in_the_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of another version of the generator, of the headers or of torch is another library."""
    layer, command = new_layer(), ["c++"]
    name = build.library_name(layer.cell, torch.float32, "portable", command)
    for maker in ("_headers_digest", "generator_digest", "_compiler_identity"):
        with monkeypatch.context() as patch:
            patch.setattr(build, maker, lambda *_: "another")
            assert build.library_name(layer.cell, torch.float32, "portable", command) != name
    assert build.library_name(new_layer().cell, torch.float32, "portable", command) != name
    assert build.library_name(layer.cell, torch.float64, "portable", command) != name
    assert build.library_name(layer.cell, torch.float32, "portable", command) == name


def test_two_processes_at_once(fresh: Path) -> None:
    script = "import torch, test_formula_kernels as t\nt.Layer(t.Odd(0.75), 2, 3)(torch.rand(2, 2, 2))"
    command = [sys.executable, "-W", "error", "-c", script]
    running = [subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.communicate(timeout=120)[1] == "" and process.returncode == 0 for process in running)
    assert len(list(fresh.glob("*.so"))) == 1 and not list(fresh.glob(".compile-*"))


def test_the_cache_is_found_again_without_tracing(fresh: Path) -> None:
    number = next(NUMBERS) / 1024
    Layer(Odd(number), 2, 3)(torch.rand(2, 2, 2))
    script = textwrap.dedent(f"""
        import sys, torch, test_formula_kernels as t
        t.Layer(t.Odd({number}), 2, 3)(torch.rand(2, 2, 2))
        assert "networkx" not in sys.modules and "fused_rnn.formula.trace" not in sys.modules
    """)
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_cache_is_bounded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 1)
    first = new_layer()
    first(torch.rand(2, 2, 2))
    assert store.entries() == []  # not even one fits
    monkeypatch.setattr(store, "MOST_BYTES", 40_000)
    for _ in range(3):
        new_layer()(torch.rand(2, 2, 2))
    assert 1 <= len(store.entries()) <= 2
    assert store.clear() > 0 and store.entries() == [] and not list(fresh.glob("*.cpp"))


def test_kernels_that_disagree_do_not_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = build.translation_unit
    monkeypatch.setattr(build, "translation_unit", lambda *args: right(*args).replace("tanh(", "sigmoid("))
    layer = new_layer()
    with pytest.raises(
        RuntimeError, match=r"Odd: the compiled kernels for torch.float32 disagree with step: output has \S+ where"
    ):
        layer(torch.rand(2, 2, 2))
    assert store.entries() == []
    monkeypatch.undo()
    layer(torch.rand(2, 2, 2))


def test_backward_that_disagrees_does_not_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = build.translation_unit
    monkeypatch.setattr(build, "translation_unit", lambda *args: right(*args).replace("V(1) - h", "V(1) + h"))
    with pytest.raises(RuntimeError, match="gradient of input has"):
        new_layer()(torch.rand(2, 2, 2))


def test_a_small_gradient_that_is_wrong_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 0.1 that is an eighth too large, in float16; and a result that is compared where others are infinite."""
    cell = cells.Rnn()
    right = torch.tensor([0.1, -0.02, torch.inf, torch.nan], dtype=torch.float64)
    verify.compare(cell, torch.float16, "gradient", right, right)
    with pytest.raises(RuntimeError, match="gradient has 0.11"):
        verify.compare(cell, torch.float16, "gradient", right * 1.125, right)
    with pytest.raises(RuntimeError, match="gradient has nan where step has -0.02"):
        verify.compare(cell, torch.float16, "gradient", torch.where(right < 0, torch.nan, right), right)


def test_more_states_than_kernels_have() -> None:
    class Many(Cell):
        gates = ("a",)
        states = tuple(f"s{i}" for i in range(9))

        def step(self, x: Any, r: Any, *states: Any) -> Any:
            return tuple(0.5 * state + torch.tanh(x.a + r.a) for state in states)

    with pytest.warns(RuntimeWarning, match="Many has more than 8 states"):
        Layer(Many(), 2, 3)(torch.rand(2, 2, 2))


# --- the op by itself ---


def test_constants_are_those_of_the_kernels() -> None:
    from fused_rnn.formula import writer

    assert _backend.extension is not None
    for name, value in _backend.extension.formula_constants().items():
        here = writer.PHASE_KINDS[name] if name in writer.PHASE_KINDS else getattr(ops, name, getattr(serve, name, None))
        assert here == value, name
    assert len(writer.PHASE_KINDS) == 3


def test_fake_kernels_refuse_mixed_devices() -> None:
    """torch calls a fake kernel where one tensor is on the meta device: its results would be uninitialised memory."""
    formula, x, params = call_of(cells.PeepholeLstm())
    with pytest.raises(RuntimeError, match=r"params\[1\]: expected device cpu .input's., got meta"):
        torch.ops.fused_rnn.formula(x, [], [params[0], params[1].to("meta"), *params[2:]], [], formula, ops.BIASES)


def call_of(cell: Cell) -> tuple[str, Tensor, list[Tensor]]:
    layer = Layer(cell, I, 8)
    layer(torch.rand(T, B, I))
    return ops.remember(cell), torch.rand(T, B, I), [parameter.detach() for parameter in layer.parameters()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s, p: (x[0], s, p), "input: expected 3-D, got 2-D"),
        (lambda x, s, p: (x.half(), s, p), "has no kernels in this process for"),
        (lambda x, s, p: (x, s, p[:-1]), "params: expected 7 tensors, got 6"),
        (lambda x, s, p: (x, s, [p[0][:-1], *p[1:]]), r"weight_ih: expected shape \[4\*H, I\]"),
        (lambda x, s, p: (x, s, [p[0], p[1][:-1], *p[2:]]), r"weight_hh: expected shape \[32, 8\]"),
        (lambda x, s, p: (x, s, [*p[:-1], p[-1][:-1]]), r"parameters: expected shape \[8\], got \[7\]"),
        (lambda x, s, p: (x[..., :-1], s, p), r"weight_ih: expected shape \[32, 2\]"),
        (lambda x, s, p: (x[:0], s, p), "input: expected at least 1 time step, got 0"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 8)], p), "states: expected 2 or none, got 1"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 7)] * 2, p), r"states: expected shape \[1, 4, 8\]"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 8).double()] * 2, p), "states: expected dtype"),
    ],
)
def test_op_checks(change: Any, message: str) -> None:
    formula, x, params = call_of(cells.PeepholeLstm())
    states: Sequence[Tensor] = []
    x, states, params = change(x, states, params)
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.fused_rnn.formula(x, states, params, [], formula, ops.BIASES)


def test_op_of_an_unknown_cell() -> None:
    _, x, params = call_of(cells.PeepholeLstm())
    with pytest.raises(RuntimeError, match="the formula nobody has no kernels in this process"):
        torch.ops.fused_rnn.formula(x, [], params, [], "nobody", ops.BIASES)


def test_backward_checks_what_was_saved() -> None:
    formula, x, params = call_of(cells.PeepholeLstm())
    y, last, saved = torch.ops.fused_rnn.formula(x, [], params, [], formula, ops.BIASES | ops.SAVE)
    flags = ops.BIASES | ops.GRAD_X
    for wrong, message in (([y], "saved: expected"), ([saved[0][:, :-1], *saved[1:], y], "saved: expected shape")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.fused_rnn.formula_backward(y, [], x, [], params, [], wrong, formula, flags)
    with pytest.raises((RuntimeError, ValueError), match="dlast: expected 2 gradients"):
        torch.ops.fused_rnn.formula_backward(y, [last[0]], x, [], params, [], [*saved, y], formula, flags)


def test_a_step_trains_and_equals_the_layer() -> None:
    step = Step(cells.SLstm(), I, 8, dtype=torch.float64)
    x = torch.rand(B, I, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        hx = None
        for _ in range(3):
            hx = step(x, hx)
        return [*hx, *torch.autograd.grad(hx[0].sum(), [x, *step.parameters()])]

    got = run()
    with fused_rnn.use_backend("reference"):
        expected = run()
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-12, rtol=0)
    single = step(x[0])
    torch.testing.assert_close(single[0], step(x)[0][0], atol=1e-12, rtol=0)


# --- around ---


def test_headers_of_a_package_suffice(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """setup.py puts these two folders, and those for a GPU (test_formula_cuda.py), into an installed package."""
    root = Path(__file__).parent.parent
    text = (root / "setup.py").read_text()
    assert 'HEADERS = ("core", "cpu/isa", ' in text
    for folder in ("core", "cpu/isa"):
        (tmp_path / folder).mkdir(parents=True)
        for path in (root / "csrc" / folder).glob("*.h"):
            shutil.copyfile(path, tmp_path / folder / path.name)
    monkeypatch.setattr(build, "headers_directory", lambda: tmp_path)
    with fused_rnn.use_backend("cpu"):
        new_layer()(torch.rand(2, 2, 2))


def test_without_headers_step_serves(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "headers_directory", lambda: tmp_path)
    with pytest.warns(RuntimeWarning, match="the headers of the kernels are missing"):
        new_layer()(torch.rand(2, 2, 2))


def test_explain() -> None:
    layer = Layer(cells.NormLstm(), 16, 32, num_layers=2)
    explanation = fused_rnn.explain(layer, torch.rand(T, B, 16), show=False)
    assert explanation.backend == "cpu" and explanation.cell == "NormLstm" and len(explanation.layers) == 2
    assert "8 numbers of a unit are kept of each step" in str(explanation)
    assert explanation.layers[0].saved_bytes == 8 * T * B * 32 * 4
    with fused_rnn.use_backend("reference"):
        assert fused_rnn.explain(layer, torch.rand(T, B, 16), show=False).backend == "reference"
    step = fused_rnn.explain(Step(cells.SLstm(), 4, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64), show=False)
    assert step.layers[0].T == step.layers[0].B == 1
    with pytest.raises(ValueError, match="input: expected 16 features"):
        fused_rnn.explain(layer, torch.rand(T, B, 3))


def test_saved_bytes_are_those_of_forward() -> None:
    for cell in (cells.SLstm(), cells.NormLstm(), cells.Gru()):
        layer = Layer(cell, 4, 8)
        x = torch.rand(T, B, 4)
        layer(x)
        flags = ops.BIASES | ops.SAVE
        _, _, saved = torch.ops.fused_rnn.formula(x, [], list(layer.parameters()), [], layer.formula, flags)
        told = fused_rnn.explain(layer, x, show=False).layers[0].saved_bytes
        assert told == sum(t.numel() * t.element_size() for t in saved), type(cell)


def test_cache_command(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_rnn.__main__ import main

    new_layer()(torch.rand(2, 2, 2))
    main(["cache"])
    assert "1 compiled formulas" in capsys.readouterr().out
    main(["cache", "--clear"])
    assert "bytes freed" in capsys.readouterr().out and store.entries() == []


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
