"""CUDA graphs of modules in the plan's own choice of kernels: captured once, replayed on other input, bitwise as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from settings import Setting
from torch import Tensor, nn

import fused_rnn

pytestmark = pytest.mark.gpu


def check_replay(run: Callable[[], list[Tensor]], inputs: list[Tensor]) -> None:
    """run() reads `inputs`. Captures it, changes the inputs in place, replays, and compares with an eager run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    before = [t.clone() for t in captured]
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for actual, want in zip(replayed, run(), strict=True):
        assert torch.equal(actual, want)
    assert not torch.equal(replayed[0], before[0]), "the replay did not read the new input"


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad([r.float().sum() for r in results], inputs))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ragged", ["dense", "lengths", "lengths on the host", "packed"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stack(name: str, ragged: str, training: bool, dtype: torch.dtype) -> None:
    module = getattr(fused_rnn, name)(24, 40, num_layers=3, bidirectional=True, device="cuda", dtype=dtype)
    function, weights = getattr(fused_rnn.functional, name.lower()), list(module.parameters())
    lengths = torch.tensor([13, 2, 7, 1, 9])
    shape, more = (13, 5, 24), {}
    if ragged == "packed":
        more = {"batch_sizes": torch.stack([(lengths > t).sum() for t in range(13)])}
        shape = (int(lengths.sum()), 24)
    elif ragged != "dense":
        more = {"lengths": lengths.cuda() if ragged == "lengths" else lengths}
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=training)

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            results = flat(function(x, weights, num_layers=3, bidirectional=True, **more))
            return [*results, *gradients(results, [x, *weights])] if training else results

    check_replay(run, [x])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cell_unrolled(name: str, training: bool) -> None:
    cell: nn.Module = getattr(fused_rnn, name)(12, 33, device="cuda")
    x = torch.randn(6, 4, 12, device="cuda", requires_grad=training)

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            state: Any = None
            for step in x.unbind(0):
                state = cell(step, state)
            results = flat(state)
            return [*results, *gradients(results, [x, *cell.parameters()])] if training else results

    check_replay(run, [x])


@pytest.mark.parametrize("family", ["", "cluster", "grid"], ids=["default", "cluster", "grid"])
@pytest.mark.parametrize("steps", [1, 13])
def test_own_cell(family: str, steps: int, setting: Setting) -> None:
    """The exchange of family `grid` is made anew at every replay."""
    setting("FUSED_RNN_PLAN", family)
    layer = fused_rnn.Layer(fused_rnn.zoo.LSTM(), 24, 64, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(steps, 5, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = list(layer.parameters())

    def run() -> list[Tensor]:
        results = flat(layer(x))
        return [*results, *gradients(results, [x, *weights])]

    check_replay(run, [x])
