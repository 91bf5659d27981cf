"""Opacus's recurrent layers on our kernels against themselves: outputs, gradients, per-sample gradients, training.

The package is optional (``pip install '.[integrations]'``); without it the tests skip.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_pairs import assert_close
from torch import Tensor, nn

from fused_rnn import use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn.integrations import opacus as ours

MISSING = [name for name in ("opacus", "scipy", "opt_einsum") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs the packages {', '.join(MISSING)}", allow_module_level=True)
import opacus.layers  # noqa: E402
from opacus import GradSampleModule, PrivacyEngine  # noqa: E402
from opacus.layers.dp_rnn import DPLSTMCell, DPRNNBase  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # hooks on inputs that need no gradient, deprecations
    pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension"),
]
ORIGINAL = vars(DPRNNBase)["forward_layer"]
LAYERS = ["LSTM", "GRU", "RNN"]
B, T, INPUTS, H = 5, 7, 4, 6


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    assert vars(DPRNNBase)["forward_layer"] is ORIGINAL


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cells that ran by ours."""
    calls: list[int] = []
    original = ours._run

    def counting(kind: int, *args: Any) -> Any:
        calls.append(kind)
        return original(kind, *args)

    monkeypatch.setattr(ours, "_run", counting)
    return calls


class Model(nn.Module):
    """A recurrent layer and a read-out of its outputs and last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.out = nn.Linear(H * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Any, hx: Any = None) -> Any:
        y, last = self.rnn(x, hx)
        lasts = last if isinstance(last, tuple) else (last,)
        if isinstance(y, nn.utils.rnn.PackedSequence):
            y = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
        return self.out(y).tanh().sum(1), *(state.tanh().sum((0, 2)) for state in lasts)


def make(name: str, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(getattr(opacus.layers, f"DP{name}")(INPUTS, H, batch_first=True, **options)).double()


def run(model: nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Outputs, gradients of the states, and the gradients and per-sample gradients of the parameters."""
    outputs = model(x, hx)
    model.zero_grad()
    sum((i + 1) * output.square().sum() for i, output in enumerate(outputs)).backward()
    given = [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]
    states = [state.grad.clone() for state in given]
    for state in given:
        state.grad = None
    found = [*outputs, *states, *(p.grad.clone() for p in model.parameters())]
    return found + [p.grad_sample.clone() for p in model.parameters() if getattr(p, "grad_sample", None) is not None]


def states_of(name: str, groups: int = 1) -> Any:
    torch.manual_seed(2)
    made = [torch.randn(groups, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return tuple(made) if name == "LSTM" else made[0]


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "unbiased", "both"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_same(name: str, options: dict[str, Any], private: bool, called: list[int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    groups = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    model: nn.Module = make(name, **options)
    if private:
        model = GradSampleModule(model, loss_reduction="mean")
    for hx in (None, states_of(name, groups)):
        expected = run(model, x, hx)
        assert called == []
        with ours.enabled():
            found = run(model, x, hx)
        assert_close(found, expected)
        assert len(called) == groups
        called.clear()


def test_relu() -> None:
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    model = GradSampleModule(make("RNN", nonlinearity="relu"))
    expected = run(model, x)
    with ours.enabled():
        assert_close(run(model, x), expected)


@pytest.fixture
def default_float64() -> Iterator[None]:
    """Opacus's last states of packed input have torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_float64")
@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str) -> None:
    """Also with states; per-sample gradients have a row for each row of the batch."""
    torch.manual_seed(1)
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 7, 1, 5, 7]), batch_first=True, enforce_sorted=False)
    model = GradSampleModule(make(name, num_layers=2))
    for hx in (None, states_of(name, 2)):
        expected = run(model, packed, hx)
        with ours.enabled():
            assert_close(run(model, packed, hx), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_in_both_directions(name: str) -> None:
    """Against torch.nn: Opacus takes other steps for the last states of its reverse direction."""
    torch.manual_seed(1)
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 7, 1, 5, 7]), batch_first=True, enforce_sorted=False)
    layer = make(name, bidirectional=True).rnn
    theirs = getattr(nn, name)(INPUTS, H, batch_first=True, bidirectional=True).double()
    theirs.load_state_dict(layer.state_dict())
    expected = theirs(packed)
    with ours.enabled():
        found = layer(packed)
    assert_close([found[0].data, found[1]], [expected[0].data, expected[1]])


@pytest.mark.parametrize("name", LAYERS)
def test_each_sample(name: str) -> None:
    """The per-sample gradients are the gradients of each row by itself, of torch.nn's layer."""
    torch.manual_seed(1)
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    model = make(name)
    private = GradSampleModule(model, loss_reduction="sum")
    with ours.enabled():
        private.zero_grad()
        private(x)[0].square().sum().backward()
    layer = getattr(nn, name)(INPUTS, H, batch_first=True).double()
    layer.load_state_dict(model.rnn.state_dict())
    for row in range(B):
        layer.zero_grad()
        model.out(layer(x[row : row + 1])[0]).tanh().sum(1).square().sum().backward()
        cell = model.rnn.cells[0]
        samples = (cell.ih.weight, cell.hh.weight, cell.ih.bias, cell.hh.bias)
        assert_close([p.grad_sample[row] for p in samples], [p.grad for p in layer.parameters()])


def trained(name: str) -> list[Tensor]:
    """The parameters after an epoch of DP-SGD."""
    torch.manual_seed(3)
    model = Model(getattr(opacus.layers, f"DP{name}")(INPUTS, H, batch_first=True))
    data = torch.utils.data.TensorDataset(torch.randn(32, T, INPUTS), torch.randn(32, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(5),
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(private(x)[0], y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_training(name: str, called: list[int]) -> None:
    expected = trained(name)
    with ours.enabled():
        found = trained(name)
    assert len(called) == 4
    error = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    assert error < 1e-5


def test_without_gradients(called: list[int]) -> None:
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)
    model = make("LSTM")
    with torch.no_grad():
        expected = model(x)
        with ours.enabled():
            assert_close(model(x), expected)
    assert len(called) == 1


@pytest.mark.parametrize("kind", ["dropout", "derived", "reference"])
def test_what_stays_theirs(kind: str, called: list[int]) -> None:
    class Derived(DPLSTMCell):
        pass

    options: dict[str, Any] = {"dropout": 0.5, "num_layers": 2} if kind == "dropout" else {}
    model = make("LSTM", **options)
    if kind == "derived":
        model.rnn = DPRNNBase(Derived, INPUTS, H, batch_first=True).double()
    x = torch.randn(B, T, INPUTS, dtype=torch.float64)

    def found() -> list[Tensor]:
        torch.manual_seed(4)
        return run(model, x)

    expected = found()
    with ours.enabled(), use_backend("reference" if kind == "reference" else "cpu"):
        assert_close(found(), expected)
    assert called == []
    if kind == "dropout":
        with ours.enabled():
            model.eval()(x)
        assert len(called) == 2


def test_no_gradients_of_gradients() -> None:
    model = make("LSTM")
    x = torch.randn(B, T, INPUTS, dtype=torch.float64, requires_grad=True)
    with ours.enabled():
        (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
