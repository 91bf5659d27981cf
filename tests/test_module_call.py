"""The quick way of a module's forward (csrc/torch/module_call.cpp): the general way's results, never taken unasked."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

LAYERS = ("LSTM", "GRU", "RNN")


def quick(module: nn.Module, *args: Any) -> Any:
    return _backend.extension.call_module(module, *args)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3}),
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_as_in_general(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    if "proj_size" in options and kind != "LSTM":
        pytest.skip("only an LSTM has a projection")
    module = getattr(fused_rnn, kind)(5, 7, **options).to(dtype)
    x = torch.randn(3, 2, 5, dtype=dtype)
    rows, batch = (4 if options.get("bidirectional") else 1), (3 if options.get("batch_first") else 2)
    h0 = torch.randn(rows, batch, options.get("proj_size", 7), dtype=dtype)
    hx: Any = (h0, torch.randn(rows, batch, 7, dtype=dtype)) if kind == "LSTM" else h0
    for states in (None, hx):
        with torch.no_grad():
            result, general = quick(module, x, states), module.forward(x, states)
        for a, b in zip(flat(result), flat(general), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride() and not a.requires_grad


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", LAYERS)
def test_cells_as_in_general(kind: str, bias: bool) -> None:
    module = getattr(fused_rnn, kind + "Cell")(5, 7, bias=bias)
    x, h, c = torch.randn(2, 5), torch.randn(2, 7), torch.randn(2, 7)
    for states in (None, (h, c) if kind == "LSTM" else h):
        with torch.inference_mode():
            result, general = quick(module, x, states), module.forward(x, states)
        for a, b in zip(flat(result), flat(general), strict=True):
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


@pytest.mark.parametrize("kind", [*LAYERS, *(kind + "Cell" for kind in LAYERS)])
def test_gradients_as_in_general(kind: str) -> None:
    module = getattr(fused_rnn, kind)(3, 4)
    x = torch.randn(*((2, 3) if kind.endswith("Cell") else (5, 2, 3)), requires_grad=True)
    leaves = [x, *module.parameters()]
    seen = []
    for result in (quick(module, x), module.forward(x)):
        tensors = flat(result)
        assert all(t.requires_grad for t in tensors)
        seen.append([*tensors, *torch.autograd.grad(sum(t.square().sum() for t in tensors), leaves)])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
    frozen = module.requires_grad_(False)
    assert flat(quick(frozen, x))[0].requires_grad and not flat(quick(frozen, x.detach()))[0].requires_grad


def test_nonlinearities() -> None:
    x, cell_x = torch.randn(2, 2, 3), torch.randn(2, 3)
    with torch.no_grad():
        for name in ("tanh", "relu", "identity"):
            layer, cell = fused_rnn.RNN(3, 4, nonlinearity=name), fused_rnn.RNNCell(3, 4, nonlinearity=name)
            assert torch.equal(quick(layer, x)[0], layer.forward(x)[0])
            assert torch.equal(quick(cell, cell_x), cell.forward(cell_x))
        cell.nonlinearity = "gelu"
        assert quick(cell, cell_x) is None


def test_long_calls_release_the_gil() -> None:
    """Beyond some ten microseconds of work, with the tensors owned: another thread may replace the weights meanwhile."""
    module, x = fused_rnn.GRU(64, 64), torch.randn(2000, 4, 64)
    seen = 0

    def count() -> None:
        nonlocal seen
        while not done.is_set():
            seen += 1
            module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().clone())
            time.sleep(0)

    done, interval = threading.Event(), sys.getswitchinterval()
    thread = threading.Thread(target=count)
    with torch.no_grad():
        expected = module.forward(x)[0]
        thread.start()
        sys.setswitchinterval(10)  # from here a thread gives the GIL away, it is not taken from it
        try:
            for _ in range(100):  # on a busy machine the other thread may find no processor during one call
                before = seen
                result = quick(module, x)[0]
                during = seen - before
                if during > 0:
                    break
        finally:
            sys.setswitchinterval(interval)
            done.set()
            thread.join()
    assert torch.equal(result, expected) and during > 0


def test_left_to_the_general_way() -> None:
    """Whatever else may want to see the call, or to raise."""
    module, x, h = fused_rnn.GRU(3, 4), torch.randn(2, 2, 3), torch.zeros(1, 2, 4)
    with torch.no_grad():
        assert quick(module, x, h) is not None
        for wrong in (x[0], x.double(), x[:, :, :2], x[:0], x.to("meta"), x.as_subclass(Subclass), x.to_sparse(), None, 3):
            assert quick(module, wrong) is None
        for wrong in (h[0], h.double(), h[:, :1], h.to("meta"), (h, h), 3):
            assert quick(module, x, wrong) is None
        for wrong in (h, (h,), [h, h], (h, None), (h, 3)):
            assert quick(fused_rnn.LSTM(3, 4), x, wrong) is None
        assert quick(module) is None and quick(module, x, h, h) is None
        assert quick(nn.GRU(3, 4), x) is None and quick(3, x) is None
        with torch.autocast("cpu"):
            assert quick(module, x) is None
        with Mode():
            assert quick(module, x) is None
        with torch.profiler.profile() as profile:
            assert quick(module, x) is None
            module(x)
        assert any(event.key == "fused_rnn::layer" for event in profile.key_averages())
        seen: list[Any] = []
        torch.func.jvp(lambda row: (seen.append(quick(module, row)), row)[1], (x,), (x,))
        with Mode():
            torch.func.vmap(lambda row: (seen.append(quick(module, row)), row)[1])(x.unsqueeze(0))
        for wrong in (x[0], x.double(), x[:, :, :2], x[:0]):
            torch.func.vmap(lambda row: (seen.append(quick(module, row)), row)[1])(wrong.unsqueeze(0))
        assert seen == [None] * 6
        torch.jit.trace(lambda row: (seen.append(quick(module, row)), row + 1)[1], x, check_trace=False)
        assert set(seen) == {None}
    pruned = fused_rnn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(pruned, "weight_ih_l0")
    with torch.no_grad():
        assert quick(pruned, x) is None
        pruned(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_under_transforms(kind: str) -> None:
    """The quick call, and its results and gradients, where forward would be called; a profile shows the layer."""
    module = getattr(fused_rnn, kind)(3, 4, num_layers=2)
    weights, x = dict(module.named_parameters()), torch.randn(5, 2, 1, 3)

    def loss(weights: dict[str, Tensor], x: Tensor, call: Any) -> Tensor:
        named = {f"module.{name}": weight for name, weight in weights.items()}
        result = torch.func.functional_call(Calling(module, call), named, (x,))
        return sum(t.square().sum() for t in flat(result))

    found = [
        torch.func.vmap(torch.func.grad(lambda w, x, call=call: loss(w, x, call), (0, 1)), (None, 1))(weights, x)
        for call in (quick, lambda module, x: module.forward(x))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    functional = [torch.func.functionalize(call)(x[:, :, 0]) for call in (lambda x: quick(module, x), module.forward)]
    torch.testing.assert_close(*functional, rtol=0, atol=0)
    with torch.no_grad(), torch.profiler.profile() as profile:
        torch.func.vmap(module, 1)(x)
    assert any(event.key == "fused_rnn::layer" for event in profile.key_averages())


class Calling(nn.Module):
    """A module that is called in a certain way."""

    def __init__(self, module: nn.Module, call: Any) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.module, x)


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward, with kwargs": lambda m, f: m.register_forward_hook(lambda m, a, k, y: f(), with_kwargs=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
    "global forward": lambda m, f: nn.modules.module.register_module_forward_hook(f),
    "global forward pre": lambda m, f: nn.modules.module.register_module_forward_pre_hook(f),
    "global full backward": lambda m, f: nn.modules.module.register_module_full_backward_hook(f),
    "global full backward pre": lambda m, f: nn.modules.module.register_module_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("module", (fused_rnn.GRU(3, 4), fused_rnn.GRUCell(3, 4)), ids=("layer", "cell"))
def test_hooks_are_called(module: nn.Module, kind: str) -> None:
    x = torch.randn(2, 3) if isinstance(module, fused_rnn.GRUCell) else torch.randn(2, 2, 3)
    seen: list[str] = []
    with torch.no_grad():
        handle = HOOKS[kind](module, lambda *args: seen.append(kind))
        assert quick(module, x) is None
        module(x)
        handle.remove()
        assert bool(seen) == ("forward" in kind)
        assert quick(module, x) is not None


class Doubled(fused_rnn.RNN):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        y, h = super().forward(input, hx)
        return 2 * y, h


class Renamed(fused_rnn.RNN):
    pass


def test_another_forward_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 2, 3)
    with torch.no_grad():
        assert quick(Renamed(3, 4), x) is not None
        doubled = Doubled(3, 4)
        assert quick(doubled, x) is None
        assert torch.equal(doubled(x)[0], 2 * fused_rnn.RNN.forward(doubled, x)[0])
        module = fused_rnn.RNN(3, 4)
        module.forward = lambda *args: "own"  # type: ignore[method-assign]
        assert module(x) == "own"
        compiled = fused_rnn.RNN(3, 4)
        compiled._compiled_call_impl = lambda *args: "compiled"  # type: ignore[assignment]
        assert compiled(x) == "compiled"
        with monkeypatch.context() as patch:
            patch.setattr(fused_rnn.RNN, "forward", lambda *args: "class")
            assert fused_rnn.RNN(3, 4)(x) == "class"
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__call__", lambda *args: "nn.Module")
            assert fused_rnn.RNN(3, 4)(x) == "nn.Module"
        module = fused_rnn.RNN(3, 4)
        assert quick(module, x) is not None
        assert torch.equal(module(input=x)[0], module(x)[0])
        with fused_rnn.use_backend("reference"):
            torch.testing.assert_close(module(x)[0], quick(module, x)[0])


def test_a_mode_is_no_nonlinearity() -> None:
    """A cell whose nonlinearity is the name of a layer's mode is refused, as without the quick call."""
    cell = fused_rnn.RNNCell(3, 4)
    cell.nonlinearity = "RNN_TANH"
    with torch.no_grad(), pytest.raises(RuntimeError, match="Unknown nonlinearity"):
        cell(torch.zeros(2, 3))
