"""What test_torch_host.py runs of second derivatives and tangents: by the ops for CUDA, against the reference in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import EXTENSION, in_process_of_its_own, recurrent_switch, tf32_products
from settings import Setting
from settings import setting as setting
from test_second_derivatives import hessian_vector_products, near, penalty
from test_tangents import GATES, LENGTHS, OPTIONS, B, Layer, T, kernels_only, scalar
from torch import Tensor

import fused_rnn
from fused_rnn import use_backend

__all__ = ["kernels_only", "recurrent_switch"]  # fixtures
CELLS = [*GATES]


def scans() -> tuple[int, int]:
    """Scans of tangents and of dual numbers on the device so far."""
    counts = (ctypes.c_int * 2)()
    ctypes.CDLL(EXTENSION.__file__).torch_host_second_order_calls(counts)
    return counts[0], counts[1]


def with_padding(layer: Layer, *more: dict[str, list[Tensor]]) -> None:
    """NaN where rows take no part."""
    if "lengths" in layer.options:
        for t in [t for of in (layer.tensors, *more) for t in of.get("x", [])]:
            t[torch.arange(T).unsqueeze(1) >= LENGTHS] = math.nan


@pytest.mark.parametrize("of", ["", "x", "hx", "weights", "reset_state"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_jvp(kind: str, name: str, of: str, kernels_only: Callable[[], None]) -> None:
    layer = Layer(kind, name)
    if of and of not in layer.tensors:
        pytest.skip("the call has no such argument")
    directions = layer.directions(of)
    with_padding(layer, directions)
    with use_backend("reference"):
        expected = layer.jvp(directions)
    kernels_only()
    before = scans()
    near(layer.jvp(directions), expected)
    assert scans()[0] > before[0]


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_gradient_penalty(kind: str, name: str, with_loss: bool, kernels_only: Callable[[], None]) -> None:
    """Beside a loss the layer's own node makes the second half (csrc/torch/second_order.h): one scan backward for both."""
    layer = Layer(kind, name)
    leaves = torch.utils._pytree.tree_leaves(layer.tensors)
    run = penalty(layer, with_loss)
    with use_backend("reference"):
        expected = run(leaves)
    kernels_only()
    before = scans()
    near(run(leaves), expected)
    made = [after - then for after, then in zip(scans(), before, strict=True)]
    assert made == [layer.options.get("num_layers", 1)] * 2


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_hessian_vector_product(kind: str, name: str, kernels_only: Callable[[], None]) -> None:
    """Forward over reverse, and reverse over reverse, by all tensors."""
    layer = Layer(kind, name)
    v = layer.directions()
    with use_backend("reference"):
        expected = hessian_vector_products(layer, v)
    kernels_only()
    before = scans()
    near(hessian_vector_products(layer, v), expected)
    assert scans()[1] > before[1]


@pytest.mark.parametrize("name", ["plain", "lengths", "packed", "projection", "reset state", "all states"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_many_directions(kind: str, name: str, kernels_only: Callable[[], None]) -> None:
    """jacfwd by weights: tangents of each sample are of its own; the Hessian by the states or the input."""
    layer = Layer(kind, name)
    bias = next(i for i, t in enumerate(layer.tensors["weights"]) if t.dim() == 1)

    def of_bias(t: Tensor) -> tuple[Tensor, ...]:
        return layer({"weights": [*layer.tensors["weights"][:bias], t, *layer.tensors["weights"][bias + 1 :]]})

    of = "x" if "hx" in layer.options else "hx"

    def every() -> Any:
        by_bias = torch.func.jacfwd(of_bias)(layer.tensors["weights"][bias])
        return by_bias, torch.func.hessian(scalar(layer))({of: layer.tensors[of]})

    with use_backend("reference"):
        expected = every()
    kernels_only()
    near(every(), expected)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_cells_and_steps(kind: str, kernels_only: Callable[[], None]) -> None:
    """One step is by family step too."""
    cell = getattr(fused_rnn, f"{kind}Cell")(3, 5, dtype=torch.float64)
    weights = {key: p.detach() for key, p in cell.named_parameters()}
    x = torch.randn(B, 3, dtype=torch.float64)

    def call(w: Any, x: Tensor) -> Any:
        return torch.func.functional_call(cell, w, (x,))

    def run() -> Any:
        tangents = torch.func.jvp(call, (weights, x), ({key: w.sin() for key, w in weights.items()}, x.cos()))
        inputs = [x.clone().requires_grad_(), *cell.parameters()]
        h = torch.utils._pytree.tree_leaves(cell(inputs[0]))[0]
        first = torch.autograd.grad(h.sin().sum(), inputs, create_graph=True, allow_unused=True)
        total = torch.stack([g.square().sum() for g in first if g is not None]).sum()
        return tangents, torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)

    with use_backend("reference"):
        expected = run()
    kernels_only()
    near(run(), expected)


@pytest.mark.parametrize("family", ["grid", "cluster", "cheapest"])
def test_of_a_forward_by_another_family(family: str, setting: Setting, kernels_only: Callable[[], None]) -> None:
    """Whoever makes the layer, family step makes its second derivatives."""
    layer = Layer("GRU", "resets", torch.float32)
    leaves = torch.utils._pytree.tree_leaves(layer.tensors)
    with use_backend("reference"):
        expected = penalty(layer, True)([t.double() for t in leaves])
    setting("FUSED_RNN_PLAN", family)
    kernels_only()
    near(penalty(layer, True)(leaves), expected, 1e-4)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_tf32_follows_the_recurrent_switch(kind: str, recurrent_switch: Callable[[str], None]) -> None:
    layer = Layer(kind, "both", torch.float32)
    leaves, v = torch.utils._pytree.tree_leaves(layer.tensors), layer.directions()

    def run(dtype: torch.dtype) -> Any:
        return penalty(layer, False)([t.to(dtype) for t in leaves]), layer.jvp(v, dtype)

    with use_backend("reference"):
        expected = run(torch.float64)
    for precision, tolerance in (("tf32", 0.05), ("ieee", 1e-4)):
        recurrent_switch(precision)
        before = tf32_products()
        with use_backend("cpu"):
            found = run(torch.float32)
        near(found, expected, tolerance)
        assert (tf32_products() > before) == (precision == "tf32")


def test_a_written_output_is_made_again() -> None:
    layer = Layer("GRU", "plain")
    leaves = [t.requires_grad_() for t in torch.utils._pytree.tree_leaves(layer.tensors)]
    spec = torch.utils._pytree.tree_structure(layer.tensors)

    def run(write: bool) -> Any:
        y, h = layer(torch.utils._pytree.tree_unflatten(leaves, spec))
        first = torch.autograd.grad((y * y.detach().cos()).sum() + h.sum(), leaves, create_graph=True)
        if write:
            with torch.no_grad():
                y.mul_(2)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first[1:]]).sum(), leaves[1:])

    near(run(True), run(False))


def test_refused_launches() -> None:
    """There is no other family: the reference serves, from then on too."""
    in_process_of_its_own("""
x = torch.randn(6, 3, 4, requires_grad=True)
lstm = fused_rnn.LSTM(4, 5)  # of one layer: nothing needs a layer's own backward below
grads = [torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)[0] for _ in range(3)]
(expected,) = torch.autograd.grad(grads[0].square().sum(), x)
library.torch_host_device(1 << 1, False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for grad in grads[1:]:
        torch.testing.assert_close(torch.autograd.grad(grad.square().sum(), x)[0], expected)
assert sum("kernel family step does not serve on device" in str(one.message) for one in caught) == 1
""")
