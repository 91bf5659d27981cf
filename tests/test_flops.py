"""FlopCounterMode counts for our layers and cells what it counts for torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, device_of, flatten, make_pair, random_state
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import use_backend

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def count(module: nn.Module, x: Any, hx: Any, backward: bool) -> tuple[int, int]:
    """(forward's, backward's) flops of one call."""
    with torch.backends.mkldnn.flags(enabled=False):
        with FlopCounterMode(display=False) as forward:
            out = module(x, hx)
        with FlopCounterMode(display=False) as counted:
            if backward:
                sum(t.sum() for t in flatten(out)).backward()
    return forward.get_total_flops(), counted.get_total_flops()


def compare(name: str, kwargs: dict[str, Any], x: Any, state: str, needs: str, ours_on: str) -> None:
    """Compares with torch.nn on the CPU, where all its products are ops of their own."""
    counts = []
    for module, device in zip(make_pair(name, 4, 6, **kwargs), (ours_on, "cpu"), strict=True):
        module.requires_grad_("weights" in needs).to(device)
        data = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        data = data.detach().to(device).requires_grad_("x" in needs)
        packed = isinstance(x, nn.utils.rnn.PackedSequence)
        input = nn.utils.rnn.PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices) if packed else data
        batch = int(x.batch_sizes[0]) if packed else x.shape[0 if x.dim() == 2 or kwargs.get("batch_first") else 1]
        hx = None
        if state != "none":
            hx = random_state(module, batch, torch.Generator().manual_seed(0), dtype=torch.float32, device=device)
            for tensor in flatten(hx):
                tensor.requires_grad_(state == "grad")
        counts.append(count(module, input, hx, bool(needs) or state == "grad"))
    assert counts[0] == counts[1] and counts[0][0] > 0, (name, kwargs, state, needs, counts)


NEEDS = ("", "weights", "x", "weights and x")


@pytest.mark.parametrize("name", LAYERS)
def test_layers(device: str, name: str) -> None:
    kinds = [{"bias": False}, {"num_layers": 2, "bidirectional": True}]
    kinds += [{"proj_size": 3, "num_layers": 2, "bidirectional": True}] if name == "LSTM" else []
    for kwargs in kinds:
        for steps in (1, 3):
            for state in ("none", "given", "grad"):
                for needs in NEEDS:
                    compare(name, kwargs, torch.randn(steps, 3, 4), state, needs, device)
    compare(name, {"batch_first": True}, torch.randn(3, 5, 4), "none", "weights and x", device)


@pytest.mark.parametrize("name", LAYERS)
def test_packed(device: str, name: str) -> None:
    """Rows of steps that differ: the first step of each direction has its own number of them."""
    x = pack_sequence([torch.randn(length, 4) for length in (2, 5, 3)], enforce_sorted=False)
    for kwargs in ({}, {"bidirectional": True, "num_layers": 2}):
        for state in ("none", "grad"):
            for needs in ("weights", "weights and x"):
                compare(name, kwargs, x, state, needs, device)


@pytest.mark.parametrize("name", CELLS)
def test_cells(device: str, name: str) -> None:
    for kwargs in ({}, {"bias": False}):
        for state in ("none", "given", "grad"):
            for needs in NEEDS:
                compare(name, kwargs, torch.randn(3, 4), state, needs, device)


@pytest.mark.parametrize("name", CLASSES)
def test_table_by_module_and_under_inference_mode(backend: str, name: str) -> None:
    """The count stands under the module's name; inference mode, and the meta device change nothing of it."""
    device = device_of(backend)
    model = nn.ModuleDict({"rnn": getattr(fused_rnn, name)(4, 6, device=device)})
    x = torch.randn((3, 4) if name in CELLS else (5, 3, 4), device=device)
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[name.removesuffix("Cell")]
    expected = 2 * x.shape[:-1].numel() * gates * 6 * (4 + 6)
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        model["rnn"](x)
    assert counter.get_total_flops() == expected
    assert sum(counter.get_flop_counts()[name].values()) == expected
    with use_backend(backend), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model["rnn"](x)
    assert counter.get_total_flops() == expected
    if backend == "cpu":
        meta = getattr(fused_rnn, name)(4, 6, device="meta")
        with use_backend(None), FlopCounterMode(display=False) as counter:
            meta(x.to("meta"))
        assert counter.get_total_flops() == expected


def test_double_backward_is_counted(device: str) -> None:
    """Gradients that are differentiated again come from torch's own products."""
    layer = fused_rnn.GRU(4, 6, device=device)
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    y = layer(x)[0].sum()
    with FlopCounterMode(display=False) as counter:
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        first = counter.get_total_flops()
        grad.square().sum().backward()
    assert 0 < first < counter.get_total_flops()


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_gradient_penalty(name: str) -> None:
    """Products of all rows with a matrix of weights: of the scan of tangents, of both halves of backward, of all results."""
    module, steps, batch, size = getattr(fused_rnn, name)(6, 6), 3, 2, 6
    x = torch.randn(steps, batch, size, requires_grad=True)
    y = module(x)[0]
    with FlopCounterMode(display=False) as counted:
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        first = counted.get_total_flops()
        grad.square().sum().backward()
    product = 2 * batch * module.weight_hh_l0.numel()  # of one step
    assert first == (2 * steps - 1) * product
    # v_x W_ih, h' W_hh; d W_hh and d' W_hh; d' W_ih, two of d, d' with x, v_x, and two of them with h, h'
    assert counted.get_total_flops() - first == (2 * steps + 2 * (steps - 1) + 5 * steps) * product
