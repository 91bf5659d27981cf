"""Forward-mode AD of layers on a CPU: jvp, jacfwd, hessian and dual tensors, by the kernels alone.

Expected is the same function of the reference, which is plain torch, in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import GRADIENT_TOLERANCE
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import _backend, _kinds, _tangents, _transforms, functional, reference, use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._recipe import Recipe, Rows

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
T, B, INPUTS, H = 4, 3, 3, 5
GATES = {"RNN": 1, "RELU": 1, "IDENTITY": 1, "GRU": 3, "LSTM": 4}
LENGTHS = torch.tensor([4, 0, 3])

# Beside functional's arguments: `projection`, and `reset_state`: its rows, or (steps, rows).
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "both": {"bidirectional": True},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "unbiased": {"has_biases": False},
    "no states": {"hx": None},
    "lengths": {"lengths": LENGTHS, "bidirectional": True},
    "packed": {"batch_sizes": torch.tensor([3, 2, 1]), "bidirectional": True},
    "packed, resets": {"batch_sizes": torch.tensor([3, 2, 1]), "resets": torch.tensor([0, 0, 0, 1, 0, 1]).bool()},
    "resets": {"resets": torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]).bool(), "bidirectional": True},
    "projection": {"projection": True, "num_layers": 2},
    "projection, lengths": {"projection": True, "lengths": LENGTHS, "bidirectional": True},
    "all states": {"return_all_states": True, "bidirectional": True, "num_layers": 2},
    "all states, lengths": {"return_all_states": True, "lengths": LENGTHS},
}
for _name, _rows in (("reset state", B), ("one reset state", 1), ("reset state of steps", (T, B))):
    OPTIONS[_name] = {**OPTIONS["resets"], "reset_state": _rows}
OPTIONS["reset state, all"] = {**OPTIONS["reset state"], "return_all_states": True, "lengths": LENGTHS}


class Layer:
    """A call, and the tensors that it may be differentiated by."""

    def __init__(self, kind: str, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.options = dict(OPTIONS[name])
        proj = 2 if self.options.pop("projection", False) else 0
        if proj and kind != "LSTM":
            pytest.skip("a projection is an LSTM's")
        self.generator, self.dtype = torch.Generator().manual_seed(1), dtype
        layers, directions = self.options.get("num_layers", 1), 2 if self.options.get("bidirectional") else 1
        batch_first, out = self.options.get("batch_first", False), proj or H
        self.function = getattr(functional, kind.lower() if kind in ("GRU", "LSTM") else "rnn")
        if kind in ("RELU", "IDENTITY"):
            self.options["nonlinearity"] = kind.lower()
        self.pairs = kind == "LSTM"
        shape = (6,) if "batch_sizes" in self.options else (B, T) if batch_first else (T, B)
        self.tensors = {"x": [self.randn(*shape, INPUTS)]}
        if "hx" not in self.options:
            self.tensors["hx"] = self.states(layers * directions, B, out)
        if "reset_state" in self.options:
            rows = self.options.pop("reset_state")
            steps = rows[:1] if isinstance(rows, tuple) else ()
            self.tensors["reset_state"] = self.states(*steps, layers * directions, B if steps else rows, out)
        self.tensors["weights"] = []
        for group in range(layers * directions):
            inputs = INPUTS if group < directions else out * directions
            sizes = [(GATES[kind] * H, inputs), (GATES[kind] * H, out)]
            sizes += [(GATES[kind] * H,)] * 2 * self.options.get("has_biases", True) + [(proj, H)] * bool(proj)
            self.tensors["weights"] += [self.randn(*size) * 0.5 for size in sizes]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def states(self, *shape: int) -> list[Tensor]:
        return [self.randn(*shape), self.randn(*shape[:-1], H)][: 1 + self.pairs]

    def to(self, dtype: torch.dtype, tensors: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        return {key: [t.to(dtype) for t in own] for key, own in tensors.items()}

    def directions(self, of: str = "") -> dict[str, list[Tensor]]:
        """Tangents of all tensors, or of those of one name."""
        return {key: [self.randn(*t.shape) for t in own] for key, own in self.tensors.items() if of in ("", key)}

    def __call__(self, tensors: dict[str, list[Tensor]]) -> tuple[Tensor, ...]:
        """All results. tensors: those that differ from the call's."""
        given = {**self.to(next(iter(tensors.values()))[0].dtype, self.tensors), **tensors}
        states = {key: tuple(given[key]) if self.pairs else given[key][0] for key in ("hx", "reset_state") if key in given}
        results = self.function(given["x"][0], given["weights"], **{**self.options, **states})
        return tuple(torch.utils._pytree.tree_leaves(results))

    def jvp(self, directions: dict[str, list[Tensor]], dtype: torch.dtype | None = None) -> Any:
        primals = {key: self.tensors[key] for key in directions}
        if dtype:
            primals, directions = self.to(dtype, primals), self.to(dtype, directions)
        return torch.func.jvp(self, (primals,), (directions,))


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it makes the reference, the scan of torch's ops and warnings raise."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("no kernel runs")

    def start() -> None:
        for name in ("rnn", "layer", "cell", "step"):
            monkeypatch.setattr(reference, name, refuse)
        monkeypatch.setattr(_tangents, "tangents", refuse)
        monkeypatch.setattr(_backend, "_warned", set())
        warnings.filterwarnings("error", category=RuntimeWarning)

    with warnings.catch_warnings():
        yield start


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    """Each within the gradients' tolerance of its largest number."""
    flat, of_reference = (torch.utils._pytree.tree_leaves(results) for results in (found, expected))
    for a, b in zip(flat, of_reference, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=GRADIENT_TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("of", ["", "x", "hx", "weights", "reset_state"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", GATES)
def test_jvp(kind: str, name: str, of: str, kernels_only: Callable[[], None]) -> None:
    """By all arguments, or by some alone; padding may hold anything."""
    layer = Layer(kind, name)
    if of and of not in layer.tensors:
        pytest.skip("the call has no such argument")
    directions = layer.directions(of)
    if "lengths" in layer.options:
        for t in layer.tensors["x"] + directions.get("x", []):
            t[torch.arange(T).unsqueeze(1) >= LENGTHS] = float("nan")
    with use_backend("reference"):
        expected = layer.jvp(directions)
    kernels_only()
    close(layer.jvp(directions), expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", GATES)
def test_float32(kind: str, name: str, kernels_only: Callable[[], None]) -> None:
    layer = Layer(kind, name, torch.float32)
    directions = layer.directions()
    with use_backend("reference"):
        expected = layer.jvp(directions, torch.float64)
    kernels_only()
    found = layer.jvp(directions)
    assert {t.dtype for t in torch.utils._pytree.tree_leaves(found)} == {torch.float32}
    close(found, expected, torch.float32)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_gradcheck(kind: str, name: str, kernels_only: Callable[[], None]) -> None:
    """Dual tensors, of which some require a gradient, and under torch's first vmap (check_batched_forward_grad)."""
    layer = Layer(kind, name)
    leaves, spec = torch.utils._pytree.tree_flatten(layer.tensors)
    leaves = [t.requires_grad_() for t in leaves]
    kernels_only()
    assert torch.autograd.gradcheck(
        lambda *leaves: layer(torch.utils._pytree.tree_unflatten(leaves, spec)),
        leaves,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


def scalar(layer: Layer) -> Callable[[dict[str, list[Tensor]]], Tensor]:
    def of(tensors: dict[str, list[Tensor]]) -> Tensor:
        return torch.stack([(i + 1) * y.sin().sum() for i, y in enumerate(layer(tensors))]).sum()

    return of


@pytest.mark.parametrize("of", ["x", "hx", "weights", "reset_state"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_jacfwd(kind: str, name: str, of: str, kernels_only: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """All directions are rows of few calls; by one bias of each direction and layer where they are weights."""
    layer = Layer(kind, name)
    if of not in layer.tensors:
        pytest.skip("the call has no such argument")
    own = layer.tensors[of]
    places = [i for i, t in enumerate(own) if of != "weights" or t.dim() == 1 or i % 2][:3]

    def f(chosen: list[Tensor]) -> tuple[Tensor, ...]:
        tensors = list(own)
        for place, t in zip(places, chosen, strict=True):
            tensors[place] = t
        return layer({of: tensors})

    chosen = [own[place] for place in places]
    with use_backend("reference"):
        expected = torch.func.jacfwd(f)(chosen)
    kernels_only()
    close(torch.func.jacfwd(f)(chosen), expected)
    monkeypatch.setattr(_transforms, "_DIRECTIONS", 2000)
    close(torch.func.jacfwd(f)(chosen), expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_reverse_over_forward(kind: str, name: str) -> None:
    """Gradients of tangents, by the tensors and by their tangents, and gradients of these."""
    layer = Layer(kind, name)
    v = layer.directions()

    def of_tangents(tensors: Any, v: Any) -> Tensor:
        return torch.stack([t.sin().sum() for t in torch.func.jvp(layer, (tensors,), (v,))[1]]).sum()

    def all_of(tensors: Any, v: Any) -> Any:
        first = torch.func.grad(of_tangents, (0, 1))(tensors, v)
        value = torch.stack([g.square().sum() for g in torch.utils._pytree.tree_leaves(first)]).sum()
        return value, first

    found = all_of(layer.tensors, v)
    second = torch.func.grad(lambda v: all_of(layer.tensors, v)[0])(v)
    with use_backend("reference"):
        close(found, all_of(layer.tensors, v))
        close(second, torch.func.grad(lambda v: all_of(layer.tensors, v)[0])(v))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_hessian(kind: str, name: str, kernels_only: Callable[[], None]) -> None:
    """Forward over reverse, and reverse over forward, by the states or the input."""
    layer = Layer(kind, name)
    of = "x" if "hx" in layer.options else "hx"
    f, given = scalar(layer), {of: layer.tensors[of]}
    with use_backend("reference"):
        expected = torch.func.hessian(f)(given)
    close(torch.func.jacrev(torch.func.jacfwd(f))(given), expected)
    kernels_only()
    close(torch.func.hessian(f)(given), expected)


@pytest.mark.filterwarnings("ignore:fused_rnn runs on its slow Python reference")
@pytest.mark.parametrize("name", ["plain", "both", "lengths", "projection", "all states"])
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_forward_over_forward(kind: str, name: str) -> None:
    layer = Layer(kind, name)
    v, w = layer.directions(), layer.directions()

    def twice(tensors: Any) -> Any:
        return torch.func.jvp(lambda t: torch.func.jvp(layer, (t,), (v,)), (tensors,), (w,))

    found = twice(layer.tensors)
    with use_backend("reference"):
        close(found, twice(layer.tensors))


@pytest.mark.parametrize("name", ["plain", "lengths", "packed", "projection", "reset state", "all states"])
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_vmap_of_jvp_by_weights(kind: str, name: str) -> None:
    """Tangents of the weights in many directions, and their gradients; with an input of each sample, and vmapped twice."""
    layer = Layer(kind, name)
    v = [torch.stack([w, 0.5 * w, -w, w.cos()]).unflatten(0, (2, 2)) for w in layer.tensors["weights"]]
    (x,) = layer.tensors["x"]

    def tangents(weights: Any, v: Any, x: Tensor) -> Any:
        return torch.func.jvp(lambda w: layer({"weights": w, "x": [x]}), (weights,), (v,))[1]

    def every(weights: Any) -> Any:
        once = torch.func.vmap(tangents, (None, 0, 0))(weights, [t[0] for t in v], torch.stack([x, x.sin()]))
        each = torch.func.vmap(torch.func.vmap(tangents, (None, 0, None)), (None, 0, None))(weights, v, x)
        inner = torch.func.vmap(torch.func.vmap(tangents, (None, None, 0)), (None, 0, None))(
            weights, [t[0] for t in v], torch.stack([x, x.sin()])
        )
        outer = torch.func.vmap(torch.func.vmap(tangents, (None, 0, None)), (None, None, 0))(
            weights, [t[0] for t in v], torch.stack([x, x.sin()])
        )
        return once, each, inner, outer

    def loss(weights: Any) -> Tensor:
        return torch.stack([t.sin().sum() for t in torch.utils._pytree.tree_leaves(every(weights))]).sum()

    found, gradients = every(layer.tensors["weights"]), torch.func.grad(loss)(layer.tensors["weights"])
    with use_backend("reference"):
        close(found, every(layer.tensors["weights"]))
        close(gradients, torch.func.grad(loss)(layer.tensors["weights"]))


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_an_ensemble(kind: str) -> None:
    """vmap over the weights themselves."""
    layer = Layer(kind, "lengths")
    weights = [torch.stack([w, -w]) for w in layer.tensors["weights"]]

    def every() -> Any:
        return torch.func.vmap(lambda w: torch.func.jvp(lambda w: layer({"weights": w}), (w,), (w,)))(weights)

    found = every()
    with use_backend("reference"):
        close(found, every())


@pytest.mark.parametrize("size", [1, 7, 33, 129])
@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_odd_sizes_and_threads(kind: str, size: int, kernels_only: Callable[[], None]) -> None:
    module = getattr(fused_rnn, kind)(size, size, 2, bidirectional=True, dtype=torch.float64)
    weights = {key: p.detach() for key, p in module.named_parameters()}
    x = torch.randn(3, 5, size, dtype=torch.float64)

    def run() -> Any:
        def call(w: Any, x: Tensor) -> Any:
            return torch.func.functional_call(module, w, (x,))

        return torch.func.jvp(call, (weights, x), ({key: w.sin() for key, w in weights.items()}, x.cos()))

    with use_backend("reference"):
        expected = run()
    kernels_only()
    close(run(), expected)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_cells(kind: str, kernels_only: Callable[[], None]) -> None:
    cell = getattr(fused_rnn, f"{kind}Cell")(INPUTS, H, dtype=torch.float64)
    weights = {key: p.detach() for key, p in cell.named_parameters()}
    x = torch.randn(B, INPUTS, dtype=torch.float64)

    def run() -> Any:
        def call(w: Any, x: Tensor) -> Any:
            return torch.func.functional_call(cell, w, (x,))

        return torch.func.jvp(call, (weights, x), ({key: w.sin() for key, w in weights.items()}, x.cos()))

    with use_backend("reference"):
        expected = run()
    kernels_only()
    close(run(), expected)


def test_an_output_that_was_written_in_place() -> None:
    """Its tangent's derivative needs what it was."""
    layer = Layer("GRU", "plain")
    weights = [w.requires_grad_() for w in layer.tensors["weights"]]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(layer.tensors["x"][0], torch.ones_like(layer.tensors["x"][0]))
        y, tangent = forward_ad.unpack_dual(layer({"x": [x], "weights": weights})[0])
        assert tangent is not None
        with torch.no_grad():
            y.mul_(2)
        with pytest.raises(RuntimeError, match="written in place"):
            torch.autograd.grad(tangent.sum(), weights)


def test_floating_point_operations() -> None:
    """The scan has a forward's products, and those of each weight's tangent."""
    args = op_arguments("GRU")
    rows, weights = T * B, [w for w in args[3] if w.dim() == 2]
    forward = 2 * rows * sum(w.numel() for w in weights)
    none = torch.empty(0, dtype=torch.float64)
    for tangents, expected in (
        (args[0], 2 * forward),
        ([args[0][0], *[none] * (len(args[0]) - 1)], forward),
        ([none, args[0][1], *[none] * (len(args[0]) - 2)], 2 * rows * sum(w.numel() for w in weights[1::2])),
    ):
        with FlopCounterMode(display=False) as counter:
            torch.ops.fused_rnn.layer_jvp(tangents, *args[1:])
        assert counter.get_total_flops() == expected


def op_arguments(kind: str = "LSTM") -> list[Any]:
    layer = Layer(kind, "lengths")
    (x,), h, weights = layer.tensors["x"], layer.tensors["hx"], layer.tensors["weights"]
    rows = Rows(LENGTHS)
    recipe = Recipe(_kinds.NUMBER_OF_MODE[kind], bidirectional=True).packed | rows.bits
    y, _, saved = torch.ops.fused_rnn.layer(x, h, weights, rows.given(), recipe, True)
    tangents = [torch.ones_like(t) for t in (x, *h, *weights)]
    return [tangents, x, h, weights, rows.given(), [*saved, y], [recipe, 0]]


@pytest.mark.parametrize("kind", ("GRU", "LSTM"))
def test_opcheck(kind: str) -> None:
    args = op_arguments(kind)
    args[0] = [t.requires_grad_() for t in args[0]]
    torch.library.opcheck(torch.ops.fused_rnn.layer_jvp.default, args)


def test_what_the_op_refuses() -> None:
    op, good = torch.ops.fused_rnn.layer_jvp, op_arguments()

    def refused(place: int, value: Any, match: str) -> None:
        with pytest.raises((ValueError, RuntimeError), match=match):
            op(*good[:place], value, *good[place + 1 :])

    tangents, saved, (recipe, _) = good[0], good[5], good[6]
    refused(0, tangents[:-1], "grads: expected one for each")
    refused(0, [tangents[0][:-1], *tangents[1:]], "tangents: expected")
    refused(0, [*tangents[:-1], tangents[-1].float()], "tangents: expected")
    refused(5, [saved[0][:, :-1], *saved[1:]], "gates: expected")
    refused(5, [*saved[:-1], saved[-1][:-1]], "y: expected")
    refused(6, [recipe], "call: expected")
    refused(6, [recipe, 2], "call: expected samples that divide")
    refused(6, [recipe, -1], "call: expected samples that divide")
    refused(6, [recipe, 3], "tangents: expected")


# --- autocast ---


def autocast_layer(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return getattr(fused_rnn, kind)(INPUTS, H, num_layers=2, bidirectional=True, dtype=dtype)


def of_a_loop(kind: str, layer: Any, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and its tangent by x, by a loop of torch's ops in float64."""
    params = [p.detach().double() for p in layer.parameters()]
    number = _kinds.NUMBER_OF_MODE[kind if kind != "RNN" else "RNN_TANH"]
    recipe = Recipe(number, num_layers=2, bidirectional=True)
    made: tuple[Tensor, Tensor] = torch.func.jvp(
        lambda x: reference.rnn(x, [], params, Rows(), recipe)[0], (x.double(),), (v.double(),)
    )
    return made


@pytest.mark.filterwarnings("ignore:fused_rnn runs on its slow Python reference")
@pytest.mark.parametrize("way", ["jvp", "dual", "jacfwd"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_autocast(kind: str, way: str) -> None:
    """In autocast's dtype, as torch's own ops: by the reference, since no kernel has tangents of 16 bits."""
    layer = autocast_layer(kind)
    x, v = torch.randn(2, T, B, INPUTS, generator=torch.Generator().manual_seed(3)).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        if way == "jvp":
            y, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))
        elif way == "jacfwd":
            y = layer(x)[0]
            tangent = torch.tensordot(torch.func.jacfwd(lambda x: layer(x)[0])(x).float(), v, 3).to(y.dtype)
        else:
            with forward_ad.dual_level():
                y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))[0])
    assert y.dtype is tangent.dtype is torch.bfloat16
    for found, expected in zip((y, tangent), of_a_loop(kind, layer, x, v), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_autocast_leaves_float64(kind: str) -> None:
    """Which the kernels serve: a forced backend would raise otherwise."""
    layer = autocast_layer(kind, torch.float64)
    x, v = torch.randn(2, T, B, INPUTS, dtype=torch.float64).unbind()
    with torch.autocast("cpu", torch.bfloat16), use_backend("cpu"):
        found = torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))
    for ours, expected in zip(found, of_a_loop(kind, layer, x, v), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:fused_rnn runs on its slow Python reference")
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_autocast_of_cells(kind: str) -> None:
    cell = getattr(fused_rnn, kind)(INPUTS, H)
    exact = copy.deepcopy(cell).double()

    def output(cell: Any, x: Tensor) -> Tensor:
        after = cell(x)
        return after if isinstance(after, Tensor) else after[0]

    x, v = torch.randn(2, B, INPUTS).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.jvp(lambda x: output(cell, x), (x,), (v,))
    with use_backend("reference"):
        wanted = torch.func.jvp(lambda x: output(exact, x), (x.double(),), (v.double(),))
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def test_autocast_where_a_backend_is_forced() -> None:
    layer, x = autocast_layer("LSTM"), torch.randn(T, B, INPUTS)
    with torch.autocast("cpu", torch.bfloat16), use_backend("cpu"):
        with pytest.raises(
            RuntimeError, match="'cpu' is forced but forward-mode AD under autocast: no kernel has tangents of 16 bits"
        ):
            torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
