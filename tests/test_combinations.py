"""What layers take beyond torch.nn's arguments, together: ids, options of steps, kept states, per-sample gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_layers import assert_near
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import fused_rnn
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

STEPS, BATCH, CLASSES, HIDDEN = 7, 4, 5, 6
OPTIONS = {"zoneout": 0.3, "recurrent_dropout": 0.2, "state_clip": 0.2}
KINDS = [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN]


def ids() -> Tensor:
    return torch.randint(0, CLASSES, (STEPS, BATCH), generator=torch.Generator().manual_seed(3))


def one_hot() -> Tensor:
    return torch.nn.functional.one_hot(ids(), CLASSES).double()


def layer(kind: type, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(CLASSES, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64, **options)


def results(module: Any, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Outputs and gradients of a call whose masks begin at one seed."""
    torch.manual_seed(1)
    output, *last = module(x, **arguments)
    tensors = [output, *(t for state in last for t in (state if isinstance(state, tuple) else (state,)))]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors]
    grads = torch.autograd.grad(sum((t * w).sum() for t, w in zip(tensors, weights, strict=True)), list(module.parameters()))
    named = {f"result {i}": t for i, t in enumerate(tensors)}
    return named | dict(zip(dict(module.named_parameters()), grads, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"lengths": torch.tensor([7, 0, 3, 5])}, {"return_all_states": True}], ids=str)
@pytest.mark.parametrize("variant", ["state", "candidate"])
@pytest.mark.parametrize("kind", KINDS)
def test_options_with_kept_states(kind: type, variant: str, arguments: dict[str, Any]) -> None:
    """checkpoint=k has the same bits as a layer that keeps everything, with every option and with ids."""
    if kind is fused_rnn.RNN and variant == "candidate":
        pytest.skip("an RNN has no candidate")
    options = {**OPTIONS, "recurrent_dropout_variant": variant}
    for x in (one_hot(), ids()):
        want = results(layer(kind, **options), x, **arguments)
        for every in (1, 3, 20):
            for name, tensor in results(layer(kind, **options, checkpoint=every), x, **arguments).items():
                assert torch.equal(tensor, want[name]), f"{name}, checkpoint={every}"


@pytest.mark.parametrize("kind", KINDS)
def test_options_with_ids(kind: type) -> None:
    """Ids and their one-hot rows draw the same masks and give the same results."""
    want = results(layer(kind, **OPTIONS), one_hot())
    for name, tensor in results(layer(kind, **OPTIONS), ids()).items():
        assert_near(name, tensor, want[name], 1e-12)


def cell_results(module: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", [fused_rnn.LSTMCell, fused_rnn.GRUCell, fused_rnn.RNNCell])
def test_options_of_cells_with_ids(kind: type) -> None:
    module = kind(CLASSES, HIDDEN, dtype=torch.float64, zoneout=0.3, state_clip=0.2)
    assert_near("h", cell_results(module, ids()[0]), cell_results(module, one_hot()[0]), 1e-12)


@pytest.mark.parametrize("x", [one_hot(), ids()], ids=["one-hot", "ids"])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_sample(kind: type, options: dict[str, Any], x: Tensor) -> None:
    """vmap(grad) over the batch, in eval mode (zoneout is its expectation there), is a loop over the samples."""
    module = layer(kind, **options).eval()
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample.unsqueeze(1),))[0].pow(2).sum()

    found = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(BATCH):
        loss_of_sample = module(x[:, b : b + 1])[0].pow(2).sum()
        want = torch.autograd.grad(loss_of_sample, list(parameters.values()))
        for (name, tensor), one in zip(found.items(), want, strict=True):
            assert_near(name, tensor[b], one, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_of_weights(kind: type) -> None:
    """jvp by the weights of a call on ids, with options: against a difference quotient."""
    module = layer(kind, zoneout=0.3).eval()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    directions = {name: torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape) for name, p in parameters.items()}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (ids(),))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reference serves, and says so once a process
        _, found = jvp(output, (parameters,), (directions,))
    step = 1e-5
    ahead, behind = (output({n: p + sign * step * directions[n] for n, p in parameters.items()}) for sign in (1, -1))
    assert_near("tangent", found, (ahead - behind) / (2 * step), 1e-7)
