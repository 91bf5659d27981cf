"""Forward-mode AD and second derivatives of cells that are formulas, by the kernels alone, against ``step`` in a loop.

Everything in float64, where both agree to a few units in the last place; float32 against that loop in float64.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import formula_cells as cells
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _backend, reference, use_backend, zoo
from fused_rnn.formula import Cell, Layer, Step, build, double_backward, ops, second_order, serve, tangents
from fused_rnn.formula.verify import TOLERANCES

T, B, IN, H = 4, 3, 2, 6
LENGTHS = torch.tensor([4, 2, 3])
BATCH_SIZES, ORDER = torch.tensor([3, 3, 2, 1]), torch.tensor([0, 2, 1])  # the same, packed
LIMIT = {torch.float64: 1e-12, torch.float32: TOLERANCES[torch.float32]}
CELLS = (
    cells.Lstm(),
    cells.Gru(),
    cells.PeepholeLstm(),
    cells.HeadedSLstm(),
    cells.FastRnn(),
    cells.RecurrentOnly(),
    cells.OutputLast(),
    cells.Mgu(),
)
ZOO = (zoo.LSTM(), zoo.GRU(), zoo.LiGRU(), zoo.MinimalRNN(), zoo.JANET(), zoo.SLSTM(), zoo.MGU(), zoo.PeepholeLSTM())
# Of a drawn call: the layer's arguments, then what the call has.
CALLS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, set()),
    "both directions, no bias": ({"bidirectional": True, "bias": False}, {"hx"}),
    "two layers": ({"num_layers": 2, "batch_first": True}, set()),
    "lengths": ({"bidirectional": True}, {"lengths", "hx"}),
    "packed": ({"bidirectional": True}, {"packed"}),
    "packed with resets": ({"bidirectional": True}, {"packed", "resets", "reset_state", "hx"}),
    "resets": ({"bidirectional": True}, {"resets", "hx"}),
    "reset state": ({"bidirectional": True}, {"resets", "reset_state"}),
    "reset state of every step": ({"num_layers": 2}, {"resets", "every reset_state", "lengths"}),
    "all states": ({"bidirectional": True, "num_layers": 2}, {"all states", "lengths"}),
    "all states, packed": ({}, {"all states", "packed"}),
    "options": ({"zoneout": 0.3, "recurrent_dropout": 0.4, "state_clip": 0.5}, {"hx"}),
    "options, resets": ({"zoneout": 0.3, "bidirectional": True}, {"resets", "reset_state", "lengths"}),
    "dropout": ({"num_layers": 2, "dropout": 0.5, "weight_dropout": 0.3}, set()),
    "ids": ({}, {"ids"}),
    "checkpoint": ({"checkpoint": 2, "zoneout": 0.3}, set()),
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in (result.values() if isinstance(result, dict) else result) for t in flat(part)]


class Case:
    """A layer's call as a function of its tensors."""

    def __init__(self, cell: Cell, name: str = "plain", dtype: torch.dtype = torch.float64) -> None:
        arguments, has = CALLS[name]
        if not cell.declaration.recurrent_gates:
            arguments = {key: v for key, v in arguments.items() if key not in ("recurrent_dropout", "weight_dropout")}
        torch.manual_seed(1)
        self.layer, self.has = Layer(cell, IN, H, dtype=dtype, **arguments), has
        groups = self.layer.num_layers * (1 + self.layer.bidirectional)
        generator = torch.Generator().manual_seed(2)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = (B, T) if self.layer.batch_first else (T, B)
        states = cell.declaration.states
        self.tensors: dict[str, Any] = {"weights": {k: v.detach() for k, v in self.layer.named_parameters()}}
        self.ids = torch.randint(IN, shape, generator=generator) if "ids" in has else None
        if self.ids is None:
            self.tensors["x"] = rand(int(BATCH_SIZES.sum()), IN) if "packed" in has else rand(*shape, IN)
        if "hx" in has:
            self.tensors["hx"] = [rand(groups, B, H) for _ in states]
        if "reset_state" in has:
            self.tensors["reset_state"] = [rand(groups, 1, H) for _ in states]
        if "every reset_state" in has:
            self.tensors["reset_state"] = [rand(T, groups, B, H) for _ in states]
        of_rows = (int(BATCH_SIZES.sum()),) if "packed" in has else (T, B)
        self.resets = torch.rand(of_rows, generator=generator) < 0.4 if "resets" in has else None
        self.rand = rand

    def __call__(self, tensors: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(3)  # of masks
        given = {**self.tensors, **tensors}
        x, options = given.get("x", self.ids), dict[str, Any]()
        if "packed" in self.has:  # torch has no forward mode of pack_padded_sequence
            x = PackedSequence(x, BATCH_SIZES, ORDER, ORDER)

        def form(states: list[Tensor]) -> Any:
            return states[0] if len(states) == 1 else tuple(states)

        if self.resets is not None:
            options["resets"] = self.resets
        if "reset_state" in given:
            options["reset_state"] = form(given["reset_state"])
        if "lengths" in self.has:
            options["lengths"] = LENGTHS
        hx = form(given["hx"]) if "hx" in given else None
        options["return_all_states"] = "all states" in self.has
        return flat(torch.func.functional_call(self.layer, given["weights"], (x, hx), options))

    def loss(self, tensors: dict[str, Any]) -> Tensor:
        return torch.stack([(i + 1) * y.sin().sum() for i, y in enumerate(self(tensors))]).sum()

    def directions(self, of: str = "") -> dict[str, Any]:
        made = torch.utils._pytree.tree_map(lambda t: self.rand(*t.shape), self.tensors)
        return {key: value for key, value in made.items() if not of or key == of}

    def jvp(self, directions: dict[str, Any]) -> Any:
        return torch.func.jvp(self, ({key: self.tensors[key] for key in directions},), (directions,))

    def to(self, dtype: torch.dtype) -> Case:
        self.layer = self.layer.to(dtype)
        self.tensors = torch.utils._pytree.tree_map(lambda t: t.to(dtype), self.tensors)
        return self


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    """Each within LIMIT of its largest number."""
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        allowed = LIMIT[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        assert (a - b).abs().max().item() <= allowed


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Case], None]]:
    """Called, it makes the reference, the loop over ``step`` and warnings raise. What compiles does so before."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("no kernel runs")

    def start(case: Case) -> None:
        case.jvp(case.directions())
        if case.ids is None:
            case.jvp(case.directions("x"))
        for name in ("layer", "cell", "step"):
            monkeypatch.setattr(reference, name, refuse)
        monkeypatch.setattr(double_backward, "_by_reference", refuse)
        monkeypatch.setattr(_backend, "_warned", set())
        warnings.filterwarnings("error", category=RuntimeWarning)

    with warnings.catch_warnings():
        yield start


def gradients(case: Case, of: tuple[str, ...], second: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    """Gradients of ``second`` of the gradients with regard to these tensors, with regard to all, by autograd."""
    leaves, spec = torch.utils._pytree.tree_flatten(case.tensors)
    own = [t.clone().requires_grad_() for t in leaves]
    tensors = torch.utils._pytree.tree_unflatten(own, spec)
    inputs = [t for key in of if key in tensors for t in flat(tensors[key])]
    first = torch.autograd.grad(case.loss(tensors), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    return list(torch.autograd.grad(second(list(first)), own, allow_unused=True, materialize_grads=True))


def penalty(first: list[Tensor]) -> Tensor:
    return torch.stack([g.square().sum() for g in first]).sum()


CELL_IDS = {"ids": lambda cell: type(cell).__name__}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", CELLS, **CELL_IDS)
def test_jvp(cell: Cell, name: str, kernels_only: Callable[[Case], None]) -> None:
    """By all arguments, and by each of them alone."""
    case = Case(cell, name)
    all_directions = [case.directions(), *(case.directions(of) for of in case.tensors)]
    with use_backend("reference"):
        expected = [case.jvp(directions) for directions in all_directions]
    kernels_only(case)
    close([case.jvp(directions) for directions in all_directions], expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", CELLS, **CELL_IDS)
def test_double_backward(cell: Cell, name: str, kernels_only: Callable[[Case], None]) -> None:
    """A gradient penalty by the input alone, and Hessian-vector products by everything."""
    case = Case(cell, name)

    def both() -> list[list[Tensor]]:
        of_all = tuple(case.tensors)
        made = [gradients(case, of_all, penalty)]
        return made if case.ids is not None else [*made, gradients(case, ("x",), penalty)]

    with use_backend("reference"):
        expected = both()
    kernels_only(case)
    close(both(), expected)


WAYS: dict[str, Callable[[Case, dict[str, Any]], Any]] = {
    "jvp of grad": lambda case, v: torch.func.jvp(torch.func.grad(case.loss), (case.tensors,), (v,)),
    "grad of jvp": lambda case, v: torch.func.grad(
        lambda t: torch.stack([y.sin().sum() for y in torch.func.jvp(case, (t,), (v,))[1]]).sum()
    )(case.tensors),
    "grad of grad": lambda case, v: torch.func.grad(lambda t: penalty(flat(torch.func.grad(case.loss)(t))))(case.tensors),
    "jacfwd": lambda case, v: torch.func.jacfwd(lambda x: case({"x": x}))(case.tensors["x"]),
    "hessian": lambda case, v: torch.func.hessian(lambda x: case.loss({"x": x}))(case.tensors["x"]),
    "vmap of jvp": lambda case, v: torch.func.vmap(lambda x, w: torch.func.jvp(lambda x: case({"x": x}), (x,), (w,))[1])(
        torch.stack([case.tensors["x"], v["x"]]), torch.stack([v["x"], case.tensors["x"]])
    ),
}


@pytest.mark.parametrize("name", ["plain", "both directions, no bias", "lengths", "reset state", "all states"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", [cells.Lstm(), cells.Gru(), cells.PeepholeLstm(), cells.Mgu()], **CELL_IDS)
def test_torch_func(cell: Cell, way: str, name: str, kernels_only: Callable[[Case], None]) -> None:
    case = Case(cell, name)
    v = case.directions()
    with use_backend("reference"):
        expected = WAYS[way](case, v)
    kernels_only(case)
    close(WAYS[way](case, v), expected)


@pytest.mark.parametrize("name", ["plain", "packed with resets", "all states"])
@pytest.mark.parametrize("cell", ZOO, **CELL_IDS)
def test_zoo(cell: Cell, name: str, kernels_only: Callable[[Case], None]) -> None:
    """Cells of the literature, by all arguments: tangents, and Hessian-vector products."""
    case = Case(cell, name)
    directions = case.directions()
    with use_backend("reference"):
        expected = [case.jvp(directions), gradients(case, tuple(case.tensors), penalty)]
    kernels_only(case)
    close([case.jvp(directions), gradients(case, tuple(case.tensors), penalty)], expected)


@pytest.mark.parametrize("name", ["plain", "lengths", "reset state"])
@pytest.mark.parametrize("cell", CELLS, **CELL_IDS)
def test_float32(cell: Cell, name: str, kernels_only: Callable[[Case], None]) -> None:
    case = Case(cell, name, torch.float32)
    directions = case.directions()
    of_both = torch.utils._pytree.tree_map(lambda t: t.double(), directions)
    own = Case(cell, name, torch.float32)
    with use_backend("reference"):
        exact = case.to(torch.float64)
        expected = [exact.jvp(of_both), gradients(exact, ("x",), penalty)]
    kernels_only(own)
    found = [own.jvp(directions), gradients(own, ("x",), penalty)]
    close(found, expected, torch.float32)


@pytest.mark.parametrize("cell", [cells.Lstm(), cells.Gru(), cells.Mgu(), cells.FastRnn()], **CELL_IDS)
def test_gradcheck(cell: Cell, kernels_only: Callable[[Case], None]) -> None:
    """Dual tensors, of which some require a gradient, under torch's first vmap too; and second derivatives."""
    case = Case(cell, "both directions, no bias")
    leaves, spec = torch.utils._pytree.tree_flatten(case.tensors)
    leaves = [t.requires_grad_() for t in leaves]
    kernels_only(case)

    def run(*leaves: Tensor) -> list[Tensor]:
        return case(torch.utils._pytree.tree_unflatten(leaves, spec))

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, check_fwd_over_rev=True)


class Corners(Cell):
    """Everything with a corner, which the test below puts its arguments on."""

    gates = ("a", "b")

    def step(self, x: Any, r: Any, h: Any) -> Any:
        a, b = x.a + r.a, x.b + r.b
        u = torch.relu(a) * b + torch.clamp(a, -1.0, 1.0) * a + torch.maximum(a, b) * torch.minimum(a, b)
        u = u + torch.abs(a) * b + torch.nn.functional.leaky_relu(a, 0.3) * b + torch.where(a > 0, a * b, a)
        u = u + torch.nn.functional.hardtanh(a, -1.0, 0.0) * torch.nn.functional.relu6(b) * a
        return u + torch.nn.functional.elu(a) * b + torch.clamp(a, min=b) * b


def test_corners(kernels_only: Callable[[Case], None]) -> None:
    """Derivatives at corners are torch's, to the last bit where they are sums of small integers."""
    case = Case(Corners())
    case.tensors["weights"]["weight_ih_l0"] = torch.tensor([[1.0, 0.0]] * H + [[0.0, 1.0]] * H, dtype=torch.float64)
    for name in ("weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        case.tensors["weights"][name] = torch.zeros_like(case.tensors["weights"][name])
    grid = torch.tensor([-1.0, 0.0, 1.0, 6.0], dtype=torch.float64)
    case.tensors["x"] = torch.cartesian_prod(grid, grid).unsqueeze(0)
    v = torch.ones_like(case.tensors["x"])

    def both() -> list[Any]:
        x = case.tensors["x"].clone().requires_grad_()
        y = case({"x": x})[0]
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [torch.func.jvp(lambda x: case({"x": x}), (x.detach(),), (v,)), torch.autograd.grad((first * v).sum(), x)]

    with use_backend("reference"):
        expected = both()
    kernels_only(case)
    close(both(), expected)


def test_step(kernels_only: Callable[[Case], None]) -> None:
    """A Step has the tangents and second derivatives of a layer of one step."""
    step = Step(cells.PeepholeLstm(), IN, H, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, n, generator=generator, dtype=torch.float64) for n in (IN, H, H)]

    def run(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return step(x, (h, c))

    def both() -> list[Any]:
        return [
            torch.func.jvp(run, tuple(tensors), tuple(t.sin() for t in tensors)),
            torch.func.hessian(lambda x: run(x, *tensors[1:])[0].square().sum())(tensors[0]),
        ]

    with use_backend("reference"):
        expected = both()
    both()
    kernels_only(Case(cells.PeepholeLstm()))
    close(both(), expected)


def test_third_derivatives() -> None:
    """They differentiate the loop over ``step``, of the cell or of its tangents."""
    case = Case(cells.Gru())
    x, v = case.tensors["x"], case.directions()["x"]

    def hvp(x: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(lambda x: case.loss({"x": x})), (x,), (v,))[1].sin().sum()

    def by_autograd() -> Tensor:
        own = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(case.loss({"x": own}), own, create_graph=True)
        (second,) = torch.autograd.grad(penalty([first]), own, create_graph=True)
        return torch.autograd.grad(penalty([second]), own)[0]

    def all_three() -> list[Tensor]:
        of_jvp = torch.func.jvp(lambda x: torch.func.jvp(lambda x: case({"x": x})[0], (x,), (v,))[1], (x,), (v,))
        return [torch.func.grad(hvp)(x), by_autograd(), *of_jvp]

    with use_backend("reference"):
        expected = all_three()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        close(all_three(), expected)


class HardSigmoid(Cell):
    gates = ("a",)

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.nn.functional.hardsigmoid(x.a + r.a) * h


@pytest.mark.parametrize(
    ("cell", "dtype", "why"),
    [
        (cells.NormLstm(), torch.float64, "NormLstm: tangents of rms_norm inside of a step are not compiled"),
        (HardSigmoid(), torch.float64, "HardSigmoid: torch has no second derivative of its step"),
        (cells.Gru(), torch.bfloat16, "Gru: there are no tangents in bfloat16"),
    ],
)
def test_what_runs_on_the_reference(cell: Cell, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning names the cell and the reason, and the tangents are the loop's."""
    case = Case(cell, dtype=dtype)
    directions = case.directions()
    with use_backend("reference"):
        expected = case.jvp(directions)
    monkeypatch.setattr(_backend, "_warned", set())
    with pytest.warns(RuntimeWarning, match=f"forward-mode AD of {why}"):
        found = case.jvp(directions)
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))
    with use_backend("cpu"), pytest.raises(RuntimeError, match=f"forced but forward-mode AD of {why}"):
        case.jvp(directions)


@pytest.mark.parametrize("of", ["", "x"])
@pytest.mark.parametrize("transform", [True, False], ids=["torch.func", "forward_ad"])
def test_tangents_that_cannot_be_compiled(of: str, transform: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer has run on its kernels by then: its tangents come from the loop, and a warning says so once."""
    case = Case(cells.Gru(), "both directions, no bias")
    directions = case.directions(of)
    with use_backend("reference"):
        expected = case.jvp(directions)
    prepare = serve.prepare

    def refuse(formula: str, *where: Any) -> None:
        if isinstance(ops.cell_of(formula), tangents.Tangent):
            raise build.BuildError("no compiler")
        prepare(formula, *where)

    monkeypatch.setattr(serve, "prepare", refuse)
    monkeypatch.setattr(_backend, "_warned", set())
    with pytest.warns(RuntimeWarning, match="forward-mode AD of Gru runs in a loop: .* cannot be used: no compiler"):
        if transform:
            found = case.jvp(directions)
        else:
            with forward_ad.dual_level():
                duals = torch.utils._pytree.tree_map(
                    forward_ad.make_dual, {key: case.tensors[key] for key in directions}, directions
                )
                pairs = [forward_ad.unpack_dual(t) for t in flat(case(duals))]
                found = [p.primal for p in pairs], [p.tangent for p in pairs]
    close(found, expected)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_transforms_that_the_loop_serves(warm: bool) -> None:
    """torch's first vmap over second derivatives, and reverse mode over a vmap of forward mode."""
    torch.manual_seed(0)
    layer = Layer(cells.Mgu() if warm else cells.PeepholeLstm(), IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return layer(t)[0].sin().sum()

    if warm:
        leaf = x.clone().requires_grad_()
        penalty(list(torch.autograd.grad(loss(leaf), leaf, create_graph=True))).backward()
    with use_backend("reference"):
        expected = torch.autograd.functional.hessian(loss, x)
    close(torch.autograd.functional.hessian(loss, x, vectorize=True), expected)
    close(torch.func.jacrev(torch.func.jacfwd(loss))(x), expected)
    close(torch.func.hessian(loss)(x), expected)
    assert second_order.why_not(layer.cell, "cpu", torch.float64) is None, "what ran before it leaves the kernels"


@pytest.mark.parametrize("name", ["plain", "both directions, no bias", "lengths"])
def test_no_rows(name: str) -> None:
    """A batch without rows has tangents and second derivatives without rows, and zeros for the weights."""
    layer = Layer(cells.Lstm(), IN, H, bidirectional=True, dtype=torch.float64)
    x = torch.zeros(T, 0, IN, dtype=torch.float64, requires_grad=True)
    y, tangent = torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (x.detach(),))
    assert y.shape == tangent.shape == (T, 0, 2 * H)
    (first,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    found = torch.autograd.grad(penalty([first]), list(layer.parameters()), allow_unused=True, materialize_grads=True)
    assert all(not t.any() for t in found)


def test_gradients_of_products_are_checked() -> None:
    """What comes to formula_backward from elsewhere has the shape of the products' gradients."""
    layer = Layer(cells.Rnn(), IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    layer(x)
    params = [p.detach() for p in layer.parameters()]
    y, _, saved = torch.ops.fused_rnn.formula(x, [], params, [], layer.formula, ops.BIASES | ops.SAVE)
    flags = ops.BIASES | ops.GRAD_X | ops.ADDS_PRODUCTS

    def run(dlast: list[Tensor]) -> Any:
        return torch.ops.fused_rnn.formula_backward(None, dlast, x, [], params, [], [*saved, y], layer.formula, flags)

    none, added = x.new_empty(0), torch.randn(1, T * B, 1, H, dtype=torch.float64)
    only_dy = torch.ops.fused_rnn.formula_backward(
        y, [], x, [], params, [], [*saved, y], layer.formula, ops.BIASES | ops.GRAD_X
    )[0]
    of_last = run([none, torch.zeros_like(added)])[0]
    assert not of_last.any() and run([none, added])[0].any() and only_dy.any()
    with pytest.raises(ValueError, match="expected gradients of products as its last, got none"):
        run([])
    with pytest.raises((ValueError, RuntimeError), match=r"gradients of products \[D, N, S, H\] with S at least 1"):
        run([none, added[0]])
    with pytest.raises(ValueError, match="expected no gradient of values"):
        torch.ops.fused_rnn.formula_backward(
            y, [], x, [], params, [], [*saved, y], layer.formula, ops.BIASES | ops.GRAD_VALUES
        )


@pytest.mark.parametrize("weights", [False, True])
def test_cells_of_tangents(weights: bool) -> None:
    """Equal cells share one; it can be pickled, and has no tangents itself."""
    one, other = (tangents.tangent_of(cells.PeepholeLstm(), weights) for _ in range(2))
    assert one is other and one.identity == pickle.loads(pickle.dumps(one)).identity
    assert one.identity != tangents.tangent_of(cells.PeepholeLstm(), not weights).identity
    assert second_order.why_not(one, "cpu", torch.float64) == "third derivatives are not compiled"
    assert repr(one).startswith("tangents of PeepholeLstm()")
