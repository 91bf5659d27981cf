"""torch.func (grad, vmap, jvp, jacrev, jacfwd, hessian) and second derivatives of layers, in float64.

Expected is the same function of the reference, which is plain torch, or a loop over samples; of whole modules torch.nn's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from module_pairs import make_pair
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _derivatives, _kinds, _transforms, functional, reference, use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._recipe import Recipe

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
KINDS = ("RNN", "GRU", "LSTM")
T, B, INPUTS, H = 4, 3, 3, 5
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference raises."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference runs")

    for name in ("rnn", "layer", "cell", "step"):
        monkeypatch.setattr(reference, name, refuse)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(kind: str, count: int = 1, proj: int = 0) -> list[Tensor]:
    """Of ``count`` layers times directions of INPUTS == H or one."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
    shapes = [(gates * H, INPUTS), (gates * H, proj or H), (gates * H,), (gates * H,)] + [(proj, H)] * bool(proj)
    return [randn(*shape, seed=10 + i) * 0.5 for i, shape in enumerate(shapes * count)]


def call(kind: str, x: Tensor, weights: list[Tensor], hx: Any = None, **options: Any) -> list[Tensor]:
    """All results of the functional form, as a flat list."""
    function: Any = getattr(functional, kind.lower())
    results: list[Tensor] = []
    for result in function(x, weights, hx, **options):
        results += result if isinstance(result, tuple) else [result]
    return results


def loss_of(kind: str, **options: Any) -> Callable[..., Tensor]:
    def loss(weights: list[Tensor], x: Tensor, hx: Any = None) -> Tensor:
        results = call(kind, x, weights, hx, **options)
        return torch.stack([(i + 1) * y.tanh().square().sum() for i, y in enumerate(results)]).sum()

    return loss


def states_of(kind: str, groups: int = 1, batch: int = B, size: int = H) -> Any:
    h = randn(groups, batch, size, seed=3)
    return (h, randn(groups, batch, H, seed=4)) if kind == "LSTM" else h


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


# --- per-sample gradients: vmap(grad) with shared weights ---

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "both": {"bidirectional": True},
    "lengths": {"lengths": torch.tensor([4, 1])},
    "resets": {"resets": randn(T, 2, seed=5) > 0.5, "bidirectional": True},
    "all_states": {"return_all_states": True},
}


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind: str, name: str) -> None:
    """Of weights, input and states, against one backward for each sample, of two rows each."""
    options = OPTIONS[name]
    groups = 2 if options.get("bidirectional") else 1
    weights, hx = weights_of(kind, groups), states_of(kind, groups, 2)
    x = randn(B, *((2, T) if options.get("batch_first") else (T, 2)), INPUTS)
    loss = loss_of(kind, **options)
    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, 0, None))(weights, x, hx)
    for index in range(B):
        leaves = [t.clone().requires_grad_() for t in (*weights, x[index], *(hx if kind == "LSTM" else (hx,)))]
        own = leaves[: len(weights)], leaves[len(weights)], leaves[len(weights) + 1 :]
        value = loss(own[0], own[1], tuple(own[2]) if kind == "LSTM" else own[2][0])
        flat = torch.utils._pytree.tree_leaves(found)
        close([t[index] for t in flat], list(torch.autograd.grad(value, leaves)))


@pytest.mark.usefixtures("kernels_only")
def test_per_sample_gradients_of_a_projection() -> None:
    weights, x = weights_of("LSTM", proj=4), randn(B, T, 2, INPUTS)
    found = torch.func.vmap(torch.func.grad(loss_of("LSTM")), (None, 0))(weights, x)
    for index in range(B):
        close([t[index] for t in found], torch.func.grad(loss_of("LSTM"))(weights, x[index]))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("each", [False, True], ids=["one state", "of every row"])
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_of_reset_states(kind: str, each: bool) -> None:
    """Resets of every sample; a reset state that all samples share."""
    x, resets, weights = randn(B, T, 2, INPUTS), randn(B, T, 2, seed=5) > 0.3, weights_of(kind)
    state = states_of(kind, batch=2 if each else 1)

    def loss(weights: list[Tensor], state: Any, x: Tensor, resets: Tensor) -> Tensor:
        results = call(kind, x, weights, resets=resets, reset_state=state)
        return torch.stack([y.tanh().square().sum() for y in results]).sum()

    gradient = torch.func.grad(loss, (0, 1))
    found = torch.func.vmap(gradient, (None, None, 0, 0))(weights, state, x, resets)
    for index in range(B):
        alone = gradient(weights, state, x[index], resets[index])
        close(torch.utils._pytree.tree_map(lambda t, index=index: t[index], found), alone)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_under_vmap(kind: str) -> None:
    sizes, weights, x = torch.tensor([3, 2, 1]), weights_of(kind), randn(B, 6, INPUTS)
    loss = loss_of(kind, batch_sizes=sizes)
    found = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(weights, x)
    for index in range(B):
        close(
            torch.utils._pytree.tree_map(lambda t, index=index: t[index], found),
            torch.func.grad(loss, (0, 1))(weights, x[index]),
        )


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble(kind: str) -> None:
    """vmap over the weights, with one input for all."""
    each = [weights_of(kind), [w * 0.7 for w in weights_of(kind)]]
    stacked = [torch.stack(of_models) for of_models in zip(*each, strict=True)]
    x = randn(T, B, INPUTS)
    found = torch.func.vmap(torch.func.grad(loss_of(kind), (0, 1)), (0, None))(stacked, x)
    for index, weights in enumerate(each):
        alone = torch.func.grad(loss_of(kind), (0, 1))(weights, x)
        close(torch.utils._pytree.tree_map(lambda t, index=index: t[index], found), alone)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_vmap(kind: str) -> None:
    weights, x = weights_of(kind), randn(2, B, T, 1, INPUTS)
    gradient = torch.func.grad(loss_of(kind), (0, 1))
    found = torch.func.vmap(torch.func.vmap(gradient, (None, 0)), (None, 0))(weights, x)
    for i in range(2):
        for j in range(B):
            alone = gradient(weights, x[i, j])
            close(torch.utils._pytree.tree_map(lambda t, i=i, j=j: t[i, j], found), alone)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", KINDS)
def test_cells_under_vmap(kind: str) -> None:
    step: Any = getattr(functional, f"{kind.lower()}_cell")
    weights, x, h = weights_of(kind), randn(B, INPUTS), randn(B, H, seed=3)

    def loss(weights: list[Tensor], x: Tensor, h: Tensor) -> Tensor:
        found = step(x, (h, h) if kind == "LSTM" else h, *weights)
        return sum(t.square().sum() for t in (found if kind == "LSTM" else (found,)))

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, 0, 0))(weights, x, h)
    for index in range(B):
        alone = torch.func.grad(loss, (0, 1, 2))(weights, x[index], h[index])
        close(torch.utils._pytree.tree_map(lambda t, index=index: t[index], found), alone)


def test_many_samples_are_folded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = weights_of("GRU"), randn(B, T, 1, INPUTS)
    loss = loss_of("GRU", resets=torch.zeros(T, 1, dtype=torch.bool))  # calls without resets are folded in C++
    gradient = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))
    expected = gradient(weights, x)
    monkeypatch.setattr(_transforms, "_ELEMENTS", 2 * T * 4 * H)  # two samples
    close(gradient(weights, x), expected)


def test_more_samples_than_are_folded_at_once() -> None:
    """In C++: 3 samples of 32768 rows, of which the limit allows two at a time."""
    layer = fused_rnn.GRU(1, 16, dtype=torch.float64)
    weights, x = {key: value.detach() for key, value in layer.named_parameters()}, randn(3, 256, 128, 1)
    folded: list[int] = []

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].square().mean()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.fused_rnn.layer_backward_samples.default:
                folded.append(args[7][-1])
            return op(*args, **(kwargs or {}))

    with Seen():
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    assert folded == [2, 1]
    for index in range(3):
        close({key: value[index] for key, value in found.items()}, torch.func.grad(loss)(weights, x[index]))


@pytest.fixture
def rules_in_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rules that ran in Python."""
    calls: list[str] = []

    def count(name: str) -> None:
        run = getattr(_transforms, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(_transforms, name, counted)

    count("_forward")
    count("_backward")
    return calls


def test_cpp_and_python_part_backward_alike() -> None:
    """The rule in C++ leaves to the rule in Python what that makes in parts."""
    source = (Path(__file__).parents[1] / "csrc" / "torch" / "ops_vmap.cpp").read_text()
    (shift,) = re.findall(r"kMostElements = int64_t\{1\} << (\d+);", source)
    assert _transforms._ELEMENTS == 1 << int(shift)


@pytest.mark.parametrize("states", ("none", "of each sample", "of all samples"))
@pytest.mark.parametrize("dim", (None, 0, 1, 2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_rules_in_cpp_are_those_in_python(kind: str, dim: int | None, states: str, rules_in_python: list[str]) -> None:
    """Forward and backward, bit for bit, whatever is vmapped and whichever gradients are asked for."""
    if dim is None and states != "of each sample":
        pytest.skip("nothing is vmapped")
    ops, weights = torch.ops.fused_rnn, weights_of(kind)
    recipe = Recipe(_kinds.NUMBER_OF_MODE["RNN_TANH" if kind == "RNN" else kind]).packed
    x = randn(T, 2, INPUTS) if dim is None else randn(2, T, 2, INPUTS).movedim(0, dim)
    count = 0 if states == "none" else 2 if kind == "LSTM" else 1
    given = [randn(*((1, 2, 2, H) if states == "of each sample" else (1, 2, H)), seed=i) for i in range(count)]
    state_dims = [2 if states == "of each sample" else None] * count
    dims = [dim, *state_dims]

    def flat(results: Any) -> list[Tensor]:
        return torch.utils._pytree.tree_leaves(results)

    def forward(op: Any) -> tuple[Tensor, ...]:
        call = torch.func.vmap(lambda x, *h: tuple(flat(op(x, list(h), weights, [], recipe, True))), tuple(dims))
        found: tuple[Tensor, ...] = call(x, *given)
        return found

    made = forward(ops.layer)
    assert not rules_in_python
    for a, b in zip(made, forward(ops.layer_vmapped), strict=True):
        assert torch.equal(a, b)
    assert rules_in_python == ["_forward"]
    y, last, saved = made[0], made[1 : 2 + (kind == "LSTM")], made[2 + (kind == "LSTM") :]
    grads = [randn(*t.shape, seed=20 + i) for i, t in enumerate((y, *last))]
    for mask, with_last in (((True, True, True), True), ((False, False, True), False), ((True, False, False), True)):
        tensors = [grads[0], y, *saved, *(grads[1:] if with_last else [])]

        def backward(op: Any, mask: Any = mask, tensors: Any = tensors) -> tuple[Tensor, ...]:
            def of_sample(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
                h, (dy, y, *more) = list(others[:count]), others[count:]
                kept, dlast = [*more[: len(saved)], y], list(more[len(saved) :])
                return tuple(flat(op(dy, dlast, x, h, weights, [], kept, recipe, mask)))

            found: tuple[Tensor, ...] = torch.func.vmap(of_sample, (*dims, *[0] * len(tensors)))(x, *given, *tensors)
            return found

        rules_in_python.clear()
        found = backward(ops.layer_backward)
        assert not rules_in_python
        for a, b in zip(found, backward(ops.layer_backward_vmapped), strict=True):
            assert torch.equal(a, b)
        assert rules_in_python == ["_backward"]


@pytest.mark.parametrize("name", ["plain", "lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_per_sample_gradients(kind: str, name: str) -> None:
    """torch.func.grad through vmap(grad), whose derivative the reference makes."""
    options = {"lengths": torch.tensor([4, 1])} if name == "lengths" else {}
    weights, x = weights_of(kind), randn(B, T, 2, INPUTS)
    each = torch.func.vmap(torch.func.grad(loss_of(kind, **options)), (None, 0))

    def penalty(weights: list[Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in each(weights, x)]).sum()

    found = torch.func.grad(penalty)(weights)
    with use_backend("reference"):
        close(found, torch.func.grad(penalty)(weights))


# --- every transform of whole modules ---


def transformed(name: str, f: Callable[[Any, Tensor], Tensor], weights: Any, x: Tensor) -> Any:
    """f(weights, x) -> scalar under the transform."""
    tangents = torch.utils._pytree.tree_map(lambda w: torch.full_like(w, 0.1), (weights, x))
    if name == "grad":
        return torch.func.grad(f, (0, 1))(weights, x)
    if name == "vmap":
        return torch.func.vmap(f, (None, 1))(weights, x.unsqueeze(2))
    if name == "vjp":
        return torch.func.vjp(f, weights, x)[1](torch.tensor(2.0, dtype=torch.float64))
    if name == "jvp":
        return torch.func.jvp(f, (weights, x), tangents)
    if name == "jacrev":
        return torch.func.jacrev(lambda x: torch.stack([f(weights, x), f(weights, 2 * x)]))(x)
    if name == "jacfwd":
        return torch.func.jacfwd(lambda x: torch.stack([f(weights, x), f(weights, 2 * x)]))(x)
    if name == "grad of grad":
        inner = torch.func.grad(f, 1)
        return torch.func.grad(lambda w, x: inner(w, x).square().sum(), (0, 1))(weights, x)
    if name == "grad of vmap":
        return torch.func.grad(lambda w, x: torch.func.vmap(f, (None, 1))(w, x.unsqueeze(2)).square().sum(), (0, 1))(
            weights, x
        )
    if name == "jacrev of grad":
        return torch.func.jacrev(torch.func.grad(f, 1), 1)(weights, x[:2, :1])
    if name == "vmap of jvp":
        return torch.func.vmap(lambda x: torch.func.jvp(lambda x: f(weights, x), (x,), (x.square(),)), 1)(x.unsqueeze(2))
    if name == "vmap of a penalty":
        inner = torch.func.grad(f, 1)
        return torch.func.vmap(torch.func.grad(lambda w, x: inner(w, x).square().sum()), (None, 1))(weights, x.unsqueeze(2))
    if name == "hessian of weights":
        of_bias = {key: value for key, value in weights.items() if "bias_hh" in key}
        return torch.func.hessian(lambda b: f({**weights, **b}, x[:2, :1]))(of_bias)
    if name == "jvp of grad":
        return torch.func.jvp(torch.func.grad(f, (0, 1)), (weights, x), tangents)
    if name == "grad of jvp":
        return torch.func.grad(lambda w, x: torch.func.jvp(f, (w, x), tangents)[1], (0, 1))(weights, x)
    if name == "jacfwd of jacfwd":
        return torch.func.jacfwd(torch.func.jacfwd(f, 1), 1)(weights, x[:2, :1])
    assert name == "hessian"
    return torch.func.hessian(f, 1)(weights, x[:2, :1])


TRANSFORMS = (
    "grad",
    "vmap",
    "vjp",
    "jvp",
    "jacrev",
    "jacfwd",
    "grad of grad",
    "grad of vmap",
    "jacrev of grad",
    "vmap of jvp",
    "vmap of a penalty",
    "hessian",
    "hessian of weights",
    "jvp of grad",
    "grad of jvp",
    "jacfwd of jacfwd",
)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    """By functional_call, against the reference, whose operations are torch's own."""
    module = getattr(fused_rnn, kind)(INPUTS, H, 2, dtype=torch.float64)
    weights = {key: value.detach() for key, value in module.named_parameters()}
    x = randn(T, B, INPUTS)

    def f(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y, last = torch.func.functional_call(module, weights, (x,))
        return y.sin().sum() + sum(t.square().sum() for t in (last if kind == "LSTM" else (last,)))

    with use_backend("reference"):
        expected = transformed(name, f, weights, x)
    request.getfixturevalue("kernels_only")
    close(transformed(name, f, weights, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_against_torch(kind: str) -> None:
    """grad, jacrev and per-sample gradients of a module are torch.nn's gradients."""
    ours, theirs = (m.double() for m in make_pair(kind, INPUTS, H))
    weights = {key: value.detach() for key, value in ours.named_parameters()}
    x = randn(T, B, INPUTS)

    def f(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, weights, (x,))[0].sin().sum()

    each = torch.func.vmap(torch.func.grad(f), (None, 1))(weights, x.unsqueeze(2))
    for index in range(B):
        theirs.zero_grad()
        theirs(x[:, index : index + 1])[0].sin().sum().backward()
        for key, parameter in theirs.named_parameters():
            close(each[key][index], parameter.grad)
    jacobian = torch.func.jacrev(lambda x: torch.func.functional_call(ours, weights, (x,))[0][-1, 0])(x)
    expected = torch.autograd.functional.jacobian(lambda x: theirs(x)[0][-1, 0], x)
    close(jacobian, expected)


# --- second derivatives ---

SECOND: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"bidirectional": True},
    "resets": {"resets": randn(T, B, seed=5) > 0.5, "bidirectional": True},
    "lengths": {"lengths": torch.tensor([4, 0, 3]), "bidirectional": True},
    "lengths and resets": {"lengths": torch.tensor([4, 1, 3]), "resets": randn(T, B, seed=5) > 0.5},
    "packed": {"batch_sizes": torch.tensor([3, 2, 1]), "bidirectional": True},
    "unbiased": {"has_biases": False},
    "all states": {"return_all_states": True, "bidirectional": True},
    "projection": {"projection": True},
    "projection, lengths": {"projection": True, "lengths": torch.tensor([4, 1, 3]), "bidirectional": True},
    "reset state": {"resets": randn(T, B, seed=5) > 0.3, "reset_state": B},
    "one reset state": {"resets": randn(T, B, seed=5) > 0.3, "reset_state": 1, "bidirectional": True},
}


def penalty(
    kind: str, options: dict[str, Any], given: dict[str, list[Tensor]], outputs: slice = slice(None)
) -> list[Tensor]:
    """Gradients of a function of all first gradients, of a loss with weights of its own for every result.

    given: x, hx, reset_state (or none) and weights, each a list of leaves.
    """
    states = {name: tuple(own) if kind == "LSTM" else own[0] for name, own in given.items() if name in ("hx", "reset_state")}
    results = call(kind, given["x"][0], given["weights"], **states, **options)[outputs]
    leaves = [t for own in given.values() for t in own]
    value = sum((i + 1) * y.sin().sum() for i, y in enumerate(results))
    grads = torch.autograd.grad(value, leaves, create_graph=True)  # type: ignore[arg-type]
    of_grads = sum((i + 1) * g.cos().sum() for i, g in enumerate(grads))
    return list(torch.autograd.grad(of_grads + sum(y.square().sum() for y in results), leaves))  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", [slice(None), slice(1), slice(1, None)], ids=["all", "output", "last"])
@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("kind", (*KINDS, "RELU", "IDENTITY"))
def test_penalties(kind: str, name: str, outputs: slice, request: pytest.FixtureRequest) -> None:
    """By kernels alone, of every argument."""
    options = dict(SECOND[name])
    if kind in ("RELU", "IDENTITY"):
        options["nonlinearity"], kind = kind.lower(), "RNN"
    groups = 2 if options.get("bidirectional") else 1
    proj = 4 if options.pop("projection", False) else 0
    if proj and kind != "LSTM":
        pytest.skip("a projection is an LSTM's")
    weights = weights_of(kind, groups, proj)
    if not options.get("has_biases", True):
        weights = [w for w in weights if w.dim() == 2]
    x = randn(*((6,) if name == "packed" else (T, B)), INPUTS)
    lengths = options.get("lengths")
    if lengths is not None:  # padding may hold anything
        x[torch.arange(T).unsqueeze(1) >= lengths] = float("nan")
    rows = {"x": [x], "hx": states_of(kind, groups, size=proj or H), "weights": weights}
    if "reset_state" in options:
        rows["reset_state"] = states_of(kind, groups, options.pop("reset_state"))
    given = {key: [t.requires_grad_() for t in ((own,) if isinstance(own, Tensor) else own)] for key, own in rows.items()}
    with use_backend("reference"):
        expected = penalty(kind, options, given, outputs)
    request.getfixturevalue("kernels_only")
    close(penalty(kind, options, given, outputs), expected)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("late", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_beside_an_episode_that_is_not_a_number(kind: str, late: bool) -> None:
    """A reset parts two episodes of a row: NaN in one leaves the second derivatives of the other as they are."""
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    nan, own = (slice(2, T), slice(0, 2)) if late else (slice(0, 2), slice(2, T))
    weights = weights_of(kind, 1)

    def found(x: Tensor) -> Tensor:
        x.requires_grad_()
        y = call(kind, x, weights, None, resets=resets)[0]
        (first,) = torch.autograd.grad(y[own].sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[own].cos().sum(), x)
        return second[own]

    x = randn(T, B, INPUTS)
    broken = x.clone()
    broken[nan] = float("nan")
    expected = found(x)
    assert expected.abs().sum() > 0
    close([found(broken)], [expected])


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_runs_kernels(kind: str) -> None:
    """Of the input alone, as of a critic's; gradients of weights that autograd accumulates."""
    ours, theirs = (m.double() for m in make_pair(kind, INPUTS, H))
    x = randn(T, B, INPUTS).requires_grad_()
    for module in (ours, theirs):
        y = module(x)[0]
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        (y.square().sum() + (grad.norm(dim=2) - 1).square().sum()).backward()
    close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def penalties_and_loss(kind: str, of_grads: Callable[[Callable[[], Tensor]], Tensor]) -> list[Tensor]:
    """Gradients of two penalties of one call, whose first gradients do not depend on y, and a loss on y."""
    leaves = [t.requires_grad_() for t in (randn(T, B, INPUTS), *weights_of(kind))]
    y, *last = call(kind, leaves[0], leaves[1:])

    def of_penalties() -> Tensor:
        (of_y,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        of_last = torch.autograd.grad(last[-1].sum(), leaves, create_graph=True)
        return of_y.cos().sum() + torch.stack([g.sin().sum() for g in of_last]).sum()

    value = of_grads(of_penalties) + y.square().sum() + last[0].sin().sum()
    return list(torch.autograd.grad(value, leaves))


@pytest.fixture
def double_backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each derivative of a backward that the layer's own node does not make."""
    calls: list[int] = []
    run = _derivatives._double_backward

    def counted(*args: Any, **kwargs: Any) -> list[Tensor]:
        calls.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(_derivatives, "_double_backward", counted)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_makes_the_gradients_of_penalties_with_its_own(kind: str, double_backwards: list[int]) -> None:
    found = penalties_and_loss(kind, lambda of_penalties: of_penalties())
    assert not double_backwards
    with use_backend("reference"):
        close(found, penalties_and_loss(kind, lambda of_penalties: of_penalties()))


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_that_run_after_the_layer(kind: str, double_backwards: list[int]) -> None:
    """autograd orders nodes by when their thread made them: of a new thread's, the layer's own node runs first."""

    def in_a_thread(of_penalties: Callable[[], Tensor]) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(of_penalties).result()

    for _ in range(1000):  # this thread has made more nodes than the new one will
        randn(1).requires_grad_().exp()
    found = penalties_and_loss(kind, in_a_thread)
    assert len(double_backwards) == 2
    with use_backend("reference"):
        close(found, penalties_and_loss(kind, in_a_thread))


def test_a_penalty_calls_no_hook_of_an_output_without_a_gradient() -> None:
    x = randn(T, B, INPUTS).requires_grad_()
    weights = [w.requires_grad_() for w in weights_of("GRU")]
    y = call("GRU", x, weights)[0]
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    grad.square().sum().backward()
    close(seen, [torch.ones_like(y)])


@pytest.mark.parametrize("loss", [0, 1])
def test_a_penalty_after_an_edit(loss: int) -> None:
    """The output is written in place between backward and the backward of that, with and without a loss on it."""
    for kind in KINDS:
        weights = [w.requires_grad_() for w in weights_of(kind)]
        x = randn(T, B, INPUTS).requires_grad_()
        found = []
        for edited in (False, True):
            y = call(kind, x, weights)[0]
            of_y = (y * randn(*y.shape, seed=8)).sum()
            (grad,) = torch.autograd.grad((y * randn(*y.shape, seed=7)).sum(), x, create_graph=True)
            if edited:
                with torch.no_grad():
                    y.mul_(3)
            found.append(torch.autograd.grad(grad.square().sum() + loss * of_y, weights))
        close(found[0], found[1])


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_penalties_of_many_rows(kind: str, steps: int) -> None:
    """A single step, which keeps no output; tiles of several rows and threads."""
    batch, size = (3, 5) if steps == 1 else (33, 70)
    module: nn.Module = getattr(fused_rnn, kind)(INPUTS, size, bidirectional=True, dtype=torch.float64)
    x = randn(steps, batch, INPUTS).requires_grad_()

    def run(backend: str) -> list[Tensor]:
        with use_backend(backend):
            y = module(x)[0]
            leaves = [x, *module.parameters()]
            grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            loss = torch.stack([g.cos().sum() for g in grads]).sum() + y.square().sum()
            return list(torch.autograd.grad(loss, leaves))

    close(run("cpu"), run("reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivatives(kind: str) -> None:
    module: nn.Module = getattr(fused_rnn, kind)(2, 3, dtype=torch.float64)
    x = randn(2, 1, 2).requires_grad_()

    def third(backend: str) -> list[Tensor]:
        with use_backend(backend):
            value = module(x)[0].sin().sum()
            for _ in range(2):
                (grad,) = torch.autograd.grad(value, x, create_graph=True)
                value = grad.square().sum()
            return list(torch.autograd.grad(value, [x, *module.parameters()]))

    close(third("cpu"), third("reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_of_per_sample_gradients(kind: str) -> None:
    """Autograd through vmap(grad)."""
    x = randn(B, T, 1, INPUTS)

    def run(backend: str) -> list[Tensor]:
        weights = [w.requires_grad_() for w in weights_of(kind)]
        with use_backend(backend):
            each = torch.func.vmap(torch.func.grad(loss_of(kind)), (None, 0))(weights, x)
            return list(torch.autograd.grad(sum(g.square().sum() for g in each), weights))

    close(run("cpu"), run("reference"))


# --- second and third derivatives by torch.func, in part by the reference ---


def differentiated_twice(name: str, f: Callable[[Any, Tensor], Tensor], weights: Any, x: Tensor) -> Any:
    """f(weights, x) -> y under nested transforms; x: a batch, or of samples [V, ...] where the name has vmap."""
    grad, vmap, jacrev = torch.func.grad, torch.func.vmap, torch.func.jacrev

    def squares(tree: Any) -> Tensor:
        return torch.stack([t.square().sum() for t in torch.utils._pytree.tree_leaves(tree)]).sum()

    def loss(weights: Any, x: Tensor) -> Tensor:
        return f(weights, x).sin().sum()

    def penalty(weights: Any, x: Tensor) -> Tensor:
        return squares(grad(loss, (0, 1))(weights, x))

    def adapted(weights: Any, x: Tensor) -> Tensor:
        step = grad(loss)(weights, x)
        return loss({key: value - 0.1 * step[key] for key, value in weights.items()}, x)

    if name == "grad of grad":
        return grad(penalty, (0, 1))(weights, x)
    if name == "grad of grad of grad":
        return grad(lambda w, x: squares(grad(penalty, 1)(w, x)), (0, 1))(weights, x)
    if name == "grad of jacrev":
        return grad(lambda w, x: squares(jacrev(f, 1)(w, x)), (0, 1))(weights, x)
    if name == "jacrev of jacrev":
        return jacrev(jacrev(loss, 1), 1)(weights, x)
    if name == "a step of MAML":
        return grad(adapted)(weights, x)
    samples = torch.stack([x, 2 * x])
    if name == "vmap of grad of grad":
        return vmap(grad(penalty, (0, 1)), (None, 0), randomness="same")(weights, samples)
    each = vmap(grad(loss, (0, 1)), (None, 0), randomness="same")
    if name == "grad of vmap of grad":
        return grad(lambda w, x: squares(each(w, x)), (0, 1))(weights, samples)
    assert name == "jacrev of vmap of grad"
    return jacrev(lambda x: each(weights, x)[1])(samples)


TWICE = (
    "grad of grad",
    "grad of grad of grad",
    "grad of jacrev",
    "jacrev of jacrev",
    "a step of MAML",
    "vmap of grad of grad",
    "grad of vmap of grad",
    "jacrev of vmap of grad",
)


def twice(kind: str, name: str, dtype: torch.dtype, options: dict[str, float]) -> list[Tensor]:
    torch.manual_seed(0)
    module = getattr(fused_rnn, kind)(2, 3, **options).to(dtype)
    weights = {key: value.detach() for key, value in module.named_parameters()}

    def f(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(1)
        y: Tensor = torch.func.functional_call(module, weights, (x,))[0]
        return y

    return list(torch.utils._pytree.tree_leaves(differentiated_twice(name, f, weights, randn(3, 2, 2).to(dtype))))


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("option", ("none", "zoneout", "state_clip", "recurrent_dropout"))
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_by_func(kind: str, option: str, name: str) -> None:
    options = {} if option == "none" else {option: 0.3}
    with use_backend("reference"):
        expected = twice(kind, name, torch.float64, options)
    close(twice(kind, name, torch.float64, options), expected)


@pytest.mark.parametrize("name", ("grad of grad", "grad of vmap of grad"))
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_by_func_of_16_bits(kind: str, name: str) -> None:
    """As near to float64 as a handful of roundings of bfloat16 allow."""
    with use_backend("reference"):
        expected = twice(kind, name, torch.float64, {})
    for found, wanted in zip(twice(kind, name, torch.bfloat16, {}), expected, strict=True):
        assert (found.double() - wanted).norm() < 0.03 * wanted.norm()


# --- vmap: autocast, no samples, lengths of each sample ---


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_under_autocast(kind: str) -> None:
    """In autocast's dtype, as each sample alone, with its gradients; and so are steps."""
    layer, cell = getattr(fused_rnn, kind)(INPUTS, H), getattr(fused_rnn, f"{kind}Cell")(INPUTS, H)
    x = randn(2, T, B, INPUTS).float()
    weights = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].float().square().sum()

    def step(x: Tensor) -> Tensor:
        found = cell(x)
        result: Tensor = found[0] if kind == "LSTM" else found
        return result

    with torch.autocast("cpu", torch.bfloat16):
        y = torch.func.vmap(lambda x: layer(x)[0])(x)
        h = torch.func.vmap(step)(x[:, 0])
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
        for index in range(2):
            alone = layer(x[index])[0]
            assert y.dtype == alone.dtype == h.dtype == step(x[index, 0]).dtype == torch.bfloat16
            torch.testing.assert_close(y[index], alone)
            torch.testing.assert_close(h[index], step(x[index, 0]))
            of_sample = torch.func.grad(loss)(weights, x[index])
            for key, gradient in of_sample.items():
                assert each[key].dtype == gradient.dtype == torch.float32
                torch.testing.assert_close(each[key][index], gradient, rtol=2e-2, atol=2e-2)
    wide = torch.func.vmap(lambda x: layer(x)[0])(x)
    assert wide.dtype == torch.float32 and not torch.equal(y.float(), wide)
    with torch.autocast("cpu", torch.bfloat16):  # float64 stays as it is, as in torch's ops
        assert torch.func.vmap(lambda x: layer.double()(x)[0])(x.double()).dtype == torch.float64


@pytest.mark.parametrize("option", ("none", "zoneout", "state_clip", "lengths"))
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_no_samples(kind: str, option: str) -> None:
    module = getattr(fused_rnn, kind)(INPUTS, H, dtype=torch.float64, **({option: 0.3} if option[-1] in "tp" else {}))
    weights = {key: value.detach() for key, value in module.named_parameters()}
    options = {"lengths": torch.tensor([4, 1, 3])} if option == "lengths" else {}

    def outputs(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        results = torch.func.functional_call(module, weights, (x,), options)
        return list(torch.utils._pytree.tree_leaves(results))

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.stack([t.square().sum() for t in outputs(weights, x)]).sum()

    x = randn(0, T, B, INPUTS)
    found = torch.func.vmap(outputs, (None, 0), randomness="different")(weights, x)
    assert [t.shape for t in found] == [(0, T, B, H)] + [(0, 1, B, H)] * (2 if kind == "LSTM" else 1)
    of_weights, of_x = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0), randomness="different")(weights, x)
    assert of_x.shape == x.shape
    assert {key: t.shape for key, t in of_weights.items()} == {key: (0, *t.shape) for key, t in weights.items()}
    total = torch.func.grad(lambda w: torch.func.vmap(loss, (None, 0), randomness="different")(w, x).sum())(weights)
    assert {key: t.shape for key, t in total.items()} == {key: t.shape for key, t in weights.items()}
    assert not any(t.any() for t in total.values())


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_each_sample(kind: str) -> None:
    layer = getattr(fused_rnn, kind)(INPUTS, H, bidirectional=True, dtype=torch.float64)
    x, lengths = randn(2, T, B, INPUTS), torch.tensor([[4, 1, 3], [2, 4, 0]])
    weights = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        results = torch.func.functional_call(layer, weights, (x,), {"lengths": lengths})
        return torch.stack([t.sin().sum() for t in torch.utils._pytree.tree_leaves(results)]).sum()

    gradient = torch.func.grad(loss, (0, 1))
    for dim in (0, 1):  # of lengths; inside of grad they are wrapped twice
        given = lengths.movedim(0, dim)
        y = torch.func.vmap(lambda x, lengths: layer(x, lengths=lengths)[0], (0, dim))(x, given)
        found = torch.func.vmap(gradient, (None, 0, dim))(weights, x, given)
        for index in range(2):
            close(y[index], layer(x[index], lengths=lengths[index])[0])
            alone = gradient(weights, x[index], lengths[index])
            close(torch.utils._pytree.tree_map(lambda t, index=index: t[index], found), alone)
    same = torch.func.vmap(lambda lengths: layer(x[0], lengths=lengths)[0])(lengths)
    close(same[1], layer(x[0], lengths=lengths[1])[0])
    for wrong in (-1, T + 1):
        with pytest.raises(
            ValueError, match=rf"lengths: expected values from 0 to {T}, got \[\[4, 1, 3\], \[2, {wrong}, 0\]\]"
        ):
            torch.func.vmap(lambda x, n: layer(x, lengths=n)[0])(x, torch.tensor([[4, 1, 3], [2, wrong, 0]]))
