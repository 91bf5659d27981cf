"""Activation checkpointing over the layers: forward runs again in backward, with the same numbers bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from module_pairs import device_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import fused_rnn
from fused_rnn import use_backend

T, B, I, H = 9, 3, 5, 8  # noqa: E741


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(fused_rnn, kind)(I, H, num_layers=3, dropout=0.4)


def gradients(run: Callable[..., Any], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and weights; dropout draws the same masks in every call."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    output = run(leaf)
    output.sin().sum().backward()
    assert leaf.grad is not None
    return [output.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 2
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_layers(backend: str, kind: str, use_reentrant: bool) -> None:
    with use_backend(backend):
        layer = layer_of(kind).to(device_of(backend))
        x = torch.randn(T, B, I, device=device_of(backend))
        again = partial(checkpoint, lambda leaf: layer(leaf)[0], use_reentrant=use_reentrant)
        assert_equal(gradients(again, layer, x), gradients(lambda leaf: layer(leaf)[0], layer, x))


def test_packed(backend: str) -> None:
    with use_backend(backend):
        layer = layer_of("LSTM").to(device_of(backend))
        x = torch.randn(T, B, I, device=device_of(backend))

        def run(leaf: Tensor) -> Tensor:
            return layer(pack_padded_sequence(leaf, torch.tensor([4, 9, 1]), enforce_sorted=False))[0].data

        assert_equal(gradients(partial(checkpoint, run, use_reentrant=False), layer, x), gradients(run, layer, x))


def test_cells_and_chunks(backend: str) -> None:
    """A long sequence in chunks of some steps, each of them checkpointed: the states between them are what is kept."""
    with use_backend(backend):
        cell = fused_rnn.LSTMCell(I, H).to(device_of(backend))
        x = torch.randn(T, B, I, device=device_of(backend))

        def chunk(steps: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            for step in steps:
                h, c = cell(step, (h, c))
            return h, c

        def run(call: Callable[..., Any], leaf: Tensor) -> Tensor:
            h = c = leaf.new_zeros(B, H)
            for steps in leaf.split(4):
                h, c = call(chunk, steps, h, c)
            return h + c

        def plain(f: Callable[..., Any], *args: Any) -> Any:
            return f(*args)

        again = partial(checkpoint, use_reentrant=False)
        assert_equal(gradients(partial(run, again), cell, x), gradients(partial(run, plain), cell, x))


def test_sequential() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fused_rnn.GRU(I, I)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    torch.manual_seed(0)
    model, x = nn.Sequential(*(First() for _ in range(4))), torch.randn(T, B, I)
    again = partial(checkpoint_sequential, model, 2, use_reentrant=False)
    assert_equal(gradients(again, model, x), gradients(model, model, x))


def test_a_last_state_alone(backend: str) -> None:
    """Some of the states have no gradient; what forward saved is asked for once even so."""
    with use_backend(backend):
        layer = layer_of("LSTM").to(device_of(backend))
        x = torch.randn(T, B, I, device=device_of(backend))

        def run(leaf: Tensor) -> Tensor:
            return layer(leaf)[1][1]

        assert_equal(gradients(partial(checkpoint, run, use_reentrant=False), layer, x), gradients(run, layer, x))


def test_selective() -> None:
    """torch's selective checkpointing sees a layer as one op, which a policy may keep: then it does not run again."""
    if not fused_rnn.build_info():
        pytest.skip("needs the compiled extension: the Python reference is many ops")
    layer, linear = fused_rnn.LSTM(I, H), nn.Linear(H, H)
    both, x, runs = nn.ModuleList([layer, linear]), torch.randn(T, B, I), []

    def run(leaf: Tensor) -> Tensor:
        return torch.tanh(linear(layer(leaf)[0]))

    for keeps in (True, False):

        def policy(context: Any, op: Any, *args: Any, keeps: bool = keeps, **kwargs: Any) -> CheckpointPolicy:
            kept = keeps and op is torch.ops.fused_rnn.layer.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        again = partial(checkpoint, run, use_reentrant=False, context_fn=contexts)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            got = gradients(again, both, x)
        assert_equal(got, gradients(run, both, x))
        runs.append(sum(event.name == "fused_rnn::layer" for event in profile.events()))
    assert 0 < runs[0] < runs[1]


def test_saved_tensors_may_be_packed_by_hooks() -> None:
    """torch.autograd.graph.save_on_cpu and what offloads activations: what forward saved comes back from the hooks."""
    layer, x = fused_rnn.LSTM(I, H, 2), torch.randn(T, B, I)
    packed: list[Tensor] = []

    def run(leaf: Tensor) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return layer(leaf)[0]

    assert_equal(gradients(run, layer, x), gradients(lambda leaf: layer(leaf)[0], layer, x))
    assert packed
