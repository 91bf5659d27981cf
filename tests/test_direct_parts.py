"""Few steps of up to 64 rows on weights that are cut into bfloat16 parts as they lie (Form::kDirectParts). AMX alone has
such products. The values are tested on every machine; tests/hardening has the loops in plain C++."""

from __future__ import annotations

import pytest
import torch
from cases import OUTPUT_TOLERANCE
from settings import Setting
from torch import Tensor, nn

import fused_rnn
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

AS_THEY_LIE = "as they lie, in bfloat16 parts"
HAS_AMX = has_cpu_kernels() and fused_rnn.build_info()["cpu_instruction_set"] == "amx"
KINDS = ("LSTM", "GRU", "RNN")


def layer_pair(kind: str, sizes: tuple[int, int], dtype: torch.dtype) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Ours, and torch.nn's with the same weights in fp64."""
    ours = getattr(fused_rnn, kind)(*sizes).to(dtype)
    theirs = getattr(nn, kind)(*sizes).double()
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    return ours, theirs


def states(kind: str, h: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return (h, torch.zeros_like(h)) if kind == "LSTM" else h


@pytest.mark.parametrize("rows", (2, 9, 10, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_one_step_of_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    for kind, sizes in zip(KINDS, ((515, 131), (256, 512), (527, 48)), strict=True):
        torch.manual_seed(rows)
        ours, theirs = layer_pair(kind, sizes, dtype)
        x, h = torch.randn(1, rows, sizes[0]).to(dtype), torch.randn(1, rows, sizes[1]).to(dtype)
        with torch.no_grad():
            y, _ = ours(x, states(kind, h))
            expected, _ = theirs(x.double(), states(kind, h.double()))
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=OUTPUT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_several_steps_and_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = fused_rnn.GRU(512, 520, num_layers=2, bidirectional=True).to(dtype)
    theirs = nn.GRU(512, 520, num_layers=2, bidirectional=True).double()
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x = torch.randn(3, 16, 512).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0].double(), theirs(x.double())[0], rtol=0, atol=2 * OUTPUT_TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_values_without_parts(kind: str, dtype: torch.dtype, setting: Setting) -> None:
    """Infinities and NaN of weights, of the input and of the state go where they go with vectors."""
    torch.manual_seed(0)
    layer = getattr(fused_rnn, kind)(512, 544).to(dtype)
    # So small that no product of the largest number is infinite.
    inputs = {"x": (torch.randn(1, 20, 512) / 10).to(dtype), "h": (torch.randn(1, 20, 544) / 10).to(dtype)}
    for place in ("weight_ih_l0", "weight_hh_l0", "x", "h"):
        target = inputs[place][0] if place in inputs else getattr(layer, place).data
        before = target[3, 5].clone()
        for value in (float("inf"), float("nan"), torch.finfo(dtype).max):
            target[3, 5] = value
            results = []
            for instruction_set in ("", "portable"):
                setting("FUSED_RNN_CPU", instruction_set)
                with torch.no_grad():
                    results.append(layer(inputs["x"], states(kind, inputs["h"]))[0])
            torch.testing.assert_close(*results, rtol=0.02, atol=OUTPUT_TOLERANCE[dtype], equal_nan=True)
        target[3, 5] = before


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_other_rows_keep_their_bits(dtype: torch.dtype) -> None:
    """Whatever one row has."""
    torch.manual_seed(0)
    layer, x = fused_rnn.LSTM(512, 528).to(dtype), torch.randn(1, 40, 512).to(dtype)
    with torch.no_grad():
        before = layer(x)[0][0]
        for value in (float("inf"), float("nan"), torch.finfo(dtype).max):
            x[0, 21, 7] = value
            after = layer(x)[0][0]
            assert torch.equal(before[:21], after[:21]) and torch.equal(before[22:], after[22:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_infinities_of_a_projection(dtype: torch.dtype, setting: Setting) -> None:
    """Its rows are not rounded to the layer's dtype: in bfloat16 they have two parts, and the weights one."""
    torch.manual_seed(0)
    layer, x = fused_rnn.LSTM(64, 256, proj_size=128).to(dtype), torch.randn(1, 16, 64).to(dtype)
    layer.weight_hr_l0.data[3, 5], layer.weight_hr_l0.data[7, 2] = float("inf"), float("nan")
    results = []
    for instruction_set in ("", "portable"):
        setting("FUSED_RNN_CPU", instruction_set)
        with torch.no_grad():
            results.append(layer(x)[0])
    torch.testing.assert_close(*results, rtol=0.02, atol=OUTPUT_TOLERANCE[dtype], equal_nan=True)


def test_weights_may_change_between_calls() -> None:
    """Nothing of them is kept."""
    cell = fused_rnn.LSTMCell(512, 512, dtype=torch.bfloat16)
    x = torch.randn(8, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        before = cell(x)[0]
        cell.weight_ih.data.zero_()
        cell.bias_ih.data.zero_()
        cell.bias_hh.data.zero_()
        after = cell(x)[0]
    assert before.abs().max() > 0 and after.abs().max() == 0


@pytest.mark.skipif(not HAS_AMX, reason="needs a CPU with AMX")
@pytest.mark.parametrize(
    ("dtype", "steps", "rows", "size", "so"),
    (
        (torch.bfloat16, 1, 1, 512, False),
        (torch.bfloat16, 1, 2, 64, True),
        (torch.bfloat16, 1, 64, 256, True),
        (torch.bfloat16, 1, 32, 128, False),
        (torch.bfloat16, 1, 65, 512, False),
        (torch.bfloat16, 4, 16, 512, True),
        (torch.bfloat16, 5, 16, 512, False),
        (torch.float16, 1, 8, 512, False),
        (torch.float16, 1, 64, 512, True),
        (torch.float16, 2, 16, 512, True),
        (torch.float16, 2, 32, 512, False),
        (torch.float32, 1, 12, 512, False),
        (torch.float32, 1, 16, 128, True),
        (torch.float32, 1, 64, 256, True),
        (torch.float32, 2, 16, 512, False),
        (torch.float32, 2, 16, 1024, True),
    ),
    ids=str,
)
def test_where_weights_are_read_as_they_lie(dtype: torch.dtype, steps: int, rows: int, size: int, so: bool) -> None:
    layer = fused_rnn.GRU(size, size, dtype=dtype)
    text = str(fused_rnn.explain(layer, torch.zeros(steps, rows, size, dtype=dtype), show=False))
    forward = next(line for line in text.splitlines() if "forward:" in line)
    assert (AS_THEY_LIE in forward) is so, text
