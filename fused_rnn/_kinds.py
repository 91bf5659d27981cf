"""Every cell, once: the twin of FUSED_RNN_CELLS in csrc/core/params.h (tests/test_kinds.py compares them)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a cell is. Its number, by which the ops know it, is its place in KINDS."""

    mode: str  # torch.nn's name of the layer with this cell, "RNN_TANH"; "RNN_IDENTITY", which it lacks, is made likewise
    name: str  # in csrc/core/params.h and in explain
    gates: int  # row blocks of the weights
    slots: int  # accumulators of a unit
    saved: int  # slots kept for backward
    has_c: bool  # a second state c
    reads_h: bool  # the step reads h outside the recurrent product
    may_project: bool  # a projection may follow the step (proj_size)
    nonlinearity: str | None = None  # of an RNN

    @property
    def states(self) -> int:
        """How many states it has: h, or h and c."""
        return 2 if self.has_c else 1


KINDS = (
    Kind("RNN_TANH", "rnn_tanh", 1, 1, 0, False, False, False, "tanh"),
    Kind("RNN_RELU", "rnn_relu", 1, 1, 0, False, False, False, "relu"),
    Kind("RNN_IDENTITY", "rnn_identity", 1, 1, 0, False, False, False, "identity"),
    Kind("LSTM", "lstm", 4, 4, 4, True, False, True),
    Kind("GRU", "gru", 3, 4, 4, False, True, False),
)
NUMBER_OF_MODE = {kind.mode: number for number, kind in enumerate(KINDS)}
NUMBER_OF_NONLINEARITY = {kind.nonlinearity: number for number, kind in enumerate(KINDS) if kind.nonlinearity is not None}
RNN_TANH, RNN_RELU, RNN_IDENTITY = (NUMBER_OF_NONLINEARITY[name] for name in ("tanh", "relu", "identity"))
LSTM, GRU = NUMBER_OF_MODE["LSTM"], NUMBER_OF_MODE["GRU"]
