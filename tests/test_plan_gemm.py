"""Family gemm of the planner: a candidate wherever cuBLAS has its products, expected to beat `step` at large batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fused_rnn
from fused_rnn import _settings
from fused_rnn._explain import DEVICES
from fused_rnn.tuning import cases

if _settings.extension is None:
    pytest.skip("needs the extension, which plans", allow_module_level=True)


def plan(device: str = "H100", **changed: Any) -> dict[str, Any]:
    sizes = {"cell": "lstm", "dtype": "bfloat16", "T": 256, "B": 512, "I": 1024, "H": 1024, "training": True, **changed}
    result: dict[str, Any] = _settings.extension.plan(device=DEVICES[device], **sizes)  # type: ignore[union-attr]
    return result


def us(**changed: Any) -> tuple[float, float, float]:
    """Microseconds of forward and backward of a step, by gemm, step and the least of cuDNN."""
    families = [
        [plan(**changed, backward=b, forced=f)["us_per_step"] for b in (False, True)] for f in ("gemm", "step", "cudnn")
    ]
    gemm, step, cudnn = (sum(both) for both in families)
    return gemm, step, cudnn


LARGE = [
    ({"B": 256}, (0.9, 1.0)),
    ({"B": 512}, (0.75, 0.9)),
    ({"B": 1024}, (0.7, 0.8)),
    ({"B": 256, "dtype": "float32", "allow_tf32": True}, (0.75, 0.9)),
    ({"B": 512, "dtype": "float32", "allow_tf32": True}, (0.65, 0.8)),
    ({"B": 1024, "cell": "gru"}, (0.7, 0.8)),
    ({"B": 512, "cell": "rnn_tanh", "dtype": "float32", "allow_tf32": True}, (0.6, 0.8)),
]


@pytest.mark.parametrize(("problem", "share"), LARGE, ids=str)
def test_expected_at_large_batches(problem: dict[str, Any], share: tuple[float, float]) -> None:
    """Of the time that `step` takes; cuDNN, whose pointwise kernels the model does not have, takes no more."""
    gemm, step, cudnn = us(**problem)
    assert share[0] < gemm / step < share[1] and cudnn < gemm


@pytest.mark.parametrize("problem", [{"B": 8, "H": 256}, {"B": 64, "H": 256}, {"B": 64}, {"B": 512, "H": 512}], ids=str)
def test_slower_than_step_where_steps_are_small(problem: dict[str, Any]) -> None:
    """Two launches a step, and sums that go through memory."""
    assert plan(**problem, forced="gemm")["us_per_step"] > plan(**problem, forced="step")["us_per_step"]


def test_it_is_offered_and_has_to_be_asked_for() -> None:
    result = plan()
    assert result["family"] == "step" and result["cheapest"] == "gemm"
    assert result["rejected"]["gemm"].startswith("never run on a GPU yet, so it is taken only when asked for")
    assert plan(forced="cheapest")["family"] == plan(preferred="gemm")["family"] == "gemm"
    assert "gemm" in plan(modified=True, ragged=True)["candidates"], "its kernels have the options of steps"


@pytest.mark.parametrize(
    ("changed", "kernels", "products"),
    [
        ({}, ["forward"], 1),
        ({"D": 2}, ["forward"], 2),
        ({"modified": True}, ["forward_modified"], 1),
        ({"P": 512}, ["forward", "project"], 2),
        ({"backward": True}, ["state_grad", "backward"], 1),
        ({"backward": True, "modified": True}, ["state_grad", "backward_modified"], 1),
        ({"backward": True, "P": 512, "D": 2}, ["state_grad", "backward"], 4),
    ],
    ids=str,
)
def test_kernels_and_products(changed: dict[str, Any], kernels: list[str], products: int) -> None:
    result = plan(forced="gemm", **changed)
    assert [kernel["name"] for kernel in result["kernels"]] == kernels and result["products"] == products
    for kernel in result["kernels"]:
        assert kernel["tile"] == "pointwise" and kernel["math"] == "bf16" and kernel["stages"] == 0
        assert kernel["grid"][0] * kernel["batch"] >= 512 and kernel["grid"][2] == changed.get("D", 1)
    assert f"a step is {products} product{'s' * (products > 1)} by cuBLAS, " in result["reason"]


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({}, 0),
        ({"ragged": True}, 512 * 1024 * 2),  # the states that a step multiplies
        ({"modified": True}, 512 * 1024 * 2),
        ({"backward": True, "modified": True}, 0),
        ({"backward": True, "ragged": True}, 4 * 512 * 1024 * 2),  # the gradients of the gates
    ],
    ids=str,
)
def test_workspace(changed: dict[str, Any], rows: int) -> None:
    """Beside what step has: sums of a step in float32, and rows that do not lie beside each other."""
    sums = (1 if changed.get("backward") else 4) * 512 * 1024 * 4
    assert (
        plan(forced="gemm", **changed)["workspace_bytes"] - plan(forced="step", **changed)["workspace_bytes"] == sums + rows
    )


def test_bfloat16_needs_an_ampere() -> None:
    assert plan("T4")["rejected"]["gemm"] == "has no products of bfloat16 below compute capability 8.0"
    assert plan("T4", dtype="float16", forced="gemm")["family"] == "gemm"


def test_verification_runs_each_of_its_kernels() -> None:
    """Every cell and arithmetic, float64 included: one block and several, rows that are aligned and rows that are not."""
    found: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
    for case in cases.cases("gemm", DEVICES["H100"]):
        found.setdefault((case.kind.name, case.dtype, case.tf32), set()).add((case.B, case.H))
    assert len(found) == len(cases.KINDS) * len(cases.ARITHMETIC)
    assert set(map(frozenset, found.values())) == {frozenset(itertools.product((1, 9), (17, 130, 256)))}


def test_explained(setting: Any) -> None:
    setting("FUSED_RNN_PLAN", "gemm")
    lstm = fused_rnn.LSTM(1024, 1024, dtype=torch.bfloat16, device="meta")
    x = torch.empty(100, 512, 1024, dtype=torch.bfloat16, device="meta")
    (layer,) = fused_rnn.explain(lstm, x, device="H100", training=True, show=False).layers
    for one in (layer.forward, layer.backward):
        assert one is not None and one.family == "gemm" and "by cuBLAS" in one.text
    assert layer.backward is not None
    assert (layer.forward.launches, layer.backward.launches) == (200, 201)
