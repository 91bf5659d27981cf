"""The recipe of a call: its packed form here and in csrc/core/recipe.h."""

from __future__ import annotations

import itertools

import pytest

from fused_rnn import _backend
from fused_rnn._kinds import KINDS
from fused_rnn._recipe import Recipe, unpacked

FLAGS = (False, True)


def test_there_and_back() -> None:
    flags_of = itertools.product(FLAGS, repeat=6)
    for cell, layers, flags, family in itertools.product(range(len(KINDS)), (1, 2, 3, 2**31), flags_of, (0, 1, 5)):
        recipe = Recipe(cell, layers, *flags[:4], all_states=flags[4], family=family, in_graph=flags[5])
        assert unpacked(recipe.packed) == recipe
        assert unpacked(recipe.of_layer().packed).family == family
        if _backend.extension is not None:
            found = _backend.extension.unpack_recipe(recipe.packed)
            assert (*found[:6], recipe.dropout, *found[6:]) == recipe


NONE = (-1, 0, 3, 2**24 + len(KINDS), 2**24 + 2**23, 2**56, 2**61 + 2**24, (2**31 + 1) << 24)
NONE += (2**63 - 1, -(2**63))


@pytest.mark.parametrize("number", NONE)
def test_numbers_that_are_none(number: int) -> None:
    with pytest.raises(ValueError, match="recipe: expected a number that fused_rnn._recipe makes"):
        unpacked(number)
    if _backend.extension is not None:
        with pytest.raises(ValueError, match="recipe: expected a number that fused_rnn._recipe makes"):
            _backend.extension.unpack_recipe(number)
