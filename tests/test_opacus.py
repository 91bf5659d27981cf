"""Opacus: its ModuleValidator and GradSampleModule refuse our layers and cells, and say what to do; that then works.

The package is optional (``pip install '.[tools]'``).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close
from torch import Tensor, nn

import fused_rnn

MISSING = [name for name in ("opacus", "scipy", "opt_einsum") if importlib.util.find_spec(name) is None]
needs_opacus = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
pytestmark = pytest.mark.filterwarnings("ignore")  # hooks on inputs that need no gradient, deprecations


class Model(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.rnn, nn.RNNCellBase):
            return self.rnn(x)[0]
        h = torch.ones(x.shape[0], 6)
        out = self.rnn(x[:, 0], (h, h) if isinstance(self.rnn, nn.LSTMCell) else h)
        return out[0] if isinstance(out, tuple) else out


def make(namespace: Any, name: str) -> Model:
    return Model(getattr(namespace, name)(4, 6, **({} if name in CELLS else {"batch_first": True})))


@needs_opacus
@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_refused(name: str, subclass: bool) -> None:
    """Cells with a state got wrong gradients, the others an error that named nothing."""
    from opacus import GradSampleModule

    model = make(fused_rnn, name)
    if subclass:
        model.rnn.__class__ = type("Theirs", (type(model.rnn),), {})
    with pytest.raises(NotImplementedError, match=rf"fused_rnn\.{name} has no per-sample gradients"):
        GradSampleModule(model)
    assert not hasattr(model.rnn, "ft_compute_sample_grad")


@needs_opacus
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_message_says_works(name: str) -> None:
    """Opacus's layer takes the state_dict, and its gradients of each row are those of ours on that row alone."""
    import opacus.layers
    from opacus import GradSampleModule

    model, x = make(fused_rnn, name), torch.randn(3, 5, 4)
    layer = getattr(opacus.layers, f"DP{name}")(4, 6, batch_first=True)
    layer.load_state_dict(model.rnn.state_dict())
    private = GradSampleModule(Model(layer), loss_reduction="sum")
    private(x).square().sum().backward()
    names = [n.rpartition(".")[2] for n, _ in private.named_parameters()]
    for row in range(3):
        model.zero_grad()
        model(x[row : row + 1]).square().sum().backward()
        expected = [model.rnn.get_parameter(n).grad for n in names]
        assert_close([p.grad_sample[row] for p in private.parameters()], expected)


@needs_opacus
@pytest.mark.parametrize("name", CLASSES)
def test_validator(name: str) -> None:
    from opacus.validators import ModuleValidator, errors

    model = fused_rnn.convert(make(nn, name))
    (error,) = ModuleValidator.validate(model)
    assert f"fused_rnn.{name} has no per-sample gradients" in str(error)
    with pytest.raises(errors.UnsupportedModuleError):
        ModuleValidator.validate(model, strict=True)
    if name in ("LSTM", "GRU"):
        fixed = ModuleValidator.fix(model)
        assert type(fixed.rnn).__name__ == f"DP{name}" and ModuleValidator.validate(fixed) == []
        x = torch.randn(3, 5, 4)
        assert_close(fixed(x), model(x))


@needs_opacus
@pytest.mark.parametrize("first", ["opacus", pytest.param("fused_rnn", marks=pytest.mark.slow)])
def test_either_import_first(first: str) -> None:
    code = f"""
import {first}, fused_rnn, opacus
from torch import nn
model = fused_rnn.convert(nn.Sequential(nn.GRU(2, 3)))
print(len(opacus.validators.ModuleValidator.validate(model)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("name", CLASSES)
def test_the_attribute_that_opacus_sets(name: str) -> None:
    """Without Opacus: the same refusal."""
    module = getattr(fused_rnn, name)(4, 6)
    with pytest.raises(NotImplementedError, match="no per-sample gradients"):
        module.ft_compute_sample_grad = lambda *args: None
    assert not hasattr(module, "ft_compute_sample_grad")
