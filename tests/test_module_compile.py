"""Modules under torch.compile, torch.export and torch.func, on the backend chosen automatically for CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, random_state
from torch import nn

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._kinds import NUMBER_OF_MODE
from fused_rnn._recipe import Recipe, Rows, StepOptions


def example(module: nn.Module, *sizes: int) -> tuple[torch.Tensor, Any]:
    g = torch.Generator().manual_seed(0)
    dtype = next(module.parameters()).dtype
    shape = sizes[-1:] if isinstance(module, nn.RNNCellBase) else sizes
    x = torch.randn(*shape, module.input_size, generator=g, dtype=torch.float64).to(dtype)
    return x, random_state(module, sizes[-1], g, dtype=dtype)


@pytest.fixture
def allow_rnn() -> Iterator[None]:
    """Without it Dynamo skips every subclass of torch.nn.RNN, LSTM and GRU."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.parametrize("name", CLASSES)
def test_compile_in_one_graph(name: str, allow_rnn: None) -> None:
    kwargs = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    module = getattr(fused_rnn, name)(4, 6, **kwargs, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for sizes in ((3, 2), (3, 4)):
        x, hx = example(module, *sizes)
        for args in ((x,), (x, hx)):
            assert_close(_with_gradients(module, compiled(*args)), _with_gradients(module, module(*args)))


def _with_gradients(module: nn.Module, output: Any) -> tuple[Any, ...]:
    first = output if isinstance(output, torch.Tensor) else output[0]
    return output, torch.autograd.grad(first.square().sum(), list(module.parameters()))


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_without_a_flag(name: str) -> None:
    torch._dynamo.reset()
    module = getattr(fused_rnn, name)(4, 6)
    x, hx = example(module, 3)
    assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x, hx), module(x, hx))


@pytest.mark.parametrize("name", LAYERS)
def test_parametrized_module_compiles(name: str, allow_rnn: None) -> None:
    module = getattr(fused_rnn, name)(4, 6, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x, hx = example(module, 3, 2)
    assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x, hx), module(x, hx))


@pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension: an export unrolls the reference's loop")
@pytest.mark.parametrize("name", CLASSES)
def test_export_with_dynamic_sizes(name: str) -> None:
    module = getattr(fused_rnn, name)(4, 6).eval()
    steps, batch = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("batch", min=2, max=64)
    x, _ = example(module, 5, 2)
    dynamic = {0: batch} if name in CELLS else {0: steps, 1: batch}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    x, _ = example(module, 7, 3)
    assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name: str) -> None:
    """torch.func.vmap(grad) over the batch equals one gradient per sample."""
    module = getattr(fused_rnn, name)(4, 6, 2, dtype=torch.float64)
    parameters = {key: value.detach() for key, value in module.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, weights, (sample.unsqueeze(1),))[0].square().sum()

    x, _ = example(module, 5, 3)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.transpose(0, 1))
    for index in range(3):
        alone = torch.func.grad(loss)(parameters, x[:, index])
        assert_close([found[key][index] for key in parameters], [alone[key] for key in parameters])


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
def test_forward_mode_ad(kind: str, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tangents of dual tensors, against central differences in fp64; with options of steps by the reference."""
    monkeypatch.setattr(_backend, "_warned", set())
    module = getattr(fused_rnn, kind)(3, 4).double()
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64).unbind()
    with torch.set_grad_enabled(gradients), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent
        weights, cell = list(module.parameters()), NUMBER_OF_MODE["RNN_TANH" if kind == "RNN" else kind]
        rows = Rows(options=StepOptions(zoneout_h=0.1))
        with pytest.raises(NotImplementedError, match="no jvp of such a call: expected .* without zoneout"):
            torch.ops.fused_rnn.layer(dual, [], weights, rows.given(), Recipe(cell).packed | rows.bits, False)
        clipped = fused_rnn.LSTM(3, 4, state_clip=2.0).double()
        with pytest.warns(RuntimeWarning, match="forward-mode AD"):
            assert torch.autograd.forward_ad.unpack_dual(clipped(dual)[0]).tangent is not None
    with torch.no_grad():
        step = 1e-6
        expected = (module(x + step * tangent)[0] - module(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
