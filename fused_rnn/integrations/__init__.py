"""Backends of other projects: their loops over time become calls of the kernels.

    fused_rnn.integrations.sb3.enable()      # sb3-contrib: RecurrentPPO's sequences with episodes that start inside
    fused_rnn.integrations.torchrl.enable()  # TorchRL: LSTMModule and GRUModule in recurrent mode, and its LSTM and GRU
    fused_rnn.integrations.keras.enable()    # Keras 3 on torch: LSTM, GRU, SimpleRNN, and RNN of their cells
    fused_rnn.integrations.opacus.enable()   # Opacus: DPLSTM, DPGRU and DPRNN, with their per-sample gradients

Each module has ``enable()``, ``disable()`` and the context manager ``enabled()``. What is replaced is the process's, so
other threads see it too. Models stay what they are: parameters, state_dict, optimizers, files. The projects are optional:
``enable`` imports its own, and raises ImportError where it is missing, RuntimeError for a version that it does not know.
docs/integrations.md has times before and after.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["keras", "opacus", "sb3", "torchrl"]


def __getattr__(name: str) -> ModuleType:
    """``fused_rnn.integrations.sb3`` and the others, imported when they are first asked for."""
    if name in __all__:
        return importlib.import_module(f"fused_rnn.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
