"""sb3-contrib's recurrent policies: a batch of sequences in which episodes start is one call.

    fused_rnn.integrations.sb3.enable()
    RecurrentPPO("MlpLstmPolicy", env).learn(100_000)

Replaced: ``RecurrentActorCriticPolicy._process_sequence``, which every recurrent policy of sb3-contrib runs its LSTMs
through. It loops over time wherever an episode starts inside a batch, which is most of PPO's updates. Here it is one call of
``fused_rnn.functional.lstm`` with ``resets``, for updates, for the collection of experience and for ``predict``, whether
the policy's layers are torch.nn.LSTM or were converted.

Versions: sb3-contrib 2.9.

Limits: sb3-contrib's own loop still runs for a layer with ``lstm_kwargs`` of batch_first or bidirectional, with hooks, of a
subclass, parametrized, or under a torch.func transform, tracer or compiler. Episode starts are 0 or 1, as sb3-contrib makes
them: every other number than 0 is a start. A state that is not finite is replaced by zeros where an episode starts; the
loop multiplies it by 0, which keeps NaN. ``lstm_kwargs`` with dropout: masks are drawn for a sequence at once, not step by
step, so they are other draws of the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fused_rnn import functional
from fused_rnn.integrations._integration import Integration, Replacement, weights_of
from fused_rnn.modules import LSTM

__all__ = ["disable", "enable", "enabled"]


def _replacements() -> Iterator[Replacement]:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    yield Replacement(RecurrentActorCriticPolicy, "_process_sequence", _process_sequence)


def _process_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: nn.LSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """features [B * T, I], lstm_states (h, c) [L, B, .], episode_starts [B * T] -> [B * T, P], (h, c)."""
        weights = weights_of(lstm, nn.LSTM, LSTM)
        if weights is None or lstm.batch_first or lstm.bidirectional:
            result: tuple[Tensor, tuple[Tensor, Tensor]] = original(features, lstm_states, episode_starts, lstm)
            return result
        return _sequence(lstm, weights, features, lstm_states, episode_starts)

    return process_sequence


def _sequence(
    layer: nn.LSTM, weights: list[Tensor], features: Tensor, states: tuple[Tensor, Tensor], episode_starts: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    batch = states[0].shape[1]
    # Time comes first here already: a layer with batch_first would copy its input for forward and again for backward.
    output, last = functional.lstm(
        features.reshape(batch, -1, layer.input_size).transpose(0, 1).contiguous(),
        weights,
        (states[0], states[1]),
        num_layers=layer.num_layers,
        has_biases=layer.bias,
        dropout=layer.dropout,
        training=layer.training,
        resets=(episode_starts.reshape(batch, -1) != 0).t(),
    )
    return output.transpose(0, 1).flatten(0, 1), last


_integration = Integration("sb3", "sb3-contrib", ("2.9",), _replacements)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
