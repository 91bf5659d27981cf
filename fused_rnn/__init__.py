"""Drop-in torch.nn RNN, LSTM, GRU and their cells with hand-written CUDA and CPU kernels."""

from fused_rnn import functional
from fused_rnn._backend import use_backend

__version__ = "0.1.0"

__all__ = ["functional", "use_backend"]
