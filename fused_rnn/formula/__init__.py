"""Recurrent cells written as formulas. Not public yet: names and behaviour may change.

``Cell`` is the language, ``Layer`` and ``Step`` run a cell, ``source`` writes it as C++.
"""

from fused_rnn.formula.errors import FormulaError
from fused_rnn.formula.language import Cell, Gate
from fused_rnn.formula.modules import Layer, Step

__all__ = ["Cell", "FormulaError", "Gate", "Layer", "Step"]
