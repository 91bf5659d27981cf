"""The constructors' options of a Layer or a Step: cells whose formulas contain them.

An option makes another cell of the user's. All kernels, their gradients, ``source`` and ``explain`` follow from its formula:

    state_clip          a state is clamped where the step makes it, so what the step makes of it is made of the clamped one
    zoneout             s' = s before the step where x.zoneout_s says so, else s after it; without masks the mean of both
    recurrent_dropout   one more state, factors * h, is what the recurrent product reads

Masks are values of gates without weights (language.GivenGate). They are drawn in the order of Regularisation.masks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn._recipe import Rows, StepOptions
from fused_rnn._regularisation import Regularisation, Sizes, Target
from fused_rnn.formula.language import Cell, GivenGate, run_step
from fused_rnn.formula.tape import Tape, listed, names_of_inputs, record


class Change(NamedTuple):
    """What options make of a formula."""

    flags: tuple[bool, ...] = ()  # of each state whether a mask says which units keep their value; (): none
    shares: tuple[float, ...] = ()  # of each state how much of its value before the step stays; (): nothing
    clips: tuple[float | None, ...] = ()  # of each state its bound; (): none
    drops: bool = False  # the recurrent product reads h times factors


def change_of(cell: Cell, of: Regularisation | None, training: bool) -> Change:
    """What the options change in training, or without it; a Change() if nothing."""
    if of is None:
        return Change()
    clips = of.clips(len(cell.declaration.states))
    if not training:
        return Change(shares=of.zoneout, clips=clips)
    return Change(tuple(p > 0 for p in of.zoneout), (), clips, of.recurrent_dropout > 0)


def changed(cell: Cell, change: Change) -> Cell:
    """The cell whose formula contains the change; the same cell if there is none."""
    return cell if change == Change() else _class_of(type(cell).__name__)(cell, change)


@functools.cache
def _class_of(name: str) -> type[Changed]:
    """The class of changed cells of a class of this name, which kernels are named after."""
    return type(f"{name}WithOptions", (Changed,), {"__module__": __name__})


class Changed(Cell):
    """A cell with options in its formula. The parameters are those of the cell ``_base``."""

    _base: Cell
    _change: Change
    _is_written = False

    def __init__(self, base: Cell, change: Change) -> None:
        says = base.declaration
        taken = {*says.states, *(gate.name for gate in says.gates)}
        self._base, self._change = base, change
        self._zoned = tuple(
            unused_name(f"zoneout_{state}", taken) if flag else None
            for state, flag in zip(says.states, change.flags or [False] * len(says.states), strict=True)
        )
        self._factors = unused_name("factors", taken) if change.drops else None
        given = [*filter(None, self._zoned), *filter(None, [self._factors])]
        self.gates = (*says.gates, *map(GivenGate, given))
        self.states = says.states
        self.output, self.recurrent = says.states[says.output], says.states[says.recurrent]
        if change.drops:
            self.recurrent = unused_name(f"dropped_{self.recurrent}", taken)
            self.states = (*says.states, self.recurrent)
        self.unit_parameters, self.scalar_parameters, self.heads = dict(says.units), dict(says.scalars), says.heads
        self._tape: Tape | None = record(base) if any(clip is not None for clip in change.clips) else None

    def __reduce__(self) -> Any:
        return changed, (self._base, self._change)

    def __repr__(self) -> str:
        given = {name: value for name, value in self._change._asdict().items() if value}
        return f"{self._base!r} with {', '.join(f'{name}={value}' for name, value in given.items())}"

    @property
    def _written_step(self) -> Any:
        return self._base._written_step

    def step(self, x: Any, r: Any, *states: Any) -> Any:
        """The user's step with the options around it."""
        base, (_, shares, clips, _) = self._base, self._change
        says = base.declaration
        before = states[: len(says.states)]
        x_gates = {gate: getattr(x, gate) for gate in says.input_gates}
        r_gates = {gate: getattr(r, gate) for gate in says.recurrent_gates}
        own = {name: getattr(self, name) for name in (*says.units, *says.scalars)}
        if self._tape is None:
            after = listed(run_step(base, x_gates, r_gates, before, own, self._run_phase))
        else:
            inputs = names_of_inputs(x_gates, r_gates, own) | dict(zip(says.states, before, strict=True))
            after = self._tape.run(inputs, self._run_phase, functools.partial(_clamped, clips))
        for index, flags in enumerate(self._zoned):
            if flags is not None:
                after[index] = torch.where(getattr(x, flags) > 0.5, before[index], after[index])
        for index, share in enumerate(shares):
            if share:
                after[index] = share * before[index] + (1 - share) * after[index]
        return (*after, getattr(x, self._factors) * after[says.recurrent]) if self._factors else tuple(after)


def _clamped(clips: Sequence[float | None], state: int, value: Any) -> Any:
    clip = clips[state]
    return value if clip is None else value.clamp(-clip, clip)


def unused_name(name: str, taken: set[str]) -> str:
    """The name, or one like it that nothing has; taken from now on."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


# --- of a call ---


class Masks(NamedTuple):
    """The masks of a call in training, as they are drawn."""

    kept: Tensor | None = None  # bool [L*D, N, K, H]: which units keep their value, of the K states with zoneout
    factors: Tensor | None = None  # [L*D, B, H] of recurrent_dropout

    def compact(self) -> StepOptions:
        """As they are drawn. rows_with_values makes values of it, for a checkpointed layer once in each pass."""
        return StepOptions(values=self.kept, product=self.factors)


def masks_of(of: Regularisation, like: Tensor, sizes: Sizes) -> Masks:
    """Draws a training call's masks. like: of the call's dtype."""
    flags, factors = of.masks(like, sizes)
    kept = [flag for flag in flags if isinstance(flag, Tensor)]
    return Masks(torch.stack(kept, 2) if kept else None, factors)


def rows_with(rows: Rows, masks: Masks, recurrent: int) -> Rows:
    """The rows of a call with its masks, compact; what resets put into the state ``recurrent`` is dropped too."""
    if masks.factors is not None and rows.reset_states:
        rows = rows._replace(reset_states=(*rows.reset_states, masks.factors * rows.reset_states[recurrent]))
    return rows if masks.kept is None and masks.factors is None else rows._replace(options=masks.compact())


def rows_with_values(rows: Rows, x: Tensor, dtype: torch.dtype) -> Rows:
    """The rows with StepOptions.values [., N, K, H] in place of compact masks, where there are some.

    x: [T, B, I], packed [N, I], or ids without the last dimension.
    """
    kept, factors = rows.options.values, rows.options.product
    if factors is None and (kept is None or kept.dtype is not torch.bool):
        return rows
    blocks = [] if kept is None else [kept.to(dtype)]
    if factors is not None:
        if rows.offsets is None:
            of_rows = factors.repeat(1, x.shape[0], 1)
        else:
            starts = torch.repeat_interleave(rows.offsets[:-1], rows.offsets.diff(), output_size=x.shape[0])
            of_rows = factors.index_select(1, torch.arange(x.shape[0], device=starts.device) - starts)
        blocks.append(of_rows.unsqueeze(2))
    return rows._replace(options=StepOptions(values=torch.cat(blocks, 2)))


def target_of(name: str, cell: Cell, bias: bool, is_cell: bool = False) -> Target:
    """What the cell of a Layer or a Step can have."""
    says = cell.declaration
    of = type(cell).__name__
    return Target(
        name,
        says.states,
        bias,
        is_cell,
        clips_each=True,
        no_candidate=f"of {of} no gate is declared as a candidate",
        no_forget_gate=f"{of} starts its own parameters, and none of its gates is declared as a forget gate",
        no_recurrent_product="" if says.recurrent_gates else f"{of} has no recurrent product",
    )
