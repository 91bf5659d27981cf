"""Gradient penalties, Hessian-vector products and jvp by the kernels of every device, against the reference in float64.

test_transforms.py and test_tangents.py have more of a CPU; tests/simt/torch_host has the same on the simulated GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tangents import OPTIONS, Layer, kernels_only, scalar
from torch import Tensor

from fused_rnn import use_backend

__all__ = ["kernels_only"]  # a fixture
KINDS = ("RNN", "RELU", "IDENTITY", "GRU", "LSTM")


def near(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Each within that share of its largest number."""
    flat, wanted = (torch.utils._pytree.tree_leaves(results) for results in (found, expected))
    for a, b in zip(flat, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double().cpu(), b.double().cpu(), rtol=0, atol=tolerance * scale)


def penalty(layer: Layer, with_loss: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradients of all tensors of a gradient penalty, or of one beside a loss."""
    spec = torch.utils._pytree.tree_structure(layer.tensors)

    def of(leaves: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        loss = scalar(layer)(torch.utils._pytree.tree_unflatten(leaves, spec))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = torch.stack([(i + 1) * g.square().sum() for i, g in enumerate(first)]).sum()
        return list(torch.autograd.grad(total + loss if with_loss else total, leaves))

    return of


def hessian_vector_products(layer: Layer, v: dict[str, list[Tensor]]) -> Any:
    """Forward over reverse, and reverse over reverse, by all tensors."""
    f = scalar(layer)
    forward = torch.func.jvp(torch.func.grad(f), (layer.tensors,), (v,))
    return forward, torch.func.vjp(torch.func.grad(f), layer.tensors)[1](v)[0]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str, name: str, device: str, kernels_only: Callable[[], None]) -> None:
    layer = Layer(kind, name)
    v = layer.directions()

    def every(on: str) -> list[Any]:
        layer.tensors = {key: [t.to(on) for t in own] for key, own in layer.tensors.items()}
        leaves = torch.utils._pytree.tree_leaves(layer.tensors)
        directions = {key: [t.to(on) for t in own] for key, own in v.items()}
        penalties = [penalty(layer, with_loss)(leaves) for with_loss in (False, True)]
        return [*penalties, hessian_vector_products(layer, directions), layer.jvp(directions)]

    with use_backend("reference"):
        expected = every("cpu")
    kernels_only()
    for found, want in zip(every(device), expected, strict=True):
        near(found, want)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str, device: str, kernels_only: Callable[[], None]) -> None:
    layer = Layer(kind, "reset state", torch.float32)
    leaves = torch.utils._pytree.tree_leaves(layer.tensors)
    with use_backend("reference"):
        expected = penalty(layer, True)([t.double() for t in leaves])
    kernels_only()
    layer.tensors = {key: [t.to(device) for t in own] for key, own in layer.tensors.items()}
    near(penalty(layer, True)([t.to(device) for t in leaves]), expected, 1e-4)
