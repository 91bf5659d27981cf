"""Every cell, once: the twin of FUSED_RNN_CELLS in csrc/core/params.h (tests/test_kinds.py compares them)."""

from __future__ import annotations

import dataclasses
from typing import Any


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

    @property
    def has_gates(self) -> bool:
        """Whether it has gates beside its candidate: more than one row block of weights. As in csrc/torch/call.cpp."""
        return self.gates > 1

    @property
    def jumps(self) -> bool:
        """Whether its derivative jumps, so that rounding alone can change a gradient much."""
        return self.nonlinearity == "relu"


KINDS = (
    Kind("RNN_TANH", "rnn_tanh", 1, 1, 0, False, False, False, "tanh"),
    Kind("RNN_RELU", "rnn_relu", 1, 1, 0, False, False, False, "relu"),
    Kind("RNN_IDENTITY", "rnn_identity", 1, 1, 0, False, False, False, "identity"),
    Kind("LSTM", "lstm", 4, 4, 4, True, False, True),
    Kind("GRU", "gru", 3, 4, 4, False, True, False),
)
KIND_OF_NAME = {kind.name: kind for kind in KINDS}
NUMBER_OF_MODE = {kind.mode: number for number, kind in enumerate(KINDS)}
NUMBER_OF_NONLINEARITY = {kind.nonlinearity: number for number, kind in enumerate(KINDS) if kind.nonlinearity is not None}
TORCH_NONLINEARITIES = ("tanh", "relu")  # of torch.nn's RNN
RNN_TANH, RNN_RELU, RNN_IDENTITY = (NUMBER_OF_NONLINEARITY[name] for name in ("tanh", "relu", "identity"))
LSTM, GRU = NUMBER_OF_MODE["LSTM"], NUMBER_OF_MODE["GRU"]
TORCH_LAYERS = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN_TANH}  # torch.nn's layers, each with the cell that it has by default


def number_of_nonlinearity(value: Any) -> int:
    """The number of the RNN with this nonlinearity.

    Raises:
        LookupError: there is none; its text has the names of those that there are.
    """
    number = NUMBER_OF_NONLINEARITY.get(value) if isinstance(value, str) else None
    if number is None:
        *names, last = map(repr, NUMBER_OF_NONLINEARITY)
        raise LookupError(f"{', '.join(names)} or {last}")
    return number


def number_of_torch_layer(name: str) -> int:
    """The number of the cell that a layer of torch.nn ("LSTM"), or its cell ("LSTMCell"), has by default.

    Raises:
        ValueError: torch.nn has no such layer.
    """
    number = TORCH_LAYERS.get(name.removesuffix("Cell"))
    if number is None:
        raise ValueError(f"cell: expected one of {', '.join(TORCH_LAYERS)}, or its cell, got {name!r}")
    return number


# --- the cell of a module: its class says it, as ``_cell_number``, a number or a property where an instance decides ---


def number_of(module: Any) -> int:
    """The number of the cell of a fused layer or cell.

    Raises:
        TypeError: its class does not say it.
    """
    number = getattr(module, "_cell_number", None)
    if type(number) is not int or not 0 <= number < len(KINDS):
        raise TypeError(
            f"{type(module).__name__}._cell_number: expected the number of a cell, 0 to {len(KINDS) - 1}, got {number!r}"
        )
    return number


def kind_of(module: Any) -> Kind:
    """The kind of a fused layer or cell; raises as number_of."""
    return KINDS[number_of(module)]


def name_of_class(module: Any) -> str:
    """The class that says a module's cell, as errors name it: "LSTM", of a user's subclass of LSTM too."""
    return next(cls.__name__ for cls in type(module).__mro__ if "_cell_number" in vars(cls))
