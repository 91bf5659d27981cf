"""A sequence that is cut into calls: the results are those of one call."""

from __future__ import annotations

import pytest
import torch
from cases import OUTPUT_TOLERANCE
from torch import Tensor, nn

import fused_rnn
from fused_rnn import functional, use_backend

SHORT = (torch.bfloat16, torch.float16)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def in_steps(layer: nn.Module, x: Tensor, state: object, step: int) -> tuple[Tensor, object]:
    outputs = []
    for part in x.split(step):
        y, state = layer(part, state)
        outputs.append(y)
    return torch.cat(outputs), state


@pytest.mark.parametrize("options", ({}, {"num_layers": 2}, {"proj_size": 24}), ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_c_in_float32_is_handed_on_without_rounding(dtype: torch.dtype, options: dict[str, int], backend: str) -> None:
    """40 rows in each call, so that the kernels multiply in one order; then the results are the same bit for bit."""
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(16, 40, **options).to(device_of(backend), dtype)
    x = torch.randn(12, 40, 16).to(device_of(backend), dtype)
    layers = options.get("num_layers", 1)
    h0 = torch.zeros(layers, 40, options.get("proj_size", 40), dtype=dtype, device=x.device)
    c0 = torch.zeros(layers, 40, 40, device=x.device)
    for gradients in (False, True):
        with use_backend(backend), torch.set_grad_enabled(gradients):
            y, (h_n, c_n) = layer(x, (h0, c0))
            found, (h, c) = in_steps(layer, x, (h0, c0), 3)
        assert c.dtype == c_n.dtype == torch.float32 and h.dtype == dtype
        if backend == "reference":
            torch.testing.assert_close(found, y, rtol=OUTPUT_TOLERANCE[dtype], atol=OUTPUT_TOLERANCE[dtype])
        else:
            assert torch.equal(found, y) and torch.equal(h, h_n) and torch.equal(c, c_n)
        assert not torch.equal(c, c.to(dtype).float())  # there was something to lose


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_cell_with_c_in_float32(dtype: torch.dtype, backend: str) -> None:
    """Steps of a cell are a layer's call, but for the order of products that few rows have: a rounding of h at each step."""
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(16, 40).to(device_of(backend), dtype)
    cell = fused_rnn.LSTMCell(16, 40).to(device_of(backend), dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(12, 40, 16).to(device_of(backend), dtype)
    with use_backend(backend), torch.no_grad():
        state = torch.zeros(40, 40, dtype=dtype, device=x.device), torch.zeros(40, 40, device=x.device)
        y, (_, c_n) = layer(x, tuple(s.unsqueeze(0) for s in state))
        for step in x:
            state = cell(step, state)
    assert state[1].dtype == torch.float32
    tolerance = OUTPUT_TOLERANCE[dtype] if backend == "reference" else 0
    torch.testing.assert_close(state[0], y[-1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state[1], c_n[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_gradients_through_c_in_float32(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(5, 7).to(device_of(backend), dtype)
    x = torch.randn(4, 3, 5).to(device_of(backend), dtype)
    h0, c0 = torch.randn(1, 3, 7).to(x), torch.randn(1, 3, 7, device=x.device).requires_grad_()
    with use_backend(backend):
        y, (_, c_n) = layer(x, (h0, c0))
        (y.float().square().sum() + c_n.square().sum()).backward()
    assert c0.grad.dtype == torch.float32
    exact = nn.LSTM(5, 7, device=x.device, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    c64 = c0.detach().double().requires_grad_()
    y, (_, c_n) = exact(x.double(), (h0.double(), c64))
    (y.square().sum() + c_n.square().sum()).backward()
    scale = c64.grad.abs().max().item()
    assert (c0.grad.double() - c64.grad).abs().max().item() <= 4 * OUTPUT_TOLERANCE[dtype] * scale


def test_other_states_of_another_dtype_are_refused(backend: str) -> None:
    device = device_of(backend)
    half = {"dtype": torch.bfloat16, "device": device}
    layer, cell, gru = fused_rnn.LSTM(3, 4, **half), fused_rnn.LSTMCell(3, 4, **half), fused_rnn.GRU(3, 4, **half)
    x, narrow, wide = torch.randn(2, 5, 3, **half), torch.zeros(1, 5, 4, **half), torch.zeros(1, 5, 4, device=device)
    with use_backend(backend), torch.no_grad():
        for call in (
            lambda: layer(x, (wide, narrow)),
            lambda: layer(x, (wide, wide)),
            lambda: layer(x, (narrow, wide.double())),
            lambda: cell(x[0], (wide[0], narrow[0])),
            lambda: gru(x, wide),
            lambda: functional.lstm(x, list(layer.parameters()), (wide, narrow)),
            lambda: functional.lstm(x, list(layer.parameters()), (narrow, wide.double())),
        ):
            with pytest.raises((RuntimeError, ValueError), match="dtype"):
                call()
        assert functional.lstm(x, list(layer.parameters()), (narrow, wide))[1][1].dtype == torch.float32


def test_autocast_casts_c_too(device: str) -> None:
    layer = fused_rnn.LSTM(3, 4, device=device)
    x, state = torch.randn(2, 5, 3, device=device), torch.zeros(1, 5, 4, device=device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        y, (h_n, c_n) = layer(x, (state, state))
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
