"""Recurrent cells written as formulas. Not public yet: names and behaviour may change.

``Cell`` is the language, ``Layer`` and ``Step`` run a cell, ``source`` writes it as C++.
"""

from fused_rnn.formula.errors import FormulaError
from fused_rnn.formula.language import Cell, Gate
from fused_rnn.formula.modules import Layer, Step

__all__ = ["Cell", "FormulaError", "Gate", "Layer", "Step", "source"]


def source(cell: Cell) -> str:
    """The cell as C++: a struct with forward and backward of one unit at one step, in the form of csrc/core/cells.h.

    Raises:
        TypeError: ``cell`` is no Cell.
        NotImplementedError: the step has products or norms inside.
    """
    from fused_rnn.formula.writer import source_of  # tracing takes a second to import

    return source_of(cell)
