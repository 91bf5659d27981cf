"""A backward pass that has both a gradient penalty and a loss on the layer's output: the node of the layer's backward hands
its second half to the layer's own node (csrc/torch/second_order.h). What may happen in between changes no gradient."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import use_backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")


def layer_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return fused_rnn.GRU(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64).requires_grad_()


def as_of_the_reference(gradients: Callable[[], list[Tensor | None]]) -> None:
    found = gradients()
    with use_backend("reference"):
        expected = gradients()
    assert [g is None for g in found] == [g is None for g in expected]
    for actual, want in zip(found, expected, strict=True):
        if actual is not None:
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-12)


def test_a_pass_within_the_pass() -> None:
    """Another pass over the same graph runs the layer's node after this pass has."""

    def gradients(nests: bool) -> list[Tensor | None]:
        layer, x = layer_and_input()
        for _ in range(2000):  # this thread has made more nodes than the new one will: the layer's own node runs first
            torch.zeros(1, requires_grad=True).exp()
        y = layer(x)[0]

        def penalty() -> Tensor:
            (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return grad.square().sum()

        with ThreadPoolExecutor(1) as pool:
            total = pool.submit(penalty).result() + y.sum()
        other, begun = y.sum(), []

        def nested(*_: object) -> None:
            if nests and not begun:
                begun.append(True)
                torch.autograd.grad(other, x, retain_graph=True)

        y.grad_fn.register_hook(nested)
        return list(torch.autograd.grad(total, [x, *layer.parameters()]))

    for actual, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, want)
    as_of_the_reference(lambda: gradients(False))


def test_a_pass_that_fails_in_between_keeps_nothing() -> None:
    def failed() -> list[weakref.ref[Tensor]]:
        layer, x = layer_and_input()
        y = layer(x)[0]
        loss = y.square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)

        def stop(_: Tensor) -> None:
            raise ValueError("stop")

        y.register_hook(stop)
        with pytest.raises(ValueError, match="stop"):
            (grad.square().sum() + loss).backward()
        return [weakref.ref(x), weakref.ref(layer.weight_hh_l0)]

    kept = failed()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_a_hook_that_writes_into_its_gradient() -> None:
    def gradients(in_place: bool) -> list[Tensor | None]:
        layer, x = layer_and_input()
        scale = torch.randn(5, 2, 4, dtype=torch.float64).requires_grad_()
        y = layer(x)[0]
        dy = scale * 2
        dy.register_hook((lambda g: g.mul_(0)) if in_place else (lambda g: g * 0))
        (grad,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (grad.square().sum() + y.sum()).backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    as_of_the_reference(lambda: gradients(False))
    for actual, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(actual, want, rtol=0, atol=0)


@pytest.mark.parametrize("loses", ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))
@pytest.mark.parametrize("gains", (True, False))
def test_requires_grad_set_in_between(loses: str, gains: bool) -> None:
    """The graph of the layer's backward leads elsewhere than the layer's: one pass gives what two passes give."""

    def gradients(passes: int) -> list[Tensor | None]:
        layer, x = layer_and_input()
        x.requires_grad_(not gains)
        y = layer(x)[0]
        getattr(layer, loses).requires_grad_(False)
        x.requires_grad_(True)
        scale = torch.ones_like(y).requires_grad_()
        (grad,) = torch.autograd.grad(y, layer.weight_hh_l0, scale, create_graph=True)
        if passes == 1:
            (grad.square().sum() + y.sum()).backward()
        else:
            grad.square().sum().backward(retain_graph=True)
            y.sum().backward()
        return [x.grad, scale.grad, *(p.grad for p in layer.parameters())]

    found, expected = gradients(1), gradients(2)
    assert [g is None for g in found] == [g is None for g in expected]
    for actual, want in zip(found, expected, strict=True):
        if actual is not None:
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-12)
