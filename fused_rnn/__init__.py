"""Drop-in torch.nn RNN, LSTM, GRU and their cells with hand-written CUDA and CPU kernels."""

from fused_rnn import functional
from fused_rnn._backend import build_info, use_backend

__version__ = "0.1.0.dev0"

__all__ = ["build_info", "functional", "use_backend"]
