"""Family ``single`` of a formula from the module to the kernels, on the simulated device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[2])]
import build  # noqa: E402

EXTENSION = build.load()  # before fused_rnn is imported

from formulas import Everything  # noqa: E402
from settings import Setting  # noqa: E402
from settings import setting as setting  # noqa: E402
from test_layers import assert_near  # noqa: E402

from fused_rnn import use_backend  # noqa: E402
from fused_rnn.formula import Layer, serve  # noqa: E402

PLAN = (1, -1, 1, 4, 18, 2, 2)  # dtype, device, T, B, H, D, heads


@pytest.mark.parametrize("plan", ["", "step", "unverified", "ids"])
@pytest.mark.parametrize("training", [False, True])
def test_one_step(plan: str, training: bool, monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    """`single` serves one time step where it is verified, nothing else is forced, and the input has rows to read."""
    layer = Layer(Everything(), 4, 18, num_layers=2, bidirectional=True)
    EXTENSION.register_formula_on_device(layer.formula, str(build.formula_source().with_suffix(".kernels")))
    if plan != "unverified":
        EXTENSION.set_formula_family(layer.formula, 1, 90, "single", 2)
    setting("FUSED_RNN_PLAN", "step" if plan == "step" else "")
    exact = Layer(Everything(), 4, 18, num_layers=2, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randint(4, (1, 4)) if plan == "ids" else torch.randn(1, 4, 8)[..., ::2]  # which has to be copied
    states = [torch.randn(4, 4, 18) for _ in range(3)]

    def run(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(training) for t in states]
        given = x if plan == "ids" else x.to(dtype).requires_grad_(training)
        with torch.set_grad_enabled(training):
            y, last = layer(given, tuple(leaves))
        results = [y, *last]
        if not training:
            return results
        wanted = [*leaves, *layer.parameters()] + [given] * (plan != "ids")
        return [*results, *torch.autograd.grad(sum(t.sum() for t in results), wanted)]

    with use_backend("reference"):
        expected = run(exact, torch.float64)
    monkeypatch.setattr(serve, "has_kernels", lambda *_: True)
    library = ctypes.CDLL(EXTENSION.__file__)
    before = library.torch_host_formula_launches()
    results = run(layer, torch.float32)
    assert library.torch_host_formula_launches() - before == 2 * (4 + training * 5)  # of each layer
    for index, (actual, want) in enumerate(zip(results, expected, strict=True)):
        assert_near(f"tensor {index}", actual, want, 1e-5 * max(1.0, want.abs().max().item()))
    text = EXTENSION.formula_plan_on_device(layer.formula, *PLAN, False)
    assert text.startswith("family single" if plan in ("", "ids") else "family step")
    reason = {"step": "step is forced", "unverified": "its kernels of this formula have not been verified"}.get(plan)
    assert reason is None or f"not single: {reason}" in text
    assert "family step" in EXTENSION.formula_plan_on_device(layer.formula, *PLAN, True)
