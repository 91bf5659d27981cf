"""convert on models that people ship: a voice-activity detector with its weights, an agent learning by reinforcement.

The packages are optional (``pip install '.[real-models]'``); a test skips by the name of the one it lacks.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_pairs import device_of
from torch import Tensor, nn

import fused_rnn
from fused_rnn import use_backend


def report(request: pytest.FixtureRequest, text: str) -> None:
    """Prints a measured figure, also where output is captured."""
    manager = request.config.pluginmanager.get_plugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print(f"\n{text}")


# --- silero-vad: a convolutional encoder, one LSTMCell(128, 128) that remembers across chunks, a read-out ---


class SileroBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.reparam_conv = nn.Conv1d(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_conv(x).relu()


class SileroVad(nn.Module):
    """silero-vad's network in plain modules, with the names of its TorchScript model; rate 16000 or 8000 Hz.

    forward: a chunk [B, 512] ([B, 256]) -> probability of speech [B, 1]. Keeps the last samples and the cell's state.
    """

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.n_fft, self.context_size = (256, 64) if rate == 16000 else (128, 32)
        bins = self.n_fft // 2 + 1
        self.stft = nn.Module()
        self.stft.register_buffer("forward_basis_buffer", torch.empty(2 * bins, 1, self.n_fft))
        sizes = ((bins, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.Sequential(*(SileroBlock(*size) for size in sizes))
        self.decoder = nn.Module()
        self.decoder.rnn = nn.LSTMCell(128, 128)
        self.decoder.decoder = nn.Sequential(nn.Dropout(0.1), nn.ReLU(), nn.Conv1d(128, 1, 1), nn.Sigmoid())
        self.context: Tensor | None = None
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, chunk: Tensor) -> Tensor:
        if self.context is None:
            self.context = chunk.new_zeros(len(chunk), self.context_size)
        x = torch.cat([self.context, chunk], 1)
        self.context = x[:, -self.context_size :]
        x = nn.functional.pad(x, (0, self.n_fft // 4), "reflect").unsqueeze(1)
        x = nn.functional.conv1d(x, self.stft.forward_basis_buffer, stride=self.n_fft // 2)
        real, imaginary = x.chunk(2, dim=1)
        x = self.encoder((real.square() + imaginary.square()).sqrt()).squeeze(-1)
        self.state = self.decoder.rnn(x, self.state)
        return self.decoder.decoder(self.state[0].unsqueeze(-1)).mean(-1)


def silero_path() -> Path:
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package silero-vad")
    return Path(spec.origin).parent / "data" / "silero_vad.jit"


def synthetic_speech(rate: int, samples: int) -> Tensor:
    """Syllables of a buzzing source through three moving formants, pauses between, soft noise under it: [samples]."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(samples, dtype=torch.float64) / rate
    pitch = 120 + 25 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / rate
    wave = torch.zeros_like(t)
    for formant, drift, speed in ((600, 250, 1.3), (1400, 500, 0.9), (2500, 300, 1.7)):
        centre = formant + drift * torch.sin(2 * math.pi * speed * t)
        for harmonic in range(1, int(rate / 2 / 150)):
            gain = torch.exp(-(((harmonic * pitch - centre) / 180) ** 2))
            wave += gain * torch.sin(harmonic * phase) * 600 / formant
    syllables = (torch.sin(2 * math.pi * 3.1 * t).clamp(min=0) ** 0.5) * (torch.sin(2 * math.pi * 0.35 * t) > -0.3)
    wave = wave * syllables
    noise = torch.randn(samples, generator=g, dtype=torch.float64)
    return (0.5 * wave / wave.abs().max() + 0.003 * noise).float()


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("rate", [16000, 8000])
def test_silero_vad(backend: str, rate: int, request: pytest.FixtureRequest) -> None:
    """200 chunks one after the other: the probabilities of the shipped TorchScript model to 1e-5."""
    shipped = torch.jit.load(str(silero_path())).eval()
    prefix = "_model." if rate == 16000 else "_model_8k."
    weights = {key.removeprefix(prefix): value for key, value in shipped.state_dict().items() if key.startswith(prefix)}
    model = SileroVad(rate).eval()
    assert str(model.load_state_dict(weights)) == "<All keys matched successfully>"
    assert fused_rnn.convert(model) is model and type(model.decoder.rnn) is fused_rnn.LSTMCell
    device = device_of(backend)
    model.to(device)
    size = 512 if rate == 16000 else 256
    chunks = synthetic_speech(rate, 200 * size).reshape(200, 1, size)
    with torch.no_grad(), use_backend(backend):
        shipped.reset_states()
        expected = torch.stack([shipped(chunk, rate) for chunk in chunks]).flatten()
        found = torch.stack([model(chunk.to(device)).cpu() for chunk in chunks]).flatten()
    assert expected.min() < 0.1 and expected.max() > 0.9, "the sound must be speech and silence to the model"
    error = (found - expected).abs().max().item()
    report(
        request,
        f"silero-vad {rate} Hz, {backend}: 200 chunks, probabilities {expected.min():.4f} to {expected.max():.4f}, "
        f"largest difference {error:.1e}",
    )
    assert error < 1e-5


# --- sb3-contrib: RecurrentPPO, which steps an LSTM through the environment and trains it on sequences with resets ---


def hidden_velocity_cartpole() -> Any:
    """CartPole-v1 that shows the positions only (of cart and pole), so that an agent needs memory."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")

    class PositionsOnly(gymnasium.ObservationWrapper):  # type: ignore[misc]
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            box = env.observation_space
            self.observation_space = gymnasium.spaces.Box(box.low[[0, 2]], box.high[[0, 2]])

        def observation(self, observation: Any) -> Any:
            return observation[[0, 2]]

    return PositionsOnly(gymnasium.make("CartPole-v1"))


def trained_policy(change: Callable[[nn.Module], Any] | None, steps: int) -> tuple[nn.Module, list[str]]:
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs the package sb3-contrib")
    agent = sb3_contrib.RecurrentPPO("MlpLstmPolicy", hidden_velocity_cartpole(), seed=0, device="cpu")
    if change is not None:
        change(agent.policy)
    kinds = [f"{type(m).__module__}.{type(m).__name__}" for m in agent.policy.modules() if isinstance(m, nn.LSTM)]
    agent.learn(steps)
    return agent.policy, kinds


@functools.cache
def plain_policies() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """torch.nn's parameters before and after 512 steps."""
    start, _ = trained_policy(None, 0)
    plain, kinds = trained_policy(None, 512)
    assert kinds == ["torch.nn.modules.rnn.LSTM"] * 2
    return start.state_dict(), plain.state_dict()


@pytest.mark.slow
def test_recurrent_ppo(backend: str, request: pytest.FixtureRequest) -> None:
    """512 steps (4 rounds of 128, 10 epochs each): the same parameters as with torch.nn.LSTM to 1e-4."""
    if backend == "cuda":
        pytest.skip("the agent is built on the CPU")
    with use_backend(backend):
        fused, kinds = trained_policy(fused_rnn.convert, 512)
    assert kinds == ["fused_rnn.modules.LSTM"] * 2
    before, expected = plain_policies()
    state = fused.state_dict()
    assert list(state) == list(expected)
    error = max((state[key] - expected[key]).abs().max().item() for key in expected)
    moved = max((before[key] - expected[key]).abs().max().item() for key in expected)
    report(request, f"RecurrentPPO, {backend}: 512 steps moved parameters by up to {moved:.1e}, difference {error:.1e}")
    assert moved > 1e-3 and error < 1e-4
