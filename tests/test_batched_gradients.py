"""Gradients of many directions at once: jacobian and hessian with vectorize=True, autograd.grad(is_grads_batched=True)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from module_pairs import CLASSES, device_of, flatten, make_pair
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fused_rnn import _kinds, use_backend
from fused_rnn._recipe import Recipe


def first_output(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: flatten(module(x))[0]


def pair_and_input(kind: str, backend: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    modules = [m.to(device_of(backend), dtype) for m in make_pair(kind, 3, 4)]
    shape = (2, 3) if kind.endswith("Cell") else (4, 2, 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return modules[0], modules[1], x.to(device_of(backend), dtype)


@pytest.mark.parametrize("kind", CLASSES)
def test_jacobian_and_hessian(kind: str, backend: str) -> None:
    ours, theirs, x = pair_and_input(kind, backend)
    with use_backend(backend):
        found = torch.autograd.functional.jacobian(first_output(ours), x, vectorize=True)
        second = torch.autograd.functional.hessian(lambda t: first_output(ours)(t).square().sum(), x, vectorize=True)
    expected = torch.autograd.functional.jacobian(first_output(theirs), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    expected = torch.autograd.functional.hessian(lambda t: first_output(theirs)(t).square().sum(), x)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_batched_gradients_equal_single_ones(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Of every parameter and of the input; with batched gradients of the output, the final states, or both."""
    module, _, x = pair_and_input(kind, backend, dtype)
    x.requires_grad_()
    inputs = [x, *module.parameters()]
    with use_backend(backend):
        outputs = flatten(module(x))
        for chosen in (outputs, outputs[:1], outputs[-1:]):
            grads = [torch.randn(3, *y.shape, dtype=torch.float64).to(y) for y in chosen]
            kwargs = {"retain_graph": True, "allow_unused": True}
            found = torch.autograd.grad(chosen, inputs, grads, is_grads_batched=True, **kwargs)
            for i in range(3):
                single = torch.autograd.grad(chosen, inputs, [g[i] for g in grads], **kwargs)
                for batched, expected in zip(found, single, strict=True):
                    if dtype == torch.bfloat16 and backend == "reference":
                        torch.testing.assert_close(
                            batched[i], expected, rtol=0.05, atol=0.05
                        )  # torch's products of another shape
                    else:
                        torch.testing.assert_close(batched[i], expected, rtol=0, atol=0 if backend != "reference" else 1e-12)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_batched_gradients_of_packed_input(kind: str, device: str) -> None:
    module, _, _ = pair_and_input(kind, device)
    x = torch.randn(4, 3, 3, dtype=torch.float64, device=device)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))

    def forward(data: Tensor) -> Tensor:
        return module(PackedSequence(data, packed.batch_sizes))[0].data

    found = torch.autograd.functional.jacobian(forward, packed.data, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(forward, packed.data), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", CLASSES)
def test_batched_gradients_after_an_edit(kind: str, device: str) -> None:
    module, _, x = pair_and_input(kind, device)
    parameters = list(module.parameters())
    expected = first_output(module)(x) * 2
    y = first_output(module)(x).mul_(2)
    grads = torch.randn(3, *y.shape, dtype=torch.float64, device=device)
    found = torch.autograd.grad(y, parameters, grads, is_grads_batched=True)
    for a, b in zip(found, torch.autograd.grad(expected, parameters, grads, is_grads_batched=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_vmap_over_the_op_itself(device: str) -> None:
    """torch.func.vmap folds the samples into one batch of backward."""
    module, _, x = pair_and_input("GRU", device)
    weights = [p.detach() for p in module.parameters()]
    recipe = Recipe(_kinds.GRU).packed
    y, _, saved = torch.ops.fused_rnn.layer(x, [], weights, [], recipe, True)

    def backward(dy: Tensor) -> tuple[Tensor, list[Tensor]]:
        dx, _, dparams = torch.ops.fused_rnn.layer_backward(
            dy, [], x, [], weights, [], [*saved, y], recipe, [True, False, True]
        )
        return dx, list(dparams)

    grads = torch.randn(3, *y.shape, dtype=torch.float64, device=device)
    dx, dw = torch.func.vmap(backward)(grads)
    for i in range(3):
        one_dx, one_dw = backward(grads[i])
        torch.testing.assert_close([dx[i], *(a[i] for a in dw)], [one_dx, *one_dw], rtol=0, atol=1e-13)
