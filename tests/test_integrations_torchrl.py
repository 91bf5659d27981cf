"""TorchRL's recurrent modules on our kernels against themselves, by every back end of theirs.

The packages are optional (``pip install '.[integrations]'``); without them the tests skip.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_pairs import assert_close
from torch import Tensor, nn

import fused_rnn
from fused_rnn import use_backend
from fused_rnn.integrations import torchrl

pytest.importorskip("torchrl", reason="needs the package torchrl")
from tensordict import TensorDict
from torchrl.modules import GRU, LSTM, GRUModule, LSTMModule, set_recurrent_mode

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchRL's of the versions around it
needs_scan = pytest.mark.skipif(importlib.util.find_spec("hoptorch") is None, reason="needs the package hoptorch")
scans = [needs_scan, pytest.mark.slow]  # torch compiles TorchRL's loop
REPLACED = [(LSTMModule, "forward"), (GRUModule, "forward"), (LSTM, "_lstm"), (GRU, "_gru")]
ORIGINALS = [vars(cls)[name] for cls, name in REPLACED]
BACKENDS = ["pad", "auto", "python", pytest.param("scan", marks=scans), pytest.param("recompute", marks=scans)]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    assert [vars(cls)[name] for cls, name in REPLACED] == ORIGINALS


def make(cell: str, theirs: str, **options: Any) -> nn.Module:
    """A module of input size 4 and hidden size 6 in float64."""
    states = ["h", "c"] if cell == "LSTM" else ["h"]
    torch.manual_seed(0)
    module = (LSTMModule if cell == "LSTM" else GRUModule)(
        4,
        6,
        in_keys=["x", *states],
        out_keys=["y", *(("next", state) for state in states)],
        python_based=theirs == "python",
        recurrent_backend={"recompute": "scan", "python": "pad"}.get(theirs, theirs),
        recurrent_recompute="full" if theirs == "recompute" else "none",
        **options,
    )
    return module.double()


def batch(module: nn.Module, shape: tuple[int, ...], starts: str, states: bool = True) -> Any:
    """A TensorDict of this shape; starts: where trajectories begin. States are no zeros where they do."""
    torch.manual_seed(1)
    steps = shape[-1]
    is_init = torch.rand(*shape, 1) < {"none": 0.0, "first": 0.0, "inside": 0.3, "everywhere": 1.1}[starts]
    if starts == "first":
        is_init[..., 0, :] = True
    found = TensorDict({"x": torch.randn(*shape, 4, dtype=torch.float64), "is_init": is_init}, shape)
    layer = module.lstm if hasattr(module, "lstm") else module.gru
    groups = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = {"h": getattr(layer, "proj_size", 0) or 6, "c": 6} if hasattr(module, "lstm") else {"h": 6}
    for name, size in sizes.items():
        if states:
            found[name] = torch.randn(*shape, groups, size, dtype=torch.float64)
    assert steps > 1
    return found


def run(module: nn.Module, data: Any) -> list[Tensor]:
    """Outputs, and the gradients of parameters, input and states."""
    data = data.clone()
    leaves = [data[key].requires_grad_() for key in ("x", "h", "c") if key in data.keys()]
    with set_recurrent_mode(True):
        assert module(data) is data
    outputs = [data[key] for key in module.out_keys]
    module.zero_grad()
    sum(output.square().sum() * (i + 1) for i, output in enumerate(outputs)).backward()
    return [*outputs, *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("theirs", BACKENDS)
@pytest.mark.parametrize("starts", ["none", "first", "inside", "everywhere"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_same(cell: str, starts: str, theirs: str) -> None:
    module = make(cell, theirs, num_layers=2)
    data = batch(module, (5, 7), starts)
    expected = run(module, data)
    with torchrl.enabled():
        assert_close(run(module, data), expected)


@pytest.mark.parametrize("starts", ["none", "inside"])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"bias": False}, {"proj_size": 3}],
    ids=["plain", "both", "unbiased", "projected"],
)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_options(cell: str, options: dict[str, Any], shape: tuple[int, ...], starts: str) -> None:
    if cell == "GRU" and "proj_size" in options:
        pytest.skip("a GRU has no projection")
    module = make(cell, "pad", **options)
    for states in (True, False):
        data = batch(module, shape, starts, states)
        expected = run(module, data)
        with torchrl.enabled():
            assert_close(run(module, data), expected)
            assert_close(run(fused_rnn.convert(module), data), expected)
        fused_rnn.revert(module)


@pytest.mark.slow
@needs_scan
def test_what_scan_refuses() -> None:
    for options in ({"dropout": 0.5, "num_layers": 2}, {"proj_size": 3}, {"bidirectional": True}):
        module = make("LSTM", "scan", **options)
        with torchrl.enabled(), pytest.raises((NotImplementedError, ValueError), match="does not support"):
            run(module, batch(module, (3, 6), "inside"))


def test_dropout() -> None:
    """Between the layers while training, as TorchRL: other draws, none in eval mode."""
    module = make("GRU", "pad", num_layers=2, dropout=0.5)
    data = batch(module, (3, 6), "inside")
    with torchrl.enabled():
        first, second = run(module, data)[0], run(module, data)[0]
        assert not torch.equal(first, second)
        found = run(module.eval(), data)
    assert_close(found, run(module, data))


def test_backends(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("the tensors are on the CPU")
    module = make("LSTM", "pad")
    data = batch(module, (3, 6), "inside")
    expected = run(module, data)
    with use_backend(backend), torchrl.enabled():
        assert_close(run(module, data), expected)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_layers_of_theirs(cell: str) -> None:
    """LSTM and GRU written in Python, called by themselves; with a mask they stay what they are."""
    for batch_first in (True, False):
        layer = (LSTM if cell == "LSTM" else GRU)(4, 6, num_layers=2, batch_first=batch_first).double()
        x, h = torch.randn(5, 5, 4, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
        hx = (h, 2 * h) if cell == "LSTM" else h
        mask = torch.rand(5, 5) < 0.5
        calls = [(x, hx), (x, None), (x, hx, mask)]
        expected = [layer(*call) for call in calls]
        with torchrl.enabled():
            assert_close([layer(*call) for call in calls], expected)


def test_vmap() -> None:
    """torch.vmap over TorchRL's layer still works: it runs TorchRL's loop."""
    layer = LSTM(4, 6).double()
    x, h = torch.randn(3, 5, 7, 4, dtype=torch.float64), torch.zeros(3, 1, 5, 6, dtype=torch.float64)
    expected = torch.vmap(lambda x, h: layer(x, (h, h)))(x, h)
    with torchrl.enabled():
        assert_close(torch.vmap(lambda x, h: layer(x, (h, h)))(x, h), expected)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_it_is_our_call(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [make(cell, "pad"), make(cell, "python")]
    monkeypatch.setattr(getattr(nn, cell), "forward", None)
    monkeypatch.setattr(LSTM if cell == "LSTM" else GRU, "forward", None)
    with torchrl.enabled():
        for module in modules:
            run(module, batch(module, (3, 6), "inside"))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_single_steps_and_keywords(cell: str) -> None:
    """No recurrent mode; and the module called by keywords, without a TensorDict."""
    module = make(cell, "pad")
    data = batch(module, (3, 6), "inside")
    step = data[:, 0]
    plain = {key: data[key] for key in module.in_keys}
    expected = [module(step.clone())[key] for key in module.out_keys]
    with set_recurrent_mode(True):
        outputs = module(**plain)
    with torchrl.enabled():
        assert_close([module(step.clone())[key] for key in module.out_keys], expected)
        with set_recurrent_mode(True):
            assert_close(list(module(**plain)), list(outputs))


def test_errors_stay_theirs() -> None:
    module = make("LSTM", "pad")
    data = batch(module, (3, 6), "inside")
    del data["c"]
    for around in (contextlib.nullcontext(), torchrl.enabled()):
        with around, set_recurrent_mode(True), pytest.raises(RuntimeError, match=r"got type\(hidden0\)"):
            module(data.clone())
    del data["x"]
    with torchrl.enabled(), set_recurrent_mode(True), pytest.raises(KeyError, match="x"):
        module(data.clone())
