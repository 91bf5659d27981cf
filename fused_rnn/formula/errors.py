"""The error of a cell that is no formula: what was met, at which line of the user's step, what to write instead."""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType, FrameType
from typing import Any

import torch

_OURS = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(torch.__file__)))


class FormulaError(ValueError):
    """A cell's declaration or step is no formula."""

    @classmethod
    def at_step(cls, cell: Any, met: str, instead: str, place: tuple[str, int] | None = None) -> FormulaError:
        """The error at the line of ``step`` that runs now (the line of its ``def`` if none does), or at ``place``.

        Args:
            cell: whose step it is.
            met: what was met.
            instead: what to write instead.
            place: (file, line).
        """
        code = cell._written_step.__code__
        file, line = place or place_in_step(code) or (code.co_filename, code.co_firstlineno)
        text = linecache.getline(file, line).strip()
        quoted = f"\n    {text}" if text else ""
        return cls(f"{type(cell).__name__}.step: {met}\n  at {file}:{line}{quoted}\n  write instead: {instead}")


def place_in_step(code: CodeType) -> tuple[str, int] | None:
    """(file, line) of the innermost running line of the user's code that ``step`` has called; None outside of a step."""
    frame: FrameType | None = sys._getframe(1)
    place = None
    while frame is not None:
        if frame.f_code is code:
            return place or (frame.f_code.co_filename, frame.f_lineno)
        if place is None and not os.path.abspath(frame.f_code.co_filename).startswith(_OURS):
            place = (frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None
