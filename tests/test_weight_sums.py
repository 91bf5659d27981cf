"""The weight gradients of a loop over a cell are one product over the rows of all its steps (csrc/torch/weight_node.h)."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn._backend import has_cpu_kernels

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pair(cell: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, torch.nn's in float64) with the same weights."""
    ours = getattr(fused_rnn, cell)(5, 7, bias=bias, dtype=dtype)
    theirs = getattr(torch.nn, cell)(5, 7, bias=bias, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def outputs(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """h of every step."""
    states, result = None, []
    for step in x:
        states = module(step, states)
        result.append(states[0] if isinstance(states, tuple) else states)
    return result


def loss(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Each step, row and unit counts differently."""
    y = torch.stack(outputs(module, x)).double()
    return (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).cos()).sum()


def gradients(module: torch.nn.Module) -> list[Tensor]:
    return [p.grad.double() for p in module.parameters() if p.grad is not None]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-13) -> None:
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        largest = other.abs().max().item() if other.numel() else 0.0
        assert ((one - other).abs() <= tolerance * max(1.0, largest)).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 3), (6, 1), (7, 100), (3, 129), (5, 300), (2, 0)])
def test_equal_to_the_steps_own_gradients(cell: str, dtype: torch.dtype, bias: bool, steps: int, batch: int) -> None:
    """Rows that wait for each other, that fill the room several times, and that do not fit into it."""
    ours, theirs = pair(cell, dtype, bias)
    x = torch.randn(steps, batch, 5, dtype=dtype)
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    loss(ours, inputs[0]).backward()
    loss(theirs, inputs[1]).backward()
    assert_same(gradients(ours), gradients(theirs), TOLERANCE[dtype])
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert_same([inputs[0].grad.double()], [inputs[1].grad], TOLERANCE[dtype])


def weight_nodes(y: list[Tensor]) -> set[Node]:
    """The nodes before weights in the graph of y."""
    found: set[Node] = set()
    seen: set[Node] = set()
    waiting = [t.grad_fn for t in y]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "FusedRnnWeightsBackward":
            found.add(node)
        waiting += [next_node for next_node, _ in node.next_functions]
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_steps_share_a_node(cell: str) -> None:
    ours, _ = pair(cell)
    y = outputs(ours, torch.randn(4, 2, 5, dtype=torch.float64))
    assert len(weight_nodes(y)) == 1
    ours.weight_ih.requires_grad_(False)
    assert not weight_nodes(outputs(ours, torch.randn(2, 2, 5, dtype=torch.float64)))


def test_layers_of_one_step_share_a_node() -> None:
    layer = fused_rnn.LSTM(5, 7, num_layers=2, dtype=torch.float64)
    reference = torch.nn.LSTM(5, 7, num_layers=2, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    for module in (layer, reference):
        states, total = None, torch.zeros((), dtype=torch.float64)
        for step in x:
            y, states = module(step.unsqueeze(0), states)
            total = total + (y * y).sum()
        total.backward()
    assert_same(gradients(layer), gradients(reference))


def test_a_graph_used_twice() -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for module in (ours, theirs):
        value = loss(module, x)
        value.backward(retain_graph=True)
        value.backward()
    assert_same(gradients(ours), gradients(theirs))


def test_parts_of_the_gradients() -> None:
    """A pass that asks for no weight leaves nothing behind, and one that asks for some gets these."""
    ours, theirs = pair("GRUCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        x_here = x.clone().requires_grad_()
        value = loss(module, x_here)
        found.append(torch.autograd.grad(value, [x_here], retain_graph=True))
        found[-1] += torch.autograd.grad(value, [module.weight_hh, module.bias_ih], retain_graph=True)
        value.backward()
    assert_same(list(found[0]), list(found[1]))
    assert_same(gradients(ours), gradients(theirs))


def test_a_pass_that_fails() -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def fail(gradient: Tensor) -> None:
        raise KeyError("stop")

    h, c = ours(x[0])
    handle = h.register_hook(fail)
    later = ours(x[1], (h, c))[0].sum()
    with pytest.raises(KeyError):
        later.backward(retain_graph=True)
    handle.remove()
    later.backward()
    first = theirs(x[0])
    theirs(x[1], first)[0].sum().backward()
    assert_same(gradients(ours), gradients(theirs))


def test_a_node_called_outside_of_a_pass() -> None:
    """It gives all of its gradients: nothing would run the node behind it."""
    layer = fused_rnn.LSTM(5, 7, dtype=torch.float64)
    y, _ = layer(torch.randn(1, 3, 5, dtype=torch.float64))
    with torch.no_grad():
        _, *got = y.grad_fn(torch.ones_like(y), None, None)
    assert_same(got, list(torch.autograd.grad(y.sum(), [*layer.parameters()])))


def test_double_backward() -> None:
    ours, theirs = pair("GRUCell")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for module in (ours, theirs):
        x_here = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(module, x_here), [x_here], create_graph=True)
        (loss(module, x) + dx.square().sum()).backward()
    assert_same(gradients(ours), gradients(theirs), 1e-12)


def test_batched_gradients() -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    seeds = torch.randn(4, 3, 2, 7, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        y = torch.stack(outputs(module, x))
        found.append(torch.autograd.grad(y, [*module.parameters()], seeds, is_grads_batched=True))
    assert_same(list(found[0]), list(found[1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_steps(reentrant: bool) -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for module in (ours, theirs):
        first = torch.stack(outputs(module, x))
        x_here = x.clone().requires_grad_()
        later = checkpoint(lambda t, module=module: torch.stack(outputs(module, t)), x_here, use_reentrant=reentrant)
        (first * later).sum().backward()
    assert_same(gradients(ours), gradients(theirs))


def test_hooks_see_the_sum() -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    seen: list[list[Tensor]] = []
    for module in (ours, theirs):
        calls: list[Tensor] = []
        module.weight_hh.register_hook(calls.append)
        loss(module, x).backward()
        seen.append(calls)
    assert_same(*seen)


def test_weights_between_two_graphs() -> None:
    """An optimizer's step between them is seen; after forward it raises; another dtype makes another node."""
    ours, _ = pair("RNNCell")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    kept = loss(ours, x)
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    reference = torch.nn.RNNCell(5, 7, dtype=torch.float64)
    reference.load_state_dict(ours.state_dict())
    loss(ours, x).backward()
    loss(reference, x).backward()
    assert_same(gradients(ours), gradients(reference))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    ours.zero_grad()
    ours.float()
    loss(ours, x.float()).backward()
    assert ours.weight_hh.grad is not None and ours.weight_hh.grad.dtype == torch.float32


def test_passes_in_several_threads() -> None:
    ours, theirs = pair("LSTMCell")
    x = torch.randn(8, 20, 3, 5, dtype=torch.float64)
    losses = [loss(ours, one) for one in x]  # one node for all
    found: list[tuple[Tensor, ...]] = [()] * len(losses)

    def run(index: int) -> None:
        found[index] = torch.autograd.grad(losses[index], [*ours.parameters()])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, got in zip(x, found, strict=True):
        assert_same(list(got), list(torch.autograd.grad(loss(theirs, one), [*theirs.parameters()])))


def test_weights_are_freed() -> None:
    ours, _ = pair("GRUCell")
    loss(ours, torch.randn(4, 3, 5, dtype=torch.float64)).backward()
    watched = weakref.ref(ours.weight_hh)
    del ours
    gc.collect()
    assert watched() is None
