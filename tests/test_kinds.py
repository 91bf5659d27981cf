"""The lists of cells: Python's and C++'s say the same."""

from __future__ import annotations

import pytest

from fused_rnn import _backend
from fused_rnn._kinds import KINDS


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_the_lists_are_equal() -> None:
    ours = [(kind.name, kind.gates, kind.slots, kind.saved, kind.has_c, kind.reads_h, kind.may_project) for kind in KINDS]
    assert ours == _backend.extension.cells()


def test_modes_are_torchs() -> None:
    for kind in KINDS:
        assert kind.mode == kind.name.upper()
        assert kind.mode == ("RNN_" + kind.nonlinearity.upper() if kind.nonlinearity else kind.mode)
