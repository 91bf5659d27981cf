"""What a call takes beyond torch.nn's arguments, the same for functions, modules and cells of one's own: its checks, its
form in the ops, and the form of the results that it adds.

Shapes, with L*D = num_layers * directions; `size` is that of the state (P of h, H of the others):

    resets        bool [T, B]; [B, T] with batch_first; [T] unbatched; [N] packed
    reset_state   [L*D, 1 or B, size], or of every step in the form of the third result; [L*D, size] unbatched
    third result  [T, L*D, B, size]; [B, T, L*D, size] with batch_first; [T, L*D, size] unbatched; [N, L*D, size] packed

Packed rows have no form for reset states of every step: these are [T, L*D, B, size].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _checks
from fused_rnn._recipe import Rows


class Extras(NamedTuple):
    """The arguments as a caller gave them."""

    lengths: Any = None  # [B] integers
    resets: Any = None
    reset_state: Any = None
    return_all_states: Any = False

    def given(self) -> bool:
        """Whether there are any: asked at every call."""
        lengths, resets, reset_state, all_states = self
        return not (lengths is None and resets is None and reset_state is None and all_states is False)


class Form(NamedTuple):
    """The call that they come with."""

    input: Tensor  # as the caller gave it; of packed input the data
    batch_first: bool
    unbatched: bool
    batch_sizes: Tensor | None  # of packed input
    groups: int  # L*D
    states: tuple[str, ...]  # their names
    sizes: tuple[int, ...]  # and sizes
    autocast: bool

    @property
    def steps(self) -> int:
        if self.batch_sizes is not None:
            return self.batch_sizes.shape[0]
        return self.input.shape[1 if self.batch_first and not self.unbatched else 0]

    @property
    def batch(self) -> int:
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        return 1 if self.unbatched else self.input.shape[0 if self.batch_first else 1]


def rows_of(extras: Extras, form: Form, sorted_indices: Tensor | None = None) -> Rows:
    """Checks the arguments; gives them as run_rnn takes them, of an unbatched input as of a batch of one.

    sorted_indices: of a packed input, whose rows they bring into order; reset_state comes in the caller's.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    lengths, resets, reset_state, return_all_states = extras
    if not isinstance(return_all_states, bool):
        raise TypeError(f"return_all_states: expected a bool, got {type(return_all_states).__name__}")
    packed = form.batch_sizes is not None
    if lengths is not None:
        if packed:
            raise ValueError("lengths: expected None with packed input, which already gives the lengths")
        lengths = _checks.lengths_tensor(lengths)
        lengths = (lengths.reshape(1) if form.unbatched else lengths).to(torch.int64)
    if resets is not None:
        _checks.check_resets(resets)
        if form.unbatched:
            with _checks.sizes_known():
                _checks.check_shape("resets", resets, form.input.shape[:1])
            resets = resets.unsqueeze(0 if form.batch_first else 1)
    elif reset_state is not None:
        raise ValueError("reset_state: expected None without resets, which say where it replaces the state")
    with _checks.sizes_known():
        shape = [1] if form.unbatched else form.input.shape[: 1 if packed else 2]
        _checks.check_masks(lengths, None if form.unbatched else resets, form.steps, form.batch, shape)
    states = () if reset_state is None else reset_states(reset_state, form, sorted_indices)
    return Rows(lengths, None, resets, states)


def reset_states(given: Any, form: Form, sorted_indices: Tensor | None = None) -> tuple[Tensor, ...]:
    """reset_state as run_rnn takes it: of each state [L*D, 1 or B, size] or [T, L*D, B, size]."""
    return tuple(
        _reset_state(name, size, state, form, sorted_indices)
        for name, size, state in zip(_names(form.states), form.sizes, list_of_states(given, form.states), strict=True)
    )


def _names(states: Sequence[str]) -> list[str]:
    return ["reset_state"] if len(states) == 1 else [f"reset_state[{i}] ({name})" for i, name in enumerate(states)]


def list_of_states(given: Any, states: Sequence[str]) -> list[Any]:
    """reset_state as one value for each state."""
    values = [given] if len(states) == 1 and isinstance(given, Tensor) else given
    if not isinstance(values, (tuple, list)) or len(values) != len(states):
        many = f"a tuple of {len(states)} Tensors ({', '.join(states)})"
        got = f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, (tuple, list)) else "")
        raise TypeError(f"reset_state: expected {'a Tensor' if len(states) == 1 else many}, got {got}")
    return list(values)


def check_place(name: str, state: Any, form_input: Tensor, autocast: bool) -> None:
    """A dense tensor on input's device and, outside autocast, of its dtype."""
    _checks.check_tensor(name, state)
    if state.device != form_input.device:
        raise ValueError(f"{name}: expected device {form_input.device} (input's), got {state.device}")
    cast = autocast and state.dtype.is_floating_point and form_input.dtype.is_floating_point
    if state.dtype != form_input.dtype and not cast:
        raise ValueError(f"{name}: expected dtype {form_input.dtype} (input's), got {state.dtype}")


def _reset_state(name: str, size: int, state: Any, form: Form, sorted_indices: Tensor | None) -> Tensor:
    check_place(name, state, form.input, form.autocast)
    with _checks.sizes_known():
        _check_shape_of_reset_state(name, size, state, form)
    if form.unbatched:
        return state.unsqueeze(-2)
    if form.batch_first and state.dim() == 4:
        state = state.permute(1, 2, 0, 3)
    if sorted_indices is not None and state.shape[-2] > 1:
        state = state.index_select(-2, sorted_indices)
    return state


def _check_shape_of_reset_state(name: str, size: int, state: Tensor, form: Form) -> None:
    steps, batch, groups = form.steps, form.batch, form.groups
    if form.unbatched:
        allowed = [[groups, size], [steps, groups, size]]
    elif form.batch_first:
        allowed = [[groups, 1, size], [groups, batch, size], [batch, steps, groups, size]]
    else:
        allowed = [[groups, 1, size], [groups, batch, size], [steps, groups, batch, size]]
    if all(list(state.shape) != shape for shape in allowed):
        expected = " or ".join(str(shape) for shape in dict.fromkeys(map(tuple, allowed)))
        raise ValueError(f"{name}: expected shape {expected.replace('(', '[').replace(')', ']')}, got {list(state.shape)}")


def in_form(states: Sequence[Tensor], form: Form) -> list[Tensor]:
    """run_rnn's states of every step [T, L*D, B, size], packed [N, L*D, size], in the form of the third result."""
    if form.unbatched:
        return [state.squeeze(2) for state in states]
    if form.batch_first:
        return [state.permute(2, 0, 1, 3) for state in states]
    return list(states)


def begin_of_step(
    states: Sequence[Tensor], resets: Any, reset_state: Any, x: Tensor, call: tuple[Sequence[str], int, bool]
) -> list[Tensor]:
    """A cell's states [B, H] with those rows replaced that `resets` [B] says: by zeros, or by reset_state [1 or B, H].

    call: names of the states, H, and whether autocast may change dtypes.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    names, hidden, autocast = call
    if resets is None:
        if reset_state is not None:
            raise ValueError("reset_state: expected None without resets, which say where it replaces the state")
        return list(states)
    _checks.check_resets(resets)
    rows = list(x.shape[:-1])
    _checks.check_shape("resets", resets, rows)
    given: list[Any] = [0] * len(names) if reset_state is None else list_of_states(reset_state, names)
    for name, state in zip(_names(names), given if reset_state is not None else [], strict=False):
        check_place(name, state, x, autocast)
        if list(state.shape) not in ([*rows, hidden], [*rows[:-1], *[1] * len(rows), hidden]):
            raise ValueError(
                f"{name}: expected shape {[*rows, hidden]}{' or ' + str([1, hidden]) if rows else ''}, got "
                f"{list(state.shape)}"
            )
    before = list(states) or [x.new_zeros([*rows, hidden]) for _ in names]
    where = resets.to(x.device).unsqueeze(-1)
    return [torch.where(where, new, state) for new, state in zip(given, before, strict=True)]
