"""The quick way of a module's forward (csrc/module_call.cpp): the results of the general way, and never taken unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import _backend, modules
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

LAYERS = {"LSTM": 3, "GRU": 4, "RNN": 0}


def quick_layer(module: nn.Module, cell: int, input: Any, h0: Any = None, c0: Any = None) -> Any:
    return _backend._C.call_layers(module.__dict__, cell, input, h0, c0)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}),
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_as_in_general(
    kind: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "proj_size" in options and kind != "LSTM":
        pytest.skip("only an LSTM has a projection")
    module = getattr(fused_rnn, kind)(5, 7, **options).to(dtype)
    x = torch.randn(3, 2, 5, dtype=dtype)
    rows, batch = (4 if options.get("bidirectional") else 1), (3 if options.get("batch_first") else 2)
    h0 = torch.randn(rows, batch, options.get("proj_size", 7), dtype=dtype)
    hx: Any = (h0, torch.randn(rows, batch, 7, dtype=dtype)) if kind == "LSTM" else h0
    for states in (None, hx):
        with torch.no_grad():
            h, c = (None, None) if states is None else states if kind == "LSTM" else (states, None)
            assert quick_layer(module, LAYERS[kind], x, h, c) is not None
            quick = module(x, states)
            with monkeypatch.context() as patch:
                patch.setattr(modules, "quick_calls", lambda: False)
                general = module(x, states)
        for a, b in zip(flat(quick), flat(general), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride() and not a.requires_grad


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", LAYERS)
def test_cells_as_in_general(kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(fused_rnn, kind + "Cell")(5, 7, bias=bias)
    x, h, c = torch.randn(2, 5), torch.randn(2, 7), torch.randn(2, 7)
    for states in (None, (h, c) if kind == "LSTM" else h):
        with torch.inference_mode():
            pair = (None, None) if states is None else (h, c if kind == "LSTM" else None)
            assert _backend._C.call_cell(module.__dict__, LAYERS[kind], x, *pair) is not None
            quick = module(x, states)
            with monkeypatch.context() as patch:
                patch.setattr("fused_rnn.cells.quick_calls", lambda: False)
                general = module(x, states)
        for a, b in zip(flat(quick), flat(general), strict=True):
            assert torch.equal(a, b) and a.shape == b.shape == (2, 7)


def test_weights_are_read_at_every_call() -> None:
    module, x = fused_rnn.LSTM(3, 4), torch.randn(1, 1, 3)
    twin = nn.LSTM(3, 4)
    with torch.no_grad():
        for change in (
            lambda m: m.weight_ih_l0.mul_(2),
            lambda m: m.weight_hh_l0.data.add_(1),
            lambda m: setattr(m.bias_ih_l0, "data", torch.ones(16)),
            lambda m: setattr(m, "weight_ih_l0", nn.Parameter(torch.ones(16, 3))),
        ):
            twin.load_state_dict(module.state_dict())
            change(module)
            change(twin)
            torch.testing.assert_close(module(x)[0], twin(x)[0])


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_left_to_the_general_way() -> None:
    """Whatever else may want to see the call, or to raise."""
    module, x, h = fused_rnn.GRU(3, 4), torch.randn(2, 2, 3), torch.zeros(1, 2, 4)
    gru = LAYERS["GRU"]
    assert quick_layer(module, gru, x) is None  # the parameters require gradients
    with torch.no_grad():
        assert quick_layer(module, gru, x, h) is not None
        for wrong in (x[0], x.double(), x[:, :, :2], x[:0], x.to("meta"), x.as_subclass(Subclass), x.to_sparse(), None, 3):
            assert quick_layer(module, gru, wrong) is None
        for wrong in (h[0], h.double(), h[:, :1], h.to("meta"), 3):
            assert quick_layer(module, gru, x, wrong) is None
        assert quick_layer(module, "GRU", x) is None
        assert _backend._C.call_layers({}, gru, x, None, None) is None
        assert _backend._C.call_layers(module.__dict__, gru, x) is None
        with torch.autocast("cpu"):
            assert quick_layer(module, gru, x) is None
        with Mode():
            assert quick_layer(module, gru, x) is None
        with torch.profiler.profile() as profile:
            assert quick_layer(module, gru, x) is None
            module(x)
        assert any(event.key == "fused_rnn::layer" for event in profile.key_averages())
        seen: list[Any] = []
        torch.func.vmap(lambda row: (seen.append(quick_layer(module, gru, row)), row)[1])(x.unsqueeze(0))
        assert seen == [None]
    pruned = fused_rnn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(pruned, "weight_ih_l0")
    with torch.no_grad():
        assert quick_layer(pruned, gru, x) is None
        pruned(x)
