"""Pairs of a fused_rnn module and torch.nn's with the same weights, and how tests compare them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn

# Comparisons are strict: on CUDA, torch's TF32 for RNNs (on by default, and followed by ours) off on both sides.
torch.backends.cudnn.allow_tf32 = False

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
CLASSES = LAYERS + CELLS

# Largest difference allowed between two correct implementations, relative to the largest value compared (at least 1): both
# round differently at every step, so twice the tolerance that each has against float64 (tests/cases.py).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def make_pair(name: str, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's), each built from the same seed and nothing copied between them."""
    modules = []
    for namespace in (fused_rnn, nn):
        torch.manual_seed(seed)
        modules.append(getattr(namespace, name)(*args, **kwargs))
    return modules[0], modules[1]


def random_state(module: nn.Module, batch: int | None, generator: torch.Generator, **kwargs: Any) -> Any:
    """A random hx for a layer or a cell; batch None: unbatched."""

    def randn(*shape: int | None) -> Tensor:
        sizes = [size for size in shape if size is not None]
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(**kwargs)

    if isinstance(module, nn.RNNCellBase):
        states = [randn(batch, module.hidden_size) for _ in range(2)]
        return tuple(states) if isinstance(module, nn.LSTMCell) else states[0]
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, randn(rows, batch, module.hidden_size)) if module.mode == "LSTM" else h


def flatten(value: Any) -> list[Tensor]:
    """Every tensor of a result: nested tuples, and the data of packed sequences."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [t for item in value for t in flatten(item)]


def assert_close(ours: Any, theirs: Any, what: str = "") -> None:
    """Same structure, shapes, dtypes; values within TOLERANCE of the dtype."""
    a, b = flatten(ours), flatten(theirs)
    assert len(a) == len(b), what
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype, (what, index, x.shape, y.shape, x.dtype, y.dtype)
        if x.numel():
            scale = max(1.0, y.detach().abs().max().item())
            error = (x.detach().double() - y.detach().double()).abs().max().item() / scale
            assert error <= TOLERANCE[x.dtype], (what, index, error)


def gradients(module: nn.Module, output: Any, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random projection of all outputs with respect to inputs and parameters."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in flatten(output):
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        total = total.to(tensor.device) + (tensor * weight).sum().double()
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, [*inputs, *parameters], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, [*inputs, *parameters], strict=True)]


def compare(ours: nn.Module, theirs: nn.Module, input: Any, hx: Any = None, what: str = "") -> None:
    """Outputs, last states, and gradients of input, hx and every parameter."""
    results = []
    for module in (ours, theirs):
        x = _leaf(input)
        h = None if hx is None else tuple(map(_leaf, hx)) if isinstance(hx, tuple) else _leaf(hx)
        output = module(x) if h is None else module(x, h)
        results.append((output, gradients(module, output, [*flatten(x), *flatten(h)])))
    assert_close(results[0][0], results[1][0], f"{what} outputs")
    assert_close(results[0][1], results[1][1], f"{what} gradients")
    if isinstance(input, nn.utils.rnn.PackedSequence):
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            a, b = (getattr(result[0][0], field) for result in results)
            assert (a is None and b is None) or torch.equal(a, b), (what, field)


def _leaf(value: Any) -> Any:
    """A leaf that requires grad with the same values and strides."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        data = value.data.detach().clone().requires_grad_()
        return nn.utils.rnn.PackedSequence(data, value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def raised(call: Callable[[], Any]) -> tuple[type[BaseException] | None, str]:
    """(type, message) of what a call raises; (None, "") if it returns."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def warned(call: Callable[[], Any]) -> list[tuple[type[Warning], str]]:
    """Category and text of every warning of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(w.category, str(w.message)) for w in caught]
