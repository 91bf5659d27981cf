"""Recurrent layers and cells as functions of explicit weights.

Units: T time steps, B batch rows, I input size, H hidden size, P output size (H, or the projection's), L layers,
D directions, G gates (RNN 1, GRU 3, LSTM 4). Weights are lists in torch.nn's order, for every layer and direction
``w_ih [G*H, I or D*P], w_hh [G*H, P]``, then ``b_ih [G*H], b_hh [G*H]`` with biases, then ``w_hr [P, H]`` with a projection.
Gate order: LSTM i f g o, GRU r z n. Formulas: the documentation of torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _has_torch_function_variadic
from torch.compiler import is_exporting
from torch.nn import Parameter

from fused_rnn import _checkpoint, _checks, _dtensor, _extras, _ids, _onnx, _ops, _tangents, reference
from fused_rnn._backend import forward_mode, uses_ops
from fused_rnn._extras import Extras
from fused_rnn._kinds import GRU, LSTM
from fused_rnn._recipe import Recipe, Rows, StepOptions

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

_ALL_ROWS = Rows()
_PLAIN = (Parameter, Tensor)


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
    reset_state: tuple[Tensor, Tensor] | None = None,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    """Long short-term memory over a sequence.

    Args:
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] unbatched; or packed rows [N, I] with batch_sizes. float64,
            float32, float16 or bfloat16; complex64 and complex128 run on the slow reference. int64 or int32 without the last
            dimension ([T, B], [B, T], [T], [N]): ids of I classes, each standing for its one-hot row, which is never made.
            The input product is then a gather of columns of w_ih, whose gradient adds up in a fixed order. An id that is not
            in [0, I) raises IndexError on a CPU; on a GPU it counts as the nearest that is. Ids of padding may be anything.
        weights: L*D groups of 2 to 5 tensors, see the module's documentation.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]) (without B for unbatched input), or None for zeros. With 16-bit input c0 may be
            float32, and c_n then is: a sequence cut into calls that hand it on is computed as a whole.
        num_layers: L.
        has_biases: whether every group has b_ih and b_hh.
        bidirectional: D = 2: groups alternate between the forward and the backward direction.
        dropout: probability of zeroing an element between layers, when training.
        training: whether dropout is applied.
        batch_first: input and output are [B, T, .] (not with batch_sizes).
        batch_sizes: [T] int64 on the CPU, never growing: rows of each step of a packed input, as in PackedSequence.
        lengths: [B] integers: row b takes part in the first lengths[b] steps, in any order; outputs after them are 0 and the
            final state is that of its last step. Not with batch_sizes.
        resets: bool, [T, B] ([B, T] with batch_first, [N] with batch_sizes): where True the state (h and c) is replaced
            before that step, by zeros or by reset_state. In the backward direction, which comes from the right, likewise.
        reset_state: (h, c), each [L*D, 1 or B, P or H], or of every step [T, L*D, B, P or H] ([B, T, L*D, P or H] with
            batch_first). It gets gradients, the sums over where it was used; none pass to the state that it replaces.
        return_all_states: whether there is a third result.

    Returns:
        output [T, B, D*P] in the input's form, (h_n [L*D, B, P], c_n [L*D, B, H]). With return_all_states a third: (h, c) of
        every layer and direction after every step, h [T, L*D, B, P], c [T, L*D, B, H]; [B, T, L*D, .] with batch_first,
        [T, L*D, .] unbatched, [N, L*D, .] with batch_sizes. Rows after their length are 0. c has the input's dtype.

    Raises:
        TypeError, ValueError: an argument whose shape, dtype or device does not fit, by its name.
    """
    recipe = Recipe(LSTM, num_layers, has_biases, bidirectional, batch_first, training, dropout)
    extras = Extras(lengths, resets, reset_state, return_all_states)
    return _with_states(*_checked_rnn(recipe, input, weights, hx, batch_sizes, extras), return_all_states)


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
    reset_state: Tensor | None = None,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    """Gated recurrent unit over a sequence; arguments and errors as :func:`lstm`, hx is h0 [L*D, B, H].

    Returns:
        output [T, B, D*H] in the input's form, h_n [L*D, B, H]; with return_all_states a third, h after every step
        [T, L*D, B, H], in the forms of :func:`lstm`'s.
    """
    recipe = Recipe(GRU, num_layers, has_biases, bidirectional, batch_first, training, dropout)
    extras = Extras(lengths, resets, reset_state, return_all_states)
    return _with_states(*_checked_rnn(recipe, input, weights, hx, batch_sizes, extras), return_all_states)


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
    reset_state: Tensor | None = None,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    """Elman network over a sequence; arguments and errors as :func:`lstm`, hx is h0 [L*D, B, H].

    Args:
        nonlinearity: "tanh", "relu" or "identity".

    Returns:
        output [T, B, D*H] in the input's form, h_n [L*D, B, H]; with return_all_states a third, h after every step
        [T, L*D, B, H], in the forms of :func:`lstm`'s.
    """
    cell = _checks.rnn_kind(nonlinearity)
    recipe = Recipe(cell, num_layers, has_biases, bidirectional, batch_first, training, dropout)
    extras = Extras(lengths, resets, reset_state, return_all_states)
    return _with_states(*_checked_rnn(recipe, input, weights, hx, batch_sizes, extras), return_all_states)


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
    h, c = _checked_cell(LSTM, input, hx, w_ih, w_hh, b_ih, b_hh)
    return h, c


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
    return _checked_cell(_checks.rnn_kind(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh)[0]


# --- without checks of the public arguments: what the modules call ---


def run_rnn(
    recipe: Recipe,
    input: Tensor,
    states: Sequence[Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    rows: Rows = _ALL_ROWS,
    checkpoint: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """A stack of layers on the selected backend: (output, last states). Batched or packed input only, or ids [..., 1].

    rows: without offsets, which batch_sizes give. checkpoint: the number of steps between the states that are kept for
    backward, or 0; the reference keeps everything.
    With recipe.all_states the last states are followed by those after every step, [T, L*D, B, .] or packed [N, L*D, .].
    """
    if batch_sizes is not None:
        rows = rows._replace(offsets=torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)]))
        if not states:  # they give the ops the batch size, which packed rows do not show
            states = zero_states(recipe, input, weights, batch_sizes)
    dtype = input.dtype
    if dtype is torch.int64:
        input, dtype = input.squeeze(-1), weights[0].dtype
    device = input.device
    device_type = device.type
    if type(input) is not Tensor or type(weights[0]) not in _PLAIN:
        _dtensor.prepare()
    for_onnx = is_exporting() and _onnx.exporting()
    dual = forward_mode() and not _lowered(device_type, dtype)
    dual = dual and _tangents.serves(input, len(weights) // recipe.num_layers // recipe.directions, rows, recipe)
    by_ops = not for_onnx and uses_ops(device_type, dtype, device, dual)
    checkpointed = checkpoint and by_ops and _checkpoint.applies(input, states, weights, rows)
    if by_ops and not checkpointed:
        # Modes see the op's call, and so do subclasses, wherever in it they are.
        recorded = torch.compiler.is_compiling()
        seen = recorded or _has_torch_function_variadic(input, *states, *rows[:3], *rows.reset_states, *weights)
        op = _ops.rnn if seen else _ops.eager_rnn
        if recorded and type(input) is Tensor and not is_exporting() and all(type(w) in _PLAIN for w in weights):
            recipe = recipe._replace(in_graph=True)  # DTensors have rules of the layer's op alone
        result: tuple[Tensor, list[Tensor]] = op(
            input, states, weights, rows.given(), recipe.packed | rows.bits, recipe.dropout
        )
        return result
    input, states, weights = autocast(device_type, input, states, weights)
    put = tuple(autocast(device_type, input, rows.reset_states, [])[1])
    rows = rows._replace(reset_states=put, options=autocast_options(device_type, rows.options))
    if checkpointed:
        return _checkpoint.rnn(checkpoint, recipe, input, states, weights, rows)
    # Offsets stay on the host, which reads them.
    lengths, resets = (None if tensor is None else tensor.to(input.device) for tensor in (rows.lengths, rows.resets))
    rows = rows._replace(lengths=lengths, resets=resets)
    if for_onnx:
        return _onnx.rnn(input, states, weights, rows, recipe)
    shown = input
    if input.dtype is torch.int64:
        packed, first = batch_sizes is not None, recipe.batch_first
        input = _ids.checked(input, weights[0].shape[1], rows.lengths, packed, first)
        shown = _ids.stand_in(input.unsqueeze(-1), weights)
    if _get_tracing_state() is None:
        batch = input.shape[0 if recipe.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        _checks.check_call(recipe, shown, states, weights, batch)
    else:
        input, states, rows = _traced_for_reference(recipe, input, states, weights, rows)
    return reference.rnn(input, states, weights, rows, recipe)


def run_cell(recipe: Recipe, input: Tensor, states: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """One step of a cell on the selected backend: the states after it. Batched input only, or ids [B, 1]."""
    dtype = input.dtype
    if dtype is torch.int64:
        input, dtype = input.squeeze(-1), params[0].dtype
    device = input.device
    device_type = device.type
    if type(input) is not Tensor or type(params[0]) not in _PLAIN:
        _dtensor.prepare()
    dual = forward_mode() and not _lowered(device_type, dtype)
    dual = dual and _tangents.serves(input, len(params), _ALL_ROWS, recipe)
    if not (is_exporting() and _onnx.exporting()) and uses_ops(device_type, dtype, device, has_tangents=dual):
        seen = torch.compiler.is_compiling() or _has_torch_function_variadic(input, *states, *params)
        op = _ops.cell if seen else _ops.eager_cell
        result: list[Tensor] = op(input, states, params, recipe.packed)
        return result
    input, states, params = autocast(device_type, input, states, params)
    lifted = [state.unsqueeze(0) for state in states]
    shown = input
    if input.dtype is torch.int64:
        input = _ids.checked(input.unsqueeze(0), params[0].shape[1], None, False).squeeze(0)
        shown = _ids.stand_in(input.unsqueeze(-1), params)
    if _get_tracing_state() is None:
        _checks.check_call(recipe, shown, lifted, params, input.shape[0])
    else:
        x, lifted, _ = _traced_for_reference(recipe, input.unsqueeze(0), lifted, params, Rows())
        input, states = x.squeeze(0), [state.squeeze(0) for state in lifted]
    return reference.cell(input, states, params, recipe)


def zero_states(recipe: Recipe, input: Tensor, weights: list[Tensor], batch_sizes: Tensor) -> list[Tensor]:
    """The states [L*D, B, .] of a packed input that comes without."""
    groups = recipe.num_layers * recipe.directions
    base = 2 + 2 * recipe.has_biases
    projected = recipe.kind.may_project and len(weights) // groups == base + 1
    sizes = [weights[base].shape[0] if projected else weights[1].shape[-1], weights[1].shape[0] // recipe.kind.gates]
    # A traced number would be the trace's constant; a traced tensor is not.
    batch: Any = int(batch_sizes[0]) if _get_tracing_state() is None else batch_sizes[0]
    like = weights[0] if input.dtype is torch.int64 else input
    return [like.new_zeros(groups, batch, size) for size in sizes[: recipe.kind.states]]


def _traced_for_reference(
    recipe: Recipe, input: Tensor, states: Sequence[Tensor], weights: list[Tensor], rows: Rows
) -> tuple[Tensor, list[Tensor], Rows]:
    """While torch.jit.trace records the reference: (input, states, rows), whose shapes the graph checks too.

    Raises:
        RuntimeError: the input is packed.
    """
    if rows.offsets is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record packed input on fused_rnn's Python reference, whose loop over time follows the "
            "values of batch_sizes: trace with the compiled kernels, or after fused_rnn.revert(model)"
        )
    batch_dim = 0 if recipe.batch_first else 1
    with _checks.untraced():
        shown = _ids.stand_in(input.unsqueeze(-1), weights) if input.dtype is torch.int64 else input
        _checks.check_call(recipe, shown, states, weights, input.shape[batch_dim])

    def pinned(tensor: Any, *shape: int) -> Any:
        """The same tensor; torch.stack raises where its shape is another, also when the graph runs."""
        return None if tensor is None else torch.stack([tensor, tensor.new_zeros(shape)])[0]

    groups, batch = recipe.num_layers * recipe.directions, input.shape[batch_dim]
    sizes = (weights[1].shape[1], weights[1].shape[0] // recipe.kind.gates)
    return (
        pinned(input, *input.shape[:2], *weights[0].shape[1 : input.dim() - 1]),
        [pinned(state, groups, batch, size) for state, size in zip(states, sizes, strict=False)],
        rows._replace(lengths=pinned(rows.lengths, batch), resets=pinned(rows.resets, *input.shape[:2])),
    )


def autocast_on(device_type: str) -> bool:
    # torch.is_autocast_enabled raises for device types without autocast, such as meta.
    return device_type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device_type)


def _lowered(device_type: str, dtype: torch.dtype) -> bool:
    """Whether autocast makes a call of this dtype one of 16 bits, of which no kernel has tangents: the reference's then."""
    if dtype is torch.float64 or not autocast_on(device_type):
        return False
    return torch.get_autocast_dtype(device_type) not in (torch.float32, torch.float64)


def autocast(
    device_type: str, input: Tensor, states: Sequence[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What the ops' Autocast kernels do, for the reference: integers, complex numbers and float64 stay what they are."""
    if not autocast_on(device_type):
        return input, list(states), weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(input), [cast(state) for state in states], [cast(weight) for weight in weights]


def autocast_options(device_type: str, options: StepOptions) -> StepOptions:
    """The same for the factors among a layer's options."""
    if not autocast_on(device_type):
        return options
    factors = options.product, options.candidate
    product, candidate = (f if f is None else autocast(device_type, f, [], [])[0] for f in factors)
    return options._replace(product=product, candidate=candidate)


# --- the public arguments ---


def _with_states(y: Tensor, states: list[Tensor], all_states: bool) -> tuple[Any, ...]:
    """What the public functions return: the output, the last states and, where asked for, those after every step."""
    count = len(states) // 2 if all_states else len(states)
    parts = [states[:count], states[count:]][: 1 + all_states]
    return (y, *(part[0] if count == 1 else tuple(part) for part in parts))


def _checked_rnn(
    recipe: Recipe,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | Tensor | None,
    batch_sizes: Tensor | None,
    extras: Extras,
) -> tuple[Tensor, list[Tensor]]:
    ids = _ids.lifted(input) if _ids.are(input) else None
    if ids is not None:
        weights = _checks.list_of_weights(weights)
        input = _ids.stand_in(ids, weights)
    _checks.check_input(recipe.cell, input)
    _checks.check_recipe(recipe)
    packed = batch_sizes is not None
    if input.dim() not in ((2,) if packed else (2, 3)):
        raise ValueError(f"input: expected {'2-D with batch_sizes' if packed else '2-D or 3-D'}, got {input.dim()}-D")
    if packed and recipe.batch_first:
        raise ValueError("batch_first: expected False with batch_sizes")
    if packed and extras.lengths is not None:
        raise ValueError("lengths: expected None with batch_sizes, which already give the lengths")
    weights = _checks.list_of_weights(weights)
    states = _checks.states_of(recipe.kind, hx)
    casts = autocast_on(input.device.type)
    _checks.check_places(input, weights, _checks.name_of_weight, casts)
    _checks.check_places(input, states, _checks.STATE_NAMES.__getitem__, casts)
    unbatched = input.dim() == 2 and not packed
    batch_dim = 0 if recipe.batch_first else 1
    given = input
    if unbatched:
        input = input.unsqueeze(batch_dim)
        ids = None if ids is None else ids.unsqueeze(batch_dim)
        states = [state.unsqueeze(1) for state in states]
    with _checks.sizes_known():
        hidden, out = _checks.check_shapes(recipe, input, states, weights, batch_sizes)
    input = input if ids is None else ids
    if not extras.given():
        y, last = run_rnn(recipe, input, states, weights, batch_sizes)
        return (y.squeeze(batch_dim), [state.squeeze(1) for state in last]) if unbatched else (y, last)
    groups, count = recipe.num_layers * recipe.directions, recipe.kind.states
    names, sizes = ("h", "c")[:count], (out, hidden)[:count]
    form = _extras.Form(given, recipe.batch_first, unbatched, batch_sizes, groups, names, sizes, casts)
    rows = _extras.rows_of(extras, form)
    y, last = run_rnn(recipe._replace(all_states=extras.return_all_states), input, states, weights, batch_sizes, rows)
    every = _extras.in_form(last[count:], form)
    if unbatched:
        y, last = y.squeeze(batch_dim), [state.squeeze(1) for state in last[:count]]
    return y, [*last[:count], *every]


def _checked_cell(
    cell: int,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> list[Tensor]:
    ids = _ids.lifted(input) if _ids.are(input) else None
    if ids is not None:
        input = _ids.stand_in(ids, [w_ih])
    _checks.check_input(cell, input)
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected 1-D or 2-D, got {input.dim()}-D")
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih, b_hh: expected both or neither, got one")
    recipe = Recipe(cell, has_biases=b_ih is not None)
    params = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    names = ("w_ih", "w_hh", "b_ih", "b_hh")[: len(params)]
    states = _checks.states_of(recipe.kind, hx)
    casts = autocast_on(input.device.type)
    _checks.check_places(input, params, names.__getitem__, casts)
    _checks.check_places(input, states, ("h", "c").__getitem__, casts)
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
        ids = None if ids is None else ids.unsqueeze(0)
        states = [state.unsqueeze(0) for state in states]
    if _get_tracing_state() is None:
        _checks.check_cell_shapes(recipe, input, states, params, names)
    else:
        with _checks.untraced():
            _checks.check_cell_shapes(recipe, input, states, params, names)
    last = run_cell(recipe, input if ids is None else ids, states, params)
    return [state.squeeze(0) for state in last] if unbatched else last
