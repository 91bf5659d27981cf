"""What a call computes and on which rows, as the ops take it: the twin of csrc/core/recipe.h (tests/test_recipe.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_rnn._kinds import KINDS, Kind

_HAS_LENGTHS = 1 << 12  # offsets and resets follow
_LAYERS_SHIFT = 16


class Recipe(NamedTuple):
    """A cell and its stack. ``packed`` is the ops' argument ``recipe``, which has everything but dropout."""

    cell: int
    num_layers: int = 1
    has_biases: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    training: bool = False
    dropout: float = 0.0  # probability between the layers, while training

    @property
    def kind(self) -> Kind:
        return KINDS[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def packed(self) -> int:
        flags = self.has_biases << 8 | self.bidirectional << 9 | self.batch_first << 10 | self.training << 11
        return self.cell | flags | self.num_layers << _LAYERS_SHIFT

    def of_layer(self) -> Recipe:
        """Of each of its layers."""
        return Recipe(self.cell, 1, self.has_biases, self.bidirectional)


def unpacked(number: int) -> Recipe:
    """The recipe of an op's argument, without dropout.

    Raises:
        ValueError: the number is no packed recipe.
    """
    cell, num_layers = number & 0xFF, number >> _LAYERS_SHIFT
    if cell >= len(KINDS) or number >> 15 & 1 or not 1 <= num_layers <= 2**31:
        raise ValueError(
            f"recipe: expected a number that fused_rnn._recipe makes (a cell of 0 to {len(KINDS) - 1} in its last byte), "
            f"got {number}"
        )
    return Recipe(cell, num_layers, *(bool(number >> bit & 1) for bit in (8, 9, 10, 11)))


class Rows(NamedTuple):
    """Which rows take part at each step, and which start again: see csrc/core/active.h and modifier.h."""

    lengths: Tensor | None = None  # [B] int64
    offsets: Tensor | None = None  # [T + 1] int64, of packed rows
    resets: Tensor | None = None  # [T, B] ([B, T] with batch_first, [N] packed) bool

    def given(self) -> list[Tensor]:
        """The ops' argument ``rows``: [] for all rows in every step."""
        return [tensor for tensor in self if tensor is not None]

    @property
    def bits(self) -> int:
        """What the ops' argument ``recipe`` says of ``rows``: which they are."""
        return sum(_HAS_LENGTHS << place for place, tensor in enumerate(self) if tensor is not None)


def rows_of(given: Sequence[Tensor], recipe: int) -> Rows:
    """The rows of an op's arguments ``rows`` and ``recipe``.

    Raises:
        ValueError: they do not fit.
    """
    places = [place for place in range(len(Rows._fields)) if recipe & _HAS_LENGTHS << place]
    if len(places) != len(given):
        raise ValueError(
            f"rows: expected {len(places)} of lengths, offsets and resets (recipe says which), got {len(given)}"
        )
    return Rows(**{Rows._fields[place]: tensor for place, tensor in zip(places, given, strict=True)})
