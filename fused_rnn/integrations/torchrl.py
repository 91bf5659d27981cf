"""TorchRL's LSTMModule and GRUModule in recurrent mode, and its LSTM and GRU written in Python.

    fused_rnn.integrations.torchrl.enable()
    with set_recurrent_mode(True):
        policy(batch)  # a TensorDict [B, T] with "is_init"

Replaced: ``LSTMModule.forward`` and ``GRUModule.forward`` in recurrent mode, back ends "pad", "scan" and "auto", with layers
of torch.nn, of fused_rnn or of TorchRL (``python_based``); and the loops of TorchRL's ``LSTM`` and ``GRU``. Trajectories
that "is_init" separates inside a row become rows of a packed batch, in one call of ``fused_rnn.functional.lstm`` or
``gru``: nothing is padded, and the number of steps is that of the longest trajectory. Each starts with the state that the
TensorDict has at its first step, as in TorchRL; the states after it stand at its last step, zeros elsewhere.

Versions: torchrl 0.14.

Limits: TorchRL's own code still runs for single steps (no recurrent mode), the back end "triton", a layer with hooks, of a
subclass or parametrized, under torch.func transforms (vmap over parameters), tracers and torch.compile, for a ``mask``
given to TorchRL's LSTM or GRU, and where its back end refuses (dropout, projections and both directions in "scan").
``recurrent_recompute="full"`` recomputes the whole call in backward. Dropout: other draws of the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import functional
from fused_rnn.integrations._integration import Integration, Replacement, named_weights, watched, weights_of

__all__ = ["disable", "enable", "enabled"]

_States = tuple[Tensor, ...]


class _Kind(NamedTuple):
    """A recurrent layer: its function, the attribute of TorchRL's module that holds it, and its classes."""

    function: Callable[..., Any]
    attribute: str
    classes: tuple[type[nn.Module], ...]

    def run(
        self, layer: Any, weights: list[Tensor], x: Tensor, states: _States | None, **rows: Any
    ) -> tuple[Tensor, _States]:
        """One call: (output, states after it), x and states in the functions' layouts."""
        hx = states if states is None or len(states) > 1 else states[0]
        y, last = self.function(
            x,
            weights,
            hx,
            num_layers=layer.num_layers,
            has_biases=layer.bias,
            bidirectional=bool(layer.bidirectional),
            dropout=layer.dropout,
            training=layer.training,
            **rows,
        )
        return y, (last if isinstance(last, tuple) else (last,))


def _replacements() -> Iterator[Replacement]:
    from tensordict.nn import dispatch
    from tensordict.utils import set_lazy_legacy
    from torchrl.modules.tensordict_module import rnn as theirs

    lstm = _Kind(functional.lstm, "lstm", (nn.LSTM, fused_rnn.LSTM, theirs.LSTM))
    gru = _Kind(functional.gru, "gru", (nn.GRU, fused_rnn.GRU, theirs.GRU))
    yield Replacement(theirs.LSTMModule, "forward", lambda original: dispatch(_module_forward(lstm, original)))
    yield Replacement(
        theirs.GRUModule, "forward", lambda original: dispatch(set_lazy_legacy(False)(_module_forward(gru, original)))
    )
    yield Replacement(theirs.LSTM, "_lstm", lambda original: _loop(lstm, original))
    yield Replacement(theirs.GRU, "_gru", lambda original: _loop(gru, original))


def _loop(kind: _Kind, original: Callable[..., Any]) -> Callable[..., Any]:
    """``_lstm`` or ``_gru`` of TorchRL's layers in Python: x [B, T, I] or [T, B, I], hx [L, B, H] or a pair."""

    def loop(self: Any, x: Tensor, hx: Any, mask: Tensor | None = None) -> Any:
        refused = getattr(self, "proj_size", 0) or (self.use_scan and self.dropout)
        if mask is not None or type(self) is not kind.classes[-1] or refused or watched():
            return original(self, x, hx, mask)
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        y, last = kind.run(self, named_weights(self), x, states, batch_first=self.batch_first)
        return y, (last if len(last) > 1 else last[0])

    return loop


def _module_forward(kind: _Kind, original: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of LSTMModule or GRUModule, on a TensorDict whose last dimension is time."""

    def forward(self: Any, tensordict: Any) -> Any:
        layer = getattr(self, kind.attribute)
        weights = weights_of(layer, *kind.classes) if self.recurrent_mode and tensordict.ndim else None
        if weights is None or not _serves(self, layer, kind):
            return original(self, tensordict)
        states = tuple(tensordict.get(key, None) for key in self.in_keys[1 : len(self.out_keys)])
        if any(state is None for state in states) and not all(state is None for state in states):
            return original(self, tensordict)  # which raises
        shape = tensordict.shape
        x = tensordict.get(self.in_keys[0])
        if x is None:
            return original(self, tensordict)  # likewise
        is_init = tensordict["is_init"].squeeze(-1)
        x, is_init = _as_rows(x, shape), _as_rows(is_init, shape)
        given = None if states[0] is None else tuple(_as_rows(state, shape) for state in states)
        run = _without_resets if not is_init[:, 1:].any() else _with_resets
        if self.recurrent_recompute == "full":
            y, out = checkpoint(run, kind, layer, weights, x, given, is_init, use_reentrant=False)
        else:
            y, out = run(kind, layer, weights, x, given, is_init)
        for key, value in zip(self.out_keys, (y, *out), strict=True):
            tensordict.set(key, value.reshape(*shape, *value.shape[2:]))
        return tensordict

    return forward


def _serves(module: Any, layer: Any, kind: _Kind) -> bool:
    backend = module.recurrent_backend
    projected = bool(getattr(layer, "proj_size", 0))
    if backend == "scan" and (layer.dropout or projected or layer.bidirectional):
        return False  # TorchRL raises
    if type(layer) is kind.classes[-1] and projected:
        return False  # its loop does not project
    return backend in ("pad", "scan", "auto") and bool(layer.batch_first)


def _as_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    """[*shape, ...] -> [B, T, ...]: all dimensions before time are rows."""
    return tensor.reshape(-1, shape[-1], *tensor.shape[len(shape) :])


def _without_resets(
    kind: _Kind, layer: Any, weights: list[Tensor], x: Tensor, states: _States | None, is_init: Tensor
) -> tuple[Tensor, _States]:
    """x [B, T, I], states [B, T, L*D, .], of which the first step counts -> y [B, T, .], states [B, T, L*D, .]."""
    first = None if states is None else tuple(state[:, 0].transpose(0, 1).contiguous() for state in states)
    y, last = kind.run(layer, weights, x, first, batch_first=True)
    steps = x.shape[1]
    return y, tuple(
        torch.cat(
            [state.new_zeros(state.shape[1], steps - 1, state.shape[0], state.shape[2]), state.transpose(0, 1)[:, None]], 1
        )
        for state in last
    )


def _with_resets(
    kind: _Kind, layer: Any, weights: list[Tensor], x: Tensor, states: _States | None, is_init: Tensor
) -> tuple[Tensor, _States]:
    """As :func:`_without_resets` where trajectories start inside of rows: each is a row of a packed batch."""
    batch, steps = is_init.shape
    packing = _packing(is_init)
    first = None
    if states is not None:
        first = tuple(state.flatten(0, 1).index_select(0, packing.starts).transpose(0, 1).contiguous() for state in states)
    packed = x.flatten(0, 1).index_select(0, packing.rows)
    y, last = kind.run(layer, weights, packed, first, batch_sizes=packing.batch_sizes)
    output = y.index_select(0, packing.back).unflatten(0, (batch, steps))
    ends = []
    for state in last:
        empty = state.new_zeros(batch * steps, state.shape[0], state.shape[2])
        ends.append(empty.index_copy(0, packing.ends, state.transpose(0, 1)).unflatten(0, (batch, steps)))
    return output, tuple(ends)


class _Packing(NamedTuple):
    """Where N trajectories stand in B * T flat rows, the longest trajectory first, and where in a packed batch."""

    starts: Tensor  # [N] the first row of each
    ends: Tensor  # [N] the last row of each
    rows: Tensor  # [B * T] the row of each packed one
    back: Tensor  # [B * T] the packed one of each row
    batch_sizes: Tensor  # [longest] on the CPU: how many trajectories have a step t


def _packing(is_init: Tensor) -> _Packing:
    """is_init [B, T] -> how its trajectories are packed; a row's first step always begins one."""
    begins = is_init.clone()
    begins[:, 0] = True
    begins = begins.flatten()
    total = begins.shape[0]
    starts = begins.nonzero().squeeze(1)
    count = starts.shape[0]
    lengths = torch.diff(starts, append=starts.new_full((1,), total))
    order = torch.argsort(lengths, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count, device=order.device)
    trajectory = begins.cumsum(0) - 1
    step = torch.arange(total, device=starts.device) - starts[trajectory]
    back = torch.empty_like(step)
    rows = torch.argsort(step * count + rank[trajectory])
    back[rows] = torch.arange(total, device=rows.device)
    return _Packing(starts[order], (starts + lengths - 1)[order], rows, back, torch.bincount(step).cpu())


_integration = Integration("torchrl", "torchrl", ("0.14",), _replacements)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
