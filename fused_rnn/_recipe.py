"""What a call computes and on which rows, as the ops take it: the twin of csrc/core/recipe.h (tests/test_recipe.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn._kinds import KINDS, Kind

_HAS_LENGTHS = 1 << 12  # offsets, resets and reset states follow
_HAS_RESET_STATES = 1 << 15
ROWS = _HAS_LENGTHS * 15  # the bits that say which rows there are
_ALL_STATES_SHIFT, _LAYERS_SHIFT, _FAMILY_SHIFT = 16, 24, 56
ALL_STATES = 1 << _ALL_STATES_SHIFT  # the bit of ``packed``
_FREE = (1 << _LAYERS_SHIFT - _ALL_STATES_SHIFT - 1) - 1  # bits above that of all_states that say nothing


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

    @property
    def kind(self) -> Kind:
        return KINDS[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def packed(self) -> int:
        flags = self.has_biases << 8 | self.bidirectional << 9 | self.batch_first << 10 | self.training << 11
        flags |= self.all_states << _ALL_STATES_SHIFT
        return self.cell | flags | self.num_layers << _LAYERS_SHIFT | self.family << _FAMILY_SHIFT

    def of_layer(self) -> Recipe:
        """Of each of its layers."""
        return Recipe(self.cell, 1, self.has_biases, self.bidirectional, all_states=self.all_states, family=self.family)


def unpacked(number: int) -> Recipe:
    """The recipe of an op's argument, without dropout.

    Raises:
        ValueError: the number is no packed recipe.
    """
    cell, num_layers, family = number & 0xFF, number >> _LAYERS_SHIFT & 0xFFFFFFFF, number >> _FAMILY_SHIFT
    unknown = number >> _ALL_STATES_SHIFT + 1 & _FREE or not 0 <= family < 16
    if cell >= len(KINDS) or unknown or not 1 <= num_layers <= 2**31:
        raise ValueError(
            f"recipe: expected a number that fused_rnn._recipe makes (a cell of 0 to {len(KINDS) - 1} in its last byte), "
            f"got {number}"
        )
    flags = [bool(number >> bit & 1) for bit in (8, 9, 10, 11)]
    return Recipe(cell, num_layers, *flags)._replace(all_states=bool(number >> _ALL_STATES_SHIFT & 1), family=family)


class Rows(NamedTuple):
    """Which rows take part at each step, and which start again: see csrc/core/active.h and modifier.h."""

    lengths: Tensor | None = None  # [B] int64
    offsets: Tensor | None = None  # [T + 1] int64, of packed rows
    resets: Tensor | None = None  # [T, B] ([B, T] with batch_first, [N] packed) bool
    # Of each state what resets replace it by, (): zeros. [L*D, 1 or B, .], or of every step [T, L*D, B, .]
    reset_states: tuple[Tensor, ...] = ()

    def given(self) -> list[Tensor]:
        """The ops' argument ``rows``: [] for all rows in every step."""
        return [*(tensor for tensor in self[:3] if tensor is not None), *self.reset_states]

    @property
    def bits(self) -> int:
        """What the ops' argument ``recipe`` says of ``rows``: which they are."""
        masks = sum(_HAS_LENGTHS << place for place, tensor in enumerate(self[:3]) if tensor is not None)
        return masks | _HAS_RESET_STATES * bool(self.reset_states)

    def on(self, device: torch.device) -> Rows:
        """The same with the integers and flags on this device."""
        lengths, offsets, resets = (None if tensor is None else tensor.to(device) for tensor in self[:3])
        return Rows(lengths, offsets, resets, self.reset_states)

    def of_layer(self, layer: int, directions: int) -> Rows:
        """What a layer of a stack has of them."""
        part = slice(layer * directions, (layer + 1) * directions)
        return self._replace(reset_states=tuple(t[:, part] if t.dim() == 4 else t[part] for t in self.reset_states))


def rows_of(given: Sequence[Tensor], recipe: int) -> Rows:
    """The rows of an op's arguments ``rows`` and ``recipe``.

    Raises:
        ValueError: they do not fit.
    """
    places = [place for place in range(3) if recipe & _HAS_LENGTHS << place]
    count, more = len(places), bool(recipe & _HAS_RESET_STATES)
    if len(given) < count + more or (len(given) > count and not more):
        raise ValueError(
            f"rows: expected {count} of lengths, offsets and resets{', then reset states' * more} (recipe says which), "
            f"got {len(given)}"
        )
    masks = {Rows._fields[place]: tensor for place, tensor in zip(places, given[:count], strict=True)}
    return Rows(**masks, reset_states=tuple(given[count:]))
