"""Each CUDA kernel family, forced, on the GPU that is there: values and gradients, repeatability, CUDA graphs, TF32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, make_data
from settings import Setting
from test_layers import assert_near, call, check_not_a_number_ends_with_a_reset, results_and_gradients
from torch import Tensor

import fused_rnn
from fused_rnn import use_backend
from fused_rnn._explain import DEVICES

C = pytest.importorskip("fused_rnn._C", reason="the extension is not built")
pytestmark = pytest.mark.gpu
FAMILIES = ("step", "grid", "cluster", "block", "gemm")
CELLS = ("RNN_TANH", "GRU", "LSTM")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases() -> Iterator[Case]:
    for cell in CELLS:
        for dtype in DTYPES:
            for ragged in ("dense", "lengths", "packed"):
                yield Case(cell, steps=7, batch=9, input_size=5, hidden=33, ragged=ragged, dtype=dtype, resets=True)
            yield Case(cell, steps=7, batch=9, input_size=5, hidden=33, bidirectional=True, dtype=dtype, states=False)
            yield Case(cell, steps=7, batch=9, input_size=5, hidden=34, ragged="packed", dtype=dtype, resets=True)
            yield Case(cell, steps=12, batch=17, input_size=64, hidden=256, bidirectional=True, layers=2, dtype=dtype)
            yield Case(cell, steps=3, batch=130, input_size=16, hidden=100, ragged="lengths", dtype=dtype)
        yield Case(cell, steps=9, batch=16, input_size=32, hidden=768, dtype=torch.float16)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, setting: Setting) -> str:
    setting("FUSED_RNN_PLAN", request.param)
    return request.param


def plans(case: Case, family: str, device: dict[str, int], tf32: bool) -> list[dict[str, Any]]:
    """Of forward and backward; ValueError with the planner's reason where the family cannot serve the case."""
    problem = {
        "cell": case.cell.lower(), "dtype": str(case.dtype).removeprefix("torch."), "T": case.steps, "B": case.batch,
        "I": case.input_size, "H": case.hidden, "D": case.directions, "ragged": case.ragged != "dense", "training": True,
    }  # fmt: skip
    return [C.plan(device=device, allow_tf32=tf32, backward=b, forced=family, **problem) for b in (False, True)]


def skip_unless_served(case: Case, family: str) -> None:
    """Skips with the planner's reason where the family cannot serve the case on this GPU."""
    try:
        plans(case, family, C.cuda_device(torch.cuda.current_device()), torch.backends.cudnn.allow_tf32)
    except ValueError as reason:
        pytest.skip(f"needs another GPU: {reason}")


def kernels(plan: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What differs in the code that runs: tiles, arithmetic; several tiles in turn; weights beyond the registers."""
    if held := plan.get("persistent"):
        units = 0 if plan["family"] == "block" else held["units"]
        return [(held["math"], units, held["row_tiles"] > 1, held["weight_bytes_in_smem"] > 0, held["launches"] > 1)]
    if plan["products"]:  # cuBLAS takes kernels by sizes and by how rows are aligned
        sizes = [(k["grid"][0] > 1, min(k["grid"][1] // 4, 2)) for k in plan["kernels"]]
        return [(k["name"], k["math"], *size) for k, size in zip(plan["kernels"], sizes, strict=True)]
    return [(k["name"], k["math"], k["tile"]) for k in plan["kernels"]]


def every_kernel() -> Iterator[tuple[Case, str, bool]]:
    """(case, family, TF32): the smallest sizes, of these, with which an H100 runs each of its kernels."""
    sizes = itertools.product(
        (17, 33, 66, 100, 130, 200, 235, 256, 300, 390, 512, 640, 768, 1026, 1537, 2048), (1, 9, 17, 64, 130, 256, 400)
    )
    arithmetic = ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False))
    in_order = sorted(sizes, key=lambda size: size[0] * size[0] * size[1])
    for family, cell, (dtype, tf32) in itertools.product(FAMILIES, CELLS, arithmetic):
        seen: set[tuple[Any, ...]] = set()
        for hidden, batch in in_order:
            case = Case(cell, steps=4, batch=batch, input_size=8, hidden=hidden, ragged="lengths", dtype=dtype)
            try:
                of_both = plans(case, family, DEVICES["H100"], tf32)
            except ValueError:
                continue
            found = {(backward, kernel) for backward, plan in enumerate(of_both) for kernel in kernels(plan)}
            if not found <= seen:
                seen |= found
                yield case, family, tf32


def check_against_fp64(case: Case) -> None:
    data = make_data(case, "cuda")
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    with use_backend("cuda"):
        results, grads = results_and_gradients(case, data)
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    tf32 = case.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    of_dtype = torch.float16 if tf32 else case.dtype  # both have 10 bits of mantissa
    for index, (actual, want) in enumerate(zip(results, expected, strict=True)):
        assert_near(f"result {index}", actual, want, OUTPUT_TOLERANCE[of_dtype] * growth)
    for index, (actual, want) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_near(f"gradient {index}", actual, want, GRADIENT_TOLERANCE[of_dtype] * growth)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_against_fp64(case: Case, family: str) -> None:
    skip_unless_served(case, family)
    check_against_fp64(case)


@pytest.mark.parametrize(("case", "family", "tf32"), list(every_kernel()), ids=str)
def test_every_kernel(case: Case, family: str, tf32: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting("FUSED_RNN_PLAN", family)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    skip_unless_served(case, family)
    check_against_fp64(case)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_ends_with_a_reset(cell: str, dtype: torch.dtype, family: str) -> None:
    case = Case(cell, steps=5, batch=17, input_size=5, hidden=66, resets=True, dtype=dtype)
    skip_unless_served(case, family)
    check_not_a_number_ends_with_a_reset(case, "cuda")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("hidden", "dtype"), [(1024, torch.float16), (512, torch.float32)], ids=str)
def test_cheapest_families(cell: str, hidden: int, dtype: torch.dtype, setting: Setting) -> None:
    """Sizes at which the cost model takes one family forward and another backward on an H100."""
    setting("FUSED_RNN_PLAN", "cheapest")
    check_against_fp64(Case(cell, steps=12, batch=64, input_size=64, hidden=hidden, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_launches_are_bitwise_equal(cell: str, dtype: torch.dtype, family: str) -> None:
    case = Case(cell, steps=20, batch=17, input_size=33, hidden=130, bidirectional=True, ragged="lengths", dtype=dtype)
    skip_unless_served(case, family)
    data = make_data(case, "cuda")

    def everything() -> list[Tensor]:
        results, grads = results_and_gradients(case, data)
        return [*results, *grads]

    with use_backend("cuda"):
        first = [t.detach().clone() for t in everything()]
        different = torch.zeros(len(first), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            different += torch.stack([(a != b).any() for a, b in zip(first, everything(), strict=True)])
    assert different.tolist() == [0] * len(first)


@pytest.mark.parametrize("cell", CELLS)
def test_captured_in_a_graph(cell: str, family: str) -> None:
    """Forward of a network of two layers, and training of it: captured once, replayed on another input."""
    case = Case(cell, steps=11, batch=9, input_size=16, hidden=64, layers=2, dtype=torch.float16)
    skip_unless_served(case, family)
    first, second = make_data(case, "cuda", seed=0), make_data(case, "cuda", seed=1)
    second.weights = first.weights
    with use_backend("cuda"):
        expected, expected_grads = results_and_gradients(case, second)
        expected = [t.detach().clone() for t in (*expected, *expected_grads)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                results_and_gradients(case, first)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results, grads = results_and_gradients(case, first)
        with torch.no_grad():
            for name in ("input", "h0", "c0", "dy", "dh_n", "dc_n"):
                target, source = getattr(first, name), getattr(second, name)
                if target is not None:
                    target.copy_(source)
        graph.replay()
    torch.cuda.synchronize()
    # Not bitwise: cuBLAS may take another algorithm while a graph is captured.
    for index, (actual, want) in enumerate(zip([*results, *grads], expected, strict=True)):
        assert_near(f"tensor {index}", actual, want, GRADIENT_TOLERANCE[case.dtype])


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_follows_torchs_switch(cell: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 bits of mantissa in the products: an error between those of fp32 and fp16."""
    case = Case(cell, steps=7, batch=9, input_size=64, hidden=128)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with TF32")
    data = make_data(case, "cuda")
    with use_backend("reference"):
        expected = call(case, data.to(torch.float64))[0].detach()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    skip_unless_served(case, family)
    with use_backend("cuda"), torch.no_grad():
        result = call(case, data)[0]
    module = fused_rnn.LSTM(64, 128, device="cuda")
    plan = fused_rnn.explain(module, data.input.detach(), show=False).layers[0].forward
    assert plan.kernels[0].math == "tf32"
    error = float((result.double() - expected).abs().max())
    assert 1e-6 < error < OUTPUT_TOLERANCE[torch.float16]
