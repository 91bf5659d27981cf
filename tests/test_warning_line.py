"""The warning that the slow reference runs names the caller's line: the first outside fused_rnn and torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES
from torch import nn

import fused_rnn
from fused_rnn import _backend, _quick_call, functional

ROWS = {True: (3, 4), False: (5, 3, 4)}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_native", {})
    monkeypatch.setattr(_quick_call, "_call_module", None)
    monkeypatch.setattr(_backend, "forced", None)


def line_of_this_call() -> int:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def weights(name: str) -> list[torch.Tensor]:
    return [w.detach() for w in getattr(fused_rnn, name)(4, 6).parameters()]


def calls(name: str, x: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to reach the reference, each in one line of this file that calls something of torch or fused_rnn."""
    module = getattr(fused_rnn, name)(4, 6)
    function = getattr(functional, name.lower().replace("cell", "_cell"))
    params = weights(name)
    once = (lambda t: function(t, None, *params)) if name in CELLS else (lambda t: function(t, params))
    yield "module", lambda: module(x)
    yield "forward", lambda: module.forward(x)
    yield "hooked module", lambda: hooked(name)(x)
    yield "functional", lambda: once(x)
    yield "Sequential", lambda: nn.Sequential(nn.Identity(), module)(x)
    yield "Sequential in a Sequential", lambda: nn.Sequential(nn.Sequential(module))(x)
    yield "a model", lambda: Model(module)(x)
    yield "functional_call", lambda: torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    yield "checkpoint", lambda: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    yield "vmap", lambda: torch.func.vmap(module)(x.unsqueeze(0))
    yield "vmap of functional", lambda: torch.func.vmap(once)(x.unsqueeze(0))
    yield "no_grad as a decorator", lambda: torch.no_grad()(module)(x)
    yield "packed", lambda: module(packed() if name not in CELLS else x)


def hooked(name: str) -> nn.Module:
    module = getattr(fused_rnn, name)(4, 6)
    module.register_forward_hook(lambda *args: None)
    return module


def packed() -> nn.utils.rnn.PackedSequence:
    return nn.utils.rnn.PackedSequence(torch.zeros(5, 4), torch.tensor([3, 2]))


@pytest.mark.parametrize("name", CLASSES)
def test_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for way, call in calls(name, torch.zeros(ROWS[name in CELLS])):
        monkeypatch.setattr(_backend, "_warned", set())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        ours = [w for w in seen if "slow Python reference" in str(w.message)]
        assert [w.filename for w in ours] == [__file__], way
        source = inspect.getsource(inspect.getmodule(calls)).splitlines()[ours[0].lineno - 1]  # type: ignore[arg-type]
        assert "yield" in source or "self.inner(x)" in source or "once = " in source, (way, source)


def test_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Sequential(fused_rnn.GRU(4, 6)), torch.zeros(5, 3, 4)
    monkeypatch.setattr(_backend, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module(x), (line := line_of_this_call())
        module(x)
    assert [(w.filename, w.lineno) for w in seen] == [(__file__, line)]


def test_called_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code without a file, and torch.fx's generated code, whose caller is meant."""
    monkeypatch.setattr(_backend, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(compile("m(x)", "<typed in>", "exec"), {"m": fused_rnn.GRUCell(4, 6), "x": torch.zeros(3, 4)})
    assert [w.filename for w in seen] == ["<typed in>"]
    monkeypatch.setattr(_backend, "_warned", set())
    graph = torch.fx.Graph()
    graph.output(graph.call_module("m", (graph.placeholder("x"),)))
    model = torch.fx.GraphModule({"m": fused_rnn.GRUCell(4, 6)}, graph)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.zeros(3, 4))
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)
def test_compiled(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The warning neither breaks Dynamo's graph nor comes from it: it names the line that calls the compiled function."""
    monkeypatch.setattr(_backend, "_warned", set())
    cell, x = fused_rnn.GRUCell(4, 6, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: cell(t), backend="eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = compiled(x), (line := line_of_this_call())
    ours = [(w.filename, w.lineno) for w in seen if "slow Python reference" in str(w.message)]
    assert ours == [(__file__, line)]
    torch.testing.assert_close(result[0], cell(x))
