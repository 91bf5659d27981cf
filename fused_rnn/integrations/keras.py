"""Keras 3 on its torch backend: LSTM, GRU, SimpleRNN, and RNN of their cells, on the kernels.

    os.environ["KERAS_BACKEND"] = "torch"
    fused_rnn.integrations.keras.enable()
    model.fit(x, y)

Replaced: ``inner_loop`` of ``keras.layers.RNN``, ``LSTM`` and ``GRU``, which Keras runs on torch step by step on a CPU, and
on a GPU wherever cuDNN does not fit. Here a sequence is one call, with masks of any form, ``go_backwards``,
``return_state``, ``return_sequences``, ``stateful``, ``unroll``, ``zero_output_for_mask``, ``initial_state``, ``dropout``,
stacked cells (``RNN([LSTMCell(8), GRUCell(8)])``) and ``Bidirectional``. The weights stay Keras's variables.

LSTM and GRU with sigmoid and tanh, and SimpleRNN with tanh, relu or linear, have kernels for CPU and GPU. On a CPU with a
C++ compiler so have ``reset_after=False`` and the activations relu, linear, hard_sigmoid, softplus, softsign, silu, gelu,
elu and leaky_relu in any place: as cells of fused_rnn.zoo, which are compiled at their first call, in a few seconds.

Versions: keras 3.15, with the backend torch.

Limits: Keras's own code still runs with other activations, ``recurrent_dropout`` while training, ``dropout`` while training
with ``implementation=1`` or inside of stacked cells, cells of one's own, derived from Keras's, with hooks or of another
dtype than their layer, inputs that are not [batch, time, features], under torch.compile, tracers and torch.func transforms,
for shapes without values (``compute_output_spec``), and for a cell that is called by itself, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.integrations import _keras_cells
from fused_rnn.integrations._integration import Integration, Replacement, has_hooks, watched

__all__ = ["disable", "enable", "enabled"]


def _replacements() -> Iterator[Replacement]:
    import keras

    if keras.backend.backend() != "torch":
        raise RuntimeError(
            f"fused_rnn.integrations.keras: expected Keras's backend torch, found {keras.backend.backend()}; "
            "set KERAS_BACKEND=torch before keras is imported"
        )
    for layer in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
        yield Replacement(layer, "inner_loop", _inner_loop)


def _inner_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        found = _serve(self, sequences, initial_state, mask, training)
        return original(self, sequences, initial_state, mask, training=training) if found is None else found

    return inner_loop


def _serve(layer: Any, sequences: Any, initial_state: Any, mask: Any, training: bool) -> Any:
    """What ``inner_loop`` returns: (last output [B, H], outputs [B, T, H] or [B, 1, H], last states); None: Keras's own."""
    from keras.src import tree

    if tree.is_nested(mask):
        mask = mask[0]
    if not isinstance(sequences, Tensor) or sequences.dim() != 3 or not sequences.shape[1] or watched():
        return None
    if sequences.device.type == "meta" or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return None
    runs = _runs(layer, sequences.device, mask, training)
    if runs is None:
        return None
    given = tree.flatten(initial_state)
    states = _states(layer, given, runs, sequences.shape[0])
    if states is None:
        return None
    dtype = runs[0][1].dtype
    x = sequences.to(dtype)
    if training and len(runs) == 1 and layer.cell.dropout:
        x = x * layer.cell.get_dropout_mask(sequences[:, 0, :]).to(dtype).unsqueeze(1)
    if layer.go_backwards:
        x = x.flip(1)
        mask = None if mask is None else mask.flip(1)
    last, outputs, flat = _run(layer, runs, x, states, None if mask is None else mask.bool())
    return last, outputs, tree.pack_sequence_as(initial_state, flat) if tree.is_nested(initial_state) else flat


_Runs = list[tuple[_keras_cells.Run, Tensor, int]]  # each with the cell's recurrent kernel and its number of states


def _runs(layer: Any, device: torch.device, mask: Any, training: bool) -> _Runs | None:
    """How each cell of a layer is run; None where one of them is not."""
    import keras

    kinds = {
        keras.layers.LSTMCell: (_keras_cells.lstm, 2),
        keras.layers.GRUCell: (_keras_cells.gru, 1),
        keras.layers.SimpleRNNCell: (_keras_cells.simple_rnn, 1),
    }
    stacked = type(layer.cell) is keras.layers.StackedRNNCells
    cells = layer.cell.cells if stacked else [layer.cell]
    runs = []
    for cell in cells:
        if type(cell) not in kinds or has_hooks(cell):
            return None
        if {cell.compute_dtype, layer.cell.compute_dtype} != {layer.compute_dtype}:
            return None  # Keras casts between them
        if training and (cell.recurrent_dropout or (cell.dropout and not _one_mask(cell, stacked))):
            return None
        if getattr(layer, "use_cudnn", None) is True and (mask is not None or not getattr(cell, "reset_after", True)):
            return None  # Keras raises
        make, count = kinds[type(cell)]
        run = make(cell, device.type)
        recurrent = _keras_cells.recurrent_kernel(cell)
        if run is None or recurrent.device != device:
            return None
        runs.append((run, recurrent, count))
    return runs


def _one_mask(cell: Any, stacked: bool) -> bool:
    """Whether dropout multiplies the input by one mask, the same for every gate."""
    return not stacked and 0 < cell.dropout < 1 and getattr(cell, "implementation", 2) != 1


def _states(layer: Any, given: Sequence[Any], runs: _Runs, batch: int) -> list[list[Tensor]] | None:
    """The states [B, H] of each cell; None where they are not of its sizes."""
    sizes = [(recurrent.shape[0], recurrent.dtype) for _, recurrent, count in runs for _ in range(count)]
    if len(given) != len(sizes):
        return None
    flat = []
    for state, (size, dtype) in zip(given, sizes, strict=True):
        if not isinstance(state, Tensor) or state.shape != (batch, size):
            return None
        # A stateful layer writes its variables after the call, while autograd still needs what was in them.
        flat.append(state.to(dtype, copy=bool(layer.stateful)))
    counts = [count for _, _, count in runs]
    return [list(part) for part in _split(flat, counts)]


def _split(items: list[Tensor], counts: Sequence[int]) -> Iterator[list[Tensor]]:
    start = 0
    for count in counts:
        yield items[start : start + count]
        start += count


def _run(
    layer: Any, runs: _Runs, x: Tensor, states: list[list[Tensor]], mask: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x [B, T, I], mask [B, T]: steps with False are left out of the sequence, and put back into the outputs."""
    lengths = None
    if mask is not None:
        lengths = mask.sum(1)
        x = _at(x, torch.argsort((~mask).to(torch.uint8), dim=1, stable=True))
    flat: list[Tensor] = []
    for (run, _, _), cell_states in zip(runs, states, strict=True):
        x, last = run(x, cell_states, lengths)
        flat += last
    top = flat[-runs[-1][2]]
    if mask is None or lengths is None:
        return top, x if layer.return_sequences else top.unsqueeze(1), flat
    seen = mask.cumsum(1)  # steps that took part, up to each
    shown = mask if layer.zero_output_for_mask else seen > 0
    top = top.where(shown[:, -1:], 0)
    if not layer.return_sequences:
        return top, top.unsqueeze(1), flat
    return top, _at(x, (seen - 1).clamp(min=0)).where(shown.unsqueeze(2), 0), flat


def _at(x: Tensor, steps: Tensor) -> Tensor:
    """x [B, T, I] at steps [B, T] of each row."""
    return x.gather(1, steps.unsqueeze(2).expand(-1, -1, x.shape[2]))


_integration = Integration("keras", "keras", ("3.15",), _replacements)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
