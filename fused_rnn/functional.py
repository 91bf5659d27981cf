"""Recurrent layers and cells as functions of explicit weights.

Units: T time steps, B batch rows, I input size, H hidden size, P output size (H, or the projection's), L layers,
D directions, G gates (RNN 1, GRU 3, LSTM 4). Weights are lists in torch.nn's order, for every layer and direction
``w_ih [G*H, I or D*P], w_hh [G*H, P]``, then ``b_ih [G*H], b_hh [G*H]`` with biases, then ``w_hr [P, H]`` with a projection.
Gate order: LSTM i f g o, GRU r z n. Formulas: the documentation of torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import _ops, reference
from fused_rnn._backend import uses_ops
from fused_rnn.reference import GRU, LSTM, RNN_IDENTITY, RNN_RELU, RNN_TANH

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

CELLS = {"RNN_TANH": RNN_TANH, "RNN_RELU": RNN_RELU, "RNN_IDENTITY": RNN_IDENTITY, "LSTM": LSTM, "GRU": GRU}
_GATES = {RNN_TANH: 1, RNN_RELU: 1, RNN_IDENTITY: 1, LSTM: 4, GRU: 3}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory over a sequence.

    Args:
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] unbatched; or packed rows [N, I] with batch_sizes.
        weights: L*D groups of 2 to 5 tensors, see the module's documentation.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]) (without B for unbatched input), or None for zeros.
        num_layers: L.
        has_biases: whether every group has b_ih and b_hh.
        bidirectional: D = 2: groups alternate between the forward and the backward direction.
        dropout: probability of zeroing an element between layers, when training.
        training: whether dropout is applied.
        batch_first: input and output are [B, T, .] (not with batch_sizes).
        batch_sizes: [T] int64 on the CPU, never growing: rows of each step of a packed input, as in PackedSequence.
        lengths: [B] integers: row b takes part in the first lengths[b] steps, in any order; outputs after them are 0 and the
            final state is that of its last step. Not with batch_sizes.
        resets: bool, [T, B] ([B, T] with batch_first, [N] with batch_sizes): where True the state (h and c) is replaced by
            zeros before that step. In the backward direction, which comes from the right, likewise.

    Returns:
        output [T, B, D*P] in the input's form, (h_n [L*D, B, P], c_n [L*D, B, H]).

    Raises:
        TypeError, ValueError: an argument whose shape, dtype or device does not fit, by its name.
    """
    y, h_n, c_n = _checked_rnn(
        LSTM, input, weights, hx, num_layers, has_biases, bidirectional, dropout, training, batch_first,
        batch_sizes, lengths, resets,
    )  # fmt: skip
    return y, (h_n, c_n)


def gru(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit over a sequence; arguments and errors as :func:`lstm`, hx is h0 [L*D, B, H].

    Returns:
        output [T, B, D*H] in the input's form, h_n [L*D, B, H].
    """
    y, h_n, _ = _checked_rnn(
        GRU, input, weights, hx, num_layers, has_biases, bidirectional, dropout, training, batch_first,
        batch_sizes, lengths, resets,
    )  # fmt: skip
    return y, h_n


def rnn(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman network over a sequence; arguments and errors as :func:`lstm`, hx is h0 [L*D, B, H].

    Args:
        nonlinearity: "tanh", "relu" or "identity".

    Returns:
        output [T, B, D*H] in the input's form, h_n [L*D, B, H].
    """
    y, h_n, _ = _checked_rnn(
        _rnn_kind(nonlinearity), input, weights, hx, num_layers, has_biases, bidirectional, dropout, training, batch_first,
        batch_sizes, lengths, resets,
    )  # fmt: skip
    return y, h_n


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: input [B, I] (or [I]), hx (h [B, H], c [B, H]) or None for zeros -> (h', c').

    w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H], both or neither. Errors as :func:`lstm`.
    """
    return _checked_cell(LSTM, input, hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step: input [B, I] (or [I]), hx [B, H] or None for zeros -> h' [B, H]; weights with 3H rows."""
    return _checked_cell(GRU, input, hx, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One Elman step: input [B, I] (or [I]), hx [B, H] or None for zeros -> h' [B, H]; weights with H rows."""
    return _checked_cell(_rnn_kind(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh)[0]


# --- without checks of the public arguments: what the modules call ---


def run_rnn(
    cell: int,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of layers on the selected backend: (output, h_n, c_n), c_n empty without c. Batched or packed input only."""
    offsets = None
    if batch_sizes is not None:
        offsets = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        if h0 is None:  # gives the ops the batch size, which packed rows do not show
            size = weights[1].shape[1]
            if cell == LSTM and len(weights) // (num_layers * (1 + bidirectional)) == 3 + 2 * has_biases:
                size = weights[2 + 2 * has_biases].shape[0]
            h0 = input.new_zeros(num_layers * (1 + bidirectional), int(batch_sizes[0]), size)
    device_type = input.device.type
    if uses_ops(device_type):
        op = _ops.rnn if torch.compiler.is_compiling() or type(input) is not Tensor else _ops.eager_rnn
        return op(
            input, h0, c0, weights, lengths, offsets, resets, cell, num_layers, has_biases, bidirectional, dropout,
            training, batch_first,
        )  # fmt: skip
    input, h0, c0, weights = _autocast(device_type, input, h0, c0, weights)
    lengths = None if lengths is None else lengths.to(input.device)
    return reference.rnn(
        input, h0, c0, weights, lengths, offsets, resets, cell, num_layers, has_biases, bidirectional, dropout,
        training, batch_first,
    )  # fmt: skip


def run_cell(
    cell: int, input: Tensor, h: Tensor | None, c: Tensor | None, params: list[Tensor], has_biases: bool
) -> tuple[Tensor, Tensor]:
    """One step of a cell on the selected backend: (h', c'), c' empty without c. Batched input only."""
    device_type = input.device.type
    if uses_ops(device_type):
        op = _ops.cell if torch.compiler.is_compiling() or type(input) is not Tensor else _ops.eager_cell
        return op(input, h, c, params, has_biases, cell)
    input, h, c, params = _autocast(device_type, input, h, c, params)
    return reference.cell(input, h, c, params, has_biases, cell)


def _autocast_on(device_type: str) -> bool:
    # torch.is_autocast_enabled raises for device types without autocast, such as meta.
    return device_type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device_type)


def _autocast(
    device_type: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """What the ops' Autocast kernels do, for the reference."""
    if not _autocast_on(device_type):
        return input, h, c, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(input), None if h is None else cast(h), None if c is None else cast(c), [cast(w) for w in weights]


# --- checks ---


def _rnn_kind(nonlinearity: str) -> int:
    kind = CELLS.get(f"RNN_{nonlinearity.upper()}") if isinstance(nonlinearity, str) else None
    if kind is None:
        raise ValueError(f"nonlinearity: expected 'tanh', 'relu' or 'identity', got {nonlinearity!r}")
    return kind


def _shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}")


def _like_input(name: str, tensor: Tensor, input: Tensor, autocast: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} (input's), got {tensor.device}")
    if tensor.dtype != input.dtype and not (autocast and tensor.dtype.is_floating_point):
        raise ValueError(f"{name}: expected dtype {input.dtype} (input's), got {tensor.dtype}")


def _check_input(input: Tensor) -> bool:
    """Checks type and dtype; returns whether autocast is on for its device."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if input.dtype not in _DTYPES:
        raise ValueError(f"input: expected dtype float64, float32, float16 or bfloat16, got {input.dtype}")
    return _autocast_on(input.device.type)


def _states(cell: int, hx: object) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if cell != LSTM:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
        return hx, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx: expected a pair (h0, c0), got {type(hx).__name__}")
    return hx[0], hx[1]


def _check_weights(
    cell: int, input: Tensor, weights: Sequence[Tensor], num_layers: int, directions: int, has_biases: bool, autocast: bool
) -> tuple[int, int]:
    """Checks every weight; returns (H, P)."""
    groups = num_layers * directions
    base = 4 if has_biases else 2
    sizes = (base, base + 1) if cell == LSTM else (base,)
    per_group = len(weights) // groups if groups else 0
    if per_group not in sizes or per_group * groups != len(weights):
        expected = " or ".join(str(groups * size) for size in sizes)
        raise ValueError(
            f"weights: expected {expected} tensors for num_layers={num_layers}, {directions} direction(s), "
            f"has_biases={has_biases}, got {len(weights)}"
        )
    for index, weight in enumerate(weights):
        _like_input(f"weights[{index}]", weight, input, autocast)
    gates = _GATES[cell]
    if weights[1].dim() != 2 or weights[1].shape[0] % gates:
        raise ValueError(f"weights[1]: expected shape [{gates}*H, P], got {list(weights[1].shape)}")
    hidden, out = weights[1].shape[0] // gates, weights[1].shape[1]
    if per_group == base and out != hidden:
        raise ValueError(f"weights[1]: expected shape {[gates * hidden, hidden]}, got {list(weights[1].shape)}")
    for index, weight in enumerate(weights):
        group, place = divmod(index, per_group)
        if place == 0:
            expected_shape = [gates * hidden, input.shape[-1] if group < directions else directions * out]
        elif place == 1:
            expected_shape = [gates * hidden, out]
        else:
            expected_shape = [gates * hidden] if place < base else [out, hidden]
        _shape(f"weights[{index}]", weight, expected_shape)
    return hidden, out


def _check_batch_sizes(batch_sizes: Tensor, input: Tensor) -> None:
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise ValueError(
            f"batch_sizes: expected a 1-D int64 tensor on the CPU, got {batch_sizes.dim()}-D {batch_sizes.dtype} "
            f"on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"batch_sizes: expected positive, never growing numbers, got {sizes}")
    if sum(sizes) != input.shape[0]:
        raise ValueError(f"batch_sizes: expected a sum of {input.shape[0]} (input's rows), got {sum(sizes)}")


def _check_masks(
    input: Tensor, steps: int, batch: int, batch_first: bool, packed: bool, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks lengths and resets; returns lengths as int64, where they are, and resets on the input's device."""
    if lengths is not None:
        if packed:
            raise ValueError("lengths: expected None with batch_sizes, which already give the lengths")
        lengths = torch.as_tensor(lengths)
        if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
            raise ValueError(f"lengths: expected integers, got {lengths.dtype}")
        _shape("lengths", lengths, [batch])
        if lengths.device.type == "cpu" and batch and not (0 <= int(lengths.min()) and int(lengths.max()) <= steps):
            raise ValueError(f"lengths: expected values from 0 to {steps}, got {lengths.tolist()}")
        lengths = lengths.to(torch.int64)
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(f"resets: expected dtype torch.bool, got {resets.dtype}")
        _shape("resets", resets, [input.shape[0]] if packed else [batch, steps] if batch_first else [steps, batch])
        resets = resets.to(input.device)
    return lengths, resets


def _checked_rnn(
    cell: int,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | Tensor | None,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    autocast = _check_input(input)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    packed = batch_sizes is not None
    if input.dim() not in ((2,) if packed else (2, 3)):
        raise ValueError(f"input: expected {'2-D with batch_sizes' if packed else '2-D or 3-D'}, got {input.dim()}-D")
    weights = list(weights)
    hidden, out = _check_weights(cell, input, weights, num_layers, 2 if bidirectional else 1, has_biases, autocast)
    unbatched = input.dim() == 2 and not packed
    h0, c0 = _states(cell, hx)
    if unbatched:
        batch_dim = 0 if batch_first else 1
        input = input.unsqueeze(batch_dim)
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
        resets = None if resets is None else resets.unsqueeze(batch_dim)
        lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
    if batch_sizes is not None:
        if batch_first:
            raise ValueError("batch_first: expected False with batch_sizes")
        _check_batch_sizes(batch_sizes, input)
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
    else:
        steps, batch = input.shape[int(batch_first)], input.shape[1 - int(batch_first)]
        if steps == 0:
            raise ValueError("input: expected at least 1 time step, got 0")
    for name, state, size in (("h0", h0, out), ("c0", c0, hidden)):
        if state is not None:
            _like_input(name, state, input, autocast)
            _shape(name, state, [num_layers * (2 if bidirectional else 1), batch, size])
    lengths, resets = _check_masks(input, steps, batch, batch_first, packed, lengths, resets)
    y, h_n, c_n = run_rnn(
        cell, input, h0, c0, weights, num_layers, has_biases, bidirectional, dropout, training, batch_first,
        batch_sizes, lengths, resets,
    )  # fmt: skip
    if unbatched:
        y, h_n = y.squeeze(batch_dim), h_n.squeeze(1)
        c_n = c_n.squeeze(1) if cell == LSTM else c_n
    return y, h_n, c_n


def _checked_cell(
    cell: int,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    autocast = _check_input(input)
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected 1-D or 2-D, got {input.dim()}-D")
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih, b_hh: expected both or neither, got one")
    params = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    hidden, _ = _check_weights(cell, input, params, 1, 1, b_ih is not None, autocast)
    h, c = _states(cell, hx)
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
        h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
    for name, state in (("h", h), ("c", c)):
        if state is not None:
            _like_input(name, state, input, autocast)
            _shape(name, state, [input.shape[0], hidden])
    new_h, new_c = run_cell(cell, input, h, c, params, b_ih is not None)
    if unbatched:
        new_h, new_c = new_h.squeeze(0), new_c.squeeze(0) if cell == LSTM else new_c
    return new_h, new_c
