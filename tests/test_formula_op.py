"""The ops of formulas by themselves, and what is said of their calls."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import formula_cells as cells
import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import _backend
from fused_rnn.formula import Cell, Layer, Step, ops, serve

pytestmark = pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")

T, B, I = 5, 4, 3  # noqa: E741


def test_constants_are_those_of_the_kernels() -> None:
    from fused_rnn.formula import cuda, cuda_build, writer

    assert _backend.extension is not None
    places = ChainMap(writer.PHASE_KINDS, *map(vars, (ops, serve, cuda, cuda_build)))
    for name, value in _backend.extension.formula_constants().items():
        assert places[name] == value, name
    assert len(writer.PHASE_KINDS) == 3


def test_fake_kernels_refuse_mixed_devices() -> None:
    """torch calls a fake kernel where one tensor is on the meta device: its results would be uninitialised memory."""
    formula, x, params = call_of(cells.PeepholeLstm())
    with pytest.raises(RuntimeError, match=r"params\[1\]: expected device cpu .input's., got meta"):
        torch.ops.fused_rnn.formula(x, [], [params[0], params[1].to("meta"), *params[2:]], [], formula, ops.BIASES)


def call_of(cell: Cell) -> tuple[str, Tensor, list[Tensor]]:
    layer = Layer(cell, I, 8)
    layer(torch.rand(T, B, I))
    return ops.remember(cell), torch.rand(T, B, I), [parameter.detach() for parameter in layer.parameters()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s, p: (x[0], s, p), "input: expected 3-D, got 2-D"),
        (lambda x, s, p: (x.half(), s, p), "has no kernels in this process for"),
        (lambda x, s, p: (x, s, p[:-1]), "params: expected 7 tensors, got 6"),
        (lambda x, s, p: (x, s, [p[0][:-1], *p[1:]]), r"weight_ih: expected shape \[4\*H, I\]"),
        (lambda x, s, p: (x, s, [p[0], p[1][:-1], *p[2:]]), r"weight_hh: expected shape \[32, 8\]"),
        (lambda x, s, p: (x, s, [*p[:-1], p[-1][:-1]]), r"parameters: expected shape \[8\], got \[7\]"),
        (lambda x, s, p: (x[..., :-1], s, p), r"weight_ih: expected shape \[32, 2\]"),
        (lambda x, s, p: (x[:0], s, p), "input: expected at least 1 time step, got 0"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 8)], p), "states: expected 2 or none, got 1"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 7)] * 2, p), r"states: expected shape \[1, 4, 8\]"),
        (lambda x, s, p: (x, [torch.zeros(1, B, 8).double()] * 2, p), "states: expected dtype"),
    ],
)
def test_op_checks(change: Any, message: str) -> None:
    formula, x, params = call_of(cells.PeepholeLstm())
    states: Sequence[Tensor] = []
    x, states, params = change(x, states, params)
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.fused_rnn.formula(x, states, params, [], formula, ops.BIASES)


def test_op_of_an_unknown_cell() -> None:
    _, x, params = call_of(cells.PeepholeLstm())
    with pytest.raises(RuntimeError, match="the formula nobody has no kernels in this process"):
        torch.ops.fused_rnn.formula(x, [], params, [], "nobody", ops.BIASES)


def test_backward_checks_what_was_saved() -> None:
    formula, x, params = call_of(cells.PeepholeLstm())
    y, last, saved = torch.ops.fused_rnn.formula(x, [], params, [], formula, ops.BIASES | ops.SAVE)
    flags = ops.BIASES | ops.GRAD_X
    for wrong, message in (([y], "saved: expected"), ([saved[0][:, :-1], *saved[1:], y], "saved: expected shape")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.fused_rnn.formula_backward(y, [], x, [], params, [], wrong, formula, flags)
    with pytest.raises((RuntimeError, ValueError), match="dlast: expected 2 gradients"):
        torch.ops.fused_rnn.formula_backward(y, [last[0]], x, [], params, [], [*saved, y], formula, flags)


def test_a_step_trains_and_equals_the_layer() -> None:
    step = Step(cells.SLstm(), I, 8, dtype=torch.float64)
    x = torch.rand(B, I, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        hx = None
        for _ in range(3):
            hx = step(x, hx)
        return [*hx, *torch.autograd.grad(hx[0].sum(), [x, *step.parameters()])]

    got = run()
    with fused_rnn.use_backend("reference"):
        expected = run()
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-12, rtol=0)
    single = step(x[0])
    torch.testing.assert_close(single[0], step(x)[0][0], atol=1e-12, rtol=0)


def test_explain() -> None:
    layer = Layer(cells.NormLstm(), 16, 32, num_layers=2)
    explanation = fused_rnn.explain(layer, torch.rand(T, B, 16), show=False)
    assert explanation.backend == "cpu" and explanation.cell == "NormLstm" and len(explanation.layers) == 2
    assert "8 numbers of a unit are kept of each step" in str(explanation)
    assert explanation.layers[0].saved_bytes == 8 * T * B * 32 * 4
    with fused_rnn.use_backend("reference"):
        assert fused_rnn.explain(layer, torch.rand(T, B, 16), show=False).backend == "reference"
    step = fused_rnn.explain(Step(cells.SLstm(), 4, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64), show=False)
    assert step.layers[0].T == step.layers[0].B == 1
    with pytest.raises(ValueError, match="input: expected 16 features"):
        fused_rnn.explain(layer, torch.rand(T, B, 3))


def test_saved_bytes_are_those_of_forward() -> None:
    for cell in (cells.SLstm(), cells.NormLstm(), cells.Gru()):
        layer = Layer(cell, 4, 8)
        x = torch.rand(T, B, 4)
        layer(x)
        flags = ops.BIASES | ops.SAVE
        _, _, saved = torch.ops.fused_rnn.formula(x, [], list(layer.parameters()), [], layer.formula, flags)
        told = fused_rnn.explain(layer, x, show=False).layers[0].saved_bytes
        assert told == sum(t.numel() * t.element_size() for t in saved), type(cell)


def test_explain_without_training() -> None:
    """As of the layers and cells with kernels of their own: no backward, and nothing saved."""
    x = torch.rand(T, B, 4)
    layer, step = Layer(cells.Gru(), 4, 8), Step(cells.Gru(), 4, 8)
    calls: tuple[tuple[Any, Tensor, str | None], ...] = ((layer, x, None), (layer, x, "H100"), (step, x[0], None))
    for module, input, device in calls:
        made = fused_rnn.explain(module, input, training=False, show=False, device=device).layers[0]
        assert made.backward is None and made.saved_bytes == 0
    made = fused_rnn.explain(layer, x, show=False).layers[0]
    assert made.backward is not None and made.saved_bytes
    with torch.no_grad():
        assert fused_rnn.explain(layer, x, show=False).layers[0].backward is None
    with fused_rnn.use_backend("reference"):
        made = fused_rnn.explain(layer, x, training=False, show=False).layers[0]
        assert made.backward is None and made.saved_bytes is None
