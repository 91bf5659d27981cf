"""What a call computes and on which rows, as the ops take it: the twin of csrc/core/recipe.h (tests/test_recipe.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn._kinds import KINDS, Kind

_HAS_LENGTHS = 1 << 12  # offsets, resets and reset states follow
HAS_RESET_STATES = 1 << 15
_OPTIONS_SHIFT, _OPTIONS = 17, 6  # where the bits of StepOptions begin, and their number
OPTIONS = (1 << _OPTIONS) - 1 << _OPTIONS_SHIFT
ROWS = _HAS_LENGTHS * 15 | OPTIONS  # the bits that say which rows there are
_ALL_STATES_SHIFT, _LAYERS_SHIFT, _FAMILY_SHIFT, _IN_GRAPH_SHIFT = 16, 24, 56, 60
ALL_STATES = 1 << _ALL_STATES_SHIFT  # the bit of ``packed``
_FREE = (1 << _LAYERS_SHIFT) - (1 << _OPTIONS_SHIFT + _OPTIONS)  # bits that say nothing


class Recipe(NamedTuple):
    """A cell and its stack. ``packed`` is the ops' argument ``recipe``, which has everything but dropout."""

    cell: int
    num_layers: int = 1
    has_biases: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    training: bool = False
    dropout: float = 0.0  # probability between the layers, while training
    all_states: bool = False  # the states after every step are results too
    family: int = 0  # 1 + the number of the GPU's kernel family that serves the call; 0: none is chosen
    in_graph: bool = False  # of a stack that torch.compile records: only backward reads what forward saves

    @property
    def kind(self) -> Kind:
        return KINDS[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def packed(self) -> int:
        flags = self.has_biases << 8 | self.bidirectional << 9 | self.batch_first << 10 | self.training << 11
        flags |= self.all_states << _ALL_STATES_SHIFT | self.in_graph << _IN_GRAPH_SHIFT
        return self.cell | flags | self.num_layers << _LAYERS_SHIFT | self.family << _FAMILY_SHIFT

    def of_layer(self) -> Recipe:
        """Of each of its layers."""
        return Recipe(self.cell, 1, self.has_biases, self.bidirectional, all_states=self.all_states, family=self.family)


def unpacked(number: int) -> Recipe:
    """The recipe of an op's argument, without dropout.

    Raises:
        ValueError: the number is no packed recipe.
    """
    cell, num_layers, family = number & 0xFF, number >> _LAYERS_SHIFT & 0xFFFFFFFF, number >> _FAMILY_SHIFT & 15
    unknown = number & _FREE or not 0 <= number >> _IN_GRAPH_SHIFT <= 1
    if cell >= len(KINDS) or unknown or not 1 <= num_layers <= 2**31:
        raise ValueError(
            f"recipe: expected a number that fused_rnn._recipe makes (a cell of 0 to {len(KINDS) - 1} in its last byte), "
            f"got {number}"
        )
    flags = [bool(number >> bit & 1) for bit in (8, 9, 10, 11)]
    all_states, in_graph = bool(number >> _ALL_STATES_SHIFT & 1), bool(number >> _IN_GRAPH_SHIFT)
    return Recipe(cell, num_layers, *flags)._replace(all_states=all_states, family=family, in_graph=in_graph)


_HOST = torch.device("cpu")  # whatever the default device is: kernels take numbers as arguments


class StepOptions(NamedTuple):
    """What modifies the steps of a call, beside the cell: see csrc/core/modifier.h. Flags and factors are tensors of the
    call's groups L*D, numbers are floats, or as the ops have them, float64 tensors of the host without dimensions."""

    zoneout_h: Tensor | float | None = None  # bool [L*D, N, H]: where true the unit keeps its value; or the share of it
    zoneout_c: Tensor | float | None = None
    clip: Tensor | float | None = None
    product: Tensor | None = None  # [L*D, B, P] factors of the h that is multiplied with w_hh
    candidate: Tensor | None = None  # [L*D, B, H] factors of LSTM's g, of GRU's n
    values: Tensor | None = None  # [L*D, N, K, H] of a cell that is a formula: what its last K input gates are

    def any(self) -> bool:
        return not (self[0] is self[1] is self[2] is self[3] is self[4] is self[5] is None)

    def given(self) -> list[Tensor]:
        """Those that are there, as the ops take them."""
        present = [value for value in self if value is not None]
        return [
            value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=_HOST)
            for value in present
        ]

    @property
    def bits(self) -> int:
        return sum(1 << _OPTIONS_SHIFT + place for place, value in enumerate(self) if value is not None)

    def _each(self, of: Callable[[Tensor], Tensor]) -> StepOptions:
        changed: list[Any] = [of(value) if isinstance(value, Tensor) and value.dim() else value for value in self]
        return StepOptions(*changed)

    def of_layer(self, layer: int, directions: int) -> StepOptions:
        return self._each(lambda t: t[layer * directions : (layer + 1) * directions])

    def of_direction(self, direction: int) -> StepOptions:
        return self._each(lambda t: t[direction])

    def of_step(self, rows: slice, batch: int) -> StepOptions:
        """Of one direction's: the step of these rows, the first `batch` of the batch."""
        of_rows, of_batch = self._replace(product=None, candidate=None), StepOptions(None, None, None, *self[3:5])
        mine, theirs = of_rows._each(lambda t: t[rows]), of_batch._each(lambda t: t[:batch])
        return mine._replace(product=theirs.product, candidate=theirs.candidate)


_NO_OPTIONS = StepOptions()


class Rows(NamedTuple):
    """Which rows take part at each step, and which start again: see csrc/core/active.h and modifier.h."""

    lengths: Tensor | None = None  # [B] int64
    offsets: Tensor | None = None  # [T + 1] int64, of packed rows
    resets: Tensor | None = None  # [T, B] ([B, T] with batch_first, [N] packed) bool
    # Of each state what resets replace it by, (): zeros. [L*D, 1 or B, .], or of every step [T, L*D, B, .]
    reset_states: tuple[Tensor, ...] = ()
    options: StepOptions = _NO_OPTIONS

    def given(self) -> list[Tensor]:
        """The ops' argument ``rows``: [] for all rows in every step."""
        masks = [tensor for tensor in self[:3] if tensor is not None]
        options = self.options.given() if self.options is not _NO_OPTIONS else []
        return [*masks, *options, *self.reset_states]

    @property
    def bits(self) -> int:
        """What the ops' argument ``recipe`` says of ``rows``: which they are."""
        masks = sum(_HAS_LENGTHS << place for place, tensor in enumerate(self[:3]) if tensor is not None)
        options = self.options.bits if self.options is not _NO_OPTIONS else 0
        return masks | options | HAS_RESET_STATES * bool(self.reset_states)

    def on(self, device: torch.device) -> Rows:
        """The same with the integers and flags on this device."""
        lengths, offsets, resets = (None if tensor is None else tensor.to(device) for tensor in self[:3])
        return Rows(lengths, offsets, resets, self.reset_states, self.options)

    def of_layer(self, layer: int, directions: int) -> Rows:
        """What a layer of a stack has of them."""
        part = slice(layer * directions, (layer + 1) * directions)
        states = tuple(t[:, part] if t.dim() == 4 else t[part] for t in self.reset_states)
        return self._replace(reset_states=states, options=self.options.of_layer(layer, directions))


_ALL_ROWS = Rows()


def rows_of(given: Sequence[Tensor], recipe: int) -> Rows:
    """The rows of an op's arguments ``rows`` and ``recipe``.

    Raises:
        ValueError: they do not fit.
    """
    if not (given or recipe & ROWS):
        return _ALL_ROWS
    places = [place for place in range(3) if recipe & _HAS_LENGTHS << place]
    options = [place for place in range(_OPTIONS) if recipe & 1 << _OPTIONS_SHIFT + place]
    first, more = len(places), bool(recipe & HAS_RESET_STATES)
    count = first + len(options)
    if len(given) < count + more or (len(given) > count and not more):
        raise ValueError(
            f"rows: expected {count} of lengths, offsets, resets and options of steps{', then reset states' * more} "
            f"(recipe says which), got {len(given)}"
        )
    masks = {Rows._fields[place]: tensor for place, tensor in zip(places, given[:first], strict=True)}
    steps = {StepOptions._fields[place]: tensor for place, tensor in zip(options, given[first:count], strict=True)}
    return Rows(**masks, reset_states=tuple(given[count:]), options=StepOptions(**steps) if steps else _NO_OPTIONS)
