"""The constructors' options beyond torch.nn's: their checks, and what they make of a call's weights and steps.

Masks come from torch's generator of the input's device, in the order of the functions' statements here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused_rnn._kinds import Kind
from fused_rnn._recipe import StepOptions

VARIANTS = ("state", "candidate")
FIELD = "_regularisation"  # of a module's __dict__, where it has options; csrc/torch/module_call.cpp looks there too


class Sizes(NamedTuple):
    """Of a call: L*D groups, N rows in memory (T*B, or of a packed input its rows), B, P and H."""

    groups: int
    rows: int
    batch: int
    out: int
    hidden: int


class Regularisation(NamedTuple):
    """The options of a layer or cell, after checks; the defaults change nothing."""

    zoneout: tuple[float, ...] = ()  # of each state, or none
    recurrent_dropout: float = 0.0
    recurrent_dropout_variant: str = "state"
    weight_dropout: float = 0.0
    state_clip: float | None = None
    forget_bias: float | None = None

    def modifies_steps(self, training: bool) -> bool:
        """Whether a call takes more than other weights."""
        return bool(self.zoneout) or self.state_clip is not None or (training and self.recurrent_dropout > 0)

    def dropped(self, weights: Sequence[Tensor], per_group: int, training: bool) -> list[Tensor]:
        """The weights with every w_hh, the second of each group, under a mask of this call."""
        if not self.weight_dropout or not training:
            return list(weights)
        p = self.weight_dropout
        return [functional.dropout(w, p, True) if i % per_group == 1 else w for i, w in enumerate(weights)]

    def step_options(self, input: Tensor, sizes: Sizes, training: bool) -> StepOptions:
        """What kernels and reference take of a call; in training with masks of its own."""

        def zoneout(p: float) -> Tensor | float | None:
            if not p or not training:
                return p or None
            shape = (sizes.groups, sizes.rows, sizes.hidden)
            return torch.rand(shape, device=input.device, dtype=torch.float32) < p

        def factors(size: int) -> Tensor:
            dtype = input.dtype.to_real() if input.is_complex() else input.dtype
            ones = input.new_ones((sizes.groups, sizes.batch, size), dtype=dtype, requires_grad=False)
            return functional.dropout(ones, self.recurrent_dropout, True)

        kept = [zoneout(p) for p in self.zoneout]
        product = candidate = None
        if self.recurrent_dropout and training:
            if self.recurrent_dropout_variant == "state":
                product = factors(sizes.out)
            else:
                candidate = factors(sizes.hidden)
        return StepOptions(
            kept[0] if kept else None, kept[1] if len(kept) > 1 else None, self.state_clip, product, candidate
        )

    def shown(self) -> str:
        """What ``repr`` adds: the options that are not the default."""
        given = {name: getattr(self, name) for name in self._fields if getattr(self, name) != self._field_defaults[name]}
        if "zoneout" in given:
            given["zoneout"] = self.zoneout[0] if len(set(self.zoneout)) == 1 else self.zoneout
        return "".join(f", {name}={value!r}" for name, value in given.items())


# --- checks ---


class Target(NamedTuple):
    """What of a module decides which options it can have."""

    name: str
    cell: Kind
    bias: bool
    is_cell: bool = False
    projects: bool = False

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c")[: self.cell.states]

    @property
    def has_candidate(self) -> bool:
        """Cells with gates have one, LSTM's g and GRU's n."""
        return self.cell.has_gates

    @property
    def has_forget_gate(self) -> bool:
        return self.cell.has_c


def _number(name: str, value: Any, expected: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return float(value)


def _probability(name: str, value: Any) -> float:
    number = _number(name, value, "a number")
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
    return number


def _zoneout(value: Any, target: Target) -> tuple[float, ...]:
    many = f"a number or a tuple of {len(target.states)} ({', '.join(target.states)})"
    if isinstance(value, (tuple, list)):
        if len(value) != len(target.states):
            raise ValueError(f"zoneout: expected {many}, got {len(value)} numbers")
        names = [f"zoneout[{i}] ({name})" for i, name in enumerate(target.states)]
        found = tuple(_probability(name, p) for name, p in zip(names, value, strict=True))
    elif isinstance(value, Real) and not isinstance(value, bool):
        found = (_probability("zoneout", value),) * len(target.states)
    else:
        raise TypeError(f"zoneout: expected {many}, got {type(value).__name__}")
    if any(found) and target.projects:
        raise ValueError(f"zoneout: expected 0 with proj_size (no kernel has both), got {value}")
    return found if any(found) else ()


def _recurrent_dropout(value: Any, variant: Any, target: Target) -> float:
    p = _probability("recurrent_dropout", value)
    if variant not in VARIANTS:
        raise ValueError(f"recurrent_dropout_variant: expected 'state' or 'candidate', got {variant!r}")
    if variant == "candidate" and not target.has_candidate:
        raise ValueError(
            f"recurrent_dropout_variant: expected 'state' for {target.name} (it has no gates, so no candidate), "
            "got 'candidate'"
        )
    if p and target.is_cell:
        raise ValueError(
            f"recurrent_dropout: expected 0 for {target.name} (its masks are those of a sequence, of which a cell sees a "
            f"step), got {value}"
        )
    return p


def checked(options: dict[str, Any], target: Target) -> Regularisation | None:
    """The options of a constructor, by their names in Regularisation; None where they are the defaults.

    Raises:
        TypeError, ValueError: an option is wrong, or this module cannot have it; the message names it.
    """
    given = {**Regularisation()._asdict(), "zoneout": 0.0, **options}
    clip, forget_bias = given["state_clip"], given["forget_bias"]
    if clip is not None:
        clip = _number("state_clip", clip, "a number or None")
        if not 0 < clip < math.inf:
            raise ValueError(f"state_clip: expected a finite number above 0, or None, got {clip}")
    if forget_bias is not None:
        forget_bias = _number("forget_bias", forget_bias, "a number or None")
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias: expected a finite number, or None, got {forget_bias}")
        if not target.has_forget_gate:
            raise ValueError(f"forget_bias: expected None for {target.name} (it has no forget gate), got {forget_bias}")
        if not target.bias:
            raise ValueError(f"forget_bias: expected None with bias=False, got {forget_bias}")
    recurrent = _recurrent_dropout(given["recurrent_dropout"], given["recurrent_dropout_variant"], target)
    made = Regularisation(
        _zoneout(given["zoneout"], target),
        recurrent,
        given["recurrent_dropout_variant"] if recurrent else "state",
        _probability("weight_dropout", given["weight_dropout"]),
        clip,
        forget_bias,
    )
    return None if made == Regularisation() else made


# --- in a module ---


def options_of(module: Any) -> Regularisation | None:
    """The options of a module; None where it has none of them, or cannot have any."""
    options: Regularisation | None = module.__dict__.get(FIELD)
    return options


class _Option:
    """An option of a module as its attribute: reading gives the value, assigning checks it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        value = getattr(options_of(module) or Regularisation(), self.name)
        return (value or 0.0) if self.name == "zoneout" else value

    def __set__(self, module: Any, value: Any) -> None:
        now = options_of(module) or Regularisation()
        module._regularise({**now._asdict(), "zoneout": now.zoneout or 0.0, self.name: value})


class Regularised:
    """A module with the options, which its constructor takes by keyword alone."""

    zoneout, recurrent_dropout, recurrent_dropout_variant = _Option(), _Option(), _Option()
    weight_dropout, state_clip, forget_bias = _Option(), _Option(), _Option()

    def __init__(
        self,
        *args: Any,
        zoneout: float | tuple[float, ...] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_variant: str = "state",
        weight_dropout: float = 0.0,
        state_clip: float | None = None,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._regularise(
            {
                "zoneout": zoneout,
                "recurrent_dropout": recurrent_dropout,
                "recurrent_dropout_variant": recurrent_dropout_variant,
                "weight_dropout": weight_dropout,
                "state_clip": state_clip,
                "forget_bias": forget_bias,
            }
        )
        self._set_forget_bias()

    def _target_of_options(self) -> Target:
        raise NotImplementedError

    def _regularise(self, options: dict[str, Any]) -> None:
        """Checks the options and keeps them."""
        found = checked(options, self._target_of_options())
        if found is None:
            self.__dict__.pop(FIELD, None)
        else:
            self.__dict__[FIELD] = found

    def _set_forget_bias(self) -> None:
        """The forget gate's part of b_ih becomes forget_bias, that of b_hh 0, so that their sum is forget_bias."""
        of = options_of(self)
        if of is None or of.forget_bias is None:
            return
        hidden = self.__dict__["hidden_size"]
        with torch.no_grad():
            for name, bias in self.named_parameters(recurse=False):  # type: ignore[attr-defined]
                if name.startswith(("bias_ih", "bias_hh")):
                    bias[hidden : 2 * hidden].fill_(of.forget_bias if name.startswith("bias_ih") else 0.0)

    def reset_parameters(self) -> None:
        """As torch.nn's; then forget_bias, where it is given."""
        super().reset_parameters()  # type: ignore[misc]
        self._set_forget_bias()

    def extra_repr(self) -> str:
        of = options_of(self)
        shown: str = super().extra_repr()  # type: ignore[misc]
        return shown if of is None else shown + of.shown()
