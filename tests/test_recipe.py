"""The recipe of a call: its packed form here and in csrc/core/recipe.h."""

from __future__ import annotations

import itertools

import pytest

from fused_rnn import _backend
from fused_rnn._kinds import KINDS
from fused_rnn._recipe import Recipe, unpacked

FLAGS = (False, True)


def test_there_and_back() -> None:
    for cell, layers, flags in itertools.product(range(len(KINDS)), (1, 2, 3, 2**31), itertools.product(FLAGS, repeat=4)):
        recipe = Recipe(cell, layers, *flags)
        assert unpacked(recipe.packed) == recipe
        if _backend.extension is not None:
            assert _backend.extension.unpack_recipe(recipe.packed) == recipe[:6]


NONE = (-1, 0, 3, 2**16 + len(KINDS), 2**16 + 2**15, 2**48, (2**31 + 1) << 16, 2**63 - 1, -(2**63))


@pytest.mark.parametrize("number", NONE)
def test_numbers_that_are_none(number: int) -> None:
    with pytest.raises(ValueError, match="recipe: expected a number that fused_rnn._recipe makes"):
        unpacked(number)
    if _backend.extension is not None:
        with pytest.raises(ValueError, match="recipe: expected a number that fused_rnn._recipe makes"):
            _backend.extension.unpack_recipe(number)
