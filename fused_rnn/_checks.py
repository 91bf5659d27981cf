"""Checks of a call's arguments, the same for every backend: an error names the argument, what was expected and what came.

Errors of the public functions are TypeError and ValueError. The modules raise torch.nn's errors and use only the parts below
that say what a tensor is. ``check_call`` checks, for calls that the reference serves, what csrc/torch/call.cpp does for
kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fused_rnn._dtensor import whole
from fused_rnn._kinds import RNN_RELU, Kind, number_of_nonlinearity
from fused_rnn._recipe import Recipe

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those with kernels
COMPLEX = (torch.complex64, torch.complex128)  # served by the reference
STATE_NAMES = ("h0", "c0")
_STRIDED = torch.strided


# --- torch.jit.trace ---


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Inside the block torch.jit.trace records nothing and sizes are numbers, so that they can be checked.

    While it records, sizes are traced tensors: a comparison of them warns and makes its outcome the trace's constant.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def sizes_known() -> contextlib.AbstractContextManager[None]:
    """The block ``untraced``, if torch.jit.trace is recording."""
    return contextlib.nullcontext() if torch._C._get_tracing_state() is None else untraced()


# --- what a tensor is ---


def fit(tensors: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether each is a strided tensor of this dtype on this device. Called at every call of a module: no more than that."""
    for tensor in tensors:
        if tensor is None or tensor.dtype is not dtype or tensor.device != device or tensor.layout is not _STRIDED:
            return False
    return True


def layout_problem(tensor: Tensor) -> str | None:
    """None for a tensor whose elements lie at strides, as kernels read them; else what was expected and what came."""
    if tensor.layout is not _STRIDED:
        return (
            f"expected a dense tensor (layout torch.strided: elements are read by strides), got layout {tensor.layout}; "
            f"convert it with to_{'padded_tensor' if tensor.is_nested else 'dense'}()"
        )
    if tensor.is_nested:
        return "expected a dense tensor, got a nested tensor; convert it with to_padded_tensor() or pack it"
    return None


def check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    problem = layout_problem(tensor)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}")


def is_wide_c(c: Tensor, input: Tensor) -> bool:
    """Whether c is the float32 c of an LSTM of 16 bits, which then returns its last c in float32 too."""
    return c.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)


def _check_like_input(name: str, tensor: Any, input: Tensor, autocast: bool) -> None:
    check_tensor(name, tensor)
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} (input's), got {tensor.device}")
    wide = name in ("c", "c0") and is_wide_c(tensor, input)
    cast = autocast and tensor.dtype.is_floating_point and input.dtype.is_floating_point
    if tensor.dtype != input.dtype and not cast and not wide:
        raise ValueError(f"{name}: expected dtype {input.dtype} (input's), got {tensor.dtype}")


# --- arguments of the public functions ---


def rnn_kind(nonlinearity: Any) -> int:
    try:
        return number_of_nonlinearity(nonlinearity)
    except LookupError as names:
        raise ValueError(f"nonlinearity: expected {names}, got {nonlinearity!r}") from None


def check_recipe(recipe: Recipe) -> None:
    """num_layers: an int of at least 1; dropout: a number from 0 to 1; each of the flags: a bool."""
    num_layers, dropout = recipe.num_layers, recipe.dropout
    if type(num_layers) is not int and (not isinstance(num_layers, Integral) or isinstance(num_layers, bool)):
        raise TypeError(f"num_layers: expected an int, got {type(num_layers).__name__}")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if type(dropout) is not float and (not isinstance(dropout, Real) or isinstance(dropout, bool)):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    for name in ("has_biases", "bidirectional", "training", "batch_first"):
        value = getattr(recipe, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_dtype(input: Tensor) -> None:
    if input.dtype not in DTYPES + COMPLEX:
        raise ValueError(
            "input: expected dtype float64, float32, float16, bfloat16, complex64 or complex128, or int64 or int32 ids, got "
            f"{input.dtype}"
        )


def check_input(cell: int, input: Any) -> None:
    check_tensor("input", input)
    check_dtype(input)
    if cell == RNN_RELU and input.dtype.is_complex:
        raise ValueError(f"input: expected a real dtype with nonlinearity 'relu', got {input.dtype}")


def states_of(kind: Kind, hx: Any) -> list[Any]:
    """The states in hx: none where it is None."""
    if hx is None:
        return []
    if kind.states == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
        return [hx]
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx: expected a pair (h0, c0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise TypeError(f"hx: expected a pair (h0, c0), got a {type(hx).__name__} of {len(hx)}")
    return list(hx)


def list_of_weights(weights: Any) -> list[Tensor]:
    """The weights as a list; any iterable of tensors will do that is not a tensor itself."""
    if isinstance(weights, (Tensor, str, bytes, dict)) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected a list of Tensors, got {type(weights).__name__}")
    return list(weights)


def check_places(input: Tensor, tensors: Sequence[Any], name: Callable[[int], str], autocast: bool) -> None:
    """Every tensor, name(index) in errors, is dense, on the input's device and, outside autocast, of its dtype."""
    if all(isinstance(tensor, Tensor) for tensor in tensors) and fit(tensors, input.dtype, input.device):
        return
    for index, tensor in enumerate(tensors):
        _check_like_input(name(index), tensor, input, autocast)


def name_of_weight(index: int) -> str:
    return f"weights[{index}]"


def weights_per_group(recipe: Recipe, weights: Sequence[Tensor]) -> tuple[int, int]:
    """(tensors of one layer and direction, those of them that are no projection) of a list of weights."""
    groups = recipe.num_layers * recipe.directions
    base = 4 if recipe.has_biases else 2
    sizes = (base, base + 1) if recipe.kind.may_project else (base,)
    per_group = len(weights) // groups
    if per_group not in sizes or per_group * groups != len(weights):
        expected = " or ".join(str(groups * size) for size in sizes)
        raise ValueError(
            f"weights: expected {expected} tensors for num_layers={recipe.num_layers}, {recipe.directions} direction(s), "
            f"has_biases={recipe.has_biases}, got {len(weights)}"
        )
    return per_group, base


def check_weights(recipe: Recipe, input: Tensor, weights: Sequence[Tensor], name: Callable[[int], str]) -> tuple[int, int]:
    """Checks number and shapes of weights; returns (H, P)."""
    per_group, base = weights_per_group(recipe, weights)
    directions, gates, w_hh = recipe.directions, recipe.kind.gates, weights[1]
    if w_hh.dim() != 2 or w_hh.shape[0] % gates or 0 in w_hh.shape:
        raise ValueError(f"{name(1)}: expected shape [{gates}*H, P] with H, P >= 1, got {list(w_hh.shape)}")
    hidden, out = w_hh.shape[0] // gates, w_hh.shape[1]
    if per_group == base and out != hidden:
        raise ValueError(f"{name(1)}: expected shape {[gates * hidden, hidden]}, got {list(w_hh.shape)}")
    for index, weight in enumerate(weights):
        group, place = divmod(index, per_group)
        if place == 0:
            expected_shape = [gates * hidden, input.shape[-1] if group < directions else directions * out]
        elif place == 1:
            expected_shape = [gates * hidden, out]
        else:
            expected_shape = [gates * hidden] if place < base else [out, hidden]
        if list(weight.shape) != expected_shape:
            check_shape(name(index), weight, expected_shape)
    return hidden, out


def check_states(names: Sequence[str], states: Sequence[Tensor], *shapes: Sequence[int]) -> None:
    for name, state, shape in zip(names, states, shapes, strict=False):
        check_shape(name, state, shape)


def check_batch_sizes(batch_sizes: Any, input: Tensor) -> None:
    check_tensor("batch_sizes", batch_sizes)
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


def lengths_tensor(lengths: Any) -> Tensor:
    """lengths as a tensor of integers: a Tensor, or what torch.as_tensor makes one of."""
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"lengths: expected a Tensor or a list of integers, got {type(lengths).__name__}") from error
    check_tensor("lengths", lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: expected integers, got {lengths.dtype}")
    return lengths


def check_resets(resets: Any) -> None:
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a bool Tensor, got {type(resets).__name__}")
    check_tensor("resets", resets)
    if resets.dtype != torch.bool:
        raise ValueError(f"resets: expected dtype torch.bool, got {resets.dtype}")


def _without_transforms(tensor: Tensor) -> Tensor:
    """The tensor with the values of all samples of torch.func.vmap, in any order of its dimensions."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_masks(lengths: Tensor | None, resets: Tensor | None, steps: int, batch: int, resets_shape: Sequence[int]) -> None:
    """Shapes of lengths and resets, and the values of lengths where reading them does not wait for a device."""
    if lengths is not None:
        check_shape("lengths", lengths, [batch])
        known = lengths.device.type == "cpu" and not torch.compiler.is_compiling()  # a graph being captured has no values
        if known and batch:
            values = whole(_without_transforms(lengths))
            if values.numel() and not (0 <= int(values.min()) and int(values.max()) <= steps):
                raise ValueError(f"lengths: expected values from 0 to {steps}, got {values.tolist()}")
    if resets is not None:
        check_shape("resets", resets, resets_shape)


def check_shapes(
    recipe: Recipe,
    input: Tensor,
    states: Sequence[Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[int, int]:
    """Shapes and values of a batched or packed input and of what comes with it. Returns (H, P)."""
    hidden, out = check_weights(recipe, input, weights, name_of_weight)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input)
        batch = int(batch_sizes[0])
    else:
        steps, batch = input.shape[int(recipe.batch_first)], input.shape[1 - int(recipe.batch_first)]
        if steps == 0:
            raise ValueError("input: expected at least 1 time step, got 0")
    rows = recipe.num_layers * recipe.directions
    check_states(STATE_NAMES, states, [rows, batch, out], [rows, batch, hidden])
    return hidden, out


def check_cell_shapes(
    recipe: Recipe, input: Tensor, states: Sequence[Tensor], params: list[Tensor], names: Sequence[str]
) -> None:
    hidden, _ = check_weights(recipe, input, params, names.__getitem__)
    shape = [input.shape[0], hidden]
    if params[1].shape[1] != hidden:
        raise ValueError(f"w_hh: expected shape {[params[1].shape[0], hidden]}, got {list(params[1].shape)}")
    check_states(("h", "c"), states, shape, shape)


# --- what csrc/torch/call.cpp checks, for the reference ---


def check_call(recipe: Recipe, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], batch: int) -> None:
    """A stack's tensors before the reference runs on them: it would broadcast, or leave out, what a kernel refuses.

    Args:
        batch: B.
        The other arguments: as :func:`fused_rnn.reference.rnn`'s, after the casts of autocast.

    Raises:
        TypeError, ValueError: options and the number of weights.
        RuntimeError: a tensor.
    """
    if not isinstance(recipe.dropout, Real):
        raise TypeError(f"dropout: expected a number, got {type(recipe.dropout).__name__}")
    check_recipe(recipe._replace(dropout=0.0, training=False, batch_first=False))
    weights_per_group(recipe, weights)
    rows = recipe.num_layers * recipe.directions
    try:
        check_input(recipe.cell, input)
        check_places(input, weights, name_of_weight, autocast=False)
        check_places(input, states, STATE_NAMES.__getitem__, autocast=False)
        hidden, out = check_weights(recipe, input, weights, name_of_weight)
        check_states(STATE_NAMES, states, [rows, batch, out], [rows, batch, hidden])
    except ValueError as error:
        raise RuntimeError(str(error)) from None
