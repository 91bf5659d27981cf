"""Recurrent cells written as formulas: Cell is the language, Layer and Step run a cell, source shows its C++.

On a CPU they run on kernels that the machine's C++ compiler makes of the formula at its first call (build.py). On other
devices, and where nothing can be compiled, ``step`` runs in a loop, with a warning that says why.
"""

from fused_rnn.formula.errors import FormulaError
from fused_rnn.formula.language import Cell, Gate
from fused_rnn.formula.modules import Layer, Step

__all__ = ["Cell", "FormulaError", "Gate", "Layer", "Step", "source"]


def source(cell: Cell) -> str:
    """The cell as C++: a struct with forward and backward of one unit at one step, in the form of csrc/core/cells.h.

    Raises:
        TypeError: ``cell`` is no Cell.
    """
    from fused_rnn.formula.writer import source_of  # tracing takes a second to import

    return source_of(cell)
