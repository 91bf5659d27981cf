"""The constructors' options beyond torch.nn's: their checks, and what they make of a call's weights and steps.

Masks come from torch's generator of the input's device, in the order of the functions' statements here. On a CPU each of
zoneout's takes one number of it, the seed of the mask; where nothing was compiled, a number for each of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused_rnn._backend import extension
from fused_rnn._dtensor import is_dtensor
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
    state_clip: float | tuple[float | None, ...] | None = None  # a tuple: of each state
    forget_bias: float | None = None

    def clips(self, states: int) -> tuple[float | None, ...]:
        """The bound of each of so many states, a number being that of all; () without state_clip."""
        clip = self.state_clip
        return () if clip is None else clip if isinstance(clip, tuple) else (clip,) * states

    def modifies_steps(self, training: bool) -> bool:
        """Whether a call takes more than other weights."""
        return bool(self.zoneout) or self.state_clip is not None or (training and self.recurrent_dropout > 0)

    def dropped(self, weights: Sequence[Tensor], per_group: int, training: bool) -> list[Tensor]:
        """The weights with every w_hh, the second of each group, under a mask of this call."""
        if not self.weight_dropout or not training:
            return list(weights)
        if any(is_dtensor(w) for w in weights):
            raise NotImplementedError(
                "weight_dropout in training: the masks of DTensors would differ between ranks; expected "
                "local tensors (to_local)"
            )
        p = self.weight_dropout
        return [functional.dropout(w, p, True) if i % per_group == 1 else w for i, w in enumerate(weights)]

    def masks(self, input: Tensor, sizes: Sizes) -> tuple[list[Tensor | None], Tensor | None]:
        """A training call's masks, in the order in which they are drawn: of each state with zoneout, bool [L*D, N, H], where
        true the unit keeps its value; then the factors of recurrent_dropout [L*D, B, P], on the candidate [L*D, B, H]."""
        shape = (sizes.groups, sizes.rows, sizes.hidden)
        kept = [flags(shape, p, input.device) if p else None for p in self.zoneout]
        if not self.recurrent_dropout:
            return kept, None
        size = sizes.out if self.recurrent_dropout_variant == "state" else sizes.hidden
        dtype = input.dtype.to_real() if input.is_complex() else input.dtype
        ones = input.new_ones((sizes.groups, sizes.batch, size), dtype=dtype, requires_grad=False)
        return kept, functional.dropout(ones, self.recurrent_dropout, True)

    def step_options(self, input: Tensor, sizes: Sizes, training: bool) -> StepOptions:
        """What kernels and reference take of a call; in training with masks of its own."""
        kept: list[Any]
        kept, factors = self.masks(input, sizes) if training else ([p or None for p in self.zoneout], None)
        of_state = self.recurrent_dropout_variant == "state"
        clip: Any = self.state_clip  # of our own kinds a number
        h, c = (*kept, None, None)[:2]
        return StepOptions(h, c, clip, factors if of_state else None, None if of_state else factors)

    def shown(self) -> str:
        """What ``repr`` adds: the options that are not the default."""
        given = {name: getattr(self, name) for name in self._fields if getattr(self, name) != self._field_defaults[name]}
        if "zoneout" in given:
            given["zoneout"] = self.zoneout[0] if len(set(self.zoneout)) == 1 else self.zoneout
        return "".join(f", {name}={value!r}" for name, value in given.items())


def flags(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Independent bools that are true with probability p, of torch's generator of the device.

    On a CPU the generator gives one number, of which a kernel makes the flags (csrc/cpu/isa/random_flags.h): torch's own
    makes a number after the other, which takes as long as the forward pass of a small RNN.
    """
    if extension is None or device.type != "cpu":
        return torch.rand(shape, device=device, dtype=torch.float32) < p
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device, dtype=torch.int64)
    made: Tensor = torch.ops.fused_rnn.flags.default(seed, torch.empty(shape, device=device, dtype=torch.bool), p)
    return made


# --- checks ---


class Target(NamedTuple):
    """What of a module decides which options it can have."""

    name: str
    states: tuple[str, ...]
    bias: bool
    is_cell: bool = False
    projects: bool = False
    clips_each: bool = False  # state_clip may be a tuple
    # Why it has none; "" where it has one.
    no_candidate: str = ""
    no_forget_gate: str = ""
    no_recurrent_product: str = ""


def target_of_kind(name: str, kind: Kind, bias: bool, is_cell: bool = False, projects: bool = False) -> Target:
    """Cells with gates have a candidate, LSTM's g and GRU's n."""
    return Target(
        name,
        ("h", "c")[: kind.states],
        bias,
        is_cell,
        projects,
        no_candidate="" if kind.has_gates else "it has no gates, so no candidate",
        no_forget_gate="" if kind.has_c else "it has no forget gate",
    )


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
    if variant == "candidate" and target.no_candidate:
        raise ValueError(
            f"recurrent_dropout_variant: expected 'state' for {target.name} ({target.no_candidate}), got 'candidate'"
        )
    if p and target.no_recurrent_product:
        raise ValueError(f"recurrent_dropout: expected 0 for {target.name} ({target.no_recurrent_product}), got {value}")
    if p and target.is_cell:
        raise ValueError(
            f"recurrent_dropout: expected 0 for {target.name} (its masks are those of a sequence, of which a cell sees a "
            f"step), got {value}"
        )
    return p


def _weight_dropout(value: Any, target: Target) -> float:
    p = _probability("weight_dropout", value)
    if p and target.no_recurrent_product:
        raise ValueError(
            f"weight_dropout: expected 0 for {target.name} ({target.no_recurrent_product}, so no weight_hh), got {value}"
        )
    return p


def _bound(name: str, value: Any, expected: str) -> float | None:
    if value is None:
        return None
    clip = _number(name, value, expected)
    if not 0 < clip < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, or None, got {clip}")
    return clip


def _state_clip(value: Any, target: Target) -> float | tuple[float | None, ...] | None:
    if not target.clips_each:
        return _bound("state_clip", value, "a number or None")
    many = f"a number, None, or a tuple of {len(target.states)} of these ({', '.join(target.states)})"
    if not isinstance(value, (tuple, list)):
        return _bound("state_clip", value, many)
    if len(value) != len(target.states):
        raise ValueError(f"state_clip: expected {many}, got {len(value)}")
    names = [f"state_clip[{i}] ({name})" for i, name in enumerate(target.states)]
    found = tuple(_bound(name, clip, "a number or None") for name, clip in zip(names, value, strict=True))
    return None if found == (None,) * len(found) else found


def checked(options: dict[str, Any], target: Target) -> Regularisation | None:
    """The options of a constructor, by their names in Regularisation; None where they are the defaults.

    Raises:
        TypeError, ValueError: an option is wrong, or this module cannot have it; the message names it.
    """
    given = {**Regularisation()._asdict(), "zoneout": 0.0, **options}
    clip, forget_bias = _state_clip(given["state_clip"], target), given["forget_bias"]
    if forget_bias is not None:
        forget_bias = _number("forget_bias", forget_bias, "a number or None")
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias: expected a finite number, or None, got {forget_bias}")
        if target.no_forget_gate:
            raise ValueError(f"forget_bias: expected None for {target.name} ({target.no_forget_gate}), got {forget_bias}")
        if not target.bias:
            raise ValueError(f"forget_bias: expected None with bias=False, got {forget_bias}")
    recurrent = _recurrent_dropout(given["recurrent_dropout"], given["recurrent_dropout_variant"], target)
    made = Regularisation(
        _zoneout(given["zoneout"], target),
        recurrent,
        given["recurrent_dropout_variant"] if recurrent else "state",
        _weight_dropout(given["weight_dropout"], target),
        clip,
        forget_bias,
    )
    return None if made == Regularisation() else made


# --- in a module ---


def taken_from(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options among a constructor's keywords, which lose them."""
    return {name: kwargs.pop(name) for name in Regularisation._fields if name in kwargs}


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


class HasOptions:
    """A module with the options as its attributes."""

    zoneout, recurrent_dropout, recurrent_dropout_variant = _Option(), _Option(), _Option()
    weight_dropout, state_clip, forget_bias = _Option(), _Option(), _Option()

    def _target_of_options(self) -> Target:
        raise NotImplementedError

    def _regularise(self, options: dict[str, Any]) -> None:
        """Checks the options and keeps them."""
        found = checked(options, self._target_of_options())
        if found is None:
            self.__dict__.pop(FIELD, None)
        else:
            self.__dict__[FIELD] = found


class Regularised(HasOptions):
    """A module with the options, which its constructor takes by keyword alone."""

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
