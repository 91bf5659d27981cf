"""Run in the edited copy of the tree: the new cell's ops on every instruction set of this CPU, against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, Data, make_data
from new_cell.steps import MODE
from torch import Tensor

import fused_rnn
from fused_rnn import _settings, functional, use_backend
from fused_rnn.cells import UpdateGateCell
from fused_rnn.modules import UpdateGate


def cases() -> Iterator[Case]:
    """Every way of being ragged, with and without options, in three dtypes; sizes on both sides of a panel and a tile."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for dtype, ragged in itertools.product(dtypes, ("dense", "lengths", "packed")):
        yield Case(MODE, ragged=ragged, dtype=dtype)
        yield Case(MODE, ragged=ragged, dtype=dtype, layers=2, bidirectional=True, resets=True, hidden=9, batch=5)
        yield Case(MODE, ragged=ragged, dtype=dtype, steps=3, batch=17, hidden=65, input_size=33, states=False)
    yield Case(MODE, steps=1, batch=1, has_biases=False)
    yield Case(MODE, steps=3, batch=7, hidden=33, dtype=torch.float16)


def results_and_gradients(case: Case, data: Data) -> list[Tensor]:
    """y, h_n, and the gradients of all that can have one."""
    inputs = data.differentiable()
    for tensor in inputs:
        tensor.requires_grad_()
    results = functional.update_gate(
        data.input, data.weights, data.h0, num_layers=case.layers, has_biases=case.has_biases,
        bidirectional=case.bidirectional, batch_first=case.batch_first, batch_sizes=data.batch_sizes, lengths=data.lengths,
        resets=data.resets,
    )  # fmt: skip
    return [t.detach() for t in results] + list(torch.autograd.grad(results, inputs, (data.dy, data.dh_n)))


def check_case(case: Case) -> None:
    """Raises AssertionError, with the result that is wrong."""
    data = make_data(case)
    with use_backend("reference"):
        expected = results_and_gradients(case, data.to(torch.float64))
    with use_backend("cpu"):
        found = results_and_gradients(case, data)
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    for index, (actual, want) in enumerate(zip(found, expected, strict=True)):
        tolerance = growth * (OUTPUT_TOLERANCE if index < 2 else GRADIENT_TOLERANCE)[case.dtype]
        error = float((actual.double() - want).abs().max()) / max(1.0, float(want.abs().max()))
        assert error <= tolerance, f"{case}: result {index}: error {error:.3g}, tolerance {tolerance:.3g}"


def check_definition() -> None:
    """The reference against the formulas, and the classes against the reference."""
    torch.manual_seed(0)
    layer = UpdateGate(3, 4, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    x, h = torch.randn(5, 2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for x_t in x:
        z = torch.sigmoid(x_t @ w_ih[:4].T + b_ih[:4] + h @ w_hh[:4].T + b_hh[:4])
        n = torch.tanh(x_t @ w_ih[4:].T + b_ih[4:] + h @ w_hh[4:].T + b_hh[4:])
        h = n + z * (h - n)
    cell = UpdateGateCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name, _ in cell.named_parameters()})
    stepped = None
    for x_t in x:
        stepped = cell(x_t, stepped)
    for found in (layer(x)[1][0], stepped):
        torch.testing.assert_close(found, h, rtol=0, atol=1e-14)


check_definition()
count = 0
for instruction_set in fused_rnn.build_info()["cpu_instruction_sets"]:
    with _settings.use("FUSED_RNN_CPU", instruction_set):
        for case in cases():
            check_case(case)
            count += 1
print(f"{count} cases on {', '.join(fused_rnn.build_info()['cpu_instruction_sets'])}")
