"""sb3-contrib's recurrent policies on our kernels against themselves.

The packages are optional (``pip install '.[real-models]'``); without them the tests skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_pairs import assert_close
from test_real_models import hidden_velocity_cartpole, report
from torch import Tensor, nn

import fused_rnn
from fused_rnn import use_backend
from fused_rnn.integrations import sb3

sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs the package sb3-contrib")
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy  # noqa: E402

ORIGINAL = RecurrentActorCriticPolicy.__dict__["_process_sequence"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    assert RecurrentActorCriticPolicy.__dict__["_process_sequence"] is ORIGINAL


def run(layer: nn.LSTM, steps: int, batch: int, starts: Tensor, leaf: bool = True) -> list[Any]:
    """Outputs, states and gradients of what a policy calls, by its own name."""
    torch.manual_seed(1)
    x = torch.randn(batch * steps, layer.input_size, dtype=torch.float64, requires_grad=leaf)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    states = [torch.randn(layer.num_layers, batch, size, dtype=torch.float64, requires_grad=leaf) for size in sizes]
    output, last = RecurrentActorCriticPolicy._process_sequence(x, (states[0], states[1]), starts, layer)
    layer.zero_grad()
    (output.square().sum() + (last[0] * last[1].sum()).sum()).backward()
    return [output, *last, x.grad, *(state.grad for state in states), *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": False}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("starts", ["none", "first", "inside", "everywhere"])
def test_same_as_the_loop(backend: str, starts: str, options: dict[str, Any]) -> None:
    if backend == "cuda":
        pytest.skip("the tensors are on the CPU")
    steps, batch = 7, 5
    torch.manual_seed(0)
    layer = nn.LSTM(4, 6, dtype=torch.float64, **options)
    begins = {"none": torch.zeros(batch, steps), "everywhere": torch.ones(batch, steps)}.get(
        starts, (torch.rand(batch, steps) < 0.3).float()
    )
    if starts == "first":
        begins = torch.zeros(batch, steps)
        begins[:, 0] = 1
    expected = run(layer, steps, batch, begins.flatten())
    with use_backend(backend), sb3.enabled():
        found = run(layer, steps, batch, begins.flatten())
        fused = run(fused_rnn.convert(layer), steps, batch, begins.flatten())
    assert_close(found, expected)
    assert_close(fused, expected)


def test_no_call_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the kernels, whatever episodes start; T = 1 as in the collection of experience."""
    layer = nn.LSTM(4, 6, dtype=torch.float64)
    monkeypatch.setattr(nn.LSTM, "forward", None)
    with sb3.enabled():
        for steps in (1, 7):
            run(layer, steps, 3, torch.ones(3 * steps))


@pytest.mark.parametrize("kind", ["hook", "subclass", "bidirectional"])
def test_what_stays_theirs(kind: str) -> None:
    class Subclass(nn.LSTM):
        pass

    layer = Subclass(4, 6) if kind == "subclass" else nn.LSTM(4, 6, bidirectional=kind == "bidirectional")
    layer.double()
    calls = []
    starts = torch.zeros(3 * 5)
    starts[7] = 1
    groups = 2 if kind == "bidirectional" else 1
    x, h = torch.randn(15, 4, dtype=torch.float64), torch.randn(groups, 3, 6, dtype=torch.float64)
    if kind == "hook":
        layer.register_forward_hook(lambda *args: calls.append(1))
    expected = RecurrentActorCriticPolicy._process_sequence(x, (h, h), starts, layer)
    with sb3.enabled():
        found = RecurrentActorCriticPolicy._process_sequence(x, (h, h), starts, layer)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(calls) == (10 if kind == "hook" else 0)


def trained(**policy: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after 128 steps of CartPole without its velocities: 4 rounds of 32, 3 epochs each."""
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(hidden_velocity_cartpole, n_envs=2, seed=0)
    agent = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", envs, n_steps=32, n_epochs=3, batch_size=32, seed=0, device="cpu", policy_kwargs=policy
    )
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.learn(256)
    return before, agent.policy.state_dict()


@pytest.mark.parametrize(
    "policy",
    [
        {"lstm_hidden_size": 32},
        {"lstm_hidden_size": 16, "n_lstm_layers": 2, "shared_lstm": True, "enable_critic_lstm": False},
    ],
    ids=["two", "shared"],
)
def test_training(policy: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """The same parameters as with sb3-contrib's loop, to 1e-4."""
    before, expected = trained(**policy)
    with sb3.enabled():
        _, found = trained(**policy)
    error = max((found[name] - expected[name]).abs().max().item() for name in expected)
    moved = max((before[name] - expected[name]).abs().max().item() for name in expected)
    report(request, f"RecurrentPPO, {policy}: parameters moved by up to {moved:.1e}, difference {error:.1e}")
    assert moved > 1e-3 and error < 1e-4
