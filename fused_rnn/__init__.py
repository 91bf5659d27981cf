"""Drop-in torch.nn RNN, LSTM, GRU and their cells with hand-written CUDA and CPU kernels."""

import importlib
from types import ModuleType

from fused_rnn import _opacus, explanation, functional
from fused_rnn._backend import build_info, free_memory, use_backend
from fused_rnn._explain import explain
from fused_rnn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.convert import convert, revert
from fused_rnn.formula import Cell, FormulaError, Gate, Layer, Step, source
from fused_rnn.modules import GRU, LSTM, RNN
from fused_rnn.patch import patched

__version__ = "0.1.0.dev0"

__all__ = [
    "Cell",
    "FormulaError",
    "Gate",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "Layer",
    "RNN",
    "RNNCell",
    "Step",
    "build_info",
    "convert",
    "explain",
    "explanation",
    "free_memory",
    "functional",
    "integrations",
    "patched",
    "revert",
    "source",
    "use_backend",
    "zoo",
]


def __getattr__(name: str) -> ModuleType:
    """``fused_rnn.zoo`` and ``fused_rnn.integrations``, imported when they are first asked for."""
    if name in ("integrations", "zoo"):
        return importlib.import_module(f"fused_rnn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_opacus.register()
